"""Reading the glyphs world: right or nothing, also under nuisance; every outcome counted as it should."""

from functools import cache

import pytest
import torch

from tropism.core import Batch, UserError
from tropism.worlds import glyphs, glyphs_posterior
from tropism.worlds import glyphs_reading as reading
from tropism.worlds.glyphs import BLANK, TAU
from tropism.worlds.glyphs_reading import UNREAD, Outcome

STATES = glyphs.scenes(range(2000), 1)
KINDS = glyphs.classes(STATES)


@cache
def clean():
    return glyphs.render(STATES, dtype=torch.float64)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(slots, error):
    """Slots (..., 256) scaled to a mean square of `error`, a number or (..., 1)."""
    return slots * (error / (slots**2).mean(-1, keepdim=True)) ** 0.5


def pictures(slots):
    """(B, 3, 32, 32) of slots (B, 4, 256)."""
    grid = slots.reshape(-1, 2, 2, 16, 16).transpose(2, 3).reshape(-1, 1, 32, 32)
    return grid.expand(-1, 3, -1, -1)


def towards_others(states, weight):
    """(B, 4, 256): from every slot's picture to the nearest one of another class, in strokes of weight (B,)."""
    mix = glyphs.mixture(weight)
    every = torch.einsum("bk,ktp->btp", mix, glyphs.bank())
    own = torch.stack([e[s] for e, s in zip(every, states, strict=True)])
    error = torch.cdist(own, every)
    error[glyphs.classes(states)[..., None] == torch.arange(99) // 9] = torch.inf
    return torch.stack([e[i] for e, i in zip(every, error.argmin(2), strict=True)]) - own


# ---------------------------------------------------------------------------------------------------- the certificate


def test_every_clean_scene_is_read_exactly():
    """Check 4 of the specification, on 2,000 scenes; in single precision too, and under noise of .05."""
    assert torch.equal(reading.read(clean()), KINDS)
    assert torch.equal(reading.read(clean().float()), KINDS)
    assert torch.equal(reading.read(clean() + 0.05 * normals(2000, 1, 32, 32)), KINDS)


def test_nothing_below_tau_changes_a_reading():
    """Check 4: random directions, and the worst one, straight to the nearest other class."""
    slots = glyphs.slots(clean())
    worst = towards_others(STATES[:200], torch.zeros(200))
    for away, of in (
        (normals(2000, 4, 256), slice(None)),
        (worst, slice(200)),
        (worst + 0.02 * normals(200, 4, 256), slice(200)),
    ):
        assert torch.equal(reading.read(pictures(slots[of] + step(away, 0.999 * TAU))), KINDS[of])
        assert (reading.read(pictures(slots[of] + step(away, 1.001 * TAU))) == UNREAD).all()


def test_the_certified_radius_cannot_be_larger():
    """Halfway between the two nearest classes the nearest state changes: just below a quarter of their error, and just above."""
    apart = glyphs.separation(torch.zeros(1)).item()
    states = torch.arange(99).reshape(-1, 1).expand(-1, 4)
    away, slots = towards_others(states, torch.zeros(99)), glyphs.slots(glyphs.render(states, dtype=torch.float64))
    for share, kept in ((0.999, True), (1.001, False)):
        found, _ = glyphs.nearest(pictures(slots + step(away, share * apart / 4)))
        assert bool((glyphs.classes(found) == glyphs.classes(states)).all()) is kept


def test_what_is_no_digit_is_unreadable():
    assert (reading.read(torch.full((1, 3, 32, 32), 0.5)) == UNREAD).all()
    assert (reading.read(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))) == UNREAD).all()
    broken = clean()[:1].clone()
    broken[0, 1, 3, 20] = torch.nan
    assert reading.read(broken)[0].tolist() == [KINDS[0, 0], UNREAD, *KINDS[0, 2:]]


# ---------------------------------------------------------------------------------------------------- outcomes


