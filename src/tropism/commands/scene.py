"""The command that makes a 3-D object from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from rich.console import Console

from tropism.core import Model, Reward, UserError, name_of
from tropism.models.load import load_model
from tropism.models.lora import LoraSettings
from tropism.rewards.load import check_prompts, require_gradient
from tropism.run.checks import at_least_one, finite_numbers, known, not_negative, set_up
from tropism.run.record import Recorder
from tropism.run.request import as_plain, read_reward, spelled
from tropism.run.scene_products import Made, write
from tropism.run.sculpt import FINE, VIEWS, Plan, Visual, drawn_prompt, kept_prompt, looked_at, read_prompt, sculpted
from tropism.scene.distill import WEIGHTS, size_of
from tropism.scene.field import SurfaceField, VoxelField
from tropism.scene.measures import measured
from tropism.scene.mesh import Mesh
from tropism.scene.times import ANNEALS
from tropism.scene.vp3d import METHODS, Asked, prompt_batch
from tropism.worlds import solids, solids_features, solids_oracle

EXACT = "solids-exact"
OWN: dict[str, Any] = {"reward": ["solids-text"], "consistency": "solids-visual", "watch": ["solids-judge"]}
"""Of the solids world, where nothing is said."""
NONE = "none"
FIXED = ("prompt", "model", "adapter", "reference", "resolution", "fine_resolution", "fine", "updates", "fine_updates")
FIXED += (
    "distillation",
    "seed",
    "reward",
    "consistency",
    "candidates",
    "strength",
    "views",
    "lr",
    "guidance",
    "negative",
)
"""Settings that a resumed scene must have in common with its beginning."""
OF_VP3D = ("weight", "anneal", "rho", "rho_visual", "hinge", "start", "samples", "pixels")
OF_VP3D += ("noises", "temperature", "smoothness", "opacity", "decided")


@dataclass(frozen=True)
class SceneRun:
    """A finished scene: its folder, the field, its mesh, and what was measured."""

    out: Path
    field: VoxelField | SurfaceField
    mesh: Mesh
    numbers: dict[str, float]


def scene(
    prompt: str,
    *,
    out: str | Path,
    model: str | Model = EXACT,
    adapter: str | Path | None = None,
    reference: str | Path | None = None,
    reward: Sequence[Reward | str] = (),
    consistency: Reward | str | None = None,
    watch: Sequence[Reward | str] = (),
    negative: str = "",
    distillation: str = "sds",
    candidates: int = 8,
    strength: float = 0.5,
    updates: int = 150,
    fine_updates: int = 75,
    resolution: int = 32,
    fine_resolution: int = 48,
    fine: str = "surface",
    lr: float = 0.06,
    fine_lr: float = 0.02,
    schedule: str = "constant",
    views: int = 4,
    samples: int = 32,
    pixels: int | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    weight: str = "sds",
    anneal: str = "linear",
    rho: float = 0.2,
    rho_visual: float = 0.2,
    noises: int = 0,
    temperature: float = 1.0,
    hinge: float | None = None,
    start: float = 0.3,
    smoothness: float = 5.0,
    opacity: float = 0.0,
    decided: float = 0.0,
    eikonal: float = 10.0,
    seed: int = 0,
    checkpoint_every: int = 25,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    command: str = "",
) -> SceneRun:
    """Make a 3-D object from text: a picture first, then a scene that follows text and picture, with rewards of its views.

    prompt: what it shall be. model: solids-exact (the exact denoiser of the bundled world), a Stable Diffusion folder or hub id,
    file.py:Class, or a Model. adapter: its image adapter, "FOLDER" or org/name:path/to/file, without which it reads no picture.
    reference: a picture file that gives the looks, in place of the one that the model draws. reward: of every view and the text, summed;
    "none" for none. noises: above 0 the reward needs no gradient, and weighs so many noises of a view at `temperature`. consistency: a
    reward that compares views with the picture near its own camera, such as features:SOURCE; "none" for none. watch: rewards to
    measure only. negative: what it must not look like. distillation: sds, csd, isd, vsd or perp-neg. candidates: pictures drawn, of which
    the reward takes the best; 0 for no visual prompt. strength: how much the picture counts in front, and behind a quarter of it.
    updates: of the coarse stage, on resolution^3 voxels. fine_updates: of the fine one, on fine_resolution^3. fine: surface (a signed
    distance), voxel or none. lr: of Adam in the coarse stage. fine_lr: in the fine one. views: pictures an update. samples: points
    along a ray. pixels: side of a render, default the model's own. guidance: of the distillation, default the model's own. steps: of
    drawing the picture. weight: w(t), one of sds, uniform, fantasia3d. anneal: of the times, one of constant, linear, square-root.
    rho: the reward's share of the distillation's gradient. rho_visual: the same of consistency. hinge: a view worth that much is
    content. start: share of the run before rewards count. smoothness: weight of total variation. opacity: weight of sparsity.
    decided: weight against half-transparency. eikonal: weight of a distance's slope, of a surface.
    OUT gets turntable.gif, views.png, mesh.glb, viewer.html, visual_prompt.png, metrics.json, report.html, scene.safetensors.
    Raises UserError for anything that cannot be, for a scene that collapses to nothing, and for a resumed scene with other settings.
    """
    settings = dict(locals())
    check(settings)
    place, precision = set_up(device, dtype, threads)
    loaded = _model(model, prompt, adapter, distillation, place, precision)
    _check_sees(loaded, settings)
    of_solids = isinstance(loaded, solids_oracle.OracleModel)
    terms = _terms(settings, of_solids)
    settings |= {"guidance": getattr(loaded, "guidance", 7.5) if guidance is None else guidance}
    settings |= {"reward": spelled(terms["reward"] or ()), "consistency": _name(terms["consistency"])}
    config = as_plain({**settings, "model": model if isinstance(model, str) else type(model).__name__})
    config = {n: v for n, v in config.items() if n not in ("command", "resume", "overwrite")} | {
        "watch": [name_of(w) for w in terms["watch"]]
    }
    folder = Path(out)
    if resume:
        _check_same(folder, config)
    with Recorder(folder, config, resume=resume, overwrite=overwrite) as recorder:
        made = _made(loaded, terms, settings, config, recorder)
    return made


def check(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a prompt without words and for settings out of range."""
    if not settings["prompt"].strip():
        raise UserError("The prompt is empty. Say what the object shall be: tropism scene 'a red cube' --out DIR.")
    at_least_one(
        **{
            n: settings[n]
            for n in ("updates", "fine_updates", "views", "samples", "pixels", "checkpoint_every", "steps")
        }
    )
    for name in ("resolution", "fine_resolution"):
        if settings[name] < 2:
            raise UserError(
                f"--{name.replace('_', '-')} is {settings[name]}; a grid has at least 2 nodes a side. Try 48."
            )
    not_negative(
        **{
            n: settings[n]
            for n in ("candidates", "strength", "lr", "fine_lr", "rho", "rho_visual", "seed", "eikonal", "noises")
        }
    )
    not_negative(**{n: settings[n] for n in ("smoothness", "opacity", "decided")})
    finite_numbers(**{n: settings[n] for n in ("strength", "lr", "rho", "rho_visual", "guidance", "hinge", "start")})
    if settings["noises"] and list(settings["reward"]) == [NONE]:
        raise UserError(f"There is no reward to weigh {settings['noises']} noises by. Name one with --reward.")
    for name, choices in (("fine", FINE), ("distillation", METHODS), ("weight", WEIGHTS), ("anneal", ANNEALS)):
        known(settings[name], choices, name)
    if not 0 <= settings["start"] < 1:
        raise UserError(f"--start is {settings['start']:g}; it is a share of the run, in [0, 1). Try 0.3.")


