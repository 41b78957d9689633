"""Best-of-N: draw N samples for every one that is wanted and keep the best. The baseline that any guidance has to beat.

Source: WebGPT, arXiv 2112.09332, section 3.2 (best-of-n as rejection sampling).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tropism.core import Batch, Model, Reward
from tropism.guide.lineages import Guided, begin, check_alpha, check_counts, setting
from tropism.guide.steps import finished, in_chunks, plain_step, rewarded
from tropism.guide.svdd import pick


@torch.no_grad()
def best_of_n(
    model: Model,
    reward: Reward,
    batch: Batch,
    n: int,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    m: int = 10,
    alpha: float = 0.0,
    pooled: bool = False,
    max_batch: int = 256,
    fixed: Tensor | None = None,
) -> Guided:
    """n samples of each prompt, each the best of m of its own.

    m: samples drawn for each that is kept. alpha: above 0, one of the m is kept with probability proportional to exp(r / alpha), soft
    best-of-n. pooled: the best n of all n m of a prompt, as the paper of SVDD has it.
    Cost, where no two states are equal: steps m rows and m rewards a sample. Raises UserError for counts below 1.
    """
    check_counts(m=m)
    check_alpha(alpha)
    run = setting(
        model,
        reward,
        batch,
        n * m,
        steps=steps,
        guidance=guidance,
        seed=seed,
        alpha=alpha,
        max_batch=max_batch,
        fixed=fixed,
    )
    state = begin(run)
    for _ in run.running:
        state = plain_step(run, state)
    if m == 1:
        return finished(run, state)
    every = torch.arange(len(state.x))
    decoded = lambda rows: run.model.decode(run.model.process.complete(state.x[rows], state.x[rows]))
    r = in_chunks(run, lambda rows: rewarded(run, decoded(rows), every[rows]), len(every))
    v = torch.where(torch.isnan(r), -torch.inf, r)
    if pooled:
        best = run.grouped(v).argsort(1, descending=True)[:, :n]
        rows = run.grouped(every).gather(1, best).flatten()
    else:
        u = run.uniforms(len(run.times), 1)[:, 0].reshape(-1, m)
        rows = every.reshape(-1, m)[torch.arange(len(every) // m), pick(v.reshape(-1, m), alpha, u)]
    kept = replace(run, n=n, batch=run.batch[rows])
    return finished(kept, state[rows], v[rows])
