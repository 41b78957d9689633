"""The command that leaves the weights alone: reward-guided decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tropism.core import Model, Reward, UserError, name_of
from tropism.guide.best_of_n import best_of_n
from tropism.guide.dps import dps
from tropism.guide.lineages import Guided, check_alpha
from tropism.guide.nested import nested
from tropism.guide.search import blockwise, refine
from tropism.guide.smc import smc
from tropism.guide.svdd import svdd
from tropism.guide.twisted import twisted
from tropism.guide.values import exact, posterior_mean
from tropism.models.load import load_model
from tropism.plugin import load_object
from tropism.prompts.batches import Prompt, listed, train_and_held_out
from tropism.rewards.identity import fingerprint
from tropism.rewards.load import check_prompts, require_gradient
from tropism.rewards.workers import InWorkers, ended
from tropism.run import guided_report, request
from tropism.run.checks import at_least_one, finite_numbers, known, not_negative, overrides, set_up
from tropism.run.failed import failures_kept
from tropism.run.guided import Piece, Plan, fixed_tokens, run_pieces, spelled
from tropism.run.guided_value import check as check_lesson
from tropism.run.guided_value import learnt
from tropism.run.products import weights_of
from tropism.run.record import Recorder
from tropism.run.report import spread
from tropism.run.sources import with_pictures

GUIDES: dict[str, Callable[..., Guided]] = {
    "svdd": svdd,
    "nested": nested,
    "smc": smc,
    "twisted": twisted,
    "dps": dps,
    "best-of-n": best_of_n,
    "blockwise": blockwise,
    "refine": refine,
}
DEFAULT_REWARDS = {"dna": "dna-liver", "utr": "utr-load", "molecules": "qed"}
"""Of the bundled models that need no prompt."""
BY_GRADIENT = ("dps", "twisted")
ANY_SAMPLER = ("dps", "best-of-n")
"""Methods that need no stochastic sampler."""
WEIGHTED = ("smc", "nested", "twisted")
"""Methods whose weights are exp(r / alpha), alpha above 0."""
BOUND = ("model", "reward", "batch", "n", "seed", "max_batch", "value", "fixed")


@dataclass(frozen=True)
class GuidedRun:
    """A finished guided run: its folder, the prompt of each sample, and its pieces (see run.guided)."""

    out: Path
    prompts: list[str]
    pieces: list[Piece]
    table: list[guided_report.Line]


def guide(
    method: str,
    *,
    model: str | Model,
    reward: Reward | str | Sequence[Reward | str] = (),
    prompts: str | Path | Sequence[str] | None = None,
    out: str | Path,
    samples: int = 64,
    group: int = 64,
    options: Mapping[str, Any] | None = None,
    value: str = "auto",
    roll_outs: int = 512,
    value_loss: str = "auto",
    fixed: str | None = None,
    pool: int = 10,
    eta: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    quantize: str | None = None,
    t5: bool = True,
    scheduler: Sequence[str] = (),
    seed: int = 0,
    max_batch: int = 64,
    workers: int = 0,
    timeout: float = 60.0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    dry_run: bool = False,
    command: str = "",
    callback: Callable[[int, int], None] | None = None,
) -> GuidedRun | None:
    """Draw samples that score higher, without changing a weight, and leave a run folder. Returns the finished run.

    method: svdd, nested, smc, twisted, dps, best-of-n, blockwise, refine. model, reward: as for `align`; the reward needs no gradient
    but for dps and twisted. prompts: as for `align`, all of them used; default the bundled model's held-out ones.
    samples: in all, spread evenly over the prompts; with fewer samples than prompts, over as many prompts, one each. group: samples of one
    prompt that are drawn together, and compete where a method lets them.
    options: the method's own hyperparameters by name (see its function). value: what a noisy state is judged by, the reward of the clean
    samples it promises (mean, argmax, sample or soft; auto chooses), "file.py:function" (x_t, t) -> (B,), or "learned", a network fitted
    by value_loss (mean, soft or linex; auto: linex where alpha is above 0, else mean) to the rewards of `roll_outs` plain samples first.
    fixed: letters (or [tokens]) of a sequence model that must stay, a dot where anything may stand. pool: plain samples drawn for every
    guided one, to compare with; 0 for none. eta: noise of the sampler; 0 only for dps and best-of-n. max_batch: rows in memory at a
    time. workers: processes that a slow reward runs in, each sample with a limit of `timeout` seconds (over it, -inf); 0 is none.
    callback(piece, pieces) is called after each piece.
    Raises UserError for anything that cannot be, before the first sample where possible.
    """
    settings = {k: v for k, v in locals().items() if k not in ("model", "reward", "callback", "dry_run", "command")}
    function = GUIDES[known(method, GUIDES, "method")]
    at_least_one(samples=samples, group=group, max_batch=max_batch, height=height, width=width)
    not_negative(seed=seed, pool=pool, eta=eta)
    own = hyperparameters(function)
    for name in options or {}:
        known(name, own, f"option of {method}")
    if eta == 0 and method not in ANY_SAMPLER:
        raise UserError(
            f"eta is 0, a deterministic sampler: all candidates of a step would be equal, and {method} chooses among them. Use --eta 1."
        )
    reward = reward or _own_reward(model)
    scored = request.read_reward(reward, workers, timeout)
    if method in BY_GRADIENT:
        require_gradient(scored, f"guide {method}")
    loaded = _model(model, settings) if isinstance(model, str) else model
    asked = _shared(_prompts(prompts, model, loaded), samples, group)
    check_prompts(scored, [p.text for p, _ in asked], [dict(p.meta) for p, _ in asked])
    _check_mode(value, loaded, scored)
    hyper = {n: (options or {}).get(n, _default(n, p, loaded)) for n, p in own.items()}
    _check(method, hyper, loaded, asked)
    same = request.identity(model, reward, scored)
    plan = _planned(loaded, scored, function, asked, hyper, settings, same)
    if dry_run:
        return _say_ready(plan)
    prepare = getattr(loaded, "prepare", None)
    if prepare:
        prepare([p.text for p, _ in asked], [p.negative for p, _ in asked])
    config = request.as_plain({**settings, "model": str(model), "reward": request.spelled(reward), "options": hyper})
    with Recorder(out, config, resume=resume, overwrite=overwrite) as recorder, ended(scored), failures_kept(Path(out)):
        before: dict[str, int] = {}
        if value == "learned":
            file = Path(out) / "value.safetensors"
            judge, before = learnt(plan, roll_outs, value_loss, hyper.get("alpha", 0.0), file, recorder)
            plan = replace(plan, method=partial(plan.method, value=judge))
        pieces = run_pieces(plan, Path(out), recorder, callback)
        texts = [asked[i][0].text for piece in pieces for i in piece.prompts.tolist()]
        told = (method, str(model), weights_of(scored), texts, seed, command, config, recorder.environment, pieces)
        done = guided_report.Finished(*told, letters=tuple(getattr(loaded, "letters", ())), before=before)
        page, found = guided_report.write(Path(out), done), guided_report.table(done)
        recorder.say(guided_report.summary(done, found) + _over_time(scored) + _unscored(pieces) + f"\nSee {page}")
    return GuidedRun(Path(out), texts, pieces, found)


def _planned(
    model: Model,
    reward: Reward,
    function: Callable[..., Guided],
    asked: list[tuple[Prompt, int]],
    hyper: dict[str, Any],
    settings: Mapping[str, Any],
    same: dict[str, str],
) -> Plan:
    """What is drawn, with the method bound to its hyperparameters. same: model and reward, as a resumed run must share them."""
    method, value, loss, fixed = (settings[n] for n in ("method", "value", "value_loss", "fixed"))
    held = fixed_tokens(fixed, model)
    bound = partial(_judged(function, method, hyper, value, settings["roll_outs"], loss), fixed=held)
    wide = hyper.get("m", 1) if isinstance(hyper.get("m", 1), int) else 1
    same = {"method": method, **same, "seed": str(settings["seed"]), "hyperparameters": str(hyper)}
    same |= {
        "prompts": spelled(asked),
        "value, its roll-outs or its loss": f"{value}, {settings['roll_outs']}, {loss}"
        if value == "learned"
        else value + fingerprint(value),
        "eta, pool and fixed places": f"{settings['eta']:g}, {settings['pool']}, {fixed}",
        "size, precision or scheduler": str(
            [settings[n] for n in ("height", "width", "quantize", "t5", "scheduler", "dtype")]
        ),
    }
    numbers = (settings["seed"], settings["max_batch"], wide, settings["pool"], hyper["steps"], hyper["guidance"])
    return Plan(model, reward, bound, asked, *numbers, same, held)


def hyperparameters(function: Callable) -> dict[str, inspect.Parameter]:
    """A method's own: the keyword arguments of its function."""
    return {n: p for n, p in inspect.signature(function).parameters.items() if n not in BOUND}


