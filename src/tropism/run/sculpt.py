"""A scene being made: its visual prompt, and the stages that training takes it through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from tropism.core import Batch, Model, Reward, UserError, scored
from tropism.restore import pictures as files
from tropism.rewards.pixels import resized
from tropism.run.evaluate import evaluate
from tropism.run.fit import fit
from tropism.run.record import Recorder
from tropism.scene.drawing import drawn
from tropism.scene.field import SurfaceField, VoxelField
from tropism.scene.gaussians import GaussianField, from_field
from tropism.scene.measures import border
from tropism.scene.threshold import level_of
from tropism.scene.views import asked as worded
from tropism.scene.vp3d import PROMPT_CAMERA, Asked, Stage, prompt_batch
from tropism.space.cameras import Cameras, ring

FINE = ("surface", "gaussian", "voxel", "none")
VIEWS = 8
"""Held-out views around the object."""
BETAS, EPS = (0.9, 0.99), 1e-15
"""Of Adam, as threestudio has them."""
RATES = {"means": 0.1, "log_scales": 1.0, "rotations": 1.0, "opacity_logits": 2.5, "dc": 2.5}
"""Of Gaussians, in units of the fine stage's rate."""
STARTING = 0.5
"""The opacity at which they begin: a stage of some 100 updates has no time to raise it."""
Sculpture = VoxelField | SurfaceField | GaussianField


# ---------------------------------------------------------------------------------------------------- the visual prompt


@dataclass(frozen=True)
class Visual:
    """The visual prompt (3, H, W), and where it was chosen: all candidates (N, 3, H, W) and their rewards (N,)."""

    picture: Tensor
    candidates: Tensor
    rewards: Tensor


def drawn_prompt(
    model: Model,
    prompt: str,
    reward: Reward | None,
    *,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    negative: str,
) -> Visual:
    """The best of `count` pictures that the model draws of the prompt, from the front on white, by the reward; without one the first."""
    nothing = lambda images, batch: images.new_zeros(len(images))
    batch = prompt_batch(prompt, count, negative=negative)
    found = evaluate(model, reward or nothing, batch, steps=steps, guidance=guidance, seed=seed, batch_size=8)
    rewards = found.columns["reward"]
    return Visual(found.images[int(rewards.nan_to_num(-torch.inf).argmax())], found.images, rewards)


def read_prompt(file: Path | str, size: tuple[int, int]) -> Visual:
    """A picture file as the visual prompt: alpha on white, made square with the colour of its border, brought to size (H, W).

    Raises UserError for what is no picture, and for one of a single colour.
    """
    x = files.read(file).whole()
    if bool((x.flatten(2).amax(2) - x.flatten(2).amin(2) < 1 / 255).all()):
        raise UserError(
            f"{file} shows nothing: it is of one colour (what is transparent counts as white). Give a picture of an object."
        )
    high, wide = x.shape[-2:]
    side = max(high, wide)
    left, top = (side - wide) // 2, (side - high) // 2
    room = (left, side - wide - left, top, side - high - top)
    x = torch.stack([pad(channel, room, value=float(c)) for channel, c in zip(x[0], border(x[0]), strict=True)])[None]
    picture = resized(x, *size, mode="bilinear").clamp(0, 1)
    return Visual(picture[0], picture, torch.full((1,), torch.nan))


def kept_prompt(file: Path, make: Callable[[], Visual]) -> Visual:
    """The visual prompt in a file, made and written there if it is not: a resumed run follows the same picture to the bit."""
    if not file.exists():
        made = make()
        unfinished = file.with_suffix(".part")
        save_file({n: v.clone().contiguous() for n, v in vars(made).items()}, unfinished)
        unfinished.replace(file)
    return Visual(**load_file(file))


# ---------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Plan:
    """How a scene is trained: a coarse stage on voxels, and a fine one on a surface, on Gaussians, on finer voxels, or none.

    updates, resolution, lr: of the coarse stage and the fine one. schedule: how lr goes over each of them, see `fit`.
    """

    updates: tuple[int, int]
    resolution: tuple[int, int]
    lr: tuple[float, float]
    fine: str
    schedule: str
    checkpoint_every: int
    seed: int
    eikonal: float
    gaussians: int = 512


