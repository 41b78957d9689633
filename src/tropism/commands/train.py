"""Commands that train: align a model, show it on the bundled one, train the bundled networks from nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tropism.align.alignprop import alignprop
from tropism.align.ddpo import ddpo
from tropism.align.draft import draft, draft_lv
from tropism.align.drtune import drtune
from tropism.align.normalise import Scaled
from tropism.align.refl import refl
from tropism.core import Info, Model, Reward, UserError, name_of
from tropism.doctor.examine import examine
from tropism.models import lora
from tropism.models.load import BUNDLED
from tropism.models.lora import LoraSettings
from tropism.prompts.batches import own_rows
from tropism.rewards.workers import end, ended
from tropism.run import ledger, request
from tropism.run.checks import known, numbers_of, set_up
from tropism.run.evaluate import Evaluation
from tropism.run.fit import FitResult, fit
from tropism.run.products import Judge, Products
from tropism.run.record import Recorder
from tropism.run.request import Request
from tropism.run.sentinel import PATIENCE
from tropism.run.watch import Watch

METHODS = {
    "alignprop": alignprop,
    "draft": draft,
    "draft-lv": draft_lv,
    "refl": refl,
    "drtune": drtune,
    "ddpo": ddpo,
}
OF_FIT = (
    *("out", "updates", "lr", "weight_decay", "clip", "ema", "schedule", "seed", "micro_batch"),
    *("checkpoint_every", "evaluate_every"),
)
NOT_CONFIG = ("model", "reward", "callback", "command", "dry_run", "doctor", "resume", "overwrite")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the held-out pictures and numbers before and after, and the fitted weights.

    reload_difference: largest pixel difference after loading the adapter into a plain diffusers pipeline (None: no adapter file).
    """

    out: Path
    before: Evaluation
    after: Evaluation
    result: FitResult
    reload_difference: float | None


