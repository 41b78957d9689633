"""The command that puts guidance and training on one page: the same prompts, the same noise, both costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from tropism.core import Model, UserError
from tropism.models import lora
from tropism.models.latent import Latent
from tropism.models.load import is_of_tokens, load_model
from tropism.models.lora import LoraSettings
from tropism.run import compared, ledger
from tropism.run.checks import overrides, set_up
from tropism.run.compared import Entry
from tropism.run.guided import Kept, finished_run, redrawn, spelled
from tropism.run.record import Recorder


def compare(
    runs: Sequence[str],
    *,
    out: str | Path,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    command: str = "",
) -> list[Entry]:
    """One page on guided and trained runs: rewards, other measures, what each cost before and costs a sample, and where training pays.

    runs: folders of `guide`, `align` and `align distil`. The first guided one sets prompts, noise, reward and the plain samples; other
    guided runs must share its model, reward, prompts and seed. Trained models draw the same prompts and noise anew, at their own steps
    and guidance. out: a new folder.
    Raises UserError without a guided run, for runs that cannot be compared, and for trained weights that cannot be loaded.
    """
    place, precision = set_up(device, dtype, threads)
    guided = [run for run in runs if not _is_trained(run)]
    if not guided or len(runs) < 2:
        raise UserError(
            "Give the folders of at least two runs, one of them of guide: tropism compare runs/svdd runs/alignprop --out DIR."
        )
    first = finished_run(guided[0])
    if not first.has_plain:
        raise UserError(f"{guided[0]} has no plain samples to compare with. Guide again with --pool 1 or more.")
    trained = {run: _config(run) for run in runs if run not in guided}
    for run, config in trained.items():
        if config["model"] != first.config["model"]:
            raise UserError(f"{run} trained {config['model']}, but {guided[0]} guided {first.config['model']}.")
    others = {run: _same(first, guided[0], run) for run in guided}
    with Recorder(out, {"runs": [str(r) for r in runs]}, overwrite=overwrite) as recorder:
        entries = [compared.plain(first)]
        names = _names(runs)
        for number, run in enumerate(runs):
            if run in others:
                if _plainly(others[run]) != _plainly(first) and others[run].has_plain:
                    entries.append(compared.plain(others[run], names[run]))
                entries.append(compared.guided(names[run], others[run]))
                continue
            recorder.say(f"Drawing with {run} ...")
            model = _trained(Path(run), trained[run], place, precision)
            folder = Path(out) / "samples" / f"run-{number}"
            pieces = redrawn(model, first, first.reward(), *_deployed(trained[run]), folder)
            spent = _spent(Path(run), trained[run])
            entries.append(compared.trained(names[run], trained[run]["method"], pieces, *spent))
        page = compared.write(Path(out), first, entries, command, recorder.environment)
        recorder.say(compared.summary(entries) + f"\nSee {page}")
    return entries


SHARED = ("model", "reward", "seed", "fixed", "height", "width", "quantize", "t5", "scheduler", "dtype")
"""Settings that guided runs must share to stand on one page."""


def _plainly(run: Kept) -> tuple:
    """What the plain samples of a run depend on beside what all runs share."""
    return run.config.get("eta"), *(run.config["options"].get(name) for name in ("steps", "guidance"))


def _names(runs: Sequence[str]) -> dict[str, str]:
    """What each run is called: its folder, with the folder above it where two are called alike."""
    last = [Path(run).name for run in runs]
    return {r: r if last.count(n) == 1 else f"{Path(r).parent.name} {n}" for r, n in zip(runs, last, strict=True)}


def _config(run: str | Path) -> dict[str, Any]:
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml.")
    return yaml.safe_load(file.read_text("utf-8"))


def _is_trained(run: str | Path) -> bool:
    return "updates" in _config(run)


def _same(first: Kept, name: str, run: str) -> Kept:
    """Another guided run. Raises UserError if it has other prompts, another model, reward, seed, size, precision or fixed places."""
    other = finished_run(run)
    changed = [key.replace("_", " ") for key in SHARED if other.config.get(key) != first.config.get(key)]
    changed += ["prompts and samples of each"] if spelled(other.asked) != spelled(first.asked) else []
    if changed:
        raise UserError(
            f"{run} and {name} have another {' and another '.join(changed)}, so their samples cannot be compared."
        )
    return other


def _deployed(config: dict[str, Any]) -> tuple[int, float]:
    """Steps and guidance a trained model is drawn with."""
    steps, guidance = config.get("evaluate_steps"), config.get("evaluate_guidance")
    own = config["options"]
    return own["steps"] if steps is None else steps, own["guidance"] if guidance is None else guidance


def _trained(run: Path, config: dict[str, Any], device: Any, dtype: Any) -> Model:
    """The model with what the run trained. Raises UserError where that is no adapter and no model of tokens."""
    source = config if config["method"] != "distil" else {**_config(run / config["run"]), **config}
    if is_of_tokens(source["model"]) and (file := run / "weights" / "model.safetensors").is_file():
        return load_model(file, device=device, dtype=dtype)
    if not (run / "lora").is_dir():
        raise UserError(
            f"{run} has no adapter in lora/, so its model cannot be drawn from here. Compare runs that trained a LoRA."
        )
    adapter = LoraSettings(source["rank"], source["alpha"], tuple(source["targets"]), source["seed"])
    own = {n: source[n] for n in ("eta", "height", "width", "quantize", "t5")}
    model: Any = load_model(
        source["model"], device=device, dtype=dtype, lora=adapter, scheduler=overrides(source["scheduler"]), **own
    )
    if not isinstance(model, Latent):
        raise UserError(f"{source['model']} is a class of yours; only pipelines can be compared after training.")
    lora.load(model, run / "lora")
    return cast(Model, model)


def _spent(run: Path, config: dict[str, Any]) -> tuple[float, float]:
    """(network rows, with two for a row backward, and rewards) that training took; a distillation's with its guide's."""
    network = rewards = 0.0
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        calls = json.loads(line).get("calls", {})
        spent = ledger.cost(calls, 0, 0)
        network += spent["forwards"] + 2 * spent["backwards"]
        rewards += spent["reward_queries"]
    if config["method"] == "distil":
        teacher = finished_run(run / config["run"])
        total = lambda name: sum(piece.costs.get(name, 0) for piece in teacher.pieces) + teacher.before.get(name, 0)
        network, rewards = network + total("network") + 2 * total("backward"), rewards + total("rewards")
    return network, rewards
