"""What distillation compares with: classifier score, control variate, a second network, other views, liked noises."""

from functools import partial

import pytest
import torch
from known import PREDICTIONS, Known, process_of
from toy import ToyModel

from tropism.core import Batch, Draw, Stream, UserError
from tropism.scene.distill import csd, distilled, gradient, isd, noised, score_losses, sds, vsd
from tropism.scene.perp_neg import decay, perp_neg, perpendicular, words
from tropism.scene.reward_sds import reward_sds, shares
from tropism.scene.views import asked
from tropism.space.cameras import VIEWS, cameras
from tropism.worlds.mixture import Law, MixtureModel

SHAPE = (3, 4, 4)
draw = lambda k=0, n=2, shape=SHAPE: Draw(7, 0, tuple(range(n)))(Stream.RENOISE, 0, shape, k).double()
uniform = lambda k=1, n=2: torch.special.ndtr(draw(k, n))
MEANS = {"cube": uniform(2)[0], "": uniform(3)[0], "dog": uniform(4)[0]}
MEANS |= {words: uniform(20 + i)[0] for i, words in enumerate(asked("cube", VIEWS))}
of = lambda loss, x: torch.autograd.grad(loss, x)[0]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def setting(prediction="epsilon", prompts=("cube", "dog")):
    model = Known(MEANS, 0.3, prediction)
    t = 0.6 if prediction == "velocity" else 55.0
    at = noised(model.process, uniform(), t, draw())
    return model, at, model.encode(Batch(list(prompts))), t


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_csd_is_sds_without_the_unconditional_part(prediction):
    model, at, cond, t = setting(prediction)
    free, told = (model.expected(at.z_t, t, prompts) for prompts in (["", ""], ["cube", "dog"]))
    base, hat = csd(model, at, cond, 7.5)
    close(hat - base, 7.5 * (told - free))
    of_noise = gradient(model.process, at, at.x0, free)
    whole = gradient(model.process, at, *sds(model, at, cond, 7.5))
    close(gradient(model.process, at, base, hat), whole - of_noise)


def test_csd_without_words_is_nothing():
    model, at, _, _ = setting()
    base, hat = csd(model, at, model.encode(Batch(["", ""])), 7.5)
    assert torch.equal(base, hat)


def test_isd_takes_the_prediction_without_the_visual_prompt():
    model, at, cond, t = setting()
    visual = lambda scale: model.encode(Batch(["cube", "dog"], visual=uniform(8), visual_scale=torch.tensor(scale)))
    base, hat = isd(model, at, visual([0.5, 0.5]), 1.0, control=visual([0.0, 0.0]))
    close(base, model.expected(at.z_t, t, ["cube", "dog"]))
    alpha, sigma = model.process.alpha(t), model.process.sigma(t)
    moved = 0.5 * (uniform(8) - torch.stack([MEANS["cube"], MEANS["dog"]]))
    close(hat - base, sigma**2 / (alpha**2 * 0.09 + sigma**2) * moved)
    same = isd(model, at, visual([0.0, 0.0]), 1.0, control=cond)
    assert torch.equal(*same)
    guided = isd(model, at, cond, 5.0, control=cond)
    assert torch.equal(guided[0], same[0]) and torch.equal(guided[1], sds(model, at, cond, 5.0)[1])


def test_isd_varies_less_than_sds():
    """Its purpose: of the same render, under ever new noise; here what the picture adds is the same for all of it."""
    model, n = Known(MEANS, 0.3), 64
    x, eps = uniform(1, 1).expand(n, *SHAPE), draw(0, n)
    visual = uniform(8, 1).expand(n, *SHAPE)
    cond = lambda scale: model.encode(Batch(["cube"] * n, visual=visual, visual_scale=torch.full((n,), scale)))
    at = noised(model.process, x, 55.0, eps)
    spread = lambda pair: gradient(model.process, at, *pair).var(0).mean()
    control = isd(model, at, cond(0.5), 1.0, control=cond(0.0))
    assert spread(control) < 1e-24
    assert spread(sds(model, at, cond(0.5), 1.0)) > 1e-3


