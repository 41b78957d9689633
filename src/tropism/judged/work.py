"""Who scores: a judge behind an address or here, or a distance of features; from the settings of the command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tropism.core import UserError
from tropism.restore.distances import FeatureProxy, Measured, measure_folder
from tropism.restore.judge import HallucinationJudge
from tropism.restore.judge_client import Endpoint
from tropism.restore.judge_local import LocalJudge
from tropism.restore.judge_pictures import LONGEST
from tropism.restore.scoring import Row, score_folder
from tropism.rewards.towers import SOURCE
from tropism.run.checks import DTYPES

OF_JUDGES = ("repeats", "tiles", "swap_share", "cache", "cache_only", "temperature", "max_tokens")
"""Settings that only a judge has."""
OF_SERVERS = ("model", "parallel", "key_file", "price_in", "price_out", "timeout", "limit", "logprobs")
"""Settings that only a judge behind an address has."""
DEFAULTS = {"repeats": 3, "tiles": 1, "swap_share": 0.05, "parallel": 4}
FEATURE_PIXELS = 2 * LONGEST
"""Pixels of the longest side that features are read from."""


def kind_of(settings: Mapping[str, Any]) -> str:
    """server, local or features. Raises UserError for another judge and for settings that it does not have."""
    judge = settings["judge"]
    head, _, rest = judge.partition(":")
    head = head.partition("?")[0]
    kind = {"http": "server", "https": "server", "local": "local", "features": "features"}.get(head)
    if kind is None or (kind == "local" and not rest) or judge == "features:":
        raise UserError(
            f"There is no judge {judge!r}. Give a server's address (http://HOST:PORT/v1), local:FOLDER of a vision-language model, or "
            "features[:SOURCE][?OPTIONS] for the distance of deep features to the references."
        )
    for name in (*OF_JUDGES, *OF_SERVERS):
        if settings[name] not in (None, False) and kind not in kinds_with(name):
            what = "a judge behind an address" if name in OF_SERVERS else "a judge"
            raise UserError(f"--{name.replace('_', '-')} is for {what}, and --judge is {judge!r}. Leave it out.")
    if (settings["price_in"] is None) != (settings["price_out"] is None):
        raise UserError("A price needs both sides: --price-in and --price-out, of a million tokens read and written.")
    if kind == "server" and settings["cache_only"] and settings["model"] is None:
        raise UserError(
            "With --cache-only nobody is asked, not even for the model's name. Give it: --model NAME; the column judge of a scores.csv "
            "tells it."
        )
    return kind


def kinds_with(name: str) -> tuple[str, ...]:
    return ("server",) if name in OF_SERVERS else ("server", "local")


def check_compared(kind: str, gt: object, lr: object) -> None:
    if kind == "features" and gt is None:
        raise UserError(
            "Features are compared with a reference, and none was given. Give --gt FOLDER; without references, ask a judge: "
            "--judge http://HOST:PORT/v1 --lr FOLDER."
        )
    if gt is None and lr is None:
        raise UserError(
            "There is nothing to compare the pictures with. Give the references (--gt FOLDER), or what the pictures were made from "
            "(--lr FOLDER), or both."
        )


class Judge:
    """Scoring by a model. pixels: of a picture's longest side that it is shown at most."""

    def __init__(self, kind: str, settings: Mapping[str, Any], place: Any, folder: Path):
        self.backend = _endpoint(settings) if kind == "server" else _local(settings, place)
        self.name, self.settings = self.backend.name, settings
        self.judge = HallucinationJudge(
            self.backend,
            repeats=settings["repeats"],
            tiles=settings["tiles"],
            cache=settings["cache"] or folder / "cache",
            cache_only=settings["cache_only"],
        )
        self.pixels = settings["tiles"] * LONGEST

    def rows(self, triples: Iterable[Any], file: Path) -> Iterator[Row]:
        parallel = self.settings["parallel"] or 1
        return score_folder(self.judge, triples, file, parallel=parallel, swap_share=self.settings["swap_share"])


class Features:
    """Scoring by the distance of features."""

    backend, pixels = None, FEATURE_PIXELS

    def __init__(self, settings: Mapping[str, Any], place: Any):
        text = settings["judge"].removeprefix("features").removeprefix(":")
        source, question, options = text.partition("?")
        self.name = f"features:{source or SOURCE}{question}{options}"
        self.distance = FeatureProxy(text, place)

    def rows(self, triples: Iterable[Any], file: Path) -> Iterator[Measured]:
        return measure_folder(self.distance, self.name, triples, file)


Work = Judge | Features


def _endpoint(settings: Mapping[str, Any]) -> Endpoint:
    names = ("temperature", "seed", "max_tokens", "logprobs", "timeout", "limit", "key_file")
    own = {name: settings[name] for name in names if settings[name] is not None}
    prices = None if settings["price_in"] is None else (settings["price_in"], settings["price_out"])
    return Endpoint(settings["judge"], settings["model"], prices=prices, **own)


def _local(settings: Mapping[str, Any], place: Any) -> LocalJudge:
    own = {name: settings[name] for name in ("temperature", "seed", "max_tokens") if settings[name] is not None}
    dtype = None if settings["dtype"] is None else DTYPES[settings["dtype"]]
    return LocalJudge(settings["judge"].removeprefix("local:"), device=place, dtype=dtype, **own)
