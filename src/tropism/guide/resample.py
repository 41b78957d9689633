"""Who survives: n lineages are drawn anew in proportion to their weights, each prompt's among themselves.

A scheme takes normalised weights (n,) and uniforms (n,) and returns n indices; each is unbiased, E[copies of i] = n w_i.
Source: Negative association, ordering and convergence of resampling methods, arXiv 1707.01845, section 3 (all five; SSP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.guide.lineages import Setting, State
from tropism.guide.steps import effective

Scheme = Callable[[Tensor, Tensor], Tensor]


def _inverse(w: Tensor, u: Tensor) -> Tensor:
    """Where the points u in [0, 1) fall in the cumulative weights."""
    return torch.searchsorted(w.cumsum(0), u * w.sum(), right=True).clamp_max(len(w) - 1)


def multinomial(w: Tensor, u: Tensor) -> Tensor:
    """n independent draws."""
    return _inverse(w, u)


def stratified(w: Tensor, u: Tensor) -> Tensor:
    """One draw in each of n equal strata."""
    return _inverse(w, (torch.arange(len(w)) + u) / len(w))


def systematic(w: Tensor, u: Tensor) -> Tensor:
    """One uniform for all strata: copies are floor(n w) or ceil(n w)."""
    return _inverse(w, (torch.arange(len(w)) + u[0]) / len(w))


def residual(w: Tensor, u: Tensor) -> Tensor:
    """floor(n w) copies for sure, the rest by independent draws from what is left."""
    sure = (len(w) * w).floor().long()
    rest, left = len(w) * w - sure, len(w) - int(sure.sum())
    drawn = _inverse(rest / rest.sum(), u[:left]) if left else sure[:0]
    return torch.cat([torch.arange(len(w)).repeat_interleave(sure), drawn]).sort().values


def ssp(w: Tensor, u: Tensor) -> Tensor:
    """Srinivasan's process: the fractions of n w meet in pairs until each is 0 or 1; copies are floor(n w) or ceil(n w)."""
    copies, fractions = (len(w) * w).floor(), (len(w) * w).frac().tolist()
    held, p = 0, fractions[0]
    for i, q in enumerate(fractions[1:], 1):
        total = p + q
        if total < 1:  # one of the two takes all of it
            held, p = (held if u[i] * total < p else i), total
        else:  # one of the two is full
            full, other = (held, i) if u[i] * (2 - total) < 1 - q else (i, held)
            copies[full] += 1
            held, p = other, total - 1
    copies[held] += round(p)
    return torch.arange(len(w)).repeat_interleave(copies.long())


SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


def scheme_of(name: str) -> Scheme:
    """The scheme of a name. Raises UserError for another."""
    if name not in SCHEMES:
        raise UserError(f"There is no resampling scheme {name!r}. Known: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


def resampled(run: Setting, state: State, scheme: str = "systematic", threshold: float = 1.0) -> State:
    """Resample the prompts whose effective sample size is below the threshold (1: always); the others carry their weights on.

    A prompt whose lineages all have weight 0 is left as it is. log_z gains the log of the mean weight of what was resampled.
    """
    grouped, draw = run.grouped(state.log_w), scheme_of(scheme)
    alive = torch.isfinite(grouped.amax(1))
    ess = torch.where(alive, effective(grouped), 0.0)
    due = alive & ((ess < threshold) | (threshold >= 1))
    rows, log_w, log_z = torch.arange(len(state.x)).reshape(-1, run.n), grouped.clone(), state.log_z.clone()
    u = run.grouped(run.uniforms(state.step, 1, k=1))[..., 0]
    for g in due.nonzero()[:, 0].tolist():
        rows[g] = rows[g][draw(grouped[g].softmax(0), u[g])]
        log_z[g] += torch.logsumexp(grouped[g], 0) - torch.log(torch.tensor(float(run.n)))
        log_w[g] = 0.0
    return replace(state[rows.flatten()], log_w=log_w.flatten(), log_z=log_z, ess=(*state.ess, ess))