# ---------------------------------------------------------------------------------------------------- the second network


class TwoSided(ToyModel):
    """ToyModel on latents (2, 3, 3), which are the samples too."""

    def latents(self, samples):
        return samples


def test_two_losses_of_vsd_have_disjoint_parameters():
    """One network, its adapter off and on: the scene's loss has no gradient on the adapter, the adapter's none on the scene."""
    model = TwoSided()
    scene = draw(1, 2, (2, 3, 3)).requires_grad_()
    cond, t, eps = model.encode(Batch(["a", "bb"])), torch.tensor([40.0, 70.0]).double(), draw(0, 2, (2, 3, 3))
    method = partial(vsd, score=model, score_cond=cond)
    x0 = 2 * scene
    loss, _ = distilled(model, x0, t, eps, cond, guidance=3.0, method=method)
    learning = score_losses(model, x0, t, draw(5, 2, (2, 3, 3)), cond).mean()
    adapter = list(model.trainable().values())
    of_scene = torch.autograd.grad(loss, [scene, *adapter], allow_unused=True, retain_graph=True)
    of_score = torch.autograd.grad(learning, [scene, *adapter], allow_unused=True, retain_graph=True)
    assert of_scene[0].abs().max() > 0 and of_scene[1:] == (None, None)
    assert of_score[0] is None and all(g.abs().max() > 0 for g in of_score[1:])
    both = torch.autograd.grad(loss + learning, [scene, *adapter])
    assert all(torch.equal(a, b) for a, b in zip(both, (of_scene[0], *of_score[1:]), strict=True))
    at = noised(model.process, x0, t, eps)
    base, hat = vsd(model, at, cond, 1.0, score=model, score_cond=cond)
    assert (base - hat).abs().max() > 1e-3 and model.on  # the adapter was off for one of them
    with model.base():
        assert torch.equal(*vsd(model, at, cond, 1.0, score=model, score_cond=cond))


def test_vsd_is_at_rest_where_the_renders_follow_the_law():
    """A second network that knows the target itself: nothing pulls, whatever the render. SDS pulls to the mean."""
    model, at, cond, _ = setting()
    base, hat = vsd(model, at, cond, 1.0, score=Known(MEANS), score_cond=cond)
    assert torch.equal(base, hat)
    guided = vsd(model, at, cond, 5.0, score=Known(MEANS), score_cond=cond)
    assert torch.equal(guided[0], base) and torch.equal(guided[1], sds(model, at, cond, 5.0)[1])
    other = Known(MEANS | {"cube": MEANS["dog"]})
    base, hat = vsd(model, at, cond, 1.0, score=other, score_cond=cond)
    close(base[1], hat[1])
    assert (base[0] - hat[0]).abs().max() > 1e-3


def test_score_losses_are_of_noise_and_least_for_the_true_score():
    process = process_of("epsilon")
    model = Known(MEANS, 0.3)
    eps, t = draw(0, 2), torch.tensor([20.0, 60.0]).double()
    z_t = process.forward(uniform(), t, eps)
    out = model.predict(z_t, t, model.encode(Batch(["cube", "dog"])), 1.0)
    found = score_losses(model, uniform(), t, eps, model.encode(Batch(["cube", "dog"])))
    close(found, (out - eps).square().flatten(1).mean(1))
    n, mixture = 4000, MixtureModel(Law.of([1], [[0.5, -0.5]], [0.04]))
    x0 = mixture.law.means + 0.2 * draw(11, n, (2,))
    cond, noise = mixture.encode(Batch(["x"] * n)), draw(12, n, (2,))
    losses = score_losses(mixture, x0, 3.0, noise, cond).mean().item()
    bar = mixture.process.alpha_bar(3.0)
    assert losses == pytest.approx(bar * 0.04 / (bar * 0.04 + 1 - bar), rel=0.05)
    mixture.law = Law.of([1], [[0.4, -0.5]], [0.04])
    assert score_losses(mixture, x0, 3.0, noise, cond).mean().item() > 1.01 * losses