def test_outcomes_by_hand():
    found = torch.tensor([[3, 3, 3, BLANK], [BLANK, UNREAD, UNREAD, 0]])
    wanted = torch.tensor([[3, 5, BLANK, 3], [BLANK, 5, BLANK, 0]])
    names = [[Outcome(o).name for o in row] for row in reading.outcomes(found, wanted).tolist()]
    assert names == [["CORRECT", "SWAP", "INSERTION", "OMISSION"], ["CORRECT", "UNREADABLE", "UNREADABLE", "CORRECT"]]


def test_counts_and_rates_by_hand():
    wanted = glyphs.render(9 * torch.tensor([[3, 5, BLANK, 3], [1, 1, 1, 1]]) + 4)
    shown = glyphs.render(9 * torch.tensor([[BLANK, 6, 2, BLANK], [1, 1, 1, 1]]) + 2)  # other places do not matter
    shown[1, :, :16, :16] = 0.5
    counted = reading.counts(shown, Batch(["digits"] * 2, reference=wanted))
    assert {k: v.tolist() for k, v in counted.items()} == {
        "correct": [0, 3],
        "swap": [1, 0],
        "insertion": [1, 0],
        "omission": [2, 0],
        "unreadable": [0, 1],
        "hallucination": [2, 0],
        "blur": [2, 1],
    }
    assert reading.rates(counted)["hallucination"] == 0.25
    assert reading.rates(counted)["correct"] == 0.375


def test_counting_needs_clean_originals():
    with pytest.raises(UserError, match="no reference"):
        reading.counts(clean()[:1], Batch(["digits"]))
    smeared = torch.stack([clean()[0], torch.full((3, 32, 32), 0.5, dtype=torch.float64)])
    with pytest.raises(UserError, match=r"sample 1 reads '\? \? / \? \?'"):
        reading.counts(clean()[:2], Batch(["digits"] * 2, reference=smeared))


# ---------------------------------------------------------------------------------------------------- nuisance


def test_nuisance_is_keyed_and_within_its_range():
    whole = reading.drawn(range(2000), 5)
    some = reading.drawn([40, 3], 5)
    for a, b in zip(vars(whole[[40, 3]]).values(), vars(some).values(), strict=True):
        assert torch.equal(a, b)
    assert whole.gain.min() < 0.71 and whole.gain.max() > 0.99 and whole.gain.min() >= 0.7
    assert whole.offset.min() >= 0 and ((whole.gain + whole.offset) <= 1).all() and whole.offset.max() > 0.25
    assert torch.bincount(whole.shift.flatten() + 2).min() > 700 and whole.shift.abs().max() == 2
    assert whole.weight.min() < -0.99 and whole.weight.max() > 0.99
    half = reading.drawn(range(2000), 5, 0.5, 0.5, 0.5)
    assert half.gain.min() >= 0.85 and half.shift.abs().max() == 1 and half.weight.abs().max() <= 0.5
    assert not torch.equal(reading.drawn(range(2000), 6).gain, whole.gain)


def test_no_strength_no_nuisance():
    none = reading.drawn(range(20), 0, tone=0, shift=0, weight=0)
    torch.testing.assert_close(reading.spoil(clean()[:20], none), clean()[:20], atol=1e-12, rtol=0)
    for call in (reading.spoil, reading.undone, reading.read):
        with pytest.raises(UserError, match="nuisance for 20 pictures, and there are 1"):
            call(clean()[:1], none)
    with pytest.raises(UserError, match=r"'shift' is 2; it must lie in \[0, 1\]. Try shift=1"):
        reading.drawn(range(2), 0, shift=2)


