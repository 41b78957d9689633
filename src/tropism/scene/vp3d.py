"""VP3D: a scene from text, by distillation with a visual prompt, and with rewards of its renders.

The visual prompt v is a picture of the text. Each update renders a few views, and follows

    VP-SDS(text with the view's word, v gated by the view) + rho_text r_hf(view, text) + rho_visual r_vc(view, v) + regularisers

where both rewards' gradients are kept at a share rho of the distillation's at the render, and begin after `start` of the run. Without v and
rewards it is DreamFusion's SDS.
Source: VP3D: Unleashing 2D Visual Prompt for Text-to-3D Generation, arXiv 2403.17001. Its weights and schedules could not be read; gate,
shares and ramp are ours, and all of them are arguments.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from tropism.core import Batch, Cond, Draw, Info, Model, Reward, Stream, UserError, generator, name_of, uniform
from tropism.scene import drawing
from tropism.scene.distill import Method, clean, csd, distilled, injected, isd, score_losses, sds, size_of, vsd
from tropism.scene.perp_neg import perp_neg
from tropism.scene.regularise import indecision, sparsity
from tropism.scene.reward_sds import reward_sds
from tropism.scene.terms import balanced, rewarded
from tropism.scene.times import ANNEALS, FIRST, LAST, Range, drawn, ramp
from tropism.scene.views import asked, gate, near
from tropism.space.cameras import VIEWS
from tropism.space.cameras import cameras as placed
from tropism.space.cameras import drawn as cameras_of

METHODS = ("sds", "csd", "isd", "vsd", "perp-neg")
PROMPT_CAMERA = 0.0, 15.0
"""Azimuth and elevation, in degrees, that a visual prompt is taken to be seen from."""


class Scene(Protocol):
    """A field that can be trained: see scene.field."""

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]: ...
    def smoothness(self) -> Tensor: ...


@dataclass(frozen=True)
class Asked:
    """What a scene is to be: its prompt, a negative one, and a visual prompt v (3, H, W) in [0, 1] that counts `strength` in front.

    views: pictures an update. elevation: of the cameras, in degrees. view_words: whether prompts name the view. background: one colour, or
    None for one drawn for each update.
    """

    prompt: str
    negative: str = ""
    visual: Tensor | None = None
    strength: float = 0.5
    views: int = 4
    elevation: Range = (-10.0, 75.0)
    view_words: bool = True
    background: Sequence[float] | None = None

    def batch(self, seed: int, update: int) -> Batch:
        """The views of an update as a batch, a pure function: prompts, cameras, the visual prompt gated by the view, backgrounds."""
        seen_from = cameras_of(self.views, seed, update, elevation=self.elevation)
        colour = self.background
        if colour is None:
            colour = generator(seed, Stream.CAMERA, update, -1, 1).random(3).tolist()
        visual = None if self.visual is None else self.visual.expand(self.views, -1, -1, -1)
        return Batch(
            asked(self.prompt, seen_from.views()) if self.view_words else [self.prompt] * self.views,
            negative_prompts=[self.negative] * self.views,
            cameras=seen_from,
            visual=visual,
            visual_scale=None if visual is None else gate(seen_from.azimuth, PROMPT_CAMERA[0], self.strength),
            meta=[{"background": list(colour), "prompt": self.prompt}] * self.views,
        )


def vp3d(
    model: Model,
    scene: Scene,
    batch: Batch,
    *,
    state: dict,
    update: int,
    seed: int,
    micro_batch: int | None = None,
    progress: float = 0.0,
    reward: Reward | None = None,
    consistency: Reward | None = None,
    guidance: float = 7.5,
    method: str = "sds",
    weight: str = "sds",
    anneal: str = "linear",
    first: Range = FIRST,
    last: Range = LAST,
    rho: float = 0.2,
    rho_visual: float = 0.2,
    noises: int = 0,
    temperature: float = 1.0,
    hinge: float | None = None,
    start: float = 0.3,
    samples: int = 48,
    pixels: int | None = None,
    smoothness: float = 0.0,
    opacity: float = 0.0,
    decided: float = 0.0,
    eikonal: float = 0.0,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """One update of a scene. Yields one (loss, Info); the loss's value is that of the regularisers, its gradient all of it.

    batch: views as `Asked.batch` makes them. progress: share of the run that is done, in [0, 1). reward: of views and the prompt (r_hf);
    consistency: of views and the visual prompt, given as batch.visual and as batch.reference, near its own camera alone (r_vc); None
    leaves them out. method: one of METHODS; vsd trains the model's adapter beside the scene. noises: above 1 the reward needs no
    gradient; from `start` on it weighs so many noises of a view, by the softmax of rewards / temperature (scene.reward_sds), and rho and
    hinge have no say. weight: w(t). anneal, first, last: which times are looked at (scene.times). hinge: a view worth that much is
    content. samples: points along a ray. pixels: side of a render, by default the model's own picture's.
    smoothness, opacity, decided, eikonal: weights of total variation, sparsity, indecision and, of a SurfaceField, a distance's slope.
    Raises UserError for names that do not exist and where something is asked of a visual prompt and there is none.
    """
    _check(method, anneal, consistency, batch)
    if noises and (reward is None or method == "perp-neg"):
        raise UserError(f"There is no reward to weigh {noises} noises by" + " under perp-neg." * (method == "perp-neg"))
    cond, compare = _compared(method, model, batch)
    wanted = size_of(model, cond)
    size = wanted if pixels is None else (pixels, pixels)
    background = torch.tensor([m["background"] for m in batch.meta or []])
    jitter = uniform(seed, Stream.CAMERA, update, batch.index, 2, 0, (size[0] * size[1], samples))[:, 0]
    rendered = drawing.drawn(scene, batch.cameras.to(model.device), size, samples=samples, jitter=jitter)
    pictures = rendered.over(background)
    leaf = pictures.detach().requires_grad_()
    x0 = clean(model, leaf, wanted)
    t = drawn(model.process, ANNEALS[anneal](progress, first, last), seed, update, batch.index)
    noise = Draw(seed, update, batch.index)(Stream.RENOISE, 0, cond.shape)
    columns = {}
    if noises and reward is not None and ramp(progress, start) > 0:
        more = [Draw(seed, update, batch.index)(Stream.RENOISE, 1 + k, cond.shape) for k in range(1, noises)]
        chosen = {"guidance": guidance, "method": compare, "weight": weight, "temperature": temperature}
        loss, liked = reward_sds(model, reward, x0, t, torch.stack([noise, *more], 1), cond, batch, **chosen)
        columns = {name_of(reward): liked.mean(1)}
    else:
        loss, _ = distilled(model, x0, t, noise, cond, guidance=guidance, method=compare, weight=weight)
    (pull,) = torch.autograd.grad(loss, leaf)
    total = pull
    azimuth = batch.cameras.azimuth
    for term, share, much in (
        (None if noises else reward, None, rho),
        (consistency, near(azimuth, PROMPT_CAMERA[0]), rho_visual),
    ):
        if term is not None:
            told = batch if term is reward else replace(batch, reference=batch.visual)
            slope, scores = rewarded(term, leaf, told, hinge=hinge if term is reward else None, share=share)
            total = total + balanced(slope, pull, much * ramp(progress, start))
            columns[name_of(term)] = scores
    extra = (
        smoothness * scene.smoothness() + opacity * sparsity(rendered.opacity) + decided * indecision(rendered.opacity)
    )
    if eikonal:
        extra = extra + eikonal * scene.eikonal()  # type: ignore[attr-defined]
    if method == "vsd":
        extra = extra + _own_score(model, x0, batch, seed, update, cond)
    scalars = {"distillation_norm": float(pull.norm()), "opacity": float(rendered.opacity.detach().mean())}
    count = len(batch)
    yield (
        injected(pictures, count * total) + extra,
        Info(1, columns=columns, scalars=scalars, calls={"rendered": count}),
    )
    return state


def _compared(method: str, model: Model, batch: Batch) -> tuple[Cond, Method]:
    """The condition of an update's views, and what the method does with it."""
    if method == "perp-neg":
        prompt, each = (batch.meta or [{}])[0]["prompt"], batch[[i for i in range(len(batch)) for _ in VIEWS]]
        words = replace(each, prompts=asked(prompt, VIEWS) * len(batch), parent=None)
        return model.encode(words), partial(perp_neg, cameras=batch.cameras)
    cond = model.encode(batch)
    if method == "isd":
        return cond, partial(isd, control=model.encode(replace(batch, visual=None, visual_scale=None)))
    if method == "vsd":
        return cond, partial(vsd, score=model, score_cond=cond)
    return cond, {"sds": sds, "csd": csd}[method]


