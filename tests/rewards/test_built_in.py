"""What rewards that need no weights of others declare: range, input size, licence, and a gradient that is there or is not."""

import pytest
import torch

from tropism.core import Batch, is_differentiable
from tropism.rewards.load import BUILT_IN, load_reward
from tropism.rewards.sources import About
from tropism.worlds import dna, molecules, utr

TOKENS = {"dna-liver": dna, "dna-specific": dna, "utr-load": utr, "gc-window": utr}
GLYPHS = ("glyphs-features", "glyphs-judge", "glyphs-random", "glyphs-features?metric=l1&reduce=max")
MOLECULES = ("qed", "sa", "logp-window", "pharmacophore")


def samples_for(name):
    """Eight samples, floating point with a gradient where the reward has one."""
    if name in MOLECULES:
        return molecules.tokens_of(["CCO", "c1ccccc1", "CC(=O)O", "CCN", "CCCCCC", "OCC(O)CO", "CC#N", "c1ccncc1"])
    if name in TOKENS:
        tokens = TOKENS[name].sequences(8, 0)
        return dna.one_hot(tokens).double().requires_grad_() if name.startswith("dna") else tokens
    side = 32 if name in GLYPHS or name.startswith("solids") else 64
    return torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("name", [*BUILT_IN, *GLYPHS])
def test_what_it_declares(name):
    if name in MOLECULES:
        pytest.importorskip("rdkit")
    if name == "utr-load":
        pytest.importorskip("RNA")
    reward = load_reward(name)
    assert reward.name == name
    assert isinstance(reward.about, About) and reward.about.licence and reward.about.source
    assert reward.about.size == {"shapes": 64, "solids": 32}.get(name.partition("-")[0])
    samples = samples_for(name)
    prompts = ["a red cube" if name.startswith("solids") else "three red circles on sand"] * 8
    pictures = (
        {"reference": samples.detach().flip(0), "low_res": torch.rand(8, 3, 16, 16), "visual": torch.rand(8, 3, 32, 32)}
        if samples.ndim == 4
        else {}
    )
    value = reward(samples, Batch(prompts, **pictures))
    low, high = reward.about.range
    assert low < high and ((low <= value) & (value <= high)).all() and value.isfinite().all()
    assert value.requires_grad == is_differentiable(reward)


def test_the_encoder_that_judges_is_not_the_one_that_rewards():
    """Another build and other weights, through the names that users type."""
    shapes = lambda name: [tuple(p.shape) for p in load_reward(name).frozen.module.parameters()]
    assert shapes("glyphs-judge") != shapes("glyphs-features") == shapes("glyphs-random")
