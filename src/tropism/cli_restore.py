"""The command line of restored pictures: `tropism hallucination`. Its flags are read off the functions of `tropism.commands`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection

import typer

from tropism.flags import HIDDEN, flags, plain_command

app = typer.Typer(
    no_args_is_help=True, help="How much of restored pictures is invented, and how far its judges agree with people."
)
_SPOKEN = re.compile(r"(?<![\w/?&.-])([a-z]+(?:_[a-z]+)*)\b(?:=([\w.,:/+-]*\w|\([^)]*\)))?(?![\w/])")

HELP = {
    "sr": "The restored pictures: a folder, or one file.",
    "gt": "The references, paired with the results by name.",
    "lr": "What the results were made from, paired by name.",
    "judge": "A server's http://HOST:PORT/v1 (vLLM, llama.cpp, Ollama, a hosted model; its key in TROPISM_JUDGE_KEY), local:FOLDER of a "
    "LLaVA, Qwen2-VL or Qwen2.5-VL, or features[:SOURCE], the distance of deep features to --gt.",
    "model": "The model's name on that server (default: its only one).",
    "out": "A folder for scores.csv, report.html and the cache; the same command goes on there.",
    "repeats": "Questions about each picture (default 3).",
    "tiles": "2 also shows the 2 x 2 parts at full size, and so on (default 1).",
    "parallel": "Pictures asked about at a time (default 4).",
    "swap_share": "Share of the pictures also shown in the other order (default 0.05).",
    "cache": "Where replies are kept (default: OUT/cache).",
    "cache_only": "Ask nothing, use kept replies only.",
    "temperature": "Of the sampling (default: 0 on a server, 0.3 locally).",
    "seed": "Of the sampling; of traps, order and intervals.",
    "max_tokens": "Most tokens of a reply (default: 2048 on a server, 1024 locally).",
    "logprobs": "Score by the probabilities of the levels, where the server tells them.",
    "timeout": "Seconds of one request (default 120).",
    "limit": "Seconds of one question with its retries (default 600).",
    "key_file": "A file with the server's key, instead of TROPISM_JUDGE_KEY.",
    "price_in": "Price of a million tokens read, for the ledger.",
    "price_out": "Price of a million tokens written.",
    "worst": "Pictures shown on the page.",
    "overwrite": "Replace the scoring in --out; its cache is kept.",
    "device": "cpu or cuda.",
    "dtype": "Of a local judge: float32, bfloat16 (default: by the device).",
    "threads": "CPU threads.",
}
HELP_OF = {
    "agree": {
        "scores": "A scores.csv, or any .csv with the columns name and --column.",
        "people": "Ratings: a .csv with name, rater, level, or files of a form (.json) with --key; repeatable.",
        "key": "The form's .key.json.",
        "exact": "A .csv with a known number for each name, such as an exact count.",
        "benchmark": "A folder of the command benchmark, or a data set's name on the hub.",
        "column": "The scores' column.",
        "exact_column": "The column of --exact.",
        "scores_higher_is": "worse or better, where --scores does not say.",
        "people_higher_is": "worse or better, of --people or --exact, where they do not say.",
        "common": "Compare the pictures that both sides have, instead of refusing others.",
        "above": "Something is wrong where people's number is above this (default: the lowest level).",
        "seed": "Of the intervals.",
        "out": "A folder for agreement.csv and agreement.html (default: that of the scores).",
    },
    "form": {
        "out": "The page, NAME.html; its key is written beside it.",
        "traps": "Items whose answer is known (default: one for ten pictures, at least 4).",
        "title": "The page's heading.",
        "seed": "Of traps and order.",
    },
    "benchmark": {
        "out": "A new folder for sr, gt and people.csv.",
        "source": "A data set on the hub, or a folder that the package datasets reads.",
    },
}
"""What flags mean for one command only."""


def register() -> None:
    """Read the flags off the functions, which takes importing them."""
    from tropism.commands import agreeing, hallucination

    app.registered_commands.clear()
    for function in (hallucination.score, agreeing.agree, agreeing.form, agreeing.benchmark):
        name = function.__name__
        spoken = _spoken(_incomplete_is_failure(function) if name == "score" else function)
        app.command(name)(plain_command(spoken, {**HELP, **HELP_OF.get(name, {})}))


def _incomplete_is_failure(score: Callable) -> Callable:
    """The scoring with exit code 1 where some pictures could not be scored: a script must be able to tell."""

    @functools.wraps(score)
    def run(*positional, **named):
        if score(*positional, **named).summary.failed:
            raise typer.Exit(1)

    return run


def _spoken(function: Callable) -> Callable:
    """The function with messages that name its arguments as flags."""
    from tropism.core import UserError

    names = {p.name for p in flags(function, HIDDEN, HELP)}

    @functools.wraps(function)
    def run(*positional, **named):
        try:
            return function(*positional, **named)
        except UserError as error:
            raise UserError(as_flags(str(error), names)) from error

    return run


def as_flags(text: str, names: Collection[str]) -> str:
    """A message to Python users as one to users of the command: `max_tokens=1024` is `--max-tokens 1024`, `common=True` its flag.

    Of words without a value only those with a low line can be nothing but an argument.
    """

    def flag(found: re.Match) -> str:
        name, value = found[1], found[2]
        if name not in names or (value is None and "_" not in name):
            return found[0]
        return f"--{name.replace('_', '-')}" + ("" if value in (None, "True") else f" {value}")

    return _SPOKEN.sub(flag, text)