def _over_time(reward: Reward) -> str:
    """Ends the workers, if there are any, and tells of samples over the limit."""
    if not isinstance(reward, InWorkers):
        return ""
    reward.close()
    late, refused = reward.timed_out, reward.refused
    said = f"\n{late} rewards exceeded the limit of {reward.timeout:g} s and count as -inf." if late else ""
    return said + (f"\n{refused} samples were refused by the program and count as -inf." if refused else "")


def _unscored(pieces: Sequence[Piece]) -> str:
    """Tells of rewards that were NaN, if any."""
    count = lambda name: sum(costs.get(name, 0) for p in pieces for costs in (p.costs, p.plain_costs))
    lost, all_ = count("unscored"), count("rewards_computed")
    return f"\n{lost} of {all_} rewards were NaN: those samples could not be scored and count as -inf." if lost else ""


def _check(method: str, hyper: Mapping[str, Any], model: Any, asked: Sequence[tuple[Prompt, int]]) -> None:
    """Raises UserError for numbers that the method or the model would refuse, before anything is written."""
    getattr(model, "check_request", lambda *_: None)(hyper["guidance"], [p.negative for p, _ in asked])
    model.process.times(hyper["steps"], getattr(model, "shape", (1, 1, 1)))
    at_least_one(**{n: hyper[n] for n in ("m", "block", "every") if n in hyper})
    check_alpha(hyper.get("alpha", 0.0), positive=method in WEIGHTED)
    finite_numbers(**{n: hyper[n] for n in ("guidance", "scale", "gamma", "threshold") if n in hyper})


