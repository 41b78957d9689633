"""The run folder: whose it is, what it says, and trackers that may fail."""

import errno
import io
import json
import os
import platform
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tropism.core import UserError
from tropism.run import trackers
from tropism.run.progress import Progress, clock
from tropism.run.record import Recorder, environment


def recorder(folder, config=None, **options):
    text = io.StringIO()
    made = Recorder(folder, config or {"lr": 0.1}, console=Console(file=text, soft_wrap=True), **options)
    made.text = text
    return made


def test_folder_is_made_with_config_and_environment(tmp_path):
    with recorder(tmp_path / "a" / "b", {"lr": 0.1, "prompts": ["x: <y>", "ü"]}) as r:
        r.write({"update": 1, "reward": float("nan"), "calls": {"network": 3}})
        assert r.lines() == [{"update": 1, "reward": None, "calls": {"network": 3}}]
    assert yaml.safe_load((tmp_path / "a/b/config.yaml").read_text()) == {"lr": 0.1, "prompts": ["x: <y>", "ü"]}
    found = json.loads((tmp_path / "a/b/env.json").read_text())
    assert found["versions"]["torch"]
    assert found["threads"] >= 1


def test_environment_names_no_machine():
    text = json.dumps(environment())
    assert platform.node() not in text
    assert not any(v in text for k, v in os.environ.items() if k in ("HOME", "PATH", "PWD", "HOSTNAME"))


def test_existing_folder_is_refused_with_its_remedies(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"not empty.*--resume.*--overwrite.*--out"):
        recorder(tmp_path)
    with pytest.raises(UserError, match="not written by a run"):
        recorder(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="not written by a run"):
        recorder(tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        recorder(tmp_path / "thesis.txt")


def test_a_run_killed_between_its_first_files_goes_on(tmp_path):
    (tmp_path / "config.yaml").write_text("{}\n")
    recorder(tmp_path, resume=True).close()
    assert (tmp_path / "env.json").exists()


def test_a_resume_that_is_refused_leaves_the_settings_as_they_were(tmp_path):
    recorder(tmp_path / "run", {"lr": 0.1}).close()
    with recorder(tmp_path / "run", {"lr": 0.2}, resume=True) as r:
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == {"lr": 0.1}
        with r.showing(0, 1):
            assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == {"lr": 0.2}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        recorder(tmp_path / "run")


def test_a_refused_tracker_leaves_no_lock(tmp_path):
    with pytest.raises(UserError, match="Unknown tracker"):
        recorder(tmp_path / "run", trackers=["foo"])
    recorder(tmp_path / "run").close()


def test_overwrite_removes_products_only(tmp_path):
    with recorder(tmp_path / "run") as r:
        r.write({"update": 1})
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    recorder(tmp_path / "run", overwrite=True).close()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "config.yaml", "env.json", "notes.txt"}


def test_two_runs_cannot_share_a_folder(tmp_path):
    with recorder(tmp_path / "run"), pytest.raises(UserError, match=rf"process {os.getpid()}\) is using"):
        recorder(tmp_path / "run", resume=True)
    recorder(tmp_path / "run", resume=True).close()


def test_a_dead_run_leaves_no_lock(tmp_path):
    child = os.fork()
    if child == 0:
        recorder(tmp_path / "run")
        (tmp_path / "held").touch()
        time.sleep(60)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {child}"):
        recorder(tmp_path / "run", resume=True)
    os.kill(child, 9)
    os.waitpid(child, 0)
    recorder(tmp_path / "run", resume=True).close()


def test_resume_says_what_changed(tmp_path):
    recorder(tmp_path / "run", {"lr": 0.1, "seed": 1}).close()
    env = json.loads((tmp_path / "run/env.json").read_text())
    (tmp_path / "run/env.json").write_text(json.dumps(env | {"threads": 99}))
    with recorder(tmp_path / "run", {"lr": 0.2, "seed": 1, "resume": True}, resume=True) as r, r.showing(0, 1):
        pass
    assert "lr 0.1 -> 0.2" in r.text.getvalue()
    assert "seed" not in r.text.getvalue()
    assert "instead of 99" in r.text.getvalue()


