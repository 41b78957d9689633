"""A guided run piece by piece: a few prompts at a time, each piece kept when it is finished, so that a resume does the rest.

A piece holds its guided samples and a pool of the plain model's, on the same noise: the first n of the pool are their twins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.core import Model, Reward, UserError
from tropism.guide.best_of_n import best_of_n
from tropism.guide.lineages import Guided
from tropism.prompts.batches import Prompt, as_batch
from tropism.rewards.load import load_rewards
from tropism.rewards.workers import InWorkers
from tropism.run.record import Recorder
from tropism.run.signals import Interrupted, stopping

ROWS = 64
"""Rows of a piece, at least one prompt's. It must not depend on what a resumed run may change."""


@dataclass(frozen=True)
class Plan:
    """What a guided run draws. method: bound to its hyperparameters, (model, reward, batch, n, *, seed, max_batch) -> Guided.

    prompts: with the number of samples of each. pool: plain samples for every guided one, 0 for none. steps, guidance: of both.
    fixed: tokens that must stay, of guided and plain samples alike.
    identity: what a resumed run must share with the run it goes on with, by name.
    """

    model: Model
    reward: Reward
    method: Callable[..., Guided]
    prompts: list[tuple[Prompt, int]]
    seed: int
    max_batch: int
    width: int
    pool: int
    steps: int
    guidance: float
    identity: dict[str, str]
    fixed: Tensor | None = None

    def pieces(self) -> list[range]:
        """Runs of prompts with equal numbers of samples, so many that a piece is about ROWS rows wide, whatever max_batch is."""
        found, at = [], 0
        while at < len(self.prompts):
            n = self.prompts[at][1]
            most = max(1, ROWS // (n * max(self.width, self.pool, 1)))
            end = at
            while end < len(self.prompts) and end - at < most and self.prompts[end][1] == n:
                end += 1
            found.append(range(at, end))
            at = end
        return found


@dataclass(frozen=True)
class Piece:
    """Samples of a few prompts as they are kept: pictures (n, 3, H, W) uint8, or tokens, prompt-major, with their rewards.

    prompts: places in the plan, one a sample; twins: the plain samples on the same noise; pool: rewards of all plain ones (n, pool).
    costs, plain_costs: rows and rewards. ess: (steps, prompts). ancestors: starting lineages. log_z: (prompts,).
    """

    prompts: Tensor
    samples: Tensor
    rewards: Tensor
    twins: Tensor
    pool: Tensor
    ess: Tensor
    ancestors: Tensor
    log_z: Tensor
    costs: dict[str, int]
    plain_costs: dict[str, int]


def stored(samples: Tensor) -> Tensor:
    """Pictures as uint8; tokens as they are."""
    return (samples.float().clamp(0, 1) * 255).round().byte().cpu() if samples.is_floating_point() else samples.cpu()


def shown(samples: Tensor) -> Tensor:
    """What `stored` kept, as pictures in [0, 1]."""
    return samples.float() / 255 if samples.dtype == torch.uint8 else samples


def spelled(asked: Sequence[tuple[Prompt, int]]) -> str:
    """Prompts with their numbers of samples, as `finished_run` reads them again."""
    return json.dumps([(p.text, p.negative, p.meta, n) for p, n in asked])


def fixed_tokens(text: str | None, model: Any) -> Tensor | None:
    """Tokens (L,) that must stay, -1 where anything may stand. Raises UserError for letters and lengths that the model does not have."""
    if text is None:
        return None
    letters = [str(letter) for letter in getattr(model, "letters", ())]
    if not letters:
        raise UserError("Only models of token sequences hold tokens fixed. Leave --fixed out.")
    length, places = model.shape[0], re.findall(r"\[[^\]]*\]|.", text)
    odd = sorted({c for c in places if c != "." and c not in letters})
    if odd or len(places) > length:
        raise UserError(
            f"--fixed has {len(places)} places{f' and the letters {chr(44).join(odd)}' if odd else ''}; this model has {length} "
            f"places and the letters {''.join(letters)}, with a dot where anything may stand."
        )
    places += ["."] * (length - len(places))
    return torch.tensor([letters.index(c) if c != "." else -1 for c in places])


def draw_piece(plan: Plan, places: range) -> Piece:
    """Guided samples and their plain pool for some of the plan's prompts."""
    n = plan.prompts[places[0]][1]
    batch = as_batch([plan.prompts[i][0] for i in places], places)
    found = plan.method(plan.model, plan.reward, batch, n, seed=plan.seed, max_batch=plan.max_batch)
    at = torch.tensor(places).repeat_interleave(n)
    twins, pool, plain_costs = found.samples[:0], found.rewards.new_zeros(len(at), 0), {}
    if plan.pool:
        how = {
            "steps": plan.steps,
            "guidance": plan.guidance,
            "seed": plan.seed,
            "max_batch": plan.max_batch,
            "fixed": plan.fixed,
        }
        plain = best_of_n(plan.model, plan.reward, batch, n * plan.pool, m=1, **how)
        first = torch.arange(len(places))[:, None] * n * plan.pool + torch.arange(n)
        twins, plain_costs = plain.samples[first.flatten()], asdict(plain.costs)
        pool = plain.rewards.reshape(len(places), n * plan.pool).repeat_interleave(n, 0)
    kept = (stored(found.samples), found.rewards, stored(twins), pool, found.ess, found.ancestors, found.log_z)
    return Piece(at, *kept, asdict(found.costs), plain_costs)


def run_pieces(plan: Plan, out: Path, recorder: Recorder, say: Callable[[int, int], None] | None = None) -> list[Piece]:
    """All pieces: those in the folder as they are, the others drawn and kept. A signal ends the run after the piece at hand."""
    folder, pieces, found = out / "samples", plan.pieces(), []
    check_begun(plan, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with recorder.showing(-1, len(pieces), word="piece"), stopping("piece") as stop:
        for i, places in enumerate(pieces):
            file = folder / f"piece-{i:04d}.safetensors"
            if not file.exists():
                keep(draw_piece(plan, places), file, plan.identity)
            found.append(read(file))
            recorder.write({"update": i + 1, **_numbers(found[-1])})
            if say:
                say(i + 1, len(pieces))
            if stop.number and i + 1 < len(pieces):
                raise Interrupted(
                    128 + stop.number,
                    f"Stopped: {i + 1} of {len(pieces)} pieces are finished and kept in {out}. Go on with --resume.",
                )
    assert sum(len(piece.rewards) for piece in found) == sum(n for _, n in plan.prompts)
    return found


def check_begun(plan: Plan, folder: Path) -> None:
    """Raises UserError if the pieces in the folder belong to a run of another method, model, reward, seed or prompts."""
    for file in sorted(folder.glob("piece-*.safetensors")):
        begun = json.loads(_metadata(file).get("identity", "{}"))
        changed = [name for name, value in plan.identity.items() if begun.get(name) != value]
        if changed:
            raise UserError(
                f"The run in {folder.parent} was begun with another {' and another '.join(changed)}, so its samples would not belong "
                "together. Resume with the settings in its config.yaml, or choose another --out."
            )


def _metadata(file: Path) -> Mapping[str, str]:
    try:
        with safe_open(file, "pt") as f:
            return f.metadata() or {}
    except SafetensorError as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({error}). Delete it and --resume: it is drawn anew.")


def keep(piece: Piece, file: Path, identity: Mapping[str, str]) -> None:
    """Write a piece in one move. Raises UserError where the disk cannot take it."""
    values = {n: v for n, v in vars(piece).items() if isinstance(v, Tensor)}
    beside = file.with_suffix(".tmp")
    try:
        told = {"costs": piece.costs, "plain_costs": piece.plain_costs, "identity": dict(identity)}
        save_file(
            {n: v.contiguous() for n, v in values.items()}, beside, metadata={n: json.dumps(v) for n, v in told.items()}
        )
        beside.replace(file)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{file} cannot be written ({error}). The pieces before it are kept: free some space and --resume."
        ) from error


def read(file: Path) -> Piece:
    """A piece that `keep` wrote. Raises UserError for a damaged file."""
    try:
        metadata = _metadata(file)
        costs = {name: json.loads(metadata[name]) for name in ("costs", "plain_costs")}
        return Piece(**load_file(file), **costs)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise damaged(file, error) from error


def _numbers(piece: Piece) -> dict[str, Any]:
    """For metrics.jsonl."""
    row: dict[str, Any] = {"reward": piece.rewards.mean().item(), "samples": len(piece.rewards)}
    if piece.pool.numel():
        row["plain/reward"] = piece.pool.mean().item()
    return row | {f"calls/{name}": n for name, n in piece.costs.items()}


# ---------------------------------------------------------------------------------------------------- finished runs


@dataclass(frozen=True)
class Kept:
    """A finished guided run as its folder tells it. prompts: those that `Piece.prompts` counts, with their numbers of samples.

    before: spent on a learned value.
    """

    config: dict[str, Any]
    asked: list[tuple[Prompt, int]]
    pieces: list[Piece]
    before: dict[str, int]

    @property
    def prompts(self) -> list[Prompt]:
        return [p for p, _ in self.asked]

    def reward(self) -> Reward:
        """What guided the run, in workers where it was. Raises UserError for a reward that was made in Python."""
        texts, workers = self.config["reward"], self.config.get("workers", 0)
        return InWorkers(texts[0], workers=workers, timeout=self.config["timeout"]) if workers else load_rewards(texts)

    @property
    def has_plain(self) -> bool:
        return all(piece.pool.numel() for piece in self.pieces)

    def joined(self, name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in self.pieces])


