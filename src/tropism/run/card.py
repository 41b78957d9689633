"""The model card of a run: README.md with front matter for the hub, numbers, and how to load the adapter."""

from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path

import yaml

from tropism.run.pictures import plain
from tropism.run.report import Finished, number, rows, spread

SHOWN = 8
"""Pictures a strength is measured on."""


def safe(text: str) -> str:
    """Any text as one line of Markdown that shows exactly that text: no markup, no HTML, no link, no table cell, no
    list.
    """
    escaped = re.sub(r"([\\`*_{}\[\]()#!|~:@])", r"\\\1", html.escape(plain(text), quote=False))
    return re.sub(r"^(\d*)([-+.=])", r"\1\\\2", escaped)


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def prompts_hash(prompts: list[str]) -> str:
    """sha256 of the prompts in order, as a JSON list."""
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def is_hub_id(name: str) -> bool:
    """Whether a base is named as the hub names it; a folder or a bundled model is not, and the hub refuses such a card."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()


def _front_matter(run: Finished) -> str:
    head = {
        "library_name": "diffusers",
        **({"base_model": run.base} if is_hub_id(run.base) else {}),
        "tags": [*(["lora"] if run.adapter else []), "text-to-image", "diffusers", "tropism", run.method],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _numbers(run: Finished) -> str:
    head = "| held-out | before | after | change | ± s.e. |\n|---|---:|---:|---:|---:|"
    lines = [
        f"| {safe(r.name)} | {number(r.before)} | {number(r.after)} | {r.change:+.4g} | {number(r.error)} |"
        for r in rows(run.before, run.after)
    ]
    return "\n".join([head, *lines])


def _loading(run: Finished) -> str:
    if run.upscales and run.adapter:
        return fenced("tropism upscale photo.png --adapter . --out photo-large.png  # in this folder", "sh")
    prompt = json.dumps(plain(run.before.prompts[0]), ensure_ascii=False)
    load = (
        'pipe.load_lora_weights("lora", adapter_name="tropism")  # this folder\'s lora/; from the hub: ("ORG/NAME", subfolder="lora")\n'
        if run.adapter
        else f'pipe.{run.part}.load_state_dict(load_file("weights/trained.safetensors"))  # in this folder\n'
    )
    return fenced(
        "from diffusers import DiffusionPipeline\n"
        + ("" if run.adapter else "from safetensors.torch import load_file\n")
        + f"\npipe = DiffusionPipeline.from_pretrained({run.load})\n"
        + load
        + f'pipe({prompt}).images[0].save("picture.png")',
        "python",
    )


def _strengths(run: Finished) -> list[str]:
    """What less or more of the adapter gives: the first remedy for one that went too far."""
    if not run.strengths:
        return []
    names = list(next(iter(run.strengths.values())))
    head = f"| strength | {' | '.join(safe(n) for n in names)} |\n|---:|{'---:|' * len(names)}"
    lines = [f"| {s:g} | {' | '.join(number(row[n]) for n in names)} |" for s, row in run.strengths.items()]
    return [
        "## Strength",
        f'Means over {SHOWN} of the held-out pictures at most, with `pipe.set_adapters("tropism", strength)`:',
        "\n".join([head, *lines]),
    ]


def card(run: Finished) -> str:
    """README.md as text; everything that came from data is escaped."""
    rewards = "\n".join(f"- {safe(name)}, weight {weight:g}" for name, weight in run.rewards.items())
    shown = "\n".join(f"- {safe(run.prompts[i])}" for i in spread(len(run.prompts), 5))
    limits = "\n".join(f"- {safe(x)}" for x in run.limits) or "- None recorded."
    what = "A LoRA adapter" if run.adapter else "Full weights"
    updates = max((r["update"] for r in run.lines), default=0)
    return (
        "\n\n".join(
            [
                _front_matter(run),
                f"# {safe(run.method)} {'adapter' if run.adapter else 'weights'} for {safe(run.base)}",
                f"{what} trained with Tropism ({safe(run.method)}) for {updates} updates, seed {run.seed}.",
                "![before and after](before_after.png)",
                "## Use",
                _loading(run),
                "## Numbers",
                f"{len(run.before.prompts)} held-out pictures, the same seeds before and after; the change is paired.",
                _numbers(run),
                "![curves](reward.png)",
                *_strengths(run),
                "## Rewards",
                rewards,
                "## Prompts",
                f"{len(run.prompts)} training prompts, sha256 `{prompts_hash(run.prompts)}`, for example:\n\n{shown}",
                "## Limits",
                limits,
                "## Repeat it",
                fenced(run.command, "sh"),
            ]
        )
        + "\n"
    )


def write(out: Path | str, run: Finished) -> Path:
    """Write README.md into a run folder; returns its path."""
    path = Path(out) / "README.md"
    path.write_text(card(run), encoding="utf-8", errors="replace")
    return path