def test_a_failing_tracker_is_switched_off(tmp_path, monkeypatch):
    class Broken:
        def log(self, values, step):
            raise RuntimeError("server [red]away[/red]")

    monkeypatch.setattr(trackers, "find_spec", lambda name: name)  # as if it were installed
    monkeypatch.setattr(trackers, "_started", lambda *a: Broken())
    with recorder(tmp_path / "run", trackers=["tensorboard"]) as r:
        r.write({"update": 1})
        r.write({"update": 2})
    assert r.text.getvalue().count("switched off") == 1
    assert "[red]" in r.text.getvalue()
    assert len(r.lines()) == 2


@pytest.mark.parametrize("slow", ["start", "log", "finish"])
def test_a_tracker_that_hangs_is_left_behind(tmp_path, monkeypatch, slow):
    """No row waits for it; at the end the run waits a while, says so, and goes."""
    gone = threading.Event()

    class Hanging:
        def __getattr__(self, name):
            return (lambda *a, **k: gone.wait(60)) if name == slow else lambda *a, **k: None

    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "_started", lambda *a: Hanging().start() or Hanging())
    monkeypatch.setattr(trackers, "WAIT", 0.2)
    began = time.perf_counter()
    with recorder(tmp_path / "run", trackers=["tensorboard"]) as r:
        for update in range(1, 4):
            r.write({"update": update, "reward": 1.0})
        assert len(r.lines()) == 3
    assert time.perf_counter() - began < 10
    gone.set()
    assert r.text.getvalue().count("did not end within 0.2 s and is left behind") == 1


def test_a_tracker_that_cannot_keep_up_is_switched_off(tmp_path, monkeypatch):
    gone, seen = threading.Event(), []

    class Slow:
        def log(self, values, step):
            seen.append(step)
            gone.wait(60)

        def finish(self):
            pass

    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "_started", lambda *a: Slow())
    monkeypatch.setattr(trackers, "BEHIND", 3)
    with recorder(tmp_path / "run", trackers=["tensorboard"]) as r:
        for update in range(1, 20):
            r.write({"update": update})
        gone.set()
        assert len(r.lines()) == 19
    assert r.text.getvalue().count("is 3 rows behind and is switched off") == 1
    assert len(seen) <= 1


def test_a_tracker_gets_every_row_in_order(tmp_path, monkeypatch):
    seen = []

    class Plain:
        def log(self, values, step):
            time.sleep(0.01)
            seen.append((step, values))

        def finish(self):
            seen.append("end")

    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "_started", lambda *a: Plain())
    with recorder(tmp_path / "run", trackers=["tensorboard"]) as r:
        for update in range(1, 9):
            r.write({"update": update, "reward": update / 2, "calls": {"network": 3}})
    assert seen == [*((u, {"reward": u / 2}) for u in range(1, 9)), "end"]


def test_unknown_or_missing_tracker(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="tensorboard, wandb"):
        recorder(tmp_path / "a", trackers=["tensorbord"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        recorder(tmp_path / "b", trackers=["wandb"])


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    with recorder(tmp_path / "run", {"lr": 0.1, "list": [1]}, trackers=["tensorboard"]) as r:
        r.write({"update": 1, "reward": 0.5, "calls": {"network": 3}})
    assert "switched off" not in r.text.getvalue(), r.text.getvalue()
    assert list((tmp_path / "run" / "logs").rglob("events*"))


def test_a_terminal_gets_a_live_bar():
    text = io.StringIO()
    shown = Progress(Console(file=text, force_terminal=True, width=100), 10)
    shown.show({"update": 5, "reward": 0.25, "gradient_norm": 1.5, "held_out/reward": 0.125})
    shown.bar.refresh()
    shown.stop()
    assert "\x1b" in text.getvalue()
    assert "reward 0.25  held-out 0.125  gradient 1.5" in text.getvalue()
    assert clock(3725) == "1:02:05"
