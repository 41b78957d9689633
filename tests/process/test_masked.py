"""Masked diffusion and its kernels: what may change, what sums to 1, and relaxed states beside hard ones."""

import pytest
import torch

from tropism.core import TERMINAL, Kernel, UserError
from tropism.process.kernels import Categorical, Mixture, RelaxedCategorical
from tropism.process.masked import Masked

P = Masked(4)
G = torch.Generator()


def probabilities(b=3, length=6, v=4):
    return torch.randn(b, length, v, generator=G.manual_seed(0), dtype=torch.float64).softmax(-1)


def normals(*shape, seed=1):
    return torch.randn(*shape, generator=G.manual_seed(seed))


X = torch.tensor([[4, 0, 4, 3, 4, 4], [4] * 6, [0, 1, 2, 3, 0, 1]])


def test_times_and_masks():
    t = P.times(4)
    assert t.tolist() == [1, 0.75, 0.5, 0.25, TERMINAL]
    assert (P.sigma(1.0), P.sigma(TERMINAL)) == (0.999, 0.0)
    assert P.alpha(torch.tensor([0.5, TERMINAL])).tolist() == pytest.approx([1 - 0.4995, 1])
    assert P.loss_weight(0.25) == 4
    with pytest.raises(UserError, match="steps is 0"):
        P.times(0)


def test_forward_masks_its_share():
    clean = torch.randint(4, (2000, 50), generator=G.manual_seed(3))
    for t in (0.2, 0.9):
        x = P.forward(clean, t, normals(2000, 50))
        assert (x == 4).double().mean().item() == pytest.approx(0.999 * t, abs=0.005)
        assert (x[x != 4] == clean[x != 4]).all()
    each = P.forward(clean[:2], torch.tensor([1e-9, 1.0]), normals(2, 50))
    assert (each[0] != 4).all() and (each[1] == 4).double().mean() > 0.9


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.75), (0.5, 0.25), (0.25, TERMINAL)])
def test_a_step(t, s):
    kernel = P.reverse(X, probabilities(), t, s)
    assert isinstance(kernel, Kernel)
    torch.testing.assert_close(kernel.probs.sum(-1), torch.ones(3, 6, dtype=torch.float64))
    masked = X == 4
    stay = float(P.sigma(s)) / float(P.sigma(t))
    torch.testing.assert_close(
        kernel.probs[..., 4][masked], torch.full((int(masked.sum()),), stay, dtype=torch.float64)
    )
    torch.testing.assert_close(kernel.probs[..., :4][masked], (1 - stay) * probabilities()[masked])
    for seed in range(20):
        y = kernel.sample(normals(3, 6, seed=seed))
        assert (y[~masked] == X[~masked]).all()
        assert s != TERMINAL or (y != 4).all()


def test_the_last_step_may_take_the_likeliest():
    kernel = Masked(4, fill="argmax").reverse(X, probabilities(), 0.25, TERMINAL)
    y = kernel.sample(normals(3, 6))
    assert (y[X == 4] == probabilities().argmax(-1)[X == 4]).all()
    assert not torch.equal(y, kernel_of_samples(X))


def kernel_of_samples(x):
    return P.reverse(x, probabilities(), 0.25, TERMINAL).sample(normals(3, 6))


def test_filling():
    p = probabilities()
    assert torch.equal(P.complete(X, p), torch.where(X == 4, p.argmax(-1), X))
    assert torch.equal(P.complete(X, X.clamp_max(3)), X.clamp_max(3))
    drawn = torch.stack([P.complete(X, p, normals(3, 6, seed=s)) for s in range(4000)])
    share = torch.stack([(drawn[:, 0, 0] == v).double().mean() for v in range(4)])
    torch.testing.assert_close(share, p[0, 0], rtol=0, atol=0.03)


def test_a_categorical_draws_its_law_and_knows_it():
    kernel = Categorical(probabilities(1, 1, 5).expand(100_000, 1, 5))
    x = kernel.sample(normals(100_000, 1))
    share = torch.bincount(x[:, 0], minlength=5).double() / len(x)
    torch.testing.assert_close(share, kernel.probs[0, 0], rtol=0, atol=0.006)
    torch.testing.assert_close(kernel.log_prob(x)[:9], kernel.probs[0, 0][x[:9, 0]].log())
    other = Categorical(probabilities(1, 1, 5).flip(-1).expand(100_000, 1, 5))
    torch.testing.assert_close(kernel.log_ratio(other, x), kernel.log_prob(x) - other.log_prob(x))
    assert kernel.log_ratio(kernel, x).abs().max() == 0


def test_no_mass_is_never_drawn_and_costs_nothing():
    sure = Categorical(torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64).expand(1000, 1, 3))
    assert (sure.sample(normals(1000, 1)) == 1).all()
    assert sure.log_ratio(sure, torch.ones(1000, 1, dtype=torch.long)).abs().max() == 0
    assert torch.isneginf(sure.log_prob(torch.zeros(1000, 1, dtype=torch.long))).all()


def test_a_mixture_draws_its_law_and_knows_it():
    kernel = Mixture(
        torch.tensor([[0.3, 0.7]]).double(),
        torch.tensor([[[-1.0], [2.0]]]).double(),
        torch.tensor([[0.5, 0.2]]).double(),
    )
    many = Mixture(*(v.expand(50_000, *v.shape[1:]) for v in (kernel.weights, kernel.means, kernel.stds)))
    x = many.sample(normals(50_000, 2))
    assert (x < 0.5).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert x[x > 0.5].std().item() == pytest.approx(0.2, abs=0.01)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    on_grid = Mixture(*(v.expand(4001, *v.shape[1:]) for v in (kernel.weights, kernel.means, kernel.stds)))
    assert torch.trapezoid(on_grid.log_prob(grid).exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-6)


def test_relaxed_states_are_hard_in_value_and_soft_in_gradient():
    hot = torch.nn.functional.one_hot(X, 5).double()
    p = probabilities().requires_grad_()
    kernel = P.reverse(hot, p, 0.5, 0.25)
    assert isinstance(kernel, RelaxedCategorical)
    y = kernel.sample(normals(3, 6, 5))
    assert set(y.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(y.sum(-1), torch.ones(3, 6, dtype=torch.float64))
    assert torch.equal(y[X != 4], hot[X != 4])
    (g,) = torch.autograd.grad((y * normals(3, 6, 5, seed=2)).sum(), p)
    assert (g[X == 4].abs().sum(-1) > 0).all() and (g[X != 4] == 0).all()
    draws = torch.stack([P.reverse(hot, p.detach(), 0.5, 0.25).sample(normals(3, 6, 5, seed=s)) for s in range(3000)])
    torch.testing.assert_close(draws.mean(0), P.reverse(X, p.detach(), 0.5, 0.25).probs, rtol=0, atol=0.04)
    hard = P.reverse(X, p.detach(), 0.5, 0.25).log_prob(y.argmax(-1))
    torch.testing.assert_close(kernel.log_prob(y.detach()), hard, rtol=1e-6, atol=1e-9)


def test_what_a_process_cannot_be():
    for options in ({"vocabulary": 1}, {"vocabulary": 4, "end": 1.0}, {"vocabulary": 4, "temperature": 0.0}):
        with pytest.raises(UserError, match="at least 2 tokens"):
            Masked(**options)
    with pytest.raises(UserError, match="fill is 'best'"):
        Masked(4, fill="best")