def _check_mode(value: str, model: Any, reward: Reward) -> None:
    """Raises UserError for a way to judge that is not for such states, or not for such a reward."""
    tokens = hasattr(model, "letters")
    if value in ("argmax", "sample", "soft") and not tokens:
        raise UserError(
            f"--value {value} is for models of tokens; this one's clean state is its own mean. Leave it out."
        )
    if value == "mean" and tokens:
        raise UserError("--value mean is for pictures: tokens have no mean. Take --value sample, argmax or soft.")
    if value == "soft":
        require_gradient(reward, "--value soft")


def _judged(
    function: Callable[..., Guided], method: str, hyper: Mapping[str, Any], value: str, roll_outs: int, loss: str
) -> Callable[..., Guided]:
    """The method with its hyperparameters and its value, unless that is learnt first. Raises UserError for values that cannot be."""
    own = ".py:" in value
    if not _has(function, "value"):
        if value != "auto":
            raise UserError(f"{method} judges no noisy states, so it has no use for --value {value}. Leave it out.")
        return partial(function, **hyper)
    if value == "learned":
        check_lesson(roll_outs, loss, hyper.get("alpha", 0.0))
        return partial(function, **hyper)
    return partial(function, **hyper, value=exact(load_object(value)) if own else posterior_mean(value))


def _has(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _default(name: str, p: inspect.Parameter, model: Model) -> Any:
    """The model's own steps and guidance, else the method's default."""
    own = getattr(model, name, None) if name in ("steps", "guidance") else None
    plain = {"steps": 50, "guidance": 1.0}.get(name) if p.default is p.empty else p.default
    return plain if own is None else own


def _model(model: str, settings: Mapping[str, Any]) -> Model:
    place, precision = set_up(settings["device"], settings["dtype"], settings["threads"])
    own = {n: settings[n] for n in ("eta", "height", "width", "quantize", "t5")}
    return load_model(
        model, dtype=precision, device=place, lora=None, scheduler=overrides(settings["scheduler"]), **own
    )


def _prompts(prompts: str | Path | Sequence[str] | None, model: Any, loaded: Model) -> list[Prompt]:
    if prompts is None and hasattr(loaded, "letters"):
        return [Prompt("")]
    found = train_and_held_out(None, None, model)[1] if prompts is None else listed(prompts)
    return with_pictures(found, loaded)


def _own_reward(model: Any) -> str:
    """The bundled model's own reward. Raises UserError for a model that has none."""
    if isinstance(model, str) and model in DEFAULT_REWARDS:
        return DEFAULT_REWARDS[model]
    raise UserError("There is no reward to guide by. Add --reward jpeg-bytes, or file.py:function of yours.")


def _shared(prompts: list[Prompt], samples: int, group: int) -> list[tuple[Prompt, int]]:
    """Each prompt with its number of samples, several times where these are more than a group."""
    chosen = [prompts[i] for i in spread(len(prompts), samples)]
    each, more = divmod(samples, len(chosen))
    found = []
    for i, p in enumerate(chosen):
        left = each + (i < more)
        while left:
            found.append((p, min(left, group)))
            left -= found[-1][1]
    return found


def _say_ready(plan: Plan) -> None:
    samples = sum(n for _, n in plan.prompts)
    Console(soft_wrap=True, highlight=False, markup=False).print(
        f"Everything is in order: reward {name_of(plan.reward)}, {samples} samples of {len(plan.prompts)} prompts in "
        f"{len(plan.pieces())} pieces. Nothing was written; run it again without --dry-run."
    )
