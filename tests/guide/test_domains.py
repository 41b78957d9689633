"""On every bundled domain: plain, best-of-M and SVDD with M children, in that order, and more children are no worse."""

from itertools import pairwise

import pytest
import torch

from tropism.core import Batch
from tropism.guide.best_of_n import best_of_n
from tropism.guide.svdd import svdd
from tropism.models.load import load_model
from tropism.rewards.load import load_reward
from tropism.worlds import utr


def starts(tokens, batch):
    """The share of ribosomes that reach the main start; folding left out."""
    return torch.tensor([utr.scanned(s) + utr.scanned(s[::-1]) / 10 for s in utr.text(tokens)])


SHAPES = ["one red circle on sand", "three blue stars on grass"]
DOMAINS = {
    "utr": (starts, 64, [""], 16),
    "dna": ("dna-liver", 48, [""], 16),
    "molecules": ("qed", 48, [""], 16),
    "shapes": ("jpeg-bytes", 16, SHAPES, 8),
}


@pytest.mark.parametrize(
    "name", ["utr", *(pytest.param(n, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]) for n in list(DOMAINS)[1:])]
)
def test_more_children_are_no_worse(name):
    """Medians on paired seeds, with a tenth of the whole gain as tolerance."""
    reward, n, prompts, steps = DOMAINS[name]
    own = {"eta": 1.0} if name == "shapes" else {}
    model, reward = load_model(name, lora=None, **own), load_reward(reward) if isinstance(reward, str) else reward
    how = {"steps": steps, "guidance": model.guidance, "max_batch": 256}
    median = lambda function, m: function(model, reward, Batch(prompts), n, m=m, **how).rewards.median().item()
    guided = [median(svdd, m) for m in (1, 5, 10, 20)]
    best = [median(best_of_n, m) for m in (1, 5, 10, 20)]
    slack = 0.1 * (guided[-1] - guided[0])
    assert slack > 0
    assert all(b > a - slack for a, b in pairwise(guided)), guided
    assert all(one <= many + slack for one, many in zip(best, guided, strict=True)), (best, guided)
    assert best[0] <= min(best[1:])
