import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tropism.core import UserError
from tropism.rewards import sources
from tropism.rewards.sources import cache_folder, configuration, read_weights, tokenizer_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights():
    x = torch.arange(6.0).reshape(2, 3)
    return {"a.weight": x, "tied": x, "turned": x.T}


def test_a_file_of_tensors_is_converted_once_with_its_hash(tmp_path, weights, monkeypatch):
    torch.save(weights, tmp_path / "head.pth")
    first = read_weights(str(tmp_path / "head.pth"), "head.pth")
    assert all(torch.equal(first[name], x) for name, x in weights.items())
    (kept,) = cache_folder().iterdir()
    with safe_open(kept, "pt") as stored:
        record = stored.metadata()
    assert record["file"] == "head.pth"
    assert kept.name == f"head-{record['sha256'][:16]}.safetensors"
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read again"))
    assert torch.equal(read_weights(str(tmp_path), "head.pth")["a.weight"], weights["a.weight"])


def test_a_changed_file_is_read_again_and_a_broken_conversion_is_made_again(tmp_path, weights):
    torch.save(weights, tmp_path / "head.pth")
    read_weights(str(tmp_path), "head.pth")
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "head.pth")
    assert read_weights(str(tmp_path), "head.pth")["a.weight"].tolist() == [1.0]
    for kept in cache_folder().iterdir():
        kept.write_bytes(b"cut off")
    assert read_weights(str(tmp_path), "head.pth")["a.weight"].tolist() == [1.0]


def test_a_conversion_of_another_file_is_not_taken(tmp_path):
    """The name holds half of the hash; the header holds all of it."""
    torch.save({"a": torch.ones(1)}, tmp_path / "head.pth")
    read_weights(str(tmp_path), "head.pth")
    (kept,) = cache_folder().iterdir()
    save_file({"a": torch.zeros(1)}, kept, {"sha256": "of another file"})
    assert read_weights(str(tmp_path), "head.pth")["a"].item() == 1.0


def test_a_checkpoint_is_unwrapped(tmp_path, weights):
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "head.pt")
    assert set(read_weights(str(tmp_path), "head.pt")) == set(weights)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"weight": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt cannot be read as plain tensors"):
        read_weights(str(tmp_path), "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"weight": Trap()}))
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        read_weights(str(tmp_path), "plain.pt")
    assert not (tmp_path / "sprung").exists()


def test_safetensors_are_read_where_they_lie(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "head.safetensors")
    assert read_weights(str(tmp_path), "head.pth")["a"].tolist() == [1.0, 1.0]
    assert not cache_folder().exists()
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="no safetensors file"):
        read_weights(str(tmp_path / "bad.safetensors"), "head.pth")


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="There is no weight file"):
        read_weights(str(tmp_path / "head.pth"), "head.pth")
    with pytest.raises(UserError, match=r"neither head\.pth nor head\.safetensors"):
        read_weights(str(tmp_path), "head.pth")
    torch.save([1, 2], tmp_path / "head.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_weights(str(tmp_path), "head.pth")


def test_a_hub_id_without_a_network(monkeypatch):
    import huggingface_hub

    def offline(source, name):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"could not be fetched.*'some/body'.*no connection Download it") as error:
        read_weights("some/body", "head.pth")
    assert "\n" not in str(error.value)


def test_another_architecture_or_none(tmp_path):
    with pytest.raises(UserError, match="No CLIP model could be read"):
        configuration(str(tmp_path), ("clip",), "CLIP model", "openai/clip-vit-base-patch32")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(UserError, match=r"its model_type is 'dinov2'.*clip or siglip, such as openai"):
        configuration(str(tmp_path), ("clip", "siglip"), "CLIP model", "openai/clip-vit-base-patch32")


def test_a_model_with_missing_weights_is_refused(clip, tmp_path):
    """transformers would fill them with random numbers, and the reward would judge by them."""
    from transformers import CLIPModel

    clip.frozen.module.save_pretrained(tmp_path)
    state = {k: v for k, v in clip.frozen.module.state_dict().items() if not k.startswith("text_projection")}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, text_projection\.weight among them"):
        sources.pretrained(CLIPModel, str(tmp_path), "CLIP model", "openai/clip-vit-base-patch32")


def test_no_tokenizer(clip, tmp_path):
    clip.frozen.module.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="CLIP model with a tokenizer"):
        tokenizer_of(str(tmp_path), "CLIP model", "openai/clip-vit-base-patch32")
