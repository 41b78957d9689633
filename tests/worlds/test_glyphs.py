"""The glyphs world: scenes, pictures, and the distances that its reader's certificate rests on."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tropism.core import UserError
from tropism.worlds import glyphs
from tropism.worlds.glyphs import BLANK, STATES

WEIGHTS = torch.tensor([-1.0, -0.5, 0.0, 0.3, 1.0], dtype=torch.float64)


def every_state(weight):
    """(99, 256): the first slot of rendered scenes, which goes past the bank and its mixtures."""
    states = torch.full((STATES, 4), 9 * BLANK)
    states[:, 0] = torch.arange(STATES)
    return glyphs.render(states, torch.full((STATES,), weight, dtype=torch.float64), torch.float64)[
        :, 0, :16, :16
    ].reshape(STATES, 256)


def test_scenes_have_the_shares_they_should():
    states = glyphs.scenes(range(4000), 0)
    kinds = glyphs.classes(states)
    share = torch.bincount(kinds.flatten(), minlength=11) / kinds.numel()
    torch.testing.assert_close(share, torch.tensor([0.08] * 10 + [0.2]), atol=0.01, rtol=0)
    moved = torch.bincount(states.flatten() % 9, minlength=9) / states.numel()
    torch.testing.assert_close(moved, torch.full((9,), 1 / 9), atol=0.01, rtol=0)
    pairs = torch.stack([(kinds[:, i] == kinds[:, j]).float().mean() for i in range(4) for j in range(i)])
    torch.testing.assert_close(
        pairs, torch.full((6,), 10 * 0.08**2 + 0.2**2), atol=0.025, rtol=0
    )  # slots are independent
    prior = glyphs.prior()
    assert prior.sum().item() == pytest.approx(1)
    assert (prior[0].item(), prior[98].item()) == pytest.approx((0.08 / 9, 0.2 / 9))


def test_a_scene_depends_on_its_number_and_the_seed_alone():
    whole = glyphs.scenes(range(50), 3)
    assert torch.equal(glyphs.scenes([41, 7], 3), whole[[41, 7]])
    assert not torch.equal(glyphs.scenes(range(50), 4), whole)


def test_a_scene_is_drawn_where_its_states_say():
    """Slots in reading order; the middle state is centred, the others one pixel from it."""
    centred = glyphs.render(torch.tensor([[9 * 3 + 4, 9 * BLANK, 9 * 8 + 4, 9 * 1 + 4]]))[0]
    assert torch.equal(centred[0], centred[1]) and torch.equal(centred[0], centred[2])
    quarters = centred[0].reshape(2, 16, 2, 16).transpose(1, 2).reshape(4, 16, 16)
    assert quarters[1].max() == 0
    assert (
        quarters[2].sum() > quarters[0].sum() > quarters[3].sum() > 0
    )  # an 8 has more ink than a 3, and that more than a 1
    for k in (0, 2, 3):
        lit = [quarters[k].amax(axis).nonzero().flatten() for axis in (1, 0)]
        assert all(abs(int(at[0]) + int(at[-1]) - 15) <= 1 for at in lit), "the ink is not in the middle"
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            state = 9 * 3 + 3 * (down + 1) + across + 1
            moved = glyphs.render(torch.tensor([[state] + [9 * BLANK] * 3]))[0, 0, :16, :16]
            assert torch.equal(moved, quarters[0].roll((down, across), (0, 1)))


def test_the_bundled_digits_are_those_of_the_recipe():
    """Up to what another Pillow or FreeType draws at the edges."""
    file = Path(__file__).parents[2] / "recipes" / "glyph_templates.py"
    spec = importlib.util.spec_from_file_location("glyph_templates", file)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    font = recipe.ImageFont.truetype(str(recipe.FONT), recipe.PIXELS * recipe.LARGER)
    for digit in range(10):
        drawn = torch.from_numpy(recipe.reduced(recipe.large(digit, font))).double() / 4080
        bundled = glyphs.bank()[1, 9 * digit + 4].reshape(16, 16)
        assert (drawn - bundled).abs().mean() < 0.02
        assert (drawn - glyphs.bank()[1, 9 * ((digit + 1) % 10) + 4].reshape(16, 16)).abs().mean() > 0.05


def test_strokes_grow_with_their_weight():
    ink = torch.stack([every_state(w)[:90].sum(1) for w in (-1.0, 0.0, 1.0)])
    assert (ink[0] < 0.8 * ink[1]).all() and (ink[2] > 1.2 * ink[1]).all()
    torch.testing.assert_close(every_state(0.5), (every_state(0.0) + every_state(1.0)) / 2)
    torch.testing.assert_close(every_state(-0.25), 0.75 * every_state(0.0) + 0.25 * every_state(-1.0))


def test_classes_are_as_far_apart_as_published():
    """Check 4 of the specification: .0242 within .001. It certifies readings up to a quarter, and TAU lies below."""
    apart = glyphs.separation(torch.zeros(1)).item()
    assert apart == pytest.approx(0.0242, abs=0.001)
    assert apart / 4 > glyphs.TAU
    assert apart == pytest.approx(0.02439, abs=1e-5)  # the bundled file's own


@pytest.mark.parametrize("weight", WEIGHTS.tolist())
def test_separation_is_that_of_the_rendered_pictures(weight):
    pictures, kinds = every_state(weight), torch.arange(STATES) // 9
    error = ((pictures[:, None] - pictures) ** 2).mean(2)
    error[kinds[:, None] == kinds] = torch.inf
    assert glyphs.separation(torch.tensor([weight], dtype=torch.float64)).item() == pytest.approx(
        error.min().item(), rel=1e-9
    )


def test_the_least_separation_is_that_of_all_weights_and_no_reading_passes_it():
    at = torch.linspace(-1, 1, 601, dtype=torch.float64)
    apart = glyphs.separation(at)
    assert apart.min().item() == pytest.approx(glyphs.least_separation(), abs=1e-6)
    assert glyphs.least_separation() <= apart.min().item() + 1e-12
    assert glyphs.least_separation() == pytest.approx(0.01330, abs=1e-5)
    assert (glyphs.limits(at) < apart / 4).all()
    assert glyphs.limits(torch.zeros(1)).item() == glyphs.TAU == glyphs.limits(at).max().item()


def test_the_least_separation_looks_between_the_weights(monkeypatch):
    """A pair that is nearest halfway: |u + a v|^2 with u = (1, 0), v = (-1, 1) is 1/2 at a = 1/2, and 1 at both ends."""
    apart = torch.zeros(3, 3, 1, dtype=torch.float64)
    regular, bold = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for i, a in enumerate((regular, regular, bold)):
        for j, b in enumerate((regular, regular, bold)):
            apart[i, j] = (a @ b).double()
    monkeypatch.setattr(glyphs, "_apart", lambda: apart)
    assert glyphs.least_separation() == pytest.approx(0.5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_nearest_is_the_smallest_of_all_errors(dtype, tolerance):
    images = torch.rand(len(WEIGHTS), 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )
    for weight in (None, WEIGHTS):
        states, error = glyphs.nearest(images, weight)
        assert error.dtype == dtype
        for b, w in enumerate([0.0] * len(WEIGHTS) if weight is None else WEIGHTS.tolist()):
            for s in range(4):
                top, left = 16 * (s // 2), 16 * (s % 2)
                slot = images[b].double().mean(0)[top : top + 16, left : left + 16].reshape(256)
                every = ((slot - every_state(w)) ** 2).mean(1)
                assert error[b, s].item() == pytest.approx(every.min().item(), abs=tolerance)
                assert every[states[b, s]].item() == pytest.approx(every.min().item(), abs=tolerance)


def test_captions():
    assert glyphs.captions(torch.tensor([[3, 7, BLANK, -1]])) == ["3 7 / _ ?"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: glyphs.render(torch.zeros(2, 3).long()), "glyphs.scenes"),
        (lambda: glyphs.render(torch.full((1, 4), 99)), "0..98"),
        (lambda: glyphs.render(torch.full((1, 4), -1)), "0..98"),
        (lambda: glyphs.render(torch.zeros(1, 4).long(), torch.tensor([1.5])), r"\[-1, 1\]; found 1.5"),
        (lambda: glyphs.mixture(torch.tensor([torch.nan])), r"\[-1, 1\]"),
        (lambda: glyphs.nearest(torch.zeros(1, 3, 64, 64)), r"64, 64"),
        (lambda: glyphs.nearest(torch.zeros(1, 1, 32, 32)), r"\(B, 3, 32, 32\)"),
        (lambda: glyphs.nearest(torch.zeros(1, 3, 32, 32).byte()), "uint8"),
    ],
)
def test_what_is_no_scene_is_refused(call, said):
    with pytest.raises(UserError, match=said):
        call()