# ---------------------------------------------------------------------------------------------------- other views


def test_perpendicular_part():
    e, positive = draw(1)
    apart = perpendicular(e, positive)
    assert abs((apart * positive).sum().item()) < 1e-12 * e.norm() * positive.norm()
    close(apart + (e * positive).sum() / positive.square().sum() * positive, e)
    assert not perpendicular(positive, positive).any()
    assert perpendicular(-3 * positive, positive).abs().max() < 1e-14
    assert torch.equal(perpendicular(e, torch.zeros_like(e)), e)


def test_words_of_a_camera():
    assert words(0, 15) == [(0, 1.0, pytest.approx(0, abs=1e-3)), (1, 0.0, pytest.approx(-1.574))]
    assert words(45, 15)[0][1] == words(-45, 15)[1][1] == 0.5
    assert words(180, 15) == [(1, 0.0, pytest.approx(-0.394)), (2, 1.0, 0.0), (0, 0.0, pytest.approx(-1.967))]
    assert words(10, 61) == [(3, 1.0, 0.0)]
    assert words(200, 0) == words(-160, 0) == words(560, 0) == words(160, 0)
    total = lambda azimuth, row, part: sum(x[part] for x in words(azimuth, 0) if x[0] == row)
    for row in range(3):  # nothing jumps at the side
        for part in (1, 2):
            assert total(89.999, row, part) == pytest.approx(total(90.001, row, part), abs=2e-3)
    for azimuth in range(0, 360, 7):
        assert sum(x[1] for x in words(azimuth, 0)) == pytest.approx(1)
        assert all(x[2] <= 1e-3 for x in words(azimuth, 0))
    assert decay(4, 0.5, -2.426, 1.0) == pytest.approx(0, abs=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perp_neg_by_its_equation(prediction):
    model, at, _, t = setting(prediction)
    cond, seen = model.encode(Batch(asked("cube", VIEWS) * 2)), cameras([30.0, 150.0])
    base, hat = perp_neg(model, at, cond, 7.5, cameras=seen)
    assert torch.equal(base, at.x0)
    alpha, sigma = model.process.alpha(t), model.process.sigma(t)
    eps = lambda word: (at.z_t - alpha * model.expected(at.z_t, t, [word] * 2)) / sigma
    front, side, back, free = *(eps(f"cube, {view} view") for view in VIEWS[:3]), eps("")
    for i, (positive, negatives) in enumerate(
        [
            (
                2 / 3 * front + 1 / 3 * side,
                [(front, -decay(4, 0.5, -2.426, 2 / 3)), (side, -decay(4, 0.5, -2.426, 1 / 3))],
            ),
            (
                1 / 3 * side + 2 / 3 * back,
                [(side, -decay(1, 0.5, -0.606, 1 / 3)), (front, -decay(1, 0.5, 0.967, 1 / 3))],
            ),
        ]
    ):
        e_pos, eps_hat = (positive - free)[i], free[i]
        for negative, weight in negatives:
            e = (negative - free)[i]
            e_pos_unit = (positive - free)[i] / (positive - free)[i].norm()
            e_pos = e_pos + weight * (e - (e * e_pos_unit).sum() * e_pos_unit)
        eps_hat = eps_hat + 7.5 * e_pos
        close((at.z_t[i] - alpha * hat[i]) / sigma, eps_hat)


def test_perp_neg_without_a_choice_is_plain_guidance():
    model, at, _, _ = setting()
    words = asked("cube", VIEWS)
    hat = perp_neg(model, at, model.encode(Batch(words * 2)), 7.5, cameras=cameras([0.0, 10.0], [75.0, 80.0]))[1]
    close(hat, sds(model, at, model.encode(Batch([words[3]] * 2)), 7.5)[1])
    same = model.encode(Batch(["cube"] * 8))  # every view is told the same: no negative is left of it
    hat = perp_neg(model, at, same, 7.5, cameras=cameras([30.0, 150.0]))[1]
    close(hat, sds(model, at, same[[0, 0]], 7.5)[1])


# ---------------------------------------------------------------------------------------------------- liked noises


def brightness(pictures, batch):
    return pictures.detach().flatten(1).mean(1)


@pytest.mark.parametrize("m", [1, 5])
def test_reward_sds_by_hand(m):
    model, _, cond, _ = setting()
    x, t = uniform().requires_grad_(), torch.tensor([40.0, 70.0]).double()
    eps = Draw(7, 0, (0, 1)).many(Stream.RENOISE, 0, SHAPE, m).double()
    loss, rewards = reward_sds(
        model, brightness, x, t, eps, cond, Batch(["cube", "dog"]), guidance=3.0, temperature=0.01
    )
    expected, each = torch.zeros_like(x), []
    for k in range(m):
        at = noised(model.process, x, t, eps[:, k])
        base, hat = sds(model, at, cond, 3.0)
        each.append((hat.flatten(1).mean(1), gradient(model.process, at, base, hat)))
    p = torch.stack([r for r, _ in each], 1).div(0.01).softmax(1)
    for k in range(m):
        expected = expected + p[:, k].reshape(2, 1, 1, 1) * each[k][1] / 2
    found = of(loss, x)
    close(found, expected)
    close(rewards, torch.stack([r for r, _ in each], 1))
    if m == 1:
        assert torch.equal(found, of(distilled(model, x, t, eps[:, 0], cond, guidance=3.0)[0], x))
    method = partial(isd, control=cond)
    other, _ = reward_sds(model, brightness, x, t, eps, cond, Batch(["a", "b"]), guidance=3.0, method=method)
    assert other.requires_grad


def test_liked_noises_raise_the_reward():
    """Descending RewardSDS makes brighter pictures than descending SDS from the same noises does."""
    model, n, m = Known(MEANS, 0.3), 8, 8
    cond, batch = model.encode(Batch(["cube"] * n)), Batch(["cube"] * n)
    ended = []
    for temperature in (1e6, 0.0):
        x = uniform(1, n).clone()
        for step in range(20):
            leaf = x.requires_grad_()
            eps = Draw(7, step, tuple(range(n))).many(Stream.RENOISE, 0, SHAPE, m).double()
            how = {"guidance": 1.0, "temperature": temperature}
            loss, _ = reward_sds(model, brightness, leaf, 55.0, eps, cond, batch, **how)
            x = (leaf - 0.3 * n * of(loss, leaf)).detach()
        ended.append(brightness(x, batch).mean().item())
    assert ended[1] > ended[0] + 0.01


def test_shares_of_noises():
    exact = partial(torch.tensor, dtype=torch.float64)
    rewards = exact([[1.0, 2.0, 4.0], [3.0, 3.0, torch.nan], [torch.nan] * 3])
    close(shares(rewards, 2.0)[0], exact([0.5, 1.0, 2.0]).softmax(0))
    close(shares(rewards, 2.0)[1:], exact([[0.5, 0.5, 0.0], [1 / 3] * 3]))
    close(shares(rewards, 0.0), exact([[0, 0, 1.0], [0.5, 0.5, 0], [1 / 3] * 3]))
    assert torch.isfinite(shares(rewards, 1e-8)).all()
    model, _, cond, _ = setting()
    with pytest.raises(UserError, match="temperature is -1"):
        reward_sds(
            model, brightness, uniform(), 55.0, draw()[:, None], cond, Batch(["", ""]), guidance=1.0, temperature=-1.0
        )
