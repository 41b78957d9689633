"""One step of a guided run: where lineages start, what they propose, how children are valued and scored, and what is left at the end.

Children stand lineage-major: (P, M, *S), flattened to P * M rows, child j of lineage i at i * M + j, for states, conditions, prompts and
noise alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tropism.core import TERMINAL, Kernel, Stream, UserError, name_of, scored
from tropism.guide.lineages import Guided, Setting, State, Value, keep

# ---------------------------------------------------------------------------------------------------- proposals


def starts(run: Setting, m: int) -> Tensor:
    """(P, M, *S): m starts a lineage, the first of them the run's own."""
    others = []
    for k in range(1, m):
        draw = replace(run.draw, update=run.draw.update + k)  # the chain's own noise is keyed by update 0
        x, _ = run.model.start(run.cond, draw, torch.tensor(run.times))
        others.append(x if run.fixed is None else keep(run.fixed, x))
    return torch.stack([run.start, *others], 1)


@torch.no_grad()
def transition(run: Setting, state: State) -> tuple[Kernel, State]:
    """p(x_s | x_t) of every lineage, with the network called only where no output is at hand."""
    t, s = run.times[state.step], run.times[state.step + 1]
    if state.out is None:
        out = predicted(run, state.x, t, torch.arange(len(state.x)))
        state = replace(state, out=out)
    kernel, _ = run.model.kernel(state.x, t, s, run.cond, run.guidance, state.out)
    return kernel, state


def children(run: Setting, kernel: Kernel, step: int, m: int) -> Tensor:
    """(P, M, *S): m draws of a kernel for every lineage; one where the step is deterministic."""
    if kernel.is_deterministic:
        if step == run.first and m > 1 and len(run.running) > 1:
            raise UserError(
                "The sampler is deterministic, so all candidates of a step are equal and nothing can be chosen. Use a stochastic "
                "one: --eta 1."
            )
        return kernel.sample(kernel.mean)[:, None]  # pyright: ignore[reportAttributeAccessIssue]
    noise = run.draw.many(Stream.TRANSITION, step, kernel.noise_shape, m)
    return torch.stack([kernel.sample(noise[:, k]) for k in range(m)], 1)


def in_chunks(run: Setting, function: Callable[[slice], Tensor], rows: int) -> Tensor:
    """A function of slices of the rows, at most max_batch at a time, joined."""
    return torch.cat([function(slice(at, at + run.max_batch)) for at in range(0, rows, run.max_batch)])


# ---------------------------------------------------------------------------------------------------- values


@torch.no_grad()
def valued(run: Setting, value: Value, x: Tensor, s: float, parents: State | None = None) -> tuple[Tensor, Any]:
    """(v (P, M) float64, the network's outputs (P, M, ...) or None) of children x (P, M, *S) at time s.

    Equal token states of a prompt are given to the network once, equal ones of a lineage are valued once. parents: their outputs are
    used again for children that equal them, where the network has no time input (`uses_time` False).
    NaN counts as -inf, and before the end -inf as a little less than the prompt's lowest: such a child is not chosen while there is
    another, and a lineage without one can still recover.
    """
    count, m = x.shape[:2]
    flat, rows = x.flatten(0, 1), torch.arange(count).repeat_interleave(m)
    timeless = not getattr(run.model, "uses_time", True)
    out = predicted(run, flat, s, rows, parents if timeless else None) if value.predicts and s != TERMINAL else None
    which, where = (
        _distinct(torch.cat([rows[:, None], flat.cpu()], 1)) if not flat.is_floating_point() else (rows, None)
    )
    if where is None:
        which = where = torch.arange(len(flat))
    pieces = [which[at : at + run.max_batch] for at in range(0, len(which), run.max_batch)]
    v = torch.cat([value(flat[p], s, rows[p], None if out is None else out[p]) for p in pieces])[where]
    v = torch.where(torch.isnan(v), -torch.inf, v.double()).reshape(count, m)
    return v if s == TERMINAL else _floored(run, v), None if out is None else out.reshape(count, m, *out.shape[1:])


def _floored(run: Setting, v: Tensor) -> Tensor:
    """Values (P, M) with -inf raised to just below the lowest finite one of the prompt; where it has none they stay."""
    grouped = run.grouped(v)
    known = grouped.isfinite()
    low = torch.where(known, grouped, torch.inf).amin((1, 2), keepdim=True)
    below = low - torch.maximum(torch.tensor(run.alpha), 1e-6 * (1 + low.abs()))
    return torch.where(known | low.isinf(), grouped, below).reshape(v.shape)