OF_A_RUN = ("model", "reward", "seed", "options", "max_batch")
"""Settings without which a run cannot be gone on with."""


def finished_run(folder: str | Path) -> Kept:
    """Read a run folder of `guide`. Raises UserError for a folder that is none, or whose run is not finished."""
    folder = Path(folder)
    files = sorted((folder / "samples").glob("piece-*.safetensors"))
    if not (folder / "config.yaml").exists() or not files:
        raise UserError(
            f"{folder} is not the folder of a guided run: it has no config.yaml or no samples/piece-*.safetensors."
        )
    if not (folder / "report.html").exists():
        raise UserError(f"The run in {folder} is not finished. Go on with the same command and --resume.")
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    try:
        told = json.loads(json.loads(_metadata(files[0])["identity"])["prompts"])
        asked = [(Prompt(text, negative, tuple(map(tuple, meta))), n) for text, negative, meta, n in told]
        judge, before = folder / "value.safetensors", {}
        if judge.exists():
            before = json.loads(_metadata(judge)["told"])["costs"]
        kept = Kept(config, asked, [read(f) for f in files], before)
        missing = [name for name in OF_A_RUN if name not in config]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is not the folder of a guided run: {type(error).__name__}: {error}.") from error
    if missing:
        raise UserError(f"{folder} is not the folder of a guided run: its config.yaml lacks {', '.join(missing)}.")
    if (there := sum(len(p.rewards) for p in kept.pieces)) != (wanted := sum(n for _, n in asked)):
        raise UserError(
            f"{folder} holds {there} of its {wanted} samples. Draw the others: the same command with --resume."
        )
    return kept


def redrawn(model: Model, run: Kept, reward: Reward, steps: int, guidance: float, folder: Path) -> list[Piece]:
    """What another model draws by itself on a run's prompts and noise, beside the run's plain samples; kept in the folder."""
    told, found = spelled(run.asked), []
    folder.mkdir(parents=True, exist_ok=True)
    how = {"steps": steps, "guidance": guidance, "seed": run.config["seed"], "max_batch": run.config["max_batch"]}
    how["fixed"] = fixed_tokens(run.config.get("fixed"), model)
    for number, piece in enumerate(run.pieces):
        places = piece.prompts.unique().tolist()
        batch = as_batch([run.prompts[i] for i in places], range(places[0], places[-1] + 1))
        drawn = best_of_n(model, reward, batch, len(piece.prompts) // len(places), m=1, **how)
        own: dict[str, Any] = {name: getattr(drawn, name) for name in ("rewards", "ess", "ancestors", "log_z")}
        own |= {"samples": stored(drawn.samples), "costs": asdict(drawn.costs)}
        file = folder / f"piece-{number:04d}.safetensors"
        keep(replace(piece, **own), file, {"prompts": told})
        found.append(read(file))
    if isinstance(reward, InWorkers):
        reward.close()
    return found
