"""AlignProp as an algorithm: one update is one yield, the reward rises, the options do what they say."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from toy import ToyModel, batch, smooth_reward

from tropism.align.alignprop import alignprop
from tropism.align.rollout import Chain, agreement_of, plain
from tropism.align.truncation import bernoulli
from tropism.align.update import reward_loss
from tropism.core import Draw, Stream, UserError, clamp, generator
from tropism.rewards.combine import weighted
from tropism.rewards.named import Named


def colour(images, batch):
    """Brightness of the first channel, bounded."""
    return torch.tanh(images[:, 0].mean((1, 2)))


def update(model, reward=colour, n=0, b=None, **options):
    run = alignprop(
        model, reward, b or batch(6), state={"kept": 1}, update=n, seed=4, **{"steps": 10, "guidance": 2.0, **options}
    )
    loss, info = next(run)
    for p in model.trainable().values():
        p.grad = None
    loss.backward()
    with pytest.raises(StopIteration) as end:
        next(run)
    assert end.value.value == {"kept": 1}
    return loss, info, torch.cat([p.grad.flatten() for p in model.trainable().values()])


def by_hand(model, b, n, drift=0.0, detach=False, loss=lambda r: -r, detach_input=False):
    """One update by its definition, in one autograd graph: (loss, gradient, penalty (B,), rewards (B,))."""
    draw, times = Draw(4, n, b.index), model.process.times(10)
    active, cond = tuple(bernoulli(10, generator(4, Stream.TRUNCATION, n))), model.encode(b)

    def penalty(x, out, t, cond):
        with model.base():
            reference = model.predict(x.detach() if detach else x, t, cond, 2.0)
        return drift * (out - (reference.detach() if detach else reference)).pow(2).flatten(1).mean(1) / sum(active)

    chain = Chain(model, colour, b, cond, draw, tuple(times.tolist()), 2.0, active, step_loss=penalty,
                  detach_input=detach_input)  # fmt: skip
    found = plain(chain, model.start(cond, draw, times)[0], loss, list(model.trainable().values()))
    total = found.losses.sum() + found.step_losses.sum()
    return total, torch.cat([g.flatten() for g in found.gradient]), found.step_losses, found.rewards


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"hinge": 0.1}, {"loss": lambda r: (0.1 - r).clamp_min(0)}),
        ({"detach_input": True}, {"detach_input": True}),
        ({"drift": 0.3}, {"drift": 0.3}),
        ({"drift": 2.0, "drift_detach": True}, {"drift": 2.0, "detach": True}),
    ],
    ids=["plain", "hinge", "detach_input", "drift", "drift_detach"],
)
def test_an_update_is_what_it_is_defined_to_be(n, options, same):
    """Keyed by seed, update and each sample's global index; penalties averaged over the active steps."""
    model, b = ToyModel(), batch(8)[2:6]
    loss, info, gradient = update(model, n=n, b=b, truncation="bernoulli", **options)
    expected, slope, penalty, rewards = by_hand(model, b, n, **same)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert (gradient - slope).abs().max() < 1e-10 * max(1.0, slope.abs().max().item())
    assert torch.allclose(info.columns["reward"], rewards, rtol=0, atol=1e-12)
    assert info.scalars["drift_penalty"] == pytest.approx(penalty.mean().item(), rel=1e-9, abs=1e-15)
    assert info.scalars["loss"] == pytest.approx((expected - penalty.sum()).item() / 4, rel=1e-9)


