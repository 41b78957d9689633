"""DDPO: ratios of one, the clipped objective written out, an unbiased gradient where the right one is known, memory by prompt."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from toy import ToyModel, batch, smooth_reward, table

from tropism import core
from tropism.align import ddpo as algorithm
from tropism.align.advantage import ADVANTAGES, KEPT, LEAST, remembered
from tropism.align.ddpo import ascend, ddpo, log_density, walk
from tropism.align.update import begin
from tropism.core import Batch, Normal, Stream, UserError
from tropism.process.gaussian import VP, Flow, linear_coefficients

N, SEED = 6, 4


def steps_of(model, b=None, state=None, n=0, reward=smooth_reward, **options):
    """[(gradient, info) of each yield without a step between them], next state."""
    run, found = (
        ddpo(model, reward, b or batch(8), state=state or {}, update=n, seed=SEED, steps=N, guidance=2.0, **options),
        [],
    )
    while True:
        try:
            loss, info = next(run)
        except StopIteration as end:
            return found, end.value
        for p in model.trainable().values():
            p.grad = None
        loss.backward()
        found.append((torch.cat([p.grad.flatten() for p in model.trainable().values()]), info))


def test_ratios_are_one_before_the_first_step():
    """Spec check 13. With one minibatch the loss is then minus the mean advantage."""
    found, _ = steps_of(ToyModel(eta=1.0), minibatches=4, inner_epochs=2)
    assert len(found) == 8
    assert all(info.scalars["ratio_error"] < 1e-12 and info.scalars["clipped"] == 0 for _, info in found)
    (one, info), *_ = steps_of(ToyModel(eta=1.0), minibatches=1)[0]
    assert abs(info.scalars["loss"]) < 1e-9
    assert one.norm() > 0


def test_densities_are_a_mean_over_dimensions():
    g = torch.Generator().manual_seed(0)
    mean, x = (torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(log_density(Normal(mean, 0.3), x), expected)


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_the_clipped_objective_by_hand(kl):
    """After the weights have moved: max(-A rho, -A clip(rho)) of stored pairs, a mean over steps, a sum over samples."""
    model, b = ToyModel(eta=1.0), batch(8)
    chain, x_T = begin(model, smooth_reward, b, seed=SEED, update=0, steps=N, guidance=2.0)
    path = walk(chain, x_T, None)
    with torch.no_grad():
        model.a.mul_(1.05)
    advantages = torch.linspace(-2, 2, 8, dtype=torch.float64)
    rows, c = torch.tensor([5, 0, 7, 2]), 2e-3
    gradient, told = ascend(chain, path, advantages, rows, c, kl, None)
    objective, outside = 0, 0
    stochastic = [i for i in range(N) if i in path.log_probs]
    assert stochastic == list(range(N - 1))  # final alpha-bar 1: the last step has no noise
    for i in stochastic:
        t, s = chain.times[i : i + 2]
        x, y, part = path.states[i][rows], path.states[i + 1][rows], chain.cond[rows]
        kernel = model.kernel(x, t, s, part, 2.0)[0]
        normal = torch.distributions.Normal(kernel.mean, kernel.std)
        rho = (normal.log_prob(y).flatten(1).mean(1) - path.log_probs[i][rows]).exp()
        outside += int(((rho - 1).abs() > c).sum())
        a = advantages[rows]
        with model.base(), torch.no_grad():
            base = model.kernel(x, t, s, part, 2.0)[0]
        away = torch.distributions.kl_divergence(normal, torch.distributions.Normal(base.mean, base.std))
        objective = objective + torch.maximum(-a * rho, -a * rho.clamp(1 - c, 1 + c)).sum()
        objective = objective + kl * away.flatten(1).mean(1).sum()
    objective = objective / len(stochastic)
    expected = torch.autograd.grad(objective, list(model.trainable().values()))
    for g, e in zip(gradient, expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-9, atol=1e-13)
    assert told["loss"] == pytest.approx(objective.item() / 4, rel=1e-9)
    assert 0 < outside < 20  # some ratios are clipped, some are not
    assert told["clipped"] == pytest.approx(outside / 20)


class Constant:
    """One dimension; the network says theta whatever it is asked, so the mean of x_0 is linear in theta."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, process, prediction):
        self.process, self.prediction, self.calls = process, prediction, {}
        self.theta = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def encode(self, b, draw=None):
        return _Cond(len(b))

    def start(self, cond, draw, times):
        return draw(Stream.PRIOR, 0, cond.shape).double(), 0

    def predict(self, x_t, t, cond, guidance):
        return self.theta.expand(x_t.shape)

    def x0(self, x_t, out, t):
        return self.process.x0(x_t, out, t, self.prediction)

    def decode(self, x0):
        return x0

    kernel = core.kernel

    def base(self):
        return nullcontext()

    def trainable(self):
        return {"theta": self.theta}


