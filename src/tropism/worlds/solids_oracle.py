"""The exact denoiser of the `solids` world: a diffusion model whose data are the pictures of a library, so that every answer is known.

With pictures x_i in [-1, 1] on the row's background, z_t = alpha_t x_0 + sigma_t eps, a prompt y with a view, and a picture v,

    w_i = softmax_i(-|z_t - alpha_t x_i|^2 / (2 sigma_t^2) + log p(i | y) + scale s_i(v))     E[x_0 | z_t] = sum_i w_i x_i

p(i | y) is uniform over the pictures that the prompt fits: its solids, and the view's azimuths and elevations if it names one. The native
output is eps = (z_t - alpha_t E[x_0]) / sigma_t, exact, so it is -sigma_t times the gradient of log p_t(z_t): Tweedie's formula.

s(v) says how likely each *scene* is to be the one that v shows: the best cosine of v with any of the scene's views, in pixels pooled to
8 x 8 and less their background, times SHARPNESS. It is one number for all views of a scene, so it tilts which object is drawn and never
from where: compared view by view, the back view of the right object would lose to every front view, and v would be copied all around.
Source: Tweedie's Formula and Selection Bias, Efron 2011; Denoising Diffusion Probabilistic Models, arXiv 2006.11239 (the schedule).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tropism import core
from tropism.core import Batch, Draw, Stream, UserError
from tropism.noise import as_index
from tropism.process.gaussian import VP
from tropism.space.cameras import VIEWS
from tropism.worlds import solids
from tropism.worlds.solids import BACKGROUND, parse
from tropism.worlds.solids_library import Library, library

POOLED, SHARPNESS = 8, 1000.0
TWO = "Try 'a red cube left of a blue sphere'."


def table(steps: int = 1000) -> tuple[float, ...]:
    """The alpha-bars of DDPM: betas from 1e-4 to .02."""
    return tuple(torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0).tolist())


@dataclass(frozen=True)
class OracleCond:
    """Of B rows over N pictures: log p(i | y) + scale s_i(v), (B, N) up to a constant, the same for what guidance leads away from, and
    backgrounds (B, 3) in [0, 1]. shape: one picture's.
    """

    shape: tuple[int, ...]
    positive: Tensor
    negative: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> OracleCond:
        at = as_index(rows)
        return OracleCond(self.shape, self.positive[at], self.negative[at], self.background[at])


class OracleModel:
    """The exact denoiser of a library: `predict` is the noise E[eps | z_t]. `calls` counts its rows as a network's, two under guidance.

    The states are pictures (B, 3, S, S) in [-1, 1]. A row's background is batch.meta[i]["background"], three numbers in [0, 1], and
    `background` where the batch names none. Prompts are those of worlds.solids; guidance leads from the whole library, or from what a
    negative prompt fits, to the prompt. batch.visual tilts the prompt's side alone, by batch.visual_scale (None: 1).
    """

    prediction, steps, guidance = "epsilon", 50, 7.5

    def __init__(
        self,
        library: Library,
        *,
        background: Sequence[float] = BACKGROUND,
        eta: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        """eta: 0 is the deterministic chain of DDIM, 1 is as stochastic as DDPM. dtype: at least float32."""
        self.dtype, self.device = torch.promote_types(dtype, torch.float32), torch.device(device)
        self.library, self.background = library, tuple(float(c) for c in background)
        self.process = VP(table(), "trailing", 0, eta, 1.0)
        self.shape = tuple(library.light.shape[1:])
        self.calls = {"network": 0, "backward": 0, "decode": 0}
        self._light, self._opacity = (x.to(self.device, self.dtype) for x in (library.light, library.opacity))
        self._pooled = tuple(F.adaptive_avg_pool2d(x, POOLED).flatten(2) for x in (self._light, self._opacity))
        self._which = library.which.to(self.device)
        self._view = torch.tensor([VIEWS.index(v) for v in library.cameras.views()], device=self.device)
        self._kept: dict[torch.dtype, Any] = {}

    # ------------------------------------------------------------------------------------------------ what is asked

    def encode(self, batch: Batch, draw: Draw | None = None) -> OracleCond:
        """Raises UserError for a prompt that is not of this world, one that no picture fits, and a background that is no colour."""
        positive = torch.stack([self.prior(p) for p in batch.prompts])
        if batch.visual is not None:
            scale = torch.ones(len(batch)) if batch.visual_scale is None else batch.visual_scale
            positive = positive + scale.to(positive)[:, None] * self.similarity(batch.visual)
        negatives = batch.negative_prompts or [""] * len(batch)
        whole = torch.zeros_like(positive[0])
        negative = torch.stack([self.prior(p) if p else whole for p in negatives])
        given = [(m or {}).get("background", self.background) for m in batch.meta or [None] * len(batch)]
        return OracleCond(self.shape, positive, negative, self._colours(given))

    def _colours(self, given: Sequence[Sequence[float]]) -> Tensor:
        for colour in given:
            if len(colour) != 3 or not all(0 <= c <= 1 for c in colour):
                raise UserError(
                    f"The background is {list(colour)}; it is red, green and blue, each in [0, 1], such as [1, 1, 1]."
                )
        return torch.tensor([list(c) for c in given], dtype=self.dtype, device=self.device)

    def prior(self, prompt: str) -> Tensor:
        """(N,) log p(i | prompt) up to a constant: 0 where the picture fits, else -infinity. Raises UserError as `encode` does."""
        asked = parse(prompt)
        right = torch.tensor([s.fits(asked) for s in self.library.scenes], device=self.device)[self._which]
        if asked.view:
            right &= self._view == VIEWS.index(asked.view)
        if not bool(right.any()):
            shown = [s.prompt for s in self.library.scenes]
            views = [VIEWS[i] for i in self._view.unique().tolist()]
            raise UserError(
                f"No picture of this library fits {prompt!r}: it has {len(shown)} scenes, such as {', '.join(shown[:4])}, from "
                f"{', '.join(views)}. Ask for one of these, or make a larger library."
            )
        return torch.zeros(len(right), dtype=self.dtype, device=self.device).masked_fill(~right, -torch.inf)

    @torch.no_grad()
    def similarity(self, visual: Tensor) -> Tensor:
        """s (B, N) of pictures (B, 3, H, W) in [0, 1]; each one's own background is taken to be the median of its border."""
        found, known = list[Tensor](), list[Tensor]()
        for picture in visual.to(self.device, self.dtype):
            same = next((i for i, other in enumerate(known) if torch.equal(other, picture)), None)
            known.append(picture)
            found.append(found[same] if same is not None else self._similar(picture))
        return torch.stack(found)

    def _similar(self, picture: Tensor) -> Tensor:
        """(N,) of a picture (3, H, W)."""
        border = torch.cat([picture[:, 0], picture[:, -1], picture[:, 1:-1, 0], picture[:, 1:-1, -1]], 1)
        behind = border.median(1).values[:, None]
        mine = F.adaptive_avg_pool2d(picture, POOLED).flatten(1) - behind
        light, opacity = self._pooled
        cosine = F.cosine_similarity((light - opacity * behind).flatten(1), mine.flatten()[None], eps=1e-6)
        best = cosine.new_full((len(self.library.scenes),), -1.0)
        best = best.scatter_reduce(0, self._which, cosine, "amax")
        return SHARPNESS * best[self._which]

    # ------------------------------------------------------------------------------------------------ the chain

    def start(self, cond: OracleCond, draw: Draw, times: Tensor) -> tuple[Tensor, int]:
        return draw(Stream.PRIOR, 0, cond.shape).to(self.device, self.dtype), 0

    def predict(self, x_t: Tensor, t: float | Tensor, cond: OracleCond, guidance: float) -> Tensor:
        """E[eps | x_t] (B, 3, S, S) after guidance, differentiable in x_t, at least float32 and x_t's dtype. t: a time or (B,) times."""
        x_t = x_t.to(torch.promote_types(x_t.dtype, self.dtype))
        alpha, sigma = (self._rows(f(t), x_t) for f in (self.process.alpha, self.process.sigma))
        priors = [cond.positive] if guidance == 1 else [cond.negative, cond.positive]
        means = self._means(x_t, alpha, sigma, [p.to(x_t) for p in priors], cond.background)
        outs = [(x_t - alpha * m) / sigma for m in means]
        out = outs[0] if guidance == 1 else outs[0] + guidance * (outs[1] - outs[0])
        core.count_rows(self.calls, out, len(outs) * len(x_t))
        return out

    @staticmethod
    def _rows(value: float | Tensor, like: Tensor) -> Tensor:
        """(B, 1, 1, 1), float64 until here."""
        return (
            torch.as_tensor(value, dtype=torch.float64, device=like.device).to(like).expand(len(like)).view(-1, 1, 1, 1)
        )

    def _means(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, priors: list[Tensor], background: Tensor
    ) -> list[Tensor]:
        """E[x_0 | x_t] (B, 3, S, S) under each of the priors (B, N).

        A picture is linear in its background, x_i = 2 (light_i + clear_i c) - 1, so that no picture is ever painted.
        """
        light, clear, middle_light, middle_clear, squares = self._parts(x_t.dtype)
        c = background.to(x_t)[:, :, None]
        alpha, sigma = alpha.flatten(1), sigma.flatten(1)
        middle = (middle_light + middle_clear * c).flatten(1)
        z = x_t.flatten(1) - alpha * middle
        # |z - alpha x|^2 without |z|^2, which all pictures share, about the pictures' mean, which would cost digits.
        along = z @ light.T + (z.view(len(z), 3, -1) * c).sum(1) @ clear.T
        lit, mixed, bare = squares
        size = lit + 2 * c[..., 0] @ mixed.T + c.square().sum((1, 2))[:, None] * bare
        near = (alpha * along - alpha**2 * size / 2) / sigma**2
        w = torch.cat([(near + p).softmax(1) for p in priors])
        shown = (w @ light).view(len(priors), len(z), 3, -1) + (w @ clear).view(len(priors), len(z), 1, -1) * c
        return [(s.flatten(1) + middle).view_as(x_t) for s in shown]

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Of all pictures in [-1, 1], x_i - middle = light_i + clear_i c: light (N, D), clear (N, P), what the middle is of, and |.|^2."""
        if dtype not in self._kept:
            light, clear = 2 * self._light.to(dtype).flatten(2), 2 * (1 - self._opacity.to(dtype).flatten(2))
            middle_light, middle_clear = light.mean(0), clear.mean(0)
            light, clear = light - middle_light, clear - middle_clear
            squares = light.square().sum((1, 2)), (light * clear).sum(2), clear.square().sum((1, 2))
            self._kept[dtype] = light.flatten(1), clear.flatten(1), middle_light - 1, middle_clear, squares
        return self._kept[dtype]

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor) -> Tensor:
        return self.process.x0(x_t, out, t, self.prediction)

    kernel = core.kernel

    # ------------------------------------------------------------------------------------------------ pictures

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1]; see core.clamp for the gradient at the walls."""
        self.calls["decode"] += len(x0)
        return core.clamp(x0 / 2 + 0.5)

    def latents(self, samples: Tensor) -> Tensor:
        """States in [-1, 1] of pictures (B, 3, S, S) in [0, 1], differentiable."""
        return 2 * samples - 1

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {}


def exact(prompt: str, *, folder: Path | None = None, **options: Any) -> OracleModel:
    """The exact denoiser for a prompt: its library has what else the words could have been.

    One solid: all shapes and colours, large, or in both sizes where the prompt names one. Two: all colours of the two shapes, both ways
    round. folder: where rendered shapes are kept, which takes seconds each; None: in the user's cache. options: of OracleModel.
    Raises UserError for a prompt of another world, and for one of two solids that leaves a shape open.
    """
    asked = parse(prompt)
    shapes = [s.shape for s in asked.solids]
    if len(shapes) == 1:
        pool = solids.scenes(size=None if asked.solids[0].size else "large")
    elif None in shapes or shapes[0] == shapes[1] or any(s.size == "small" for s in asked.solids):
        raise UserError(f"Of two solids name two different shapes, and no small one: {prompt!r} does not. {TWO}")
    else:
        pool = [s for s in solids.pairs() if {x.shape for x in s.solids} == set(shapes)]
    return OracleModel(library(pool, folder=folder or kept_in()), **options)


def kept_in() -> Path:
    """Where rendered shapes are kept between runs: tropism/ in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tropism"
