"""The command that turns a guide into weights: fine-tune a model on what a guided run has drawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from tropism.align.distil import distil as distilled
from tropism.core import Info, Model, UserError
from tropism.models import lora as adapters
from tropism.models.latent import Latent
from tropism.models.load import is_of_tokens, load_model
from tropism.models.lora import LoraSettings
from tropism.models.masked_lm import MaskedModel, load, save
from tropism.prompts.batches import Prompt, batch_of, own_rows
from tropism.rewards.load import load_rewards
from tropism.run import guided_report, guided_table
from tropism.run.checks import at_least_one, overrides, set_up
from tropism.run.fit import fit
from tropism.run.guided import Kept, Piece, finished_run, redrawn, shown
from tropism.run.products import weights_of
from tropism.run.record import Recorder
from tropism.run.request import as_plain


@dataclass(frozen=True)
class Distilled:
    """A finished distillation: mean rewards of the plain model, the guide and the distilled model on the guide's prompts and seed.

    share: how much of the guide's gain is kept, NaN where it gained nothing.
    """

    out: Path
    plain: float
    guided: float
    distilled: float
    share: float


def distil(
    run: str | Path,
    *,
    out: str | Path,
    updates: int = 300,
    batch: int = 16,
    micro_batch: int | None = None,
    best: float = 1.0,
    guidance: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    clip: float = 1.0,
    ema: float = 0.0,
    schedule: str = "cosine",
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = LoraSettings().targets,
    checkpoint_every: int = 50,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    command: str = "",
    callback: Callable[[int, Info], None] | None = None,
) -> Distilled:
    """Fine-tune a guided run's model on its samples, and tell how much of the gain is kept without a guide.

    run: the folder of a finished guided run with a pool. best: the share of its samples to learn from, the best of each prompt first.
    guidance: of the distilled model's chain, default the run's. A pipeline gets a LoRA, a bundled model of tokens new weights.
    Raises UserError for runs that are not finished, and models without weights to train.
    """
    settings = {k: v for k, v in locals().items() if k not in ("callback", "command", "resume", "overwrite")}
    at_least_one(updates=updates, batch=batch, micro_batch=micro_batch, rank=rank)
    if not 0 < best <= 1:
        raise UserError(f"best is {best:g}; it is the share of the samples that are learnt from. Try --best 0.5.")
    teacher = finished_run(run)
    if "updates" in teacher.config:
        raise UserError(f"{run} is a distilled run itself. Give the folder of the guided run that it came from.")
    if not teacher.has_plain:
        raise UserError(f"{run} has no plain samples to compare with. Guide again with --pool 1 or more.")
    place, precision = set_up(device, dtype, threads)
    model = _model(teacher.config, LoraSettings(rank, alpha, tuple(targets), seed), place, precision)
    steps = teacher.config["options"]["steps"]
    strength = teacher.config["options"]["guidance"] if guidance is None else guidance
    getattr(model, "check_request", lambda *_: None)(strength, [p.negative for p in teacher.prompts])
    reward = teacher.reward()
    clean, prompts = _lessons(model, teacher, best)
    same = ("model", "reward", "max_batch")
    config = as_plain({"method": "distil", **settings, **{name: teacher.config[name] for name in same}})
    config["options"] = {"steps": steps, "guidance": strength}
    config["run"] = os.path.relpath(run, out)
    with Recorder(out, config, resume=resume, overwrite=overwrite) as recorder:
        bound = {"steps": steps, "guidance": strength}
        fit(
            lambda batch, **how: distilled(model, clean, batch, **how, **bound),
            model.trainable(),
            lambda update: own_rows(batch_of(prompts, batch, seed, update)),
            updates=updates,
            out=Path(out),
            recorder=recorder,
            lr=lr,
            weight_decay=weight_decay,
            clip=clip,
            ema=ema,
            schedule=schedule,
            seed=seed,
            micro_batch=micro_batch,
            checkpoint_every=checkpoint_every,
            resume=resume,
            callback=callback,
        )
        difference = _save(model, Path(out), teacher.prompts)
        pieces = redrawn(model, teacher, reward, steps, strength, Path(out) / "samples")
        found = _told(Path(out), teacher, pieces, tuple(getattr(model, "letters", ())), recorder, command)
        kept = guided_table.told_share(found.plain, found.guided, found.distilled)
        recorder.say(f"{difference}{kept}\nSee {Path(out) / 'report.html'}")
    return found


def _model(config: dict[str, Any], adapter: LoraSettings, device: torch.device, dtype: torch.dtype) -> Model:
    """The run's model with weights to train. Raises UserError if it has none."""
    own = {n: config[n] for n in ("eta", "height", "width", "quantize", "t5")}
    full = is_of_tokens(config["model"])
    own |= {"full": full, "lora": None if full else adapter, "scheduler": overrides(config["scheduler"])}
    model = load_model(config["model"], device=device, dtype=dtype, **own)
    if not model.trainable():
        raise UserError(f"{config['model']} has no weights to train, so no guide can become weights of it.")
    return model


