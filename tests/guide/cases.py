"""The reference case of one dimension, the reference table, and how far a law is from another."""

import torch

from tropism.worlds.mixture import Law, Quadratic
from tropism.worlds.table import TableModel

ALPHA = 0.5
LAW = Law.of([0.7, 0.3], [-1.5, 1.5], [0.25, 0.16])
CENTRE = Quadratic(torch.tensor([1.0], dtype=torch.float64))
STEPS = 4


def ks(x, law):
    """Kolmogorov's distance of draws x (n, 1) from a law."""
    c, n = law.cdf(x.flatten().sort().values), len(x)
    i = torch.arange(n, dtype=torch.float64)
    return max((c - i / n).abs().max(), ((i + 1) / n - c).abs().max()).item()


def table():
    return TableModel.random(4, 4, seed=0)


def ones(samples, batch=None):
    """How many tokens are 1."""
    return (samples == 1).sum(1).double()


def histogram(samples, model):
    """The share of every sequence, in the order of the law's entries."""
    base = model.vocabulary ** torch.arange(model.length - 1, -1, -1)
    return torch.bincount((samples * base).sum(1), minlength=model.law.numel()).double() / len(samples)


def variation(p, q):
    """Total variation distance."""
    return 0.5 * (p.flatten() - q.flatten()).abs().sum().item()