class _Cond:
    shape = (1, 1, 1)

    def __init__(self, n):
        self.n = n

    def __getitem__(self, rows):
        return self


class Design:
    """In place of draws: 2 d points whose mean is 0 and whose covariance is 1, so that means of quadratics are exact."""

    def __init__(self, points):
        self.points = points

    def __call__(self, stream, step, shape, k=0):
        assert stream == Stream.TRANSITION
        return self.points[:, step + 1].reshape(-1, *shape)

    def __getitem__(self, rows):
        return Design(self.points[rows])


@pytest.mark.parametrize("kind", ["DDPM", "flow SDE"])
def test_the_gradient_is_unbiased_where_the_right_one_is_known(kind):
    """E[x_0] = theta sum_i b_i prod a. Reward and score are linear in the noise, so the mean of their product is exact on a design."""
    if kind == "DDPM":
        process, prediction = VP(table(), "leading", 0, 1.0, 0.9999), "epsilon"
    else:
        process, prediction = Flow("even", eta=0.7), "velocity"
    times = process.times(N, (1, 1, 1)).tolist()
    right, later = 0.0, 1.0
    for a, b in reversed(linear_coefficients(process, times, prediction)):
        right, later = right + later * b, later * a
    model, d = Constant(process, prediction), N + 1  # x_T and N steps
    points = d**0.5 * torch.cat([torch.eye(d), -torch.eye(d)]).double()
    reward = lambda x, b: 3 + x[:, 0, 0, 0]
    chain, _ = begin(model, reward, Batch([""] * 2 * d), seed=0, update=0, steps=N, guidance=1.0)
    chain = replace(chain, draw=Design(points))
    path = walk(chain, points[:, 0].reshape(-1, 1, 1, 1), None)
    (total,), _ = ascend(chain, path, path.rewards, torch.arange(2 * d), 1.0, 0.0, None)
    if kind == "flow SDE":  # its last step has no noise, so theta's part in it is out of a policy gradient's reach
        right -= linear_coefficients(process, times, prediction)[-1][1]
    assert -total.item() * len(path.log_probs) / (2 * d) == pytest.approx(right, rel=1e-9)