def predicted(run: Setting, x: Tensor, s: float, rows: Tensor, parents: State | None = None) -> Tensor:
    """The network's outputs (R, ...) for states x (R, *S) of these lineages; equal token states of a prompt are looked at once."""
    known, given = parents.out if parents is not None else None, x
    run.costs.children += len(x)
    if x.is_floating_point():
        which = where = torch.arange(len(x))
    else:
        if parents is not None and known is not None:  # first, so that they are the ones found
            given, rows = torch.cat([parents.x, x]), torch.cat([torch.arange(len(parents.x)), rows])
        which, where = _distinct(torch.cat([run.groups[rows][:, None], given.cpu()], 1))
    old = len(given) - len(x)
    new = which[which >= old]
    run.costs.distinct += len(new)
    call = lambda r: run.model.predict(given[new[r]], s, run.cond[rows[new[r]]], run.guidance)
    outs = [] if known is None or not old else [known]
    outs += [in_chunks(run, call, len(new))] if len(new) else []
    place = torch.cat([torch.arange(old), torch.empty(len(x), dtype=torch.long)])
    place[new] = old + torch.arange(len(new))
    return torch.cat(outs)[place[which][where[old:]]]


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(the first row of each distinct key (N, K), in which of them each row is found (N,))."""
    radix = int(keys[:, 1:].max()) + 1
    if radix ** (keys.shape[1] - 1) < 2**62 // (int(keys[:, 0].max()) + 1):  # one number a key is faster to sort
        place = radix ** torch.arange(keys.shape[1] - 2, -1, -1)
        keys = (keys[:, :1] * radix ** (keys.shape[1] - 1)) + (keys[:, 1:] * place).sum(1, keepdim=True)
    unique, inverse = torch.unique(keys.squeeze(1), dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(keys)).scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
    return first, inverse


def rewarded(run: Setting, samples: Tensor, rows: Tensor) -> Tensor:
    """Rewards (R,) of decoded samples of these lineages, float64; each distinct sequence of tokens is scored once a prompt.

    NaN, a sample that cannot be scored, is -inf here, so that it is never chosen and spoils no mean over exp(r / alpha).
    """
    run.costs.rewards += len(samples)
    if samples.is_floating_point():
        return _computed(run, samples, rows)
    groups = run.groups[rows].tolist()
    keys = [
        group.to_bytes(4, "little") + row.tobytes() for group, row in zip(groups, samples.cpu().numpy(), strict=True)
    ]
    new = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in run.seen}.values())[::-1]
    if new:
        found = _computed(run, samples[new], rows[new])
        run.seen.update({keys[i]: v for i, v in zip(new, found, strict=True)})
    return torch.stack([run.seen[key] for key in keys])


def _computed(run: Setting, samples: Tensor, rows: Tensor) -> Tensor:
    found = scored(run.reward, samples, run.batch[rows]).double().cpu()
    if torch.isposinf(found).any():
        raise UserError(
            f"Reward '{name_of(run.reward)}' is +inf for {int(torch.isposinf(found).sum())} of {len(found)} samples, so nothing can "
            "be better than these. Make it finite; -inf is for samples that must not be."
        )
    lost = torch.isnan(found)
    run.costs.rewards_computed += len(samples)
    run.costs.unscored += int(lost.sum())
    return found.masked_fill(lost, -torch.inf)


@torch.no_grad()
def plain_step(run: Setting, state: State) -> State:
    """One step of every lineage as the model draws it, nothing chosen; outputs of equal token states are used again, as elsewhere."""
    kernel, state = transition(run, state)
    x, s = children(run, kernel, state.step, 1)[:, 0], run.times[state.step + 1]
    out = None
    if s != TERMINAL and not x.is_floating_point():
        out = predicted(run, x, s, torch.arange(len(x)), None if getattr(run.model, "uses_time", True) else state)
    return replace(state, x=x, out=out, step=state.step + 1)


def chosen(state: State, x: Tensor, v: Tensor, out: Tensor | None, best: Tensor) -> State:
    """The state one step on, with child best (P,) of the children x (P, M, *S) and their values and outputs."""
    row = torch.arange(len(best))
    at = lambda values: None if values is None else values[row, best]
    return replace(state, x=x[row, best], out=at(out), value=at(v), step=state.step + 1)


# ---------------------------------------------------------------------------------------------------- the end


@torch.no_grad()
def finished(run: Setting, state: State, rewards: Tensor | None = None) -> Guided:
    """Decode the final states, score them where no rewards (P,) are given, and add up the costs."""
    clean = run.model.process.complete(state.x, state.x)
    samples = in_chunks(run, lambda rows: run.model.decode(clean[rows]), len(clean))
    if rewards is None:
        every = torch.arange(len(clean))
        rewards = in_chunks(run, lambda rows: rewarded(run, samples[rows], every[rows]), len(clean))
    rewards = torch.where(torch.isnan(rewards), -torch.inf, rewards.double())
    if not torch.isfinite(rewards).any():
        raise UserError(
            f"The reward of all {len(rewards)} samples is -inf or NaN, so nothing could guide them. Give the reward a finite value for "
            "poor samples too."
        )
    now: dict[str, int] = getattr(run.model, "calls", {})
    run.costs.network = now.get("network", 0) - run.calls.get("network", 0)
    run.costs.backward = now.get("backward", 0) - run.calls.get("backward", 0)
    ess = torch.stack(state.ess) if state.ess else torch.ones(0, len(rewards) // run.n)
    log_z = state.log_z if state.ess else torch.full_like(state.log_z, torch.nan)
    return Guided(samples, rewards, state.x, run.batch, run.costs, state.log_w, log_z, ess, state.ancestors)


def effective(log_w: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 as a share of n, over the last axis of log weights (..., n)."""
    w = (log_w - log_w.amax(-1, keepdim=True)).exp()
    return w.sum(-1) ** 2 / (w**2).sum(-1) / w.shape[-1]
