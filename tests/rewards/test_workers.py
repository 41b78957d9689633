"""Rewards in worker processes: the same numbers, time limits that let the run go on, and clear words."""

import pytest
import torch

from tropism import commands
from tropism.core import Batch, UserError
from tropism.rewards.workers import InWorkers

SLOW = """
import time
import torch

def count(tokens, batch):
    if (tokens == 0).all():
        time.sleep(60)
    if (tokens == 1).all():
        raise ValueError("no such molecule")
    return (tokens == 2).double().sum(1) + len(batch.prompts[0])
"""

HANGS = """
import time

def a(tokens, batch):
    if int(tokens[0, 0]) == 3:
        time.sleep(60)
    return (tokens == 0).double().sum(1)
"""


IN_A_WORKER = """
import multiprocessing, os, time

if multiprocessing.parent_process():
    {what}
"""


@pytest.fixture
def slow(tmp_path):
    made = []

    def make(loading="pass", **options):
        (tmp_path / "slow.py").write_text(SLOW + IN_A_WORKER.format(what=loading))
        made.append(InWorkers(f"{tmp_path}/slow.py:count", **{"workers": 2, "timeout": 20, **options}))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def test_the_same_numbers_and_a_limit(slow, forked):
    reward = slow(timeout=1)
    tokens = torch.tensor([[2, 2, 0], [0, 0, 0], [2, 1, 0], [3, 3, 3]])
    found = reward(tokens, Batch(["a", "bb", "ccc", ""]))
    assert found.tolist() == [3, -torch.inf, 4, 0]
    assert reward.timed_out == 1
    assert reward(tokens[:1], Batch(["a"])).tolist() == [3], "the pool goes on after a process was ended"


def test_loading_is_not_counted_against_a_sample(slow, forked):
    """Nor in the worker that takes the place of one that was ended."""
    reward, tokens = slow("time.sleep(0.5)", workers=1, timeout=0.25), torch.tensor([[2, 2], [0, 0], [3, 3]])
    assert reward(tokens, Batch(["a"] * 3)).tolist() == [3, -torch.inf, 1]
    assert reward.timed_out == 1


def test_workers_that_die_of_loading_do_not_hang_the_run(slow, forked):
    with pytest.raises(UserError, match="failed in a worker: BrokenProcessPool"):
        slow("os._exit(1)", workers=1)(torch.ones(1, 3, dtype=torch.long), Batch(["a"]))


def test_what_only_a_worker_cannot_load_is_said(slow, forked):
    with pytest.raises(UserError, match=r"slow\.py failed with KeyError: 'no display'"):
        slow("raise KeyError('no display')", workers=1)(torch.ones(1, 3, dtype=torch.long), Batch(["a"]))


@pytest.mark.parametrize(
    ("text", "name"), [("jpeg-bytes=0.5", "0.5 jpeg-bytes"), ("hinge(jpeg,-1)", "hinge(jpeg, -1)")]
)
def test_its_name_is_that_of_the_reward(text, name):
    assert InWorkers(text, workers=1, timeout=1).name == name


def test_an_exception_is_named(slow):
    """In a worker that is spawned, as outside the tests: starting it takes seconds, which are not the sample's."""
    with pytest.raises(
        UserError, match=r"raised ValueError: no such molecule \(slow.py, line 9\).*prompt 'a'"
    ) as error:
        slow(workers=1, timeout=1)(torch.ones(1, 3, dtype=torch.long), Batch(["a"]))
    assert error.value.samples.tolist() == [[1, 1, 1]] and error.value.batch.prompts == ["a"]


def test_numbers_that_cannot_be():
    for options in ({"workers": 0, "timeout": 1}, {"workers": 1, "timeout": 0}):
        with pytest.raises(UserError, match="at least 1 and above 0"):
            InWorkers("jpeg", **options)


def test_a_guided_run_with_a_sample_that_never_ends(tmp_path, capsys, forked):
    """Some sequences hang their reward: they are counted, never chosen, and the run ends."""
    (tmp_path / "hang.py").write_text(HANGS)
    run = commands.guide(
        "best-of-n",
        model="utr",
        reward=f"{tmp_path}/hang.py:a",
        out=tmp_path / "run",
        samples=4,
        pool=0,
        options={"m": 3, "steps": 4},
        workers=2,
        timeout=0.7,
    )
    samples = torch.cat([p.samples for p in run.pieces])
    assert (samples[:, 0] != 3).all()
    assert "exceeded the limit of 0.7 s" in capsys.readouterr().out
