"""The holder of a reward's network."""

import torch
from torch import nn

from tropism.rewards.frozen import Frozen


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()


def test_gradients_reach_the_input_but_never_the_network():
    frozen, x = Frozen(network()), torch.randn(5, 3, requires_grad=True)
    frozen.like(x)(x).square().sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in frozen.module.parameters())


def test_judging_changes_nothing_in_the_network():
    """Dropout is off and running statistics stand still, whatever the caller's network did before."""
    frozen, x = Frozen(network()), torch.randn(5, 3)
    before = {n: t.clone() for n, t in frozen.module.state_dict().items()}
    first = frozen.like(x)(x)
    assert torch.equal(first, frozen.like(x)(x))
    assert all(torch.equal(t, before[n]) for n, t in frozen.module.state_dict().items())


def test_one_copy_a_precision_and_the_original_for_its_own():
    frozen = Frozen(network())
    assert frozen.like(torch.zeros(1)) is frozen.module
    assert frozen.like(torch.zeros(1, dtype=torch.bfloat16)) is frozen.module
    wide = frozen.like(torch.zeros(1, dtype=torch.float64))
    assert wide is frozen.like(torch.zeros(2, dtype=torch.float64))
    assert next(wide.parameters()).dtype == torch.float64
    assert next(frozen.module.parameters()).dtype == torch.float32


def test_a_graph_survives_a_question_in_another_precision():
    frozen, x = Frozen(network()), torch.randn(5, 3, requires_grad=True)
    value = frozen.like(x)(x).sum()
    frozen.like(x.double())(x.double())
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.dtype == torch.float32
    assert gradient.abs().max() > 0
