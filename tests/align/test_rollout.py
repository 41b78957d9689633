"""The engine: gradients against central differences, the sweep against its plain twin, costs counted."""

from collections import Counter

import pytest
import torch
from toy import ToyModel, batch, draw, smooth_reward

from tropism.align.rollout import Chain, _forward, plain, sample, surrogate, sweep
from tropism.core import Batch, Draw, Stream, noise

N = 8
SETS = {
    "full": (True,) * N,
    "last": (False,) * (N - 1) + (True,),
    "suffix": (False,) * 5 + (True,) * 3,
    "holes": (False, True, False, False, True, True, False, True),
    "hole at the end": (False, False, True, False, True, False, False, False),
    "empty": (False,) * N,
}


def chain(model, active, b=None, guidance=3.0, steps=N, **options):
    b = b or batch()
    d = Draw(3, 0, b.index)
    cond = model.encode(b, d)
    times = model.process.times(steps, cond.shape)
    return Chain(
        model, options.pop("reward", smooth_reward), b, cond, d, tuple(times.tolist()), guidance, active, **options
    ), model.start(cond, d, times)[0]


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient])


def drift(model, detach=False):
    def penalty(x_t, out, t, cond):
        with model.base(), torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            return 0.3 * (out - model.predict(x_t, t, cond, 3.0)).pow(2).flatten(1).sum(1)

    return penalty


LOSSES = {
    "ascend": lambda r: -r,
    "hinge": lambda r: (0.1 - r).clamp_min(0),
    "target": lambda r: (r - 0.05).abs(),
    "square": lambda r: (r - 0.3).pow(2),  # a slope that is neither 0 nor 1
}


def by_hand(model, b, guidance=3.0, seed=3, update=0):
    """The chain as a loop over the process's reverse steps: the states x_0..x_N and each step's predicted clean state."""
    keyed = lambda stream, step: noise(seed, stream, update, b.index, step, 0, (2, 3, 3))[:, 0].double()
    times, cond = model.process.times(N).tolist(), model.encode(b)
    states, clean = [keyed(Stream.PRIOR, 0)], []
    for i in range(N):
        clean.append(model.x0(states[i], model.predict(states[i], times[i], cond, guidance), times[i]))
        kernel = model.process.reverse(states[i], clean[i], times[i], times[i + 1])
        states.append(kernel.sample(keyed(Stream.TRANSITION, i)))
    return states, clean


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    "options", [{}, {"detach_input": True}, {"penalty": True}, {"stop": 6}, {"penalty": True, "stop": 5}], ids=str
)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_sweep_equals_plain_autograd(name, options, eta):
    model = ToyModel(eta=eta)
    options = dict(options)
    extra = {"step_loss": drift(model)} if options.pop("penalty", False) else {}
    c, x = chain(model, SETS[name], **options, **extra)
    parameters = list(model.trainable().values())
    for loss in LOSSES.values():
        fast, slow = sweep(c, x, loss, parameters), plain(c, x, loss, parameters)
        assert torch.allclose(fast.rewards, slow.rewards, rtol=0, atol=1e-13)
        assert torch.allclose(fast.losses, slow.losses, rtol=0, atol=1e-13)
        assert torch.allclose(fast.step_losses, slow.step_losses, rtol=0, atol=1e-12)
        scale = max(1.0, flat(slow.gradient).abs().max().item())
        assert (flat(fast.gradient) - flat(slow.gradient)).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_full_chain_gradient_equals_central_differences(prediction, eta):
    model = ToyModel(eta=eta, prediction=prediction)
    c, x = chain(model, SETS["full"], step_loss=drift(model))
    parameters = list(model.trainable().values())
    gradient = sweep(c, x, lambda r: -r, parameters).gradient
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) for p in parameters]

    def value(h):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += h * d
            result = plain(c, x, lambda r: -r, parameters)
            for p, d in zip(parameters, direction, strict=True):
                p -= h * d
        return (result.losses.sum() + result.step_losses.sum()).item()

    h = 1e-4
    numeric = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    analytic = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item()
    assert abs(analytic - numeric) < 1e-6 * abs(numeric)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_samples_are_those_of_the_loop_written_out(eta):
    """Each step its own time, its own noise and the guidance asked for; from the sampler and from both engines."""
    model, b = ToyModel(eta=eta), batch()[1:4]
    with torch.no_grad():
        states, clean = by_hand(model, b)
        whole, early = model.decode(states[-1]), model.decode(clean[4])
    drawn = sample(model, b, Draw(3, 0, b.index), steps=N, guidance=3.0)
    assert not drawn.requires_grad
    assert (drawn - whole).abs().max() < 1e-12
    for engine in (sweep, plain):
        for stop, expected in ((None, whole), (4, early)):
            c, x = chain(model, SETS["holes"], b, stop=stop)
            assert (engine(c, x, LOSSES["ascend"], [model.a]).images - expected).abs().max() < 1e-12