def align(
    method: str,
    *,
    model: str | Model,
    reward: Reward | str | Sequence[Reward | str],
    prompts: str | Path | Sequence[str] | None = None,
    pictures: str | Path | None = None,
    low_res: str | Path | None = None,
    degrade: str = "realesrgan",
    crop: int = 0,
    out: str | Path,
    updates: int = 60,
    batch: int = 16,
    per_prompt: int = 1,
    options: Mapping[str, Any] | None = None,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    clip: float = 1.0,
    ema: float = 0.0,
    schedule: str = "constant",
    micro_batch: int | None = None,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = LoraSettings().targets,
    normalise: str = "none",
    ramp: Sequence[str] = (),
    full: bool = False,
    eta: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    quantize: str | None = None,
    t5: bool = True,
    scheduler: Sequence[str] = (),
    setting: Sequence[str] = (),
    seed: int = 0,
    workers: int = 0,
    timeout: float = 60.0,
    held_out: str | Path | Sequence[str] | None = None,
    budget: Sequence[str] = (),
    evaluate_every: int = 10,
    evaluate_prompts: int = 32,
    evaluate_steps: int | None = None,
    evaluate_guidance: float | None = None,
    evaluate_eta: float | None = None,
    on_alarm: str = "keep",
    watch: Sequence[Reward | str] = (),
    checkpoint_every: int = 10,
    resume: bool = False,
    overwrite: bool = False,
    trackers: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    dry_run: bool = False,
    doctor: bool = True,
    command: str = "",
    callback: Callable[[int, Info], None] | None = None,
) -> Run | None:
    """Change a model's weights so that its samples score higher, and leave a run folder. Returns the finished run.

    method: a name in METHODS. model: a bundled name, a diffusers folder, a hub id, "file.py:Class", or a Model.
    reward: a name, "NAME=WEIGHT", "file.py:function", any callable (images, batch) -> (B,), or several of these.
    prompts: a .txt, .jsonl or .csv file (with wildcards), a bundled set, `org/name[:column][@split]` on the hub, or a list;
    held_out: the same, else a tenth of the prompts is kept for evaluation.
    pictures: for an upscaler, a folder of originals instead of prompts; low_res: what it is given, by the same names, else made of
    the originals by `degrade` (realesrgan, bsrgan-lite, bicubic). crop: side of the part of an original that is used, 0 for all.
    normalise: none, base or running: every reward of a sum in units of its spread over samples of the base model ("running":
    followed from there). ramp: "NAME=WEIGHT", what a reward's weight goes to, linearly, until the last update or the budget's end.
    options: the method's own hyperparameters by name (see its function). batch: samples an update, over all processes.
    per_prompt: pictures of one prompt in a batch, which is a multiple of it (advantages within a group need several).
    height, width: pixels. quantize: "4bit" or "8bit", of the frozen denoiser. t5: False leaves that text encoder out where the
    pipeline can do without. scheduler: "KEY=VALUE" replaces a key of the scheduler's configuration (few-step variants).
    setting: "KEY=VALUE" of the model's family alone, such as an upscaler's noise_level=50.
    workers: processes that a slow reward without a gradient runs in (ddpo), each sample with a limit of `timeout` seconds (over it, -inf).
    budget: "AXIS=LIMIT": the update that reaches one ends the run before `updates` do; seconds, cpu_seconds, reward_queries,
    reward_gradients, forwards, backwards (rows of the network) or decodes, evaluations not counted.
    evaluate_steps, evaluate_guidance, evaluate_eta: deployment settings, default those of training. watch: rewards that evaluations
    measure beside it and nothing is trained on, as many as there are. on_alarm: when these fall while the trained reward rises, or
    the samples become all alike, "keep" the best weights beside the last, "stop" with them, "shrink": go back to them at half the
    rate, or "off": do not watch. dry_run: check everything, then stop. doctor: prove first that the gradient arrives, else UserError.
    Raises UserError for anything that cannot be, before the first update where possible.
    """
    settings = {k: v for k, v in locals().items() if k not in NOT_CONFIG}
    function = METHODS[known(method, METHODS, "method")]
    asked = request.read(method, function, model, reward, options or {}, settings)
    step = bound(function, asked, normalise, numbers_of("ramp", ramp))
    if not dry_run:
        asked.embed()
    remarks = [*asked.remarks, *_seldom(asked), *(_examined(asked) if doctor and not resume else [])]
    if dry_run:
        return _say_ready(asked, remarks)
    config = _config(settings, asked, model, reward)
    recording = Recorder(out, config, resume=resume, overwrite=overwrite, trackers=trackers)
    with recording as recorder, ended(asked.reward):
        for text in remarks:
            recorder.say(text)
        judge = judge_of(asked, Path(out), request.identity(model, reward, asked.reward))
        if resume:
            judge.check_begun()
        of_run = (asked.model, str(model), asked.reward, asked.train, seed, command, config, recorder, judge)
        watching = _watch(asked, judge, Path(out))
        products = Products(Path(out), method, *of_run, watching.best)
        result = fit(
            step,
            asked.model.trainable(),
            watching.batches,
            recorder=recorder,
            resume=resume,
            evaluate=watching,
            watch=watching,
            callback=callback,
            finish=products.write,
            budget=ledger.budget_of(budget),
            **{name: settings[name] for name in OF_FIT},
        )
        for text in _seldom(asked, len(watching.seen)):
            recorder.say(text)
    return Run(Path(out), judge.before, judge.after, result, products.difference)


