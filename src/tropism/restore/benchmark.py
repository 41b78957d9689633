"""The public human benchmark of invented detail: pairs of reference and result, each rated by some twenty people.

VHA-bench: 90 references, six upscalers (StableSR, DiffBIR, SeeSR, OSEDiff, PURE, VOSR), 540 pairs, 11,200 ratings by 200 people from 1 to
5, higher meaning more hallucination. It has no low-resolution pictures, so judges are asked without them.
Source: VHA: VQA-based Hallucination Assessment for Generative Image Super-Resolution, 2026; the data set's card, dhryou/VHA-bench.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tropism.core import UserError
from tropism.restore.levels import HIGHEST, LOWEST
from tropism.restore.ratings import Scores

NAME, SPLIT = "dhryou/VHA-bench", "test"
COLUMNS = ("gt", "sr", "sample_id", "image_id", "method", "human_score", "n_ratings")


@dataclass(frozen=True)
class Pair:
    """A rated pair. name: its own; image: its reference's, shared by the methods. gt, sr: (3, H, W) in [0, 1], float32.

    human_score: people's mean level, 1 to 5, higher is worse. ratings: of how many.
    """

    name: str
    image: str
    method: str
    gt: Tensor
    sr: Tensor
    human_score: float
    ratings: int


def pairs(name: str = NAME, split: str = SPLIT) -> Iterator[Pair]:
    """The pairs of the benchmark, read one at a time. name: a data set on the hub, or a folder that `datasets` reads, of its columns.

    Raises UserError where the package is missing, the data set is out of reach, or a row is not what the card says.
    """
    library = _library(name)
    seen = set[str]()
    for number, row in enumerate(_rows(library, name, split), 1):
        pair = _pair(row, f"Row {number} of '{name}'")
        if pair.name in seen:
            raise UserError(f"Row {number} of '{name}' has the sample_id {pair.name!r} a second time. {_COMPARE}")
        seen.add(pair.name)
        yield pair
    if not seen:
        raise UserError(f"'{name}' holds no row in its split '{split}'. {_COMPARE}")


def human(found: Iterable[Pair], method: str | None = None) -> Scores:
    """People's mean levels by the pairs' names, of all pairs or of one method's.

    Raises UserError for a method that none has. Over a mixture of methods agreement is higher than within one: look at both.
    """
    every = list(found)
    kept = {p.name: p.human_score for p in every if method in (None, p.method)}
    if not kept:
        known = ", ".join(dict.fromkeys(p.method for p in every)) or "none"
        raise UserError(f"No pair is by the method {method!r}. There are: {known}.")
    return Scores(kept, True, True, "the benchmark's human scores")


_COMPARE = f"Compare it with https://huggingface.co/datasets/{NAME}, or update: pip install -U datasets"


def _library(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"Reading the benchmark '{name}' needs a package that cannot be imported ({error}). "
            'Install it: pip install "tropism[data]"'
        ) from error


def _rows(library: Any, name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        yield from library.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the package, its hub client and its readers raise kinds of their own, by version
        said = f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        remedy = (
            f"Check the name and https://huggingface.co/datasets/{NAME}"
            if isinstance(error, FileNotFoundError)
            else f"Give another split than '{split}'"
            if isinstance(error, ValueError)
            else "Check the network and HF_HUB_OFFLINE, or give the path of a folder that was downloaded elsewhere"
        )
        raise UserError(f"The benchmark '{name}' cannot be read {said}. {remedy}.") from error


def _pair(row: dict[str, Any], where: str) -> Pair:
    if missing := [c for c in COLUMNS if row.get(c) is None]:
        raise UserError(f"{where} has no {missing[0]}; it has: {', '.join(row)}. {_COMPARE}")
    score, many = row["human_score"], row["n_ratings"]
    if not isinstance(score, int | float) or not math.isfinite(score) or not LOWEST <= score <= HIGHEST:
        raise UserError(f"{where} has the human_score {score!r}, and it is from {LOWEST} to {HIGHEST}. {_COMPARE}")
    gt, sr = (_picture(row[c], f"{where}, {c},") for c in ("gt", "sr"))
    if gt.shape != sr.shape:
        raise UserError(
            f"{where} has a reference of {gt.shape[2]} x {gt.shape[1]} pixels and a result of {sr.shape[2]} x {sr.shape[1]}. {_COMPARE}"
        )
    return Pair(str(row["sample_id"]), str(row["image_id"]), str(row["method"]), gt, sr, float(score), int(many))


def _picture(value: Any, where: str) -> Tensor:
    """(3, H, W) in [0, 1] of a PIL picture, or of the bytes or path of one, as versions of the package give them."""
    try:
        if isinstance(value, dict):
            value = Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
        pixels = np.array(value.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{where} is no picture ({type(error).__name__}: {str(error)[:200]}). {_COMPARE}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
