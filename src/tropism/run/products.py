"""What a run measures on held-out prompts, and what it leaves in its folder when it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from tropism.core import Model, Reward, UserError, name_of
from tropism.models import lora
from tropism.models.latent import Latent
from tropism.models.lora import LoraSettings
from tropism.prompts.batches import Prompt, as_batch
from tropism.rewards.identity import served
from tropism.run import card, report
from tropism.run.evaluate import Evaluation, finite_mean
from tropism.run.evaluate import evaluate as measured
from tropism.run.measures import measures_for
from tropism.run.optimiser import fill, is_main
from tropism.run.record import Recorder

STRENGTHS = (0.25, 0.5, 0.75, 1.25)
"""Multiples of the adapter's effect that the model card tells of, beside 0 and 1."""


def weights_of(reward: Reward) -> dict[str, float]:
    """The weight of every part of a reward, by name."""
    return {name_of(r): w for r, w in getattr(reward, "terms", ((reward, 1.0),))}


def trained_on(train: Sequence[Prompt], held: Sequence[str]) -> int:
    """How many of the evaluation prompts, or of their pictures, are trained on as well; held: names of prompts."""
    return len(set(held) & {p.name for p in train})


class Judge:
    """Held-out evaluation of a run: called by `fit`, it remembers the first and the newest.

    eta, watch, per_prompt: see `evaluate`. before: what a run of the same base model has measured already.
    """

    def __init__(
        self,
        out: Path,
        model: Model,
        reward: Reward,
        held: list[Prompt],
        steps: int,
        guidance: float,
        seed: int,
        batch: int,
        identity: dict[str, str],
        *,
        eta: float | None = None,
        watch: Mapping[str, Reward] | None = None,
        per_prompt: int = 1,
        before: Evaluation | None = None,
    ):
        self.file = out / "samples" / "before.safetensors"
        self.prompts = [p.name for p in held]
        how = {
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "batch_size": batch,
            "eta": eta,
            "watch": watch or {},
        }
        self._measure = partial(measured, model, reward, per_prompt=per_prompt, **how)
        self._asked = as_batch(held)
        self._measures = measures_for(self._asked)
        self._before = before
        self._after: Evaluation | None = None
        self.identity = {
            **identity,
            "held-out prompts": json.dumps(self.prompts),
            "evaluation": f"{steps} steps, guidance {guidance:g}" + ("" if eta is None else f", eta {eta:g}"),
            **(
                {"watched rewards": json.dumps([" ".join([name, *served(r)]) for name, r in watch.items()])}
                if watch
                else {}
            ),
            "seed": str(seed),
        }

    def check_begun(self) -> None:
        """Raises UserError if the pictures kept by the run that is resumed were of another reward, model, seed or prompts."""
        if not self.file.exists():
            return
        try:
            with safe_open(self.file, "pt") as f:
                begun = f.metadata() or {}
        except SafetensorError as error:
            raise UserError(
                f"{self.file} is damaged ({error}), and with it the pictures before training. Start again in another --out."
            ) from error
        changed = [name for name, value in self.identity.items() if begun.get(name) != value]
        if changed:
            raise UserError(
                f"This run was begun with another {' and another '.join(changed)}; its pictures before and after would not "
                "compare. Resume with the settings in its config.yaml, or choose another --out."
            )

    def measure(self, base: torch.Tensor | None = None, only: int | None = None) -> Evaluation:
        """Draw and measure the held-out prompts now, or the first few of them."""
        return self._measure(self._asked[:only], measures=self._measures, base=base)

    def given(self) -> dict[str, torch.Tensor]:
        """What an upscaler was given and what it should have drawn, of each prompt, as large as the pictures drawn; of others nothing."""
        named = {"low resolution": self._asked.low_res, "original": self._asked.reference}
        high, wide = self.before.images.shape[-2:]
        each = len(self.before.images) // len(self.prompts)
        large = lambda images: interpolate(images.cpu().float(), (high, wide), mode="nearest").repeat_interleave(
            each, 0
        )
        return {name: large(images) for name, images in named.items() if images is not None}

    @property
    def before(self) -> Evaluation:
        if self._before is None:
            if not self.file.exists():
                raise UserError(
                    f"{self.file} is gone, and with it the pictures before training. Start again in another --out."
                )
            kept = load_file(self.file)
            columns = {k.removeprefix("column/"): v for k, v in kept.items() if k.startswith("column/")}
            self._before = Evaluation(
                kept["images"], columns, self.prompts, kept["diversity"].item() if "diversity" in kept else None
            )
        return self._before

    @property
    def after(self) -> Evaluation:
        if self._after is None:  # a finished run, resumed
            self._after = self.measure(base=self.before.images)
        return self._after

    def __call__(self, update: int) -> dict[str, float]:
        if update == 0:
            self._before = self._after = self._before or self.measure()
            self._keep(self._before, self.file)
        else:
            self._after = self.measure(base=self.before.images)
        return self._after.numbers()

    def keep_after(self) -> None:
        """The newest pictures as after.safetensors beside those before training; the dial reads both."""
        self._keep(self.after, self.file.with_name("after.safetensors"))

    def forget_last(self) -> None:
        """The weights are no longer those of the last evaluation: `after` is measured when it is asked for."""
        self._after = None

    def _keep(self, found: Evaluation, file: Path):
        if not is_main():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "images": found.images.contiguous(),
            **{f"column/{k}": v.contiguous() for k, v in found.columns.items()},
        }
        if found.diversity is not None:
            tensors["diversity"] = torch.tensor(found.diversity, dtype=torch.float64)
        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary, metadata=self.identity)
        temporary.replace(file)