def test_what_an_update_reports():
    part = lambda name, weight: Named(name, True, lambda images, b: weight * images.mean((1, 2, 3)))
    reward = weighted([(part("one", 1.0), 1), (part("two", 3.0), -0.5)])
    _, info, _ = update(ToyModel(), reward, truncation="3", micro_batch=2)
    assert list(info.columns) == ["reward", "one", "two"]
    torch.testing.assert_close(info.columns["reward"], info.columns["one"] - 0.5 * info.columns["two"])
    assert (info.samples, info.scalars["active_steps"], info.scalars["micro_batch"]) == (6, 3, 2)
    assert {k for k in info.scalars if k.startswith("step")} == {"step_norm/7", "step_norm/8", "step_norm/9"}
    assert info.scalars["cosine/one|two"] == pytest.approx(-1)  # they pull against each other
    assert info.scalars["part_norm/two"] == pytest.approx(1.5 * info.scalars["part_norm/one"])
    rows = {"forward": 2 * 6 * 10, "recompute": 2 * 6 * 3, "backward": 2 * 6 * 3}
    assert info.calls == {**rows, "decode": 6, "reward": 6, "reward_gradient": 18}  # of the sum, and of each part alone


def test_how_parts_agree_is_told_of_what_is_descended_also_at_clamped_pixels():
    x = torch.tensor([[1.4, 0.5], [-0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    terms = [(Named("dark", True, len), 1.0), (Named("light", True, len), 2.0)]
    images, reward = clamp(x), SimpleNamespace(terms=terms, scales={"dark": (0.0, 0.5)})
    told = agreement_of(reward, {"dark": -images.sum(1), "light": images.sum(1)}, x)
    assert told["part_norm/dark"].tolist() == pytest.approx(
        [2 * 2**0.5, 2.0]
    )  # 1.4 goes down into [0, 1], -.3 does not
    assert told["part_norm/light"].tolist() == pytest.approx([2.0, 2 * 2**0.5])
    assert told["cosine/dark|light"].tolist() == pytest.approx([-(0.5**0.5)] * 2)


class Late(ToyModel):
    """Starts at step 4, as an image-to-image model does."""

    def start(self, cond, draw, times):
        return super().start(cond, draw, times)[0], 4


def test_a_chain_that_starts_late_runs_only_its_own_steps():
    _, info, _ = update(Late(), truncation="full")
    assert info.scalars["active_steps"] == 6
    assert info.calls["forward"] == 2 * 6 * 6
    assert {k for k in info.scalars if "/" in k} == {f"step_norm/{i}" for i in range(4, 10)}
    with pytest.raises(UserError, match="6 steps run"):
        update(Late(), truncation=7)


def test_losses_in_closed_form_also_at_zero():
    r = torch.linspace(-1, 1, 9, dtype=torch.float64)
    assert torch.equal(reward_loss(None, None)(r), -r)
    for c in (0.0, 0.5):
        assert torch.equal(reward_loss(c, None)(r), torch.maximum(c - r, torch.zeros_like(r)))
        assert torch.equal(reward_loss(None, c)(r), (r - c).abs())


def gain(model, updates=20, **options):
    """How much training raises the mean reward on noise that it never saw."""
    optimiser = torch.optim.Adam(model.trainable().values(), lr=0.03)
    unseen = lambda: update(model, n=999, **options)[1].columns["reward"].mean().item()
    before = unseen()
    for n in range(updates):
        update(model, n=n, **options)
        optimiser.step()
    return unseen() - before


@pytest.mark.parametrize("policy", ["1", "3", "full", "suffix-uniform", "bernoulli", "suffix-gaussian"])
def test_the_reward_rises_in_twenty_updates(policy):
    assert gain(ToyModel(), truncation=policy) > 0.04


def test_on_fixed_noise_every_update_rises():
    """Same samples every update, small steps: the reward is monotone, and what it does not read moves less (spec check 17)."""
    model, first = ToyModel(), lambda images: images[:, 0].mean((1, 2))
    optimiser, rewards, pictures = torch.optim.SGD(model.trainable().values(), lr=0.02), [], []
    for _ in range(20):
        _, info, _ = update(model, truncation="full")
        rewards.append(info.columns["reward"].mean().item())
        pictures.append(info.images)
        optimiser.step()
    assert all(b > a for a, b in pairwise(rewards))
    moved = (pictures[-1] - pictures[0]).mean((0, 2, 3)).abs()
    assert (first(pictures[-1]) > first(pictures[0])).all()
    assert moved[0] > 2 * moved[1:].max()


def test_detached_inputs_also_rise():
    assert gain(ToyModel(), truncation="bernoulli", detach_input=True) > 0.04


def test_an_empty_draw_has_no_gradient_and_no_error():
    _, info, gradient = update(ToyModel(), truncation=lambda n, rng: [False] * n)
    assert info.scalars["active_steps"] == 0
    assert gradient.abs().max() == 0


def test_hinge_is_silent_beyond_its_threshold():
    _, _, gradient = update(ToyModel(), hinge=-2.0)
    assert gradient.abs().max() == 0
    assert torch.equal(update(ToyModel(), hinge=2.0)[2], update(ToyModel())[2])


def test_target_turns_round_above_itself():
    assert torch.allclose(update(ToyModel(), target=-2.0)[2], -update(ToyModel())[2])
    assert torch.allclose(update(ToyModel(), target=2.0)[2], update(ToyModel())[2])


def test_drift_pulls_back_to_the_base():
    """With a constant reward only the penalty is left: descending it brings the adapter's output towards the base's."""
    model = ToyModel()
    silent = lambda images, batch: 0 * images.sum((1, 2, 3))
    first = update(model, silent, drift=1.0)[1].scalars["drift_penalty"]
    optimiser = torch.optim.SGD(model.trainable().values(), lr=0.05)
    for _ in range(20):
        _, info, _ = update(model, silent, drift=1.0)
        optimiser.step()
    assert info.scalars["drift_penalty"] < 0.5 * first


def test_detached_drift_is_another_gradient_of_the_same_penalty():
    true, _, g = update(ToyModel(), drift=1.0)
    cheap, _, h = update(ToyModel(), drift=1.0, drift_detach=True)
    assert torch.allclose(true, cheap, rtol=1e-12)
    assert not torch.allclose(g, h)
    assert torch.cosine_similarity(g, h, 0) > 0.8


def test_micro_batches_add_up():
    """1 x 6 = 3 x 2 (spec check 9)."""
    whole, parts = (update(ToyModel(), truncation="bernoulli", drift=0.3, micro_batch=m)[2] for m in (6, 2))
    assert (whole - parts).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hinge": 1.0, "target": 1.0}, "one loss"),
        ({"drift": -1.0}, "negative"),
        ({"truncation": 11}, "10 steps"),
        ({"steps": 1000}, "1..100"),
    ],
)
def test_bad_options_are_explained(options, says):
    with pytest.raises(UserError, match=says):
        update(ToyModel(), **options)


def test_a_reward_without_a_graph_is_refused():
    def scored_by_numpy(images, batch):
        return torch.tensor(images.detach().numpy().mean((1, 2, 3)))

    with pytest.raises(UserError, match=r"scored_by_numpy.*without a gradient"):
        update(ToyModel(), scored_by_numpy)


def test_the_caller_keeps_its_gradient_mode():
    run = alignprop(ToyModel(), smooth_reward, batch(2), state={}, update=0, seed=0, steps=3)
    next(run)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("trained", [True, False])
def test_a_rewards_own_network_is_never_trained(trained):
    """Though its weights require a gradient and it stands in training mode: nothing of it moves and no gradient is left on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    net = net.double().train(trained)
    before = [p.detach().clone() for p in net.parameters()]
    model = ToyModel()
    optimiser = torch.optim.AdamW([*model.trainable().values(), *net.parameters()], lr=0.1)  # a careless list
    judge = lambda images, b: net(images)[:, 0]
    for update in range(2):
        for loss, _ in alignprop(model, judge, batch(3), state={}, update=update, seed=0, steps=4, truncation="2"):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert all(p.grad is None and torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))
    assert not torch.equal(model.b, ToyModel().b)