def test_pieces_do_not_change_the_gradient():
    model = ToyModel(eta=0.5)
    c, x = chain(model, SETS["holes"], step_loss=drift(model))
    parameters = list(model.trainable().values())
    whole, pieces = (sweep(c, x, LOSSES["hinge"], parameters, m) for m in (5, 2))
    assert (flat(whole.gradient) - flat(pieces.gradient)).abs().max() < 1e-13
    assert (whole.piece, pieces.piece) == (5, 2)


def test_rows_of_a_slice_are_the_same_samples():
    """Drawing rows 2..4 alone gives the rows of the whole batch: noise belongs to the sample, not to its place."""
    model = ToyModel(eta=1.0)
    b = batch()
    c, x = chain(model, SETS["last"], b)
    part, y = chain(model, SETS["last"], b[2:5])
    whole, alone = sweep(c, x, LOSSES["ascend"], [model.a]), sweep(part, y, LOSSES["ascend"], [model.a])
    assert (whole.rewards[2:5] - alone.rewards).abs().max() < 1e-12


def test_last_step_alone_is_draft_1():
    """DRaFT-1 written out: roll out without a graph, one step with a graph, back-propagate (arXiv 2309.17400)."""
    model = ToyModel()
    c, x = chain(model, SETS["last"])
    z = x
    for i in range(N):
        with torch.set_grad_enabled(i == N - 1):
            t, s = c.times[i], c.times[i + 1]
            e = model.predict(z, t, c.cond, 3.0)
            a_t, a_s = model.process.alpha_bar(t), model.process.alpha_bar(s)
            z = a_s**0.5 * (z - (1 - a_t) ** 0.5 * e) / a_t**0.5 + (1 - a_s) ** 0.5 * e
    loss = -smooth_reward(model.decode(z), c.batch).sum()
    draft = torch.autograd.grad(loss, [model.a, model.b])
    assert (flat(draft) - flat(sweep(c, x, lambda r: -r, [model.a, model.b]).gradient)).abs().max() < 1e-12


class Copied(ToyModel):
    """Every step has its own copy of the parameters, by its time."""

    def __init__(self):
        super().__init__()
        self.copies = {}

    def predict(self, x_t, t, cond, guidance):
        mine = self.a, self.b
        self.a, self.b = self.copies.setdefault(t, [p.detach().clone().requires_grad_() for p in mine])
        out = super().predict(x_t, t, cond, guidance)
        self.a, self.b = mine
        return out


def test_the_gradient_is_the_sum_over_the_active_steps_own_copies():
    """Spec check 6: what the parameters get is the sum of what each active step's copy of them gets, and the norms are theirs."""
    model, copied = ToyModel(), Copied()
    c, x = chain(model, SETS["holes"])
    swept = sweep(c, x, lambda r: -r, [model.a, model.b])
    c, x = chain(copied, SETS["holes"])
    plain(c, x, lambda r: -r, [copied.a])  # makes the copies
    parts = plain(c, x, lambda r: -r, [p for t in c.times[:-1] for p in copied.copies[t]]).gradient
    apart = {i: flat(parts[2 * i : 2 * i + 2]) for i in range(N)}
    assert all(apart[i].abs().max() == 0 for i in range(N) if not SETS["holes"][i])
    assert (flat(swept.gradient) - sum(apart.values())).abs().max() < 1e-12
    assert swept.step_norms == pytest.approx({i: apart[i].norm().item() for i in swept.step_norms}, rel=1e-9)
    assert set(swept.step_norms) == {i for i in range(N) if SETS["holes"][i]}


def test_only_states_that_will_be_recomputed_are_kept():
    model = ToyModel()
    c, x = chain(model, SETS["suffix"])
    states, outputs, _ = _forward(c, x)
    assert set(states) == {i for i in range(N) if SETS["suffix"][i]}
    assert outputs == {}


def test_detached_steps_add_up():
    """With detached inputs the steps do not see each other: several active at once give the sum of each alone."""
    model = ToyModel()
    parameters = [model.a, model.b]
    one = lambda i: flat(
        sweep(chain(model, tuple(j == i for j in range(N)), detach_input=True)[0], x, lambda r: -r, parameters).gradient
    )
    c, x = chain(model, SETS["holes"], detach_input=True)
    together = flat(sweep(c, x, lambda r: -r, parameters).gradient)
    apart = {i: one(i) for i in range(N) if SETS["holes"][i]}
    assert (together - sum(apart.values())).abs().max() < 1e-10
    norms = sweep(c, x, lambda r: -r, parameters).step_norms
    assert norms == pytest.approx({i: g.norm().item() for i, g in apart.items()}, rel=1e-9)