# ---------------------------------------------------------------------------------------------------- what it needs


def _check_sees(model: Model, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a reference that cannot be read, and for a model that reads no picture where it shall follow one."""
    if settings["reference"] is None and settings["candidates"] == 0:
        return
    v = torch.ones(3, 8, 8) if settings["reference"] is None else read_prompt(settings["reference"], (8, 8)).picture
    try:
        model.encode(replace(prompt_batch(settings["prompt"], 1), visual=v[None], visual_scale=torch.ones(1)))
    except UserError as error:
        raise UserError(f"{error} Give it as --adapter; or do without a picture: --candidates 0.") from error


def _model(
    model: str | Model, prompt: str, adapter: str | Path | None, method: str, device: torch.device, dtype: torch.dtype
) -> Model:
    if model == EXACT:
        if adapter or method == "vsd":
            what = "no image adapter" if adapter else "no score network of its own to train (vsd)"
            raise UserError(f"{EXACT} is exact: it has {what}. Leave that out, or give another --model.")
        if not any(solids_oracle.kept_in().glob("solids-*")):
            say = Console(soft_wrap=True, highlight=False).print
            say(f"Drawing the pictures that the exact denoiser knows; kept in {solids_oracle.kept_in()}.")
        return cast(Model, solids_oracle.exact(prompt, dtype=dtype, device=device))
    if not isinstance(model, str):
        return model
    trained = LoraSettings() if method == "vsd" else None
    return load_model(model, device=device, dtype=dtype, lora=trained, **({"visual": adapter} if adapter else {}))


def _terms(settings: Mapping[str, Any], of_solids: bool) -> dict[str, Any]:
    """Reward, consistency and watched rewards, read and checked; the solids world has its own where nothing is said.

    One of its scenes with two solids has none: its networks read one.
    """
    own = OWN if of_solids and len(solids.parse(settings["prompt"]).solids) == 1 else {}
    asked = {n: settings[n] or own.get(n, ()) for n in OWN}
    seen = settings["candidates"] > 0 or settings["reference"] is not None
    found: dict[str, Any] = {"reward": None, "consistency": None}
    for name in found:
        if asked[name] and asked[name] not in (NONE, [NONE], (NONE,)) and (seen or name == "reward"):
            found[name] = read_reward(asked[name])
            _follows(found[name], settings["noises"] if name == "reward" else 0)
    found["watch"] = [read_reward(w) for w in asked["watch"] if w != NONE]
    for reward in (found["reward"], *found["watch"]):
        if reward is not None:
            check_prompts(reward, [settings["prompt"]])
    return found


def _follows(reward: Reward, noises: int) -> None:
    """Raises UserError for a reward without the gradient that it would be followed by."""
    try:
        if not noises:
            require_gradient(reward, "a scene")
    except UserError as error:
        raise UserError(f"{error} Here it can weigh noises instead: --noises 4.") from error


def _name(reward: Reward | None) -> str | None:
    return None if reward is None else name_of(reward)


def _check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for a scene that was begun with other settings."""
    file = folder / "config.yaml"
    if not file.exists():
        return
    before = yaml.safe_load(file.read_text("utf-8")) or {}
    odd = [f"{n} {before.get(n)!r}, now {config.get(n)!r}" for n in FIXED if before.get(n) != config.get(n)]
    if odd:
        raise UserError(
            f"This scene was begun with {'; '.join(odd)}. Resume it as it was begun, or choose another --out."
        )


# ---------------------------------------------------------------------------------------------------- the run


def _made(
    model: Model, terms: Mapping[str, Any], settings: Mapping[str, Any], config: dict[str, Any], recorder: Recorder
) -> SceneRun:
    out, s = recorder.out, settings
    size = size_of(model, model.encode(prompt_batch(s["prompt"], 1, negative=s["negative"])))
    visual = _visual(model, terms["reward"], settings, size, out / "visual.safetensors")
    asked = Asked(
        s["prompt"],
        negative=s["negative"],
        visual=None if visual is None else visual.picture.to(model.device),
        strength=s["strength"],
        views=s["views"],
    )
    how = (
        {n: s[n] for n in OF_VP3D}
        | {"guidance": s["guidance"], "method": s["distillation"]}
        | {n: terms[n] for n in ("reward", "consistency")}
    )
    plan = Plan(
        (s["updates"], s["fine_updates"]),
        (s["resolution"], s["fine_resolution"]),
        (s["lr"], s["fine_lr"]),
        s["fine"],
        s["schedule"],
        s["checkpoint_every"],
        s["seed"],
        s["eikonal"],
    )
    seen = {name_of(r): r for r in (terms["reward"], *terms["watch"]) if r is not None}
    watching = partial(looked_at, prompt=s["prompt"], rewards=seen, size=size, device=model.device)
    field, lines = sculpted(
        model, asked, how, plan, out=out, resume=s["resume"], config=config, watching=watching, say=recorder.say
    )
    numbers = {n.removeprefix("held_out/"): v for n, v in watching(field).items()} | _of_solids(field, model, settings)
    done = Made(
        prompt=s["prompt"],
        method=("VP3D, " if visual is not None else "") + s["distillation"],
        model=config["model"],
        seed=s["seed"],
        command=s["command"] or f"tropism.commands.scene({s['prompt']!r}, out={str(out)!r})",
        config=config,
        environment=recorder.environment,
        visual=visual,
        reference=s["reference"] is not None,
        rewards=[name_of(r) for r in (terms["reward"], terms["consistency"]) if r is not None],
        numbers=numbers,
        protocol=f"Rewards: means and the worst of {VIEWS} views around it at 15 degrees, {size[1]} x {size[0]} pixels, on white.",
        lines=lines,
    )
    mesh = write(out, field, done)
    recorder.say("\n".join(f"  {name:28s} {value:10.4f}" for name, value in numbers.items()))
    recorder.say(f"See {out / 'report.html'}; turn it in {out / 'viewer.html'}")
    return SceneRun(out, field, mesh, numbers)


def _visual(
    model: Model, reward: Reward | None, settings: Mapping[str, Any], size: tuple[int, int], file: Path
) -> Visual | None:
    """The visual prompt, as it was begun with where the run is resumed."""
    s = settings
    make: Callable[[], Visual]
    if s["reference"] is not None:
        make = partial(read_prompt, s["reference"], size)
    elif s["candidates"] == 0:
        return None
    else:
        steps = s["steps"] or getattr(model, "steps", 50)
        how = {"count": s["candidates"], "steps": steps, "guidance": s["guidance"], "seed": s["seed"]}
        make = partial(drawn_prompt, model, s["prompt"], reward, negative=s["negative"], **how)
    file.parent.mkdir(parents=True, exist_ok=True)
    return kept_prompt(file, make)


def _of_solids(field: VoxelField | SurfaceField, model: Model, settings: Mapping[str, Any]) -> dict[str, float]:
    """What a judge that never rewarded says of a scene of the solids world, from 16 sides; {} of other models."""
    if not isinstance(model, solids_oracle.OracleModel) or NONE in settings["watch"]:
        return {}
    found = measured(field, solids.parse(settings["prompt"]), judge=solids_features.classifier("judge"))
    return {f"judge/{n}": v for n, v in found.items() if n not in ("floaters", "threshold")}