def sculpted(
    model: Model,
    asked: Asked,
    how: Mapping[str, Any],
    plan: Plan,
    *,
    out: Path,
    resume: bool,
    config: Mapping[str, Any],
    watching: Callable[[Any], Mapping[str, float]],
    say: Callable[[str], None],
) -> tuple[Sculpture, list[dict[str, Any]]]:
    """The finished field and the lines of both stages' records, from OUT/coarse and OUT/fine; finished stages are read, not repeated."""
    coarse = VoxelField(plan.resolution[0]).to(model.device)
    share = 1.0 if plan.fine == "none" else plan.updates[0] / sum(plan.updates)
    stage = Stage(model, coarse, asked, how, 0, 0.0, share)
    lines = _trained(stage, plan, 0, out / "coarse", resume, config, watching)
    level = level_of(coarse)  # an empty scene is said so, before more is spent on it
    if plan.fine == "none":
        return coarse, lines
    say(f"The fine stage: {plan.gaussians if plan.fine == 'gaussian' else f'{plan.resolution[1]}^3'}, {plan.fine}.")
    field = _refined(coarse, plan, level)
    own = dict(how) | ({"eikonal": plan.eikonal} if plan.fine == "surface" else {})
    stage = Stage(model, field, asked, own, plan.updates[0], share, 1.0)
    more = _trained(stage, plan, 1, out / "fine", resume, config, watching)
    return field, [*lines, *({**line, "update": line["update"] + plan.updates[0]} for line in more)]


def _refined(coarse: VoxelField, plan: Plan, level: float) -> Sculpture:
    """What the fine stage begins with. level: the density of the coarse scene's surface."""
    if plan.fine == "gaussian":
        inside = lambda points: ((density := coarse(points)[0]) * (density > level), coarse(points)[1])
        return from_field(inside, plan.gaussians, seed=plan.seed, opacity=STARTING, device=coarse.grid.device)
    finer = coarse.grown(plan.resolution[1])
    return SurfaceField.of(finer, level) if plan.fine == "surface" else finer


def _trained(
    stage: Stage,
    plan: Plan,
    number: int,
    folder: Path,
    resume: bool,
    config: Mapping[str, Any],
    watching: Callable[[Any], Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Train the stage's field in place; the lines of its record. number: 0 is the coarse stage, 1 the fine one."""
    scene: Any = stage.scene
    parameters: dict[str, Tensor] = dict(scene.named_parameters())
    groups, rates, updates = {"scene": parameters}, {"scene": plan.lr[number]}, plan.updates[number]
    if isinstance(scene, GaussianField):
        groups = {name: {name: value} for name, value in parameters.items()}
        rates = {name: RATES[name] * plan.lr[number] for name in groups}
    if stage.how.get("method") == "vsd":
        groups["score"] = dict(stage.model.trainable())
        rates["score"] = 1e-4
    with Recorder(folder, config, resume=resume) as recorder:
        fit(
            stage,
            groups,
            lambda update: stage.batch(update, plan.seed),
            updates=updates,
            out=folder,
            recorder=recorder,
            lr=rates,
            betas=BETAS,
            eps=EPS,
            weight_decay=0.0,
            clip=0.0,
            schedule=plan.schedule,
            seed=plan.seed,
            checkpoint_every=plan.checkpoint_every,
            resume=resume,
            evaluate=lambda _: dict(watching(scene)),
            evaluate_every=max(1, updates // 4),
        )
        return recorder.lines()


# ---------------------------------------------------------------------------------------------------- looking on


def around(device: torch.device, count: int = VIEWS) -> Cameras:
    """The held-out views: equally spaced, at the visual prompt's elevation."""
    return ring(count, PROMPT_CAMERA[1]).to(device)


@torch.no_grad()
def looked_at(
    field: Any, prompt: str, rewards: Mapping[str, Reward], size: tuple[int, int], device: torch.device
) -> dict[str, float]:
    """Of every reward its mean over the held-out views, and of the worst one, as "held_out/NAME" and "held_out/NAME/worst"."""
    places = around(device)
    views = torch.cat([drawn(field, places[[i]], size).over(1.0) for i in range(len(places))])
    batch = Batch(worded(prompt, places.views()), cameras=places)
    found = {}
    for name, reward in rewards.items():
        values = scored(reward, views, batch).double()
        found |= {f"held_out/{name}": values.mean().item(), f"held_out/{name}/worst": values.min().item()}
    return found
