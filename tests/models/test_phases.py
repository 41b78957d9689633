"""Strengths by phase of the chain: equal ones are that strength, zeros are the base, and each share acts on its own steps."""

from itertools import pairwise

import pytest
import torch
from test_model_conformance import stirred

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, UserError
from tropism.models import lora
from tropism.models.lora import LoraSettings
from tropism.models.phases import Phased
from tropism.models.stable_diffusion import StableDiffusion

BATCH = Batch(["red cat", "a dog"])
STEPS = 7


@pytest.fixture(scope="module")
def model(folders):
    return stirred(StableDiffusion.load(folders["sd1"], lora=LoraSettings(rank=2, alpha=6)), 0)


def drawn(model, steps=STEPS):
    return sample(model, BATCH, Draw(0, 0, BATCH.index), steps=steps, guidance=3.0)


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_equal_phases_are_the_plain_strength_bit_for_bit(model, strength):
    with lora.scaled(model, strength):
        plain = drawn(model)
    assert torch.equal(drawn(Phased(model, (strength,) * 3, STEPS)), plain)
    assert (plain - drawn(Phased(model, (0.0,) * 3, STEPS))).abs().max() > 1e-3


def test_no_strength_anywhere_is_the_base_bit_for_bit(model):
    with model.base():
        base = drawn(model)
    assert torch.equal(drawn(Phased(model, (0.0, 0.0, 0.0), STEPS)), base)


def test_the_model_acts_as_trained_afterwards(model):
    trained = drawn(model)
    drawn(Phased(model, (0.0, 1.5, 0.3), STEPS))
    assert torch.equal(drawn(model), trained)


def test_each_step_has_the_strength_of_its_third(model, monkeypatch):
    """Of seven steps three are early, two in the middle and two late; counted at the network itself."""
    seen, original = [], type(model).counted

    def counted(self, *arguments):
        seen.append(next(m.scaling["default"] for m in self.network.modules() if isinstance(m, lora.LoraLayer)) / 3)
        return original(self, *arguments)

    monkeypatch.setattr(type(model), "counted", counted)
    drawn(Phased(model, (0.0, 0.5, 1.5), STEPS))
    assert seen == [0.0] * 3 + [0.5] * 2 + [1.5] * 2


def test_a_phase_changes_nothing_before_it(model):
    """With the adapter in the last third alone, the states until then are the base's."""
    late, states = Phased(model, (0.0, 0.0, 1.0), STEPS), []
    with model.base():
        cond = model.encode(BATCH)
        times = model.process.times(STEPS).tolist()
        x, _ = model.start(cond, Draw(0, 0, BATCH.index), model.process.times(STEPS))
        for t, s in pairwise(times):
            states.append((x, t))
            x = model.kernel(x, t, s, cond, 3.0)[0].mean
        outputs = [model.predict(x, t, cond, 3.0) for x, t in states]
    for i, ((x, t), base) in enumerate(zip(states, outputs, strict=True)):
        mine = late.kernel(x, t, times[i + 1], cond, 3.0)[1]
        assert torch.equal(mine, base) == (i < 5)


def test_times_in_a_batch(model):
    phased = Phased(model, (0.0, 1.0), 4)
    t = model.process.times(4)
    assert [phased.strength(x, (1, 4, 8, 8)) for x in t[:-1]] == [0.0, 0.0, 1.0, 1.0]
    assert phased.strength(t[2].expand(3), (3, 4, 8, 8)) == 1.0
    with pytest.raises(RuntimeError):
        phased.strength(t[:2], (2, 4, 8, 8))


@pytest.mark.parametrize(
    ("strengths", "steps", "says"),
    [((), 4, "give at least one"), ((1.0, float("nan")), 4, "finite"), ((1.0,) * 3, 2, "fewer than the 3 phases")],
)
def test_what_cannot_be(model, strengths, steps, says):
    with pytest.raises(UserError, match=says):
        Phased(model, strengths, steps)


def test_a_model_without_an_adapter(folders):
    with pytest.raises(UserError, match="no LoRA adapter"):
        Phased(StableDiffusion.load(folders["sd1"], lora=None), (1.0,), 4)
