"""The command that makes a 3-D object from text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tropism.core import Model, Reward, UserError, name_of
from tropism.run.checks import at_least_one, finite_numbers, known, not_negative, set_up
from tropism.run.optimiser import schedule_of
from tropism.run.record import Recorder
from tropism.run.request import as_plain, spelled
from tropism.run.scene_products import Made, protocol, write
from tropism.run.scene_request import EXACT, NONE, check_sees, guidance_of, model_of, of_solids, strength_of, terms_of
from tropism.run.sculpt import (
    FINE,
    Plan,
    Sculpture,
    Visual,
    drawn_prompt,
    kept_prompt,
    looked_at,
    read_prompt,
    sculpted,
)
from tropism.scene.distill import WEIGHTS, size_of
from tropism.scene.gaussians import GaussianField
from tropism.scene.measures import measured
from tropism.scene.mesh import Mesh, installed
from tropism.scene.times import ANNEALS
from tropism.scene.vp3d import METHODS, Asked, prompt_batch
from tropism.worlds import solids, solids_features, solids_oracle

FREE = ("out", "checkpoint_every", "watch", "device", "threads")
"""Settings that a resumed scene need not have in common with its beginning."""
VISUAL = "visual.safetensors"
OF_VP3D = ("weight", "anneal", "rho", "rho_visual", "hinge", "start", "samples", "pixels")
OF_VP3D += ("noises", "temperature", "smoothness", "opacity", "decided")


@dataclass(frozen=True)
class SceneRun:
    """A finished scene: its folder, the field, its mesh, and what was measured."""

    out: Path
    field: Sculpture
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
    strength: float | None = None,
    updates: int = 150,
    fine_updates: int = 75,
    resolution: int = 32,
    fine_resolution: int = 48,
    fine: str = "surface",
    gaussians: int = 512,
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

    prompt: what it shall be. model: solids-exact (the exact denoiser of the bundled world), solids (a network trained on it), a Stable
    Diffusion folder or hub id, file.py:Class, or a Model. adapter: its image adapter, "FOLDER" or org/name:path/to/file, without which it
    reads no picture. reference: a picture file that gives the looks, in place of the one that the model draws. reward: of every view and
    the text, summed; "none" for none. noises: above 0 the reward needs no gradient, and weighs so many noises of a view at `temperature`.
    consistency: a reward that compares views with the picture near its own camera, such as features:SOURCE; "none" for none. watch:
    rewards to measure only. negative: what it must not look like. distillation: sds, csd, isd, vsd or perp-neg. candidates: pictures
    drawn, of which the reward takes the best; 0 for no visual prompt. strength: how much the picture counts in front (default .5, with
    solids 2), and behind a quarter of it. updates: of the coarse stage, on resolution^3 voxels. fine_updates: of the fine one, on
    fine_resolution^3. fine: surface (a signed distance), gaussian (so many `gaussians`; also writes scene.ply), voxel or none. lr: of
    Adam in the coarse stage. fine_lr: in the fine one. views: pictures an update. samples: points along a ray. pixels: side of a render,
    default the model's own. guidance: of the distillation, default the model's own, with solids 7.5; the picture is drawn at the model's
    own. steps: of drawing the picture. weight: w(t), one of sds, uniform, fantasia3d. anneal: of the times, one of constant, linear,
    square-root. rho: the reward's share of the distillation's gradient. rho_visual: the same of consistency. hinge: a view worth that
    much is content. start: share of the run before rewards count. smoothness: weight of total variation. opacity: weight of sparsity.
    decided: weight against half-transparency. eikonal: weight of a distance's slope, of a surface.
    OUT gets turntable.gif, views.png, mesh.glb, viewer.html, visual_prompt.png, metrics.json, report.html, scene.safetensors.
    Raises UserError for anything that cannot be, for a scene that collapses to nothing, and for a resumed scene with other settings.
    """
    settings = dict(locals())
    settings |= {"strength": strength_of(model) if strength is None else strength}
    check(settings)
    installed()
    place, precision = set_up(device, dtype, threads)
    loaded = model_of(model, prompt, adapter, distillation, place, precision)
    kept = Path(out) / VISUAL if resume else None
    check_sees(loaded, settings, kept)
    terms = terms_of(settings, of_solids(model))
    settings |= {"guidance": guidance_of(model, loaded) if guidance is None else guidance}
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
            for n in ("updates", "fine_updates", "views", "samples", "pixels", "checkpoint_every", "steps", "gaussians")
        }
    )
    for name in ("resolution", "fine_resolution"):
        if settings[name] < 2:
            raise UserError(
                f"--{name.replace('_', '-')} is {settings[name]}; a grid has at least 2 nodes a side. Try 48."
            )
    numbers = (
        "strength",
        "lr",
        "fine_lr",
        "rho",
        "rho_visual",
        "eikonal",
        "temperature",
        "smoothness",
        "opacity",
        "decided",
    )
    not_negative(**{n: settings[n] for n in (*numbers, "candidates", "seed", "noises")})
    finite_numbers(**{n: settings[n] for n in (*numbers, "guidance", "hinge", "start")})
    schedule_of(settings["schedule"])
    if settings["noises"] == 1:
        raise UserError("--noises is 1, and one noise cannot be weighed against another. Try 4.")
    if settings["noises"] and list(settings["reward"]) == [NONE]:
        raise UserError(f"There is no reward to weigh {settings['noises']} noises by. Name one with --reward.")
    if settings["noises"] and settings["distillation"] == "perp-neg":
        raise UserError("perp-neg weighs view words, not noises. Take another --distillation, or leave --noises out.")
    if settings["distillation"] == "isd" and settings["candidates"] == 0 and settings["reference"] is None:
        raise UserError(
            "isd compares with a visual prompt, and there is none. Leave --candidates 0 out, or give a --reference."
        )
    for name, choices in (("fine", FINE), ("distillation", METHODS), ("weight", WEIGHTS), ("anneal", ANNEALS)):
        known(settings[name], choices, name)
    if not 0 <= settings["start"] < 1:
        raise UserError(f"--start is {settings['start']:g}; it is a share of the run, in [0, 1). Try 0.3.")