def _seldom(asked: Request, seen: int | None = None) -> list[str]:
    """A line where watched rewards are looked at too seldom for an alarm. seen: evaluations of a run that has ended, else those planned."""
    updates, every = asked.settings["updates"], asked.settings["evaluate_every"]
    planned = 1 + (-(-updates // every) if every else 1)
    is_told = seen is not None and planned <= PATIENCE
    count = planned if seen is None else seen
    if not asked.watch or asked.settings["on_alarm"] == "off" or is_told or count > PATIENCE:
        return []
    return [
        f"What is watched can sound no alarm: that takes {PATIENCE + 1} evaluations, the base model's counted, and this run has {count}. "
        "Try a smaller --evaluate-every."
    ]


def _examined(asked: Request) -> list[str]:
    """The doctor's warnings about a run. Raises UserError for a fault."""
    guidance = asked.hyper.get("guidance", 1.0)
    seed, gradient = asked.settings["seed"], asked.method not in request.WITHOUT_GRADIENT
    found = examine(asked.model, asked.reward, asked.batch(0), guidance=guidance, seed=seed, gradient=gradient)
    faults = [f for f in found if f.level == "fault"]
    if faults:
        end(asked.reward)
        more = f" ({len(faults) - 1} more: tropism doctor.)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0].text}{more} To go on regardless: --no-doctor.")
    return [f"{f.check}: {f.text}" for f in found if f.level == "warning"]


def _say_ready(asked: Request, remarks: Sequence[str]) -> None:
    numbers = sum(p.numel() for p in asked.model.trainable().values())
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    for text in remarks:
        say(text)
    say(
        f"Everything is in order: reward {name_of(asked.reward)}, {len(asked.train)} prompts to train on, "
        f"{len(asked.held)} held out, {numbers:,} numbers to train. Nothing was written; run it again without --dry-run."
    )


def judge_of(
    asked: Request, out: Path, identity: dict[str, str], per_prompt: int = 1, before: Evaluation | None = None
) -> Judge:
    """The evaluation of a run; per_prompt, before: see `Judge`."""
    settings = asked.settings
    how = (*asked.sampling(), settings["seed"], settings["batch"], identity)
    more = {"eta": settings["evaluate_eta"], "watch": asked.watch, "per_prompt": per_prompt, "before": before}
    return Judge(out, asked.model, asked.reward, asked.held, *how, **more)


def _config(settings: Mapping[str, Any], asked: Request, model: str | Model, reward: request.Rewards) -> dict[str, Any]:
    """The settings as config.yaml keeps them."""
    watch = [request.spelled(w)[0] for w in settings["watch"]]
    own = {"model": str(model), "reward": request.spelled(reward), "watch": watch, "options": asked.hyper}
    return request.as_plain({**settings, **own})


def _watch(asked: Request, judge: Judge, out: Path) -> Watch:
    batches = lambda update: own_rows(asked.batch(update))
    chain = (asked.hyper.get("steps", 50), asked.hyper.get("guidance", 1.0))
    return Watch(out, asked.model, judge, batches, asked.settings["seed"], *chain, asked.settings["on_alarm"])


def bound(function: Callable, asked: Request, normalise: str, ramps: Mapping[str, float]) -> Scaled:
    """The algorithm with its model and hyperparameters bound, its rewards on their scales."""
    hyper = {n: asked.hyper[n] for n in ("steps", "guidance")}
    bound = lambda reward: partial(function, asked.model, reward, **asked.hyper)
    return Scaled(bound, asked.model, asked.reward, asked.settings["updates"], kind=normalise, ramps=ramps, **hyper)


def demo(
    out: str | Path = "runs/demo",
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    command: str = "tropism demo",
) -> Run | None:
    """The main job on the bundled model: count what the prompt asks for, in fewer bytes."""
    return align(
        "alignprop",
        model="shapes",
        reward=["shapes-count", "jpeg=0.3"],
        out=out,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        threads=threads or min(2, os.cpu_count() or 1),
        command=command,
        **DEMO,
    )


DEMO: dict[str, Any] = {
    "updates": 24,
    "batch": 16,
    "lr": 2e-3,
    "ema": 0.9,
    "rank": 16,
    "targets": lora.EVERY_LAYER,
    "options": {"truncation": "2", "drift": 0.1},
}
"""Adapters on every layer: grain is drawn by the convolutions, and adapters on the attention alone cannot take it away."""


def pretrain(world: str = "shapes", *, out: str | Path, quick: bool = False, threads: int | None = None) -> Path:
    """Train the bundled networks of a world from nothing, resumable; returns the folder with the finished files.

    quick: a few updates of every stage, to see that it works.
    """
    from tropism.run import pretrain as generator
    from tropism.run import pretrain_glyphs, pretrain_loop, pretrain_rewards, pretrain_sequences, pretrain_solids

    known(world, (*BUNDLED, *pretrain_sequences.RECIPES), "world")
    if Path(out).is_file():
        raise UserError(f"{out} is a file, but the networks need a folder. Choose another --out.")
    set_up("cpu", "float32", threads)
    if world in pretrain_sequences.RECIPES:
        pretrain_sequences.sequence_world(world, Path(out), **({"updates": 4, "batch": 4} if quick else {}))
        return Path(out)
    if world == "glyphs":
        pretrain_glyphs.glyphs_world(Path(out), dict.fromkeys(pretrain_glyphs.LENGTHS, 2) if quick else None)
        return Path(out)
    if world == "solids":
        pretrain_solids.solids_world(Path(out), pretrain_solids.QUICK if quick else pretrain_solids.Lengths())
        return Path(out)
    lengths = pretrain_loop.QUICK if quick else pretrain_loop.Lengths()
    vae, tokenizer = generator.shapes_world(Path(out), lengths)
    pretrain_rewards.shapes_rewards(Path(out), vae, tokenizer, lengths)
    return Path(out)