def test_advantages_are_clipped_on_both_sides():
    """Before the first step every ratio is 1, so the loss is minus the mean of the clipped advantages."""
    for sign in (1, -1):
        outlier = lambda images, b, sign=sign: sign * torch.tensor([9.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
        (_, info), *_ = steps_of(
            ToyModel(eta=1.0), reward=outlier, minibatches=1, advantage="batch", advantage_clip=0.7
        )[0]
        whole = ADVANTAGES["batch"](info.columns["reward"], [""] * 8, {})
        assert whole.abs().max() > 2
        assert info.scalars["loss"] == pytest.approx(-whole.clamp(-0.7, 0.7).mean().item(), rel=1e-6)


def test_rows_are_shuffled_anew_every_epoch_and_update(monkeypatch):
    seen = []

    def spy(chain, path, advantages, rows, *rest):
        seen.append(rows.tolist())
        return ascend(chain, path, advantages, rows, *rest)

    monkeypatch.setattr(algorithm, "ascend", spy)
    for n in (0, 0, 1):
        steps_of(ToyModel(eta=1.0), n=n, minibatches=2, inner_epochs=2)
    orders = [first + second for first, second in zip(seen[::2], seen[1::2], strict=True)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    first, second, again, _, later, _ = orders
    assert first == again
    assert len({tuple(order) for order in (first, second, later, range(8))}) == 4


def test_rewards_belong_to_their_prompts_whatever_the_order_of_rows():
    """As another process gathers them: by the samples' global indices."""
    one, order = batch(8), [5, 0, 7, 2, 1, 6, 4, 3]
    other = Batch([one.prompts[i] for i in order], index=tuple(order))
    found, state = steps_of(ToyModel(eta=1.0), one, minibatches=1)
    moved, same = steps_of(ToyModel(eta=1.0), other, minibatches=1)
    assert {p: pytest.approx(r) for p, r in state["rewards"].items()} == same["rewards"]
    assert len({r for (r,) in same["rewards"].values()}) == 8
    assert torch.allclose(found[0][0], moved[0][0], rtol=1e-9, atol=1e-13)


def test_the_reward_rises():
    model, state, b = ToyModel(eta=1.0), {}, Batch(["x thing"] * 32)
    colour = lambda images, _: torch.tanh(images[:, 0].mean((1, 2)))
    optimiser = torch.optim.Adam(model.trainable().values(), lr=0.03)
    unseen = lambda: steps_of(model, b, n=999, reward=colour)[0][0][1].columns["reward"].mean()
    before = unseen()
    for n in range(60):
        run = ddpo(model, colour, b, state=state, update=n, seed=SEED, steps=N, guidance=2.0, clip_range=0.1)
        while True:
            try:
                loss, _ = next(run)
            except StopIteration as end:
                state = end.value
                break
            for p in model.trainable().values():
                p.grad = None
            loss.backward()
            optimiser.step()
    assert unseen() - before > 0.07


def test_pieces_and_processes_do_not_matter():
    whole, parts = (steps_of(ToyModel(eta=1.0), micro_batch=m)[0] for m in (None, 3))
    for (g, _), (h, _) in zip(whole, parts, strict=True):
        assert (g - h).abs().max() < 1e-12


def test_costs_are_counted():
    found, _ = steps_of(ToyModel(eta=1.0), minibatches=2, inner_epochs=3)
    first, rest = found[0][1].calls, [info.calls for _, info in found[1:]]
    assert first["forward"] == 2 * 8 * N
    assert (first["reward"], first["decode"]) == (8, 8)
    assert all(set(c) == {"recompute", "backward"} for c in rest)
    assert all(c["recompute"] == c["backward"] == 2 * 4 * (N - 1) for c in [first, *rest])


def test_a_prompts_own_statistics_count_once_there_are_enough():
    rewards = torch.arange(4, dtype=torch.float64)
    prompts = ["a", "b", "a", "c"]
    old = {"a": [1.0, 5.0] * (LEAST // 2 - 1)}
    past = remembered(old, prompts, rewards)
    assert past["a"][-2:] == [0.0, 2.0]
    assert (len(past["a"]), past["b"], past["c"]) == (LEAST, [1.0], [3.0])
    assert old == {"a": [1.0, 5.0] * (LEAST // 2 - 1)}
    own = torch.tensor(past["a"], dtype=torch.float64)
    found = ADVANTAGES["per-prompt"](rewards, prompts, past)
    for i in (0, 2):
        assert found[i].item() == pytest.approx(((rewards[i] - own.mean()) / own.std(correction=0)).item(), abs=1e-5)
    for i in (1, 3):
        assert found[i].item() == pytest.approx(((rewards[i] - 1.5) / rewards.std(correction=0)).item(), abs=1e-5)
    kept = remembered({"a": [float(i) for i in range(KEPT)], "b": [5.0]}, ["a", "a"], torch.tensor([70.0, 80.0]))
    assert kept == {"a": [*range(2, KEPT), 70.0, 80.0], "b": [5.0]}, "the newest"


def test_a_group_is_a_prompt_in_this_batch():
    rewards = torch.tensor([1.0, 3.0, 10.0, 7.0], dtype=torch.float64)
    found = ADVANTAGES["group"](rewards, ["a", "a", "b", "b"], {})
    assert torch.allclose(found, torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=torch.float64), atol=1e-5)
    assert ADVANTAGES["group"](rewards, list("abcd"), {}).abs().max() == 0
    assert ADVANTAGES["batch"](rewards, list("abcd"), {}).mean().abs() < 1e-12


def test_the_state_is_plain_and_goes_on():
    _, state = steps_of(ToyModel(eta=1.0))
    assert json.loads(json.dumps(state)) == state
    assert {p: len(r) for p, r in state["rewards"].items()} == dict.fromkeys(batch(8).prompts, 1)
    _, later = steps_of(ToyModel(eta=1.0), state=state, n=1)
    assert {len(r) for r in later["rewards"].values()} == {2}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"minibatches": 9}, "minibatches is 9 for 8 samples"),
        ({"minibatches": 0}, "minibatches is 0"),
        ({"inner_epochs": 0}, "inner_epochs is 0"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"kl": -1.0}, "kl"),
        ({"advantage": "mean"}, "no advantage 'mean'"),
        ({"advantage": "group"}, "alone in it.*--per-prompt 4"),
    ],
)
def test_bad_options_are_explained(options, says):
    with pytest.raises(UserError, match=says):
        steps_of(ToyModel(eta=1.0), **options)


def test_a_deterministic_chain_is_refused():
    with pytest.raises(UserError, match="--eta 1"):
        steps_of(ToyModel(eta=0.0))


def test_a_reward_in_integers_and_numpy_will_do():
    def whole(images, b):
        return torch.from_numpy((images.numpy() * 20).round().mean((1, 2, 3)))

    found, _ = steps_of(ToyModel(eta=1.0), reward=whole)
    assert found[0][0].norm() > 0
