"""Rewards on molecules by name, and a docking program played by a script."""

import os
import time
from pathlib import Path

import pytest
import torch

from tropism.core import Batch, UserError, scored
from tropism.rewards.docking import Docking, affinity
from tropism.rewards.load import load_reward, load_rewards, split
from tropism.rewards.workers import InWorkers
from tropism.worlds import molecules

TEXTS = ["CCO", "CC(=O)Oc1ccccc1C(=O)O", "CCCCCCCCCCCCCCCC"]
ROWS = molecules.tokens_of(TEXTS)
BATCH = Batch([""] * 3)

VINA = """\
mode |   affinity | dist from best mode
     | (kcal/mol) | rmsd l.b.| rmsd u.b.
-----+------------+----------+----------
   1         -7.3      0.000      0.000
   2         -6.9      1.204      2.011
"""


@pytest.fixture
def program(tmp_path):
    """Writes an executable script; it counts the carbon atoms of the SDF file it is given."""

    def make(body):
        file = tmp_path / "dock.sh"
        file.write_text("#!/bin/sh\n" + body)
        os.chmod(file, 0o755)
        return str(file)

    return make


def test_by_name():
    assert load_reward("qed")(ROWS, BATCH)[1].item() == pytest.approx(0.550, abs=2e-3)
    assert load_reward("sa")(ROWS, BATCH)[1].item() == pytest.approx((10 - 1.58) / 9, abs=2e-3)
    window = load_reward("logp-window")(ROWS, BATCH)
    assert window[1] == 0 and window[0] == pytest.approx(-1.0014, abs=0.01) and window[2] < -3
    assert (load_reward("pharmacophore")(ROWS, BATCH) <= 1).all()
    mixed = load_rewards(["qed", "sa=0.5"])(ROWS, BATCH)
    torch.testing.assert_close(mixed, load_reward("qed")(ROWS, BATCH) + 0.5 * load_reward("sa")(ROWS, BATCH))


def test_a_docking_program(program):
    last = program("grep -c ' C   ' $1 | sed s/^/-/")
    dock = load_reward(f"dock:{last}")
    assert scored(dock, ROWS, BATCH).tolist() == [2.0, 9.0, 16.0]
    named = load_reward("dock:" + program("test $1 = -l && grep -c ' C   ' $2") + " -l {ligand} --cpu=1")
    assert scored(named, ROWS, BATCH).tolist() == [-2.0, -9.0, -16.0]
    assert split("dock:smina --cpu=2")[0] == "dock:smina --cpu=2"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (VINA, -7.3),
        (VINA.replace("-7.3", "  -7"), -7.0),
        ("1 0.5 warning\n" + VINA, -7.3),
        ("## smina\nAffinity: -7.34 (kcal/mol)\nRMSD: 0.31\nRefine time 0.02\n", -7.34),
        ("Estimated Free Energy of Binding   : -6.7 (kcal/mol)\n(1) Final: -0.45\n", -6.7),
        ("read 2 files\nscore: -4.25e0\n", -4.25),
        ("done\n", None),
    ],
)
def test_what_programs_print(text, found):
    assert affinity(text) == found


def test_a_molecule_that_is_refused_scores_nothing(program):
    """One poor ligand does not end a run; a command that never works does."""
    dock = Docking(program("grep -q ' O   ' $1 && exit 1; echo -5"))
    assert dock(ROWS, BATCH).tolist() == [-torch.inf, -torch.inf, 5.0]
    assert dock.failed == 2
    assert dock(ROWS, BATCH).tolist() == [-torch.inf, -torch.inf, 5.0] and dock.failed == 2, "known by now"
    with pytest.raises(UserError, match="starts no program"):
        Docking("no-such-program -l {ligand}")
    with pytest.raises(UserError, match=r"ended with code 3: no receptor\. Run it by hand"):
        Docking(program("echo 'no receptor' >&2; exit 3"))(ROWS, BATCH)
    with pytest.raises(UserError, match=r"printed no number: ready"):
        Docking(program("echo ready"))(ROWS, BATCH)


@pytest.mark.parametrize("body", ["exec sleep 60", "sleep 60; echo 1"])
def test_a_dock_that_takes_too_long_is_ended(body, program, tmp_path, forked):
    """The worker is ended, and its program with all that it started."""
    name = f"sleep{os.getpid()}"
    os.symlink("/bin/sleep", tmp_path / name)
    script = program(body.replace("sleep", str(tmp_path / name)))
    reward = InWorkers(f"dock:{script}", workers=1, timeout=2)
    running = lambda: [p for p in Path("/proc").glob("[0-9]*/cmdline") if name in _text(p)]
    try:
        assert reward(ROWS[:1], Batch([""])).item() == -torch.inf
        assert reward.timed_out == 1
    finally:
        reward.close()
    for _ in range(50):
        if not running():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the docking program outlived its worker")


def test_a_timeout_does_not_make_refusals_the_commands_fault(program, forked):
    """Whoever sees all molecules judges: one is docked, one takes too long and ends its worker, three are refused after that."""
    script = program("grep -q ' O   ' $1 && exit 1; grep -q ' N   ' $1 && exec sleep 60; echo -5")
    reward = InWorkers(f"dock:{script}", workers=1, timeout=4)
    try:
        found = reward(molecules.tokens_of(["CCC", "CCN", "CO", "CCO", "CCCO", "CC"]), Batch([""] * 6))
    finally:
        reward.close()
    assert found.tolist() == [5.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf, 5.0]
    assert (reward.timed_out, reward.refused) == (1, 3)


def test_a_command_that_refuses_all_is_at_fault_in_workers_too(program, forked):
    reward = InWorkers(f"dock:{program('echo no receptor >&2; exit 3')}", workers=2, timeout=30)
    with pytest.raises(UserError, match=r"ended with code 3: no receptor\. Run it by hand"):
        reward(ROWS, BATCH)


def _text(file):
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