def test_detached_inputs_give_the_closed_form():
    """DRTune: gradient = sum over active i of r' (product of a over later steps) b_i d e_i / d theta (spec check 8)."""
    from tropism.process.gaussian import linear_coefficients

    model = ToyModel()
    c, x = chain(model, SETS["holes"], detach_input=True)
    swept = sweep(c, x, lambda r: -r, [model.a])
    ab = linear_coefficients(model.process, c.times, "epsilon")
    states, z = [], x
    for i in range(N):
        states.append(z)
        z = c.advance(i, z, c.predict(i, z)).detach()
    z.requires_grad_()
    (slope,) = torch.autograd.grad(-smooth_reward(model.decode(z), c.batch).sum(), z)
    expected = torch.zeros_like(model.a)
    for i in range(N):
        if SETS["holes"][i]:
            carried = torch.tensor([a for a, _ in ab[i + 1 :]], dtype=torch.float64).prod() * ab[i][1]
            out = model.predict(states[i].detach(), c.times[i], c.cond, 3.0)
            expected += torch.autograd.grad((out * slope * carried).sum(), model.a)[0]
    assert (swept.gradient[0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", SETS)
def test_network_rows_follow_the_closed_form(name, guidance):
    """N forward, K recomputed, K backward, twice that under guidance; a hole costs nothing on the way back."""
    model = ToyModel()
    c, x = chain(model, SETS[name], guidance=guidance)
    rows = sweep(c, x, lambda r: -r, [model.a]).rows
    factor, active = len(x) * (1 if guidance == 1 else 2), sum(SETS[name])
    assert rows == {"forward": factor * N, "recompute": factor * active, "backward": factor * active}


class Watched(ToyModel):
    """Remembers of every network call its rows and whether a graph was being built."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def predict(self, x_t, t, cond, guidance):
        self.seen.append((len(x_t), torch.is_grad_enabled()))
        return super().predict(x_t, t, cond, guidance)


@pytest.mark.parametrize("size", [None, 2])
def test_only_recomputed_steps_see_a_graph_and_no_call_is_larger_than_a_piece(size):
    model = Watched()
    c, x = chain(model, SETS["suffix"])
    sweep(c, x, lambda r: -r, [model.a], size)
    pieces = [5] if size is None else [2, 2, 1]
    assert model.seen == [(n, False) for n in pieces for _ in range(N)] + [(n, True) for _ in range(3) for n in pieces]


@pytest.mark.parametrize(("detach", "backward"), [(False, 2), (True, 1)])
def test_the_drift_penalty_costs_k_more_rows(detach, backward):
    """The base runs beside every active step; a detached one is not walked back through."""
    model = ToyModel()
    c, x = chain(model, SETS["suffix"], step_loss=drift(model, detach))
    rows = sweep(c, x, lambda r: -r, [model.a]).rows
    assert rows["recompute"] == 2 * 2 * len(x) * 3
    assert rows["backward"] == backward * 2 * len(x) * 3


def test_surrogate_has_the_value_and_exactly_the_gradient():
    p = torch.randn(4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, dtype=torch.float64)
    loss = surrogate([g], [p], torch.tensor(2.5, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 2.5
    assert torch.equal(p.grad, g)


def test_a_reward_without_a_graph_is_seen():
    model = ToyModel()
    c, x = chain(model, SETS["last"], reward=lambda s, b: s.detach().mean((1, 2, 3)))
    assert not sweep(c, x, lambda r: -r, [model.a]).has_graph


def test_a_graph_must_reach_every_piece():
    model = ToyModel()
    some = lambda s, b: (s if b.index[0] < 2 else s.detach()).mean((1, 2, 3))
    c, x = chain(model, SETS["last"], reward=some)
    assert sweep(c, x, lambda r: -r, [model.a], 5).has_graph
    assert not sweep(c, x, lambda r: -r, [model.a], 2).has_graph


def test_the_share_of_clamped_values_counts_both_walls():
    model = ToyModel()
    model.read = 4 * model.read
    c, x = chain(model, SETS["last"])
    swept = sweep(c, x, lambda r: -r, [model.a])
    low, high = ((swept.images <= 0).double().mean().item(), (swept.images >= 1).double().mean().item())
    assert min(low, high) > 0.02
    assert swept.clamped == pytest.approx(low + high, rel=1e-6)


def test_two_steps_never_share_their_noise():
    """The noise is drawn per (step, sample)."""
    d = draw()
    drawn = [d(Stream.TRANSITION, i, (4,)) for i in range(6)]
    assert Counter(tuple(row.tolist()) for block in drawn for row in block).most_common(1)[0][1] == 1


def test_batch_rows_keep_their_whole():
    b = Batch(["a", "b", "c"])
    assert b[1:].whole is b
    assert b[1:][1:].index == (2,)
