"""Checkpoints: whole or not used, never pickle, never a name that leads out of the folder."""

import json
import pickle

import pytest
import torch

from tropism.run import checkpoint


def save(folder, update, value=1.0, **options):
    return checkpoint.save(
        folder, update, {"weights": {"a/b": torch.full((3,), value)}, "state": {}}, {"n": update}, **options
    )


def test_round_trip(tmp_path):
    tensors = {
        "weights": {"../x": torch.arange(6).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
        "state": {"scalar": torch.tensor(3.0)},
    }
    checkpoint.save(tmp_path, 7, tensors, {"state": {"k": [1, None, "ü"]}})
    found = checkpoint.newest(tmp_path)
    assert (found.update, found.values, found.remarks) == (7, {"state": {"k": [1, None, "ü"]}}, ())
    for group, values in tensors.items():
        assert all(torch.equal(found.tensors[group][n], v) for n, v in values.items())
    assert {p.name for p in (tmp_path / "step-000007").iterdir()} == {
        "weights.safetensors",
        "state.safetensors",
        "state.json",
        "manifest.json",
        "COMPLETE",
    }


def test_keeps_the_last_and_leaves_no_litter(tmp_path):
    (tmp_path / ".tmp-000001").mkdir(parents=True)
    for update in (2, 4, 6, 100, 1_000_000):
        save(tmp_path, update, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000100", "step-1000000"]
    assert checkpoint.newest(tmp_path).update == 1_000_000


def test_a_flipped_bit_falls_back_and_says_so(tmp_path):
    save(tmp_path, 3, 3.0)
    file = save(tmp_path, 6, 6.0) / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    found = checkpoint.newest(tmp_path)
    assert found.update == 3
    assert found.tensors["weights"]["a/b"][0] == 3
    assert "step-000006 is damaged (weights.safetensors: sha256 differs)" in found.remarks[0]
    save(tmp_path, 6, 6.5)
    assert checkpoint.newest(tmp_path).tensors["weights"]["a/b"][0] == 6.5


def test_a_damaged_newer_one_never_crowds_out_a_good_one(tmp_path):
    save(tmp_path, 3)
    (save(tmp_path, 100) / "COMPLETE").unlink()
    save(tmp_path, 5, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


@pytest.mark.parametrize("name", ["COMPLETE", "manifest.json", "state.json", "weights.safetensors"])
def test_a_missing_or_cut_file_falls_back(tmp_path, name):
    save(tmp_path, 3)
    (save(tmp_path, 6) / name).unlink()
    assert checkpoint.newest(tmp_path).update == 3
    (save(tmp_path, 6) / name).write_bytes(b"")
    assert checkpoint.newest(tmp_path).update == 3


def test_nothing_whole(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    (save(tmp_path, 3) / "COMPLETE").unlink()
    found = checkpoint.newest(tmp_path)
    assert found.tensors == {}
    assert len(found.remarks) == 1


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def test_hostile_pickle_is_not_read(tmp_path):
    """Dropped beside, named in the manifest, and in the place of the weights with every hash made to fit."""
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    save(tmp_path / "c", 3)
    step = save(tmp_path / "c", 6)
    (step / "optimizer.pt").write_bytes(bomb)
    assert checkpoint.newest(tmp_path / "c").update == 6
    for name in ("optimizer.pt", "weights.safetensors"):
        (step / name).write_bytes(bomb)
        _forge(step, name)
        assert checkpoint.newest(tmp_path / "c").update == 3
    assert not canary.exists()
    pickle.loads(bomb).close()
    assert canary.exists()


def _forge(step, name):
    manifest = json.loads((step / "manifest.json").read_text()) | {name: checkpoint._sha256(step / name)}
    (step / "manifest.json").write_text(json.dumps(manifest))
    (step / "COMPLETE").write_text(checkpoint._sha256(step / "manifest.json"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "..", "sub/x.json"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    step = save(tmp_path / "c", 3)
    manifest = json.loads((step / "manifest.json").read_text()) | {name: "0" * 64}
    (step / "manifest.json").write_text(json.dumps(manifest))
    (step / "COMPLETE").write_text(checkpoint._sha256(step / "manifest.json"))
    with pytest.raises(checkpoint.Damaged, match="not a file of a checkpoint"):
        checkpoint.load(step)


def test_links_and_renamed_folders_are_not_taken(tmp_path):
    real = save(tmp_path / "other", 9)
    save(tmp_path / "c", 3)
    (tmp_path / "c" / "step-000009").symlink_to(real, target_is_directory=True)
    real.rename(tmp_path / "c" / "step-000012")
    found = checkpoint.newest(tmp_path / "c")
    assert found.update == 3
    assert "number" in found.remarks[0]


def test_a_failed_write_leaves_the_old_and_no_litter(tmp_path, monkeypatch):
    save(tmp_path, 3)
    monkeypatch.setattr(
        checkpoint, "_write_text", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space") as caught:
        save(tmp_path, 6)
    assert checkpoint.is_full(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