@dataclass
class Products:
    """What a finished run leaves beside its record: adapter, pictures, report, model card.

    best: the weights of the best evaluation by name, or None; their adapter goes to best/ where they are not the last.
    """

    out: Path
    method: str
    model: Model
    source: str
    reward: Reward
    train: list[Prompt]
    seed: int
    command: str
    config: dict
    recorder: Recorder
    judge: Judge
    best: Callable[[], dict[str, torch.Tensor] | None] = lambda: None
    difference: float | None = None

    def write(self):
        if not is_main():
            return
        before, after = self.judge.before, self.judge.after
        self.judge.keep_after()
        if isinstance(getattr(self.model, "lora", None), LoraSettings):
            model = cast(Latent, self.model)
            lora.save(model, self.out / "lora")
            self.difference = lora.verify(model, self.out / "lora", prompts=self.judge.prompts[:2])
            self._save_best(model)
        else:
            self.out.joinpath("weights").mkdir(exist_ok=True)
            save_file(
                {n: p.detach().contiguous() for n, p in self.model.trainable().items()},
                self.out / "weights" / "trained.safetensors",
            )
        load = f"{str(getattr(self.model, 'source', self.source))!r}"
        done = report.Finished(
            method=self.method,
            base=self.source,
            load=load,
            rewards=weights_of(self.reward),
            prompts=[p.name for p in self.train],
            seed=self.seed,
            command=self.command,
            config=self.config,
            environment=self.recorder.environment,
            before=before,
            after=after,
            lines=self.recorder.lines(),
            limits=self._limits(),
            adapter=self.difference is not None,
            part=getattr(self.model, "part", "unet"),
            upscales=hasattr(self.model, "scale"),
            given=self.judge.given(),
            strengths=self._strengths() if self.difference is not None else {},
        )
        report.write(self.out, done)
        card.write(self.out, done)
        self.recorder.say(self._summary(report.rows(before, after)))

    def _save_best(self, model: Latent) -> None:
        """The adapter of the best evaluation, if it is another than the last, in best/."""
        best, own = self.best(), {n: p.detach().clone() for n, p in model.trainable().items()}
        if best is None or all(torch.equal(best[n].to(p), p) for n, p in own.items()):
            return
        try:
            fill(model.trainable(), best)
            lora.save(model, self.out / "best")
        finally:
            fill(model.trainable(), own)

    def _strengths(self) -> dict[float, dict[str, float]]:
        """The means of the first few held-out pictures at several strengths of the adapter, on the same noise."""
        few = lambda found: {n: finite_mean(v[: card.SHOWN]) for n, v in found.columns.items() if n != "drift"}
        model, measured = cast(Latent, self.model), {0.0: few(self.judge.before), 1.0: few(self.judge.after)}
        for strength in STRENGTHS:
            with lora.scaled(model, strength):
                measured[strength] = few(self.judge.measure(only=card.SHOWN))
        return dict(sorted(measured.items()))

    def _limits(self) -> list[str]:
        n, seen = len(self.judge.prompts), trained_on(self.train, self.judge.prompts)
        unseen = f"{n} held-out prompts" if not seen else f"{n} prompts, {seen} of them trained on (with other noise)"
        return [
            f"One training seed; evaluated on {unseen}, one picture each.",
            "A reward is a proxy: look at the pictures and at the measures that were not trained on.",
        ]

    def _summary(self, rows: list) -> str:
        lines = [f"  {r.name:28s} {r.before:10.4f} -> {r.after:10.4f}" for r in rows]
        kept = (
            "" if self.difference is None else f"\nAdapter saved and verified: reload difference {self.difference:.1e}"
        )
        told = report.watched(self.recorder.lines())
        where = "best/" if (self.out / "best" / "pytorch_lora_weights.safetensors").exists() else "this result"
        alarm = f"\nWatch out, {told['alarm']}. The best weights are in {where}." if told and told["alarm"] else ""
        return "\n".join(["Held-out, before -> after:", *lines]) + kept + alarm + f"\nSee {self.out / 'report.html'}"