def _lessons(model: Model, teacher: Kept, best: float) -> tuple[Tensor, list[Prompt]]:
    """Clean states of the samples to learn from, and a prompt for each that names it."""
    samples, places = teacher.joined("samples"), teacher.joined("prompts")
    rewards = torch.nan_to_num(teacher.joined("rewards"), nan=-torch.inf, neginf=-torch.inf)
    texts = [(teacher.prompts[i].text, teacher.prompts[i].negative) for i in places.tolist()]
    chosen = []
    for text in dict.fromkeys(texts):
        rows = torch.tensor([i for i, t in enumerate(texts) if t == text and rewards[i] > -torch.inf], dtype=torch.long)
        chosen.append(rows[rewards[rows].argsort(descending=True)][: max(1, round(best * len(rows)))])
    rows = torch.cat(chosen).sort().values
    device = getattr(model, "device", "cpu")
    with torch.no_grad():
        clean = torch.cat([model.latents(shown(part).to(device)) for part in samples[rows].split(16)])
    asked = [teacher.prompts[i] for i in places[rows].tolist()]
    return clean, [replace(p, meta=(*p.meta, ("sample", i))) for i, p in enumerate(asked)]


def _save(model: Model, out: Path, prompts: Sequence[Prompt]) -> str:
    """The adapter or the weights, and what there is to say of them."""
    if isinstance(model, MaskedModel):
        (out / "weights").mkdir(exist_ok=True)
        file = out / "weights" / "model.safetensors"
        save(cast(Any, model.network), file, model.world)
        model.network.load_state_dict(load(file).state_dict())  # what is drawn and told is what was saved
        return f"Weights saved; use them with --model {out / 'weights' / 'model.safetensors'}\n"
    if isinstance(getattr(model, "lora", None), LoraSettings):
        adapters.save(cast(Latent, model), out / "lora")
        difference = adapters.verify(cast(Latent, model), out / "lora", prompts=[p.text for p in prompts[:2]])
        return f"Adapter saved and verified: reload difference {difference:.1e}\n"
    (out / "weights").mkdir(exist_ok=True)
    trained = {n: p.detach().contiguous() for n, p in model.trainable().items()}
    save_file(trained, out / "weights" / "trained.safetensors")
    return ""


def _told(
    out: Path, teacher: Kept, pieces: list[Piece], letters: tuple[str, ...], recorder: Recorder, command: str
) -> Distilled:
    """The report's files, and the means."""
    texts = [teacher.prompts[i].text for piece in pieces for i in piece.prompts.tolist()]
    rewards = weights_of(load_rewards(teacher.config["reward"]))
    guide = guided_table.line_of(f"its guide, {teacher.config['method']}", teacher.pieces, teacher.before)
    told = ("distil", teacher.config["model"], rewards, texts, teacher.config["seed"], command, recorder.config)
    done = guided_report.Finished(*told, recorder.environment, pieces, letters, teacher=guide)
    guided_report.write(out, done)
    found = guided_report.table(done)
    plain, student = found[0].mean, found[-1].mean
    return Distilled(out, plain, guide.mean, student, guided_table.share_kept(plain, guide.mean, student))