def test_each_nuisance_does_what_it_says():
    states = STATES[:100]
    tone = reading.drawn(range(100), 0, shift=0, weight=0)
    seen = reading.spoil(clean()[:100], tone)
    torch.testing.assert_close(seen, tone.gain[:, None, None, None] * clean()[:100] + tone.offset[:, None, None, None])
    shift = reading.drawn(range(100), 0, tone=0, weight=0)
    for before, after, (down, right) in zip(
        clean(), reading.spoil(clean()[:100], shift), shift.shift.tolist(), strict=False
    ):
        torch.testing.assert_close(after, before.roll((down, right), (1, 2)), atol=1e-12, rtol=0)
        assert (
            before[:, :2].max() == before[:, -2:].max() == before[..., :2].max() == before[..., -2:].max() == 0
        )  # nothing wraps
    weight = reading.drawn(range(100), 0, tone=0, shift=0)
    seen = reading.spoil(clean()[:100], weight)
    torch.testing.assert_close(seen, glyphs.render(states, weight.weight, torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kinds", [{}, {"shift": 0, "weight": 0}, {"tone": 0, "weight": 0}, {"tone": 0, "shift": 0}])
def test_spoilt_pictures_read_the_same_to_who_is_told_and_not_to_others(kinds):
    nuisance = reading.drawn(range(500), 2, **kinds)
    error = torch.rand(500, 4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 * TAU
    noisy = pictures(glyphs.slots(clean()[:500]) + step(normals(500, 4, 256), error)).clamp(0, 1).float()
    before = reading.read(noisy)
    assert 0.05 < (before == UNREAD).double().mean() < 0.6  # clamping takes part of the noise away
    spoilt = reading.spoil(noisy, nuisance)
    assert spoilt.dtype == torch.float32 and spoilt.min() >= 0 and spoilt.max() <= 1 + 1e-6
    after = reading.read(spoilt, nuisance)
    assert torch.equal(after[before != UNREAD], before[before != UNREAD])
    assert (after == before).double().mean() > 0.99
    assert torch.equal(reading.read(reading.spoil(clean()[:500].float(), nuisance), nuisance), KINDS[:500])
    assert (reading.read(spoilt) == before).double().mean() < 0.9


def test_the_certificate_under_nuisance():
    """No step shorter than `radius` reads as another digit, not even straight to the nearest other one; a longer one does."""
    nuisance = reading.drawn(range(120), 3)
    radius, least = reading.radius(nuisance), 0.7**2 * glyphs.least_separation() / 4
    assert (radius >= least).all() and radius.min().item() < 2 * least
    assert least == pytest.approx(0.00163, abs=1e-5)
    lines = glyphs.slots(reading.undone(reading.spoil(clean()[:120], nuisance), nuisance))
    worst = towards_others(STATES[:120], nuisance.weight)
    changed = 0
    for away in (worst, normals(120, 4, 256)):
        for share in (0.5, 0.999, 1.5):
            moved = pictures(lines + step(away, share * (radius / nuisance.gain**2)[:, None, None]))
            gain, offset = (v[:, None, None, None] for v in (nuisance.gain, nuisance.offset))
            seen = gain * reading._moved(moved, nuisance.shift) + offset
            assert ((seen - reading.spoil(clean()[:120], nuisance)) ** 2).mean() == pytest.approx(
                share * radius.mean().item()
            )
            wrong = (reading.read(seen, nuisance) != KINDS[:120]) & (reading.read(seen, nuisance) != UNREAD)
            assert share > 1 or not wrong.any()
            nearest, _ = glyphs.nearest(reading.undone(seen, nuisance), nuisance.weight)
            same = glyphs.classes(nearest) == KINDS[:120]
            assert same.all() or share > 1
            changed += int((~same).sum())
    assert changed > 0


def test_blurred_pictures_stay_unreadable():
    batch = glyphs_posterior.batch(range(500), 0)
    blurred, nuisance = glyphs_posterior.bicubic(batch), reading.drawn(range(500), 0)
    assert torch.equal(reading.read(reading.spoil(blurred, nuisance), nuisance), reading.read(blurred))
