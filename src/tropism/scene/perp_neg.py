"""Perp-Neg: between two view words, be neither of them too much, and on the back be no front.

    eps_hat = e_0 + w (e_pos + sum_i w_i e_i^perp),    e_i^perp = e_i - <e_i, e_pos> / |e_pos|^2 e_pos

e_0 is the prediction without words; e_i and e_pos are predictions less e_0. All of them are predictions of one z_t, so clean states
serve as well as noise.
The paper interpolates the embeddings of two view words; here their predictions are interpolated, which needs nothing of a model but
`predict`, and no more network rows.
Source: Re-imagine the Negative Prompt Algorithm, arXiv 2304.04968; the weights are those of threestudio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropism.core import Cond, Model
from tropism.scene.distill import Noised, denoised
from tropism.space.cameras import OVERHEAD, VIEWS, Cameras

FRONT, SIDE, BACK, ABOVE = range(len(VIEWS))


def decay(a: float, b: float, c: float, r: float) -> float:
    """a exp(-b r) + c, how strongly a view word is kept out."""
    return a * math.exp(-b * r) + c


def words(azimuth: float, elevation: float) -> list[tuple[int, float, float]]:
    """For a camera, in degrees: (row of VIEWS, share in the positive prediction, weight of its perpendicular part); shares sum to 1."""
    turn = abs((azimuth + 180) % 360 - 180)
    if elevation > OVERHEAD:
        return [(ABOVE, 1.0, 0.0)]
    if turn < 90:
        r = 1 - turn / 90
        return [(FRONT, r, -decay(4, 0.5, -2.426, r)), (SIDE, 1 - r, -decay(4, 0.5, -2.426, 1 - r))]
    r = 2 - turn / 90
    return [
        (SIDE, r, -decay(1, 0.5, -0.606, r)),
        (BACK, 1 - r, 0.0),
        (FRONT, 0.0, -decay(1, 0.5, 0.967, r)),
    ]


def perpendicular(e: Tensor, positive: Tensor) -> Tensor:
    """The part of e (*S) that is orthogonal to `positive` (*S), of one sample; e itself where there is nothing to be orthogonal to."""
    square = (positive * positive).sum()
    return e - torch.where(square > 0, (e * positive).sum() / square, 0.0) * positive


@torch.no_grad()
def perp_neg(model: Model, at: Noised, cond: Cond, guidance: float, *, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """A method of scene.distill, against the noise. cond: of every row's prompt in all of VIEWS, row after row; cameras: of the rows."""
    seen, rows = cameras[at.rows], torch.arange(len(cameras))[at.rows].tolist()
    told = [words(*angles) for angles in zip(seen.azimuth.tolist(), seen.elevation.tolist(), strict=True)]
    of, word = zip(*((i, row) for i, each in enumerate(told) for row, _, _ in each), strict=True)
    free = denoised(model, _rows(at, rows, range(len(told)), [each[0][0] for each in told]), cond, 0.0)
    every = denoised(model, _rows(at, rows, of, word), cond, 1.0) - free[list(of)]
    hat, start = [], 0
    for i, each in enumerate(told):
        hat.append(free[i] + guidance * _kept_apart(every[start : start + len(each)], each))
        start += len(each)
    return at.x0, torch.stack(hat)


def _kept_apart(every: Tensor, told: list[tuple[int, float, float]]) -> Tensor:
    """e_pos + sum_i w_i e_i^perp (*S) of one sample's e_i (K, *S)."""
    share, weight = (every.new_tensor([each[part] for each in told]) for part in (1, 2))
    positive = torch.tensordot(share, every, 1)
    return positive + torch.tensordot(weight, torch.stack([perpendicular(e, positive) for e in every]), 1)


def _rows(at: Noised, rows: list[int], of, word) -> Noised:
    """Samples `of` again, each to be told a word. rows: of the batch, by sample."""
    chosen = list(of)
    t = at.t[chosen] if isinstance(at.t, Tensor) and at.t.ndim else at.t
    asked = torch.tensor([rows[i] * len(VIEWS) + w for i, w in zip(chosen, word, strict=True)])
    return Noised(at.x0[chosen], at.z_t[chosen], t, asked)