# ---------------------------------------------------------------------------------------------------- as it was begun


def _name(reward: Reward | None) -> str | None:
    return None if reward is None else name_of(reward)


def _check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for a scene that was begun with other settings."""
    file = folder / "config.yaml"
    if not file.exists():
        return
    before, now = yaml.safe_load(file.read_text("utf-8")) or {}, yaml.safe_load(yaml.safe_dump(dict(config)))
    odd = [f"{n} {before[n]!r}, now {now.get(n)!r}" for n in before if n not in FREE and before[n] != now.get(n)]
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
    visual = _visual(model, terms["reward"], settings, size, out / VISUAL)
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
        s["gaussians"],
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
        protocol=protocol(size, of_solids(s["model"])),
        parts=len(solids.parse(s["prompt"]).solids) if of_solids(s["model"]) else 1,
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
        how = {"count": s["candidates"], "steps": steps, "guidance": getattr(model, "guidance", 7.5), "seed": s["seed"]}
        make = partial(drawn_prompt, model, s["prompt"], reward, negative=s["negative"], **how)
    file.parent.mkdir(parents=True, exist_ok=True)
    return kept_prompt(file, make)


def _of_solids(field: Sculpture, model: Model, settings: Mapping[str, Any]) -> dict[str, float]:
    """What a judge that never rewarded says of a scene of the solids world, from 16 sides, and how far it is from the one scene that the
    prompt can mean, where it can mean but one; {} of other models.
    """
    if not of_solids(settings["model"]) or NONE in settings["watch"]:
        return {}
    solid = field.baked() if isinstance(field, GaussianField) else field
    solid, asked = copy.deepcopy(solid).to("cpu"), solids.parse(settings["prompt"])
    known = model.library.scenes if isinstance(model, solids_oracle.OracleModel) else solids.scenes()
    meant = [s for s in known if s.fits(asked)]
    truth = meant[0] if len(meant) == 1 and settings["reference"] is None else None
    found = measured(solid, asked, truth=truth, judge=solids_features.classifier("judge"))
    judged = ("accuracy", "log_prob", "face", "janus")
    named = lambda name: f"{'judge/' if name.startswith(judged) else '' if name == 'colour_spread' else 'truth/'}{name}"
    return {named(n): v for n, v in found.items() if n not in ("floaters", "threshold")}
