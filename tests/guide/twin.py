"""SVDD as its released code runs it: a loop over candidates, each given to the network anew. The slow, readable twin of guide/svdd.py."""

import torch

from tropism.core import TERMINAL, Batch, Draw, Stream, uniform
from tropism.guide.lineages import APART
from tropism.guide.svdd import pick


@torch.no_grad()
def svdd_plain(model, reward, n, *, steps, m, seed=0, alpha=0.0):
    """n samples of one prompt: T (1 + M) rows and T M rewards each. The same noise as `svdd`, which starts at one x_T."""
    draw, batch = Draw(seed, 0, tuple(range(n))), Batch([""] * n)
    assert n <= APART
    cond = model.encode(batch, draw)
    times = model.process.times(steps, cond.shape)
    x, first = model.start(cond, draw, times)
    for i in range(first, steps):
        t, s = times[i].item(), times[i + 1].item()
        out = model.predict(x, t, cond, 1.0)
        kernel = model.process.reverse(x, model.x0(x, out, t), t, s)
        noise = draw.many(Stream.TRANSITION, i, kernel.noise_shape, m)
        candidates, values = [], []
        for k in range(m):
            child = kernel.sample(noise[:, k])
            if s == TERMINAL:
                clean = model.process.complete(child, child)
            else:
                clean = model.process.complete(child, model.x0(child, model.predict(child, s, cond, 1.0), s))
            candidates.append(child)
            values.append(reward(model.decode(clean), batch).double())
        u = uniform(seed, Stream.RESAMPLE, 0, range(n), i, 0, (m,))[:, 0].double().clamp(1e-12, 1 - 1e-12)
        best = pick(torch.stack(values, 1), alpha, u)
        x = torch.stack(candidates, 1)[torch.arange(n), best]
    return model.decode(model.process.complete(x, x))