def _own_score(model: Model, x0: Tensor, batch: Batch, seed: int, update: int, cond: Cond) -> Tensor:
    """The loss of vsd's adapter, (): draws of its own, over all times."""
    t = drawn(model.process, FIRST, seed, update, batch.index, k=1)
    noise = Draw(seed, update, batch.index)(Stream.RENOISE, 1, cond.shape)
    return score_losses(model, x0, t, noise, cond).mean()


def _check(method: str, anneal: str, consistency: Reward | None, batch: Batch) -> None:
    for name, known, what in ((method, METHODS, "method"), (anneal, ANNEALS, "anneal")):
        if name not in known:
            raise UserError(f"The {what} is {name!r}; it must be one of {', '.join(known)}.")
    if batch.visual is None and (consistency is not None or method == "isd"):
        what = "isd" if consistency is None else f"the reward '{name_of(consistency)}'"
        raise UserError(f"{what} compares with a visual prompt, and there is none. Give one, or leave it out.")


@dataclass
class Stage:
    """VP3D as a step of a training loop: a part of a run, from `begin` to `end` of its progress, on one scene.

    how: hyperparameters of `vp3d`. first: updates that other stages have done before, so that no draw is made twice.
    """

    model: Model
    scene: Scene
    asked: Asked
    how: Mapping[str, Any]
    first: int = 0
    begin: float = 0.0
    end: float = 1.0
    progress: float = 0.0

    def pace(self, done: float) -> None:
        self.progress = self.begin + done * (self.end - self.begin)

    def batch(self, update: int, seed: int) -> Batch:
        return self.asked.batch(seed, self.first + update)

    def __call__(
        self, batch: Batch, *, state: dict, update: int, seed: int, micro_batch: int | None
    ) -> Generator[tuple[Tensor, Info], None, dict]:
        moment = {"state": state, "update": self.first + update, "seed": seed, "progress": self.progress}
        return vp3d(self.model, self.scene, batch, **moment, **self.how)


def prompt_batch(
    prompt: str, count: int, *, negative: str = "", background: Sequence[float] = (1.0, 1.0, 1.0)
) -> Batch:
    """What the model is asked for to draw `count` visual prompts: the front view."""
    azimuth, elevation = PROMPT_CAMERA
    front = placed([azimuth] * count, elevation)
    return Batch(
        asked(prompt, front.views()),
        negative_prompts=[negative] * count,
        cameras=front,
        meta=[{"background": list(background)}] * count,
    )
