"""A rating form for people: one page that works without a network, and a key that tells later which picture was which.

Each item shows the low-resolution picture, the reference and the result; five levels say how much is invented. Trap items, whose level is
known, are mixed in: the reference as the result (must be 1), and another picture as the result (must be 5). The page calls every item by
a random word; only the key, which stays with who asks, knows names and traps.
Source: the five levels and the traps are ours, as the judge's; trap questions as in Hallucination Score's relatives, arXiv 2512.07037.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tropism.core import UserError
from tropism.noise import Stream, generator
from tropism.restore.levels import LEVELS
from tropism.rewards.protocol import as_png

ANSWERS, KEY = "tropism-ratings-1", "tropism-form-key-1"
"""What the files of a rater and of the key call their form."""
PEOPLE = 3
"""Ratings that every picture should have."""
SAME, OTHER = "same", "other"
"""The kinds of traps; what each must be rated is in `MUST`."""
MUST = {SAME: 1, OTHER: 5}
EMBEDDED = 20_000_000
"""Bytes of pictures, above which they lie in files beside the page."""
Source = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Form:
    """What was written. pictures: the folder beside the page, None where they are inside it. items: with the traps."""

    page: Path
    key: Path
    pictures: Path | None
    items: int
    traps: int


@dataclass(frozen=True)
class _Shown:
    """A set of three pictures as PNGs, low-resolution, reference, result; `look` is the reference at 8 x 8 pixels, (192,)."""

    name: str
    pngs: tuple[bytes, bytes, bytes]
    height: int
    width: int
    look: np.ndarray


@dataclass(frozen=True)
class _Item:
    word: str
    told: dict[str, str]
    pngs: tuple[bytes, bytes, bytes]
    height: int
    width: int


def write_form(
    triples: Iterable[tuple[str, Source, Source | None, Source | None]],
    out: str | Path,
    *,
    seed: int = 0,
    traps: int | None = None,
    title: str = "What is invented?",
    embedded: int = EMBEDDED,
) -> Form:
    """Write OUT, a page for people to rate results with, and beside it OUT's key (keep it) and, if they are large, a folder of pictures.

    triples: (name, result, reference, low resolution) in the order of `score_folder`; pictures (3, H, W) or (1, 3, H, W) in [0, 1], or
    calls that load them; result and reference of one size. seed: of traps and order. traps: how many, half of each kind, default one for
    ten pictures and at least 4. embedded: bytes of pictures above which they lie beside the page.
    Raises UserError for pictures that are missing, of wrong form or different sizes, names twice, fewer than 3 pictures, fewer than 2
    traps, references that all look alike, and where another form stands already.
    """
    page = Path(out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The form is a page, and '{page}' is not named like one. Give a name that ends in .html.")
    shown = _all_shown(triples)
    traps = max(4, round(len(shown) / 10)) if traps is None else traps
    if traps < 2:
        raise UserError(f"traps is {traps}; there must be at least 2, one of each kind. Leave it out for the default.")
    rng = generator(seed, Stream.EVAL, 0)
    items = _items(shown, traps, rng)
    form = hashlib.sha256(b"".join(i.word.encode() + p for i in items for p in i.pngs)).hexdigest()[:16]
    key = page.with_name(page.stem + ".key.json")
    _not_another(key, form)
    beside = page.with_name(page.stem + "_pictures") if sum(len(p) for i in items for p in i.pngs) > embedded else None
    told = {
        "format": KEY,
        "form": form,
        "seed": seed,
        "higher_is_worse": True,
        "items": {i.word: i.told for i in items},
    }
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        html = _html(title, form, [_addressed(i, beside) for i in items], beside is not None)
        key.write_text(json.dumps(told, indent=1), "utf-8")
        page.write_text(html, "utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"'{page}' cannot be written ({error.strerror or error}). Choose another place.") from error
    return Form(page, key, beside, len(items), traps)


def _not_another(key: Path, form: str) -> None:
    """Refuse to write over a form that people may have answered."""
    if not key.exists():
        return
    try:
        there = json.loads(key.read_text("utf-8"))["form"]
    except (OSError, ValueError, KeyError, TypeError):
        there = None
    if there != form:
        raise UserError(
            f"Another form stands there already: '{key}' is the key to it, without which its answers cannot be read. "
            "Choose another name for the new one, or remove the old key."
        )


# ---------------------------------------------------------------------------------------------------- pictures


def _all_shown(triples: Iterable[tuple[str, Source, Source | None, Source | None]]) -> list[_Shown]:
    shown, seen = list[_Shown](), set[str]()
    for name, *sources in triples:
        if name in seen:
            raise UserError(
                f"Two pictures are named {name!r}, and ratings are told apart by names. Rename one of them."
            )
        seen.add(name)
        shown.append(_shown(name, sources))
    if len(shown) < 3:
        raise UserError(
            f"A form needs at least 3 pictures, and dozens to learn from; here are {len(shown)}. Give more."
        )
    return shown


def _shown(name: str, sources: Sequence[Source | None]) -> _Shown:
    """sources: result, reference, low resolution."""
    found = dict[str, Tensor]()
    for what, source in zip(("result", "reference", "low-resolution picture"), sources, strict=True):
        if source is None:
            raise UserError(f"{name!r} has no {what}, and people see all three. Give it, or leave {name!r} out.")
        found[what] = _checked(source() if callable(source) else source, f"The {what} of {name!r}")
    sr, gt, lr = found.values()
    if sr.shape != gt.shape:
        raise UserError(
            f"The result of {name!r} has {sr.shape[2]} x {sr.shape[1]} pixels and its reference {gt.shape[2]} x {gt.shape[1]}; side by "
            "side they must show the same. Bring them to one size first."
        )
    look = F.adaptive_avg_pool2d(gt, 8).flatten().double().numpy()
    return _Shown(name, (as_png(lr), as_png(gt), as_png(sr)), sr.shape[1], sr.shape[2], look)


def _checked(picture: Tensor, what: str) -> Tensor:
    """(3, H, W) float32 on the CPU."""
    image = picture[0] if picture.ndim == 4 and len(picture) == 1 else picture
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
        raise UserError(
            f"{what} is {tuple(picture.shape)}, {picture.dtype}; a picture is (3, H, W), floats from 0 to 1."
        )
    image = image.detach().float().cpu()
    if not bool(torch.isfinite(image).all()) or image.min() < -0.01 or image.max() > 1.01:
        raise UserError(f"{what} has values outside 0 to 1. Scale it: 8-bit pixels are divided by 255.")
    return image


# ---------------------------------------------------------------------------------------------------- items


def _items(shown: list[_Shown], traps: int, rng: np.random.Generator) -> list[_Item]:
    """Pictures and traps in one shuffled list, each under a random word."""
    told = [({"kind": "picture", "name": s.name}, s, s.pngs) for s in shown]
    bases = [shown[i % len(shown)] for i in np.tile(rng.permutation(len(shown)), -(-traps // len(shown)))[:traps]]
    for i, base in enumerate(bases):
        low, reference, _ = base.pngs
        if i % 2 == 0:
            told.append(({"kind": SAME, "name": base.name}, base, (low, reference, reference)))
        else:
            other = _other(base, shown, rng)
            told.append(
                ({"kind": OTHER, "name": base.name, "result_of": other.name}, base, (low, reference, other.pngs[2]))
            )
    words = list(dict.fromkeys(rng.bytes(6).hex() for _ in range(2 * len(told) + 10)))
    order = rng.permutation(len(told))
    return [
        _Item(w, told[i][0], told[i][2], told[i][1].height, told[i][1].width)
        for w, i in zip(words, order, strict=False)
    ]


def _other(base: _Shown, shown: list[_Shown], rng: np.random.Generator) -> _Shown:
    """A picture whose reference looks unlike the base's: one of the farthest quarter. Raises UserError where all look alike."""
    far = np.array([np.sqrt(np.mean((s.look - base.look) ** 2)) for s in shown])
    order = np.argsort(-far, kind="stable")[: max(1, len(shown) // 4)]
    chosen = int(rng.choice(order))
    if far[chosen] < 0.02:
        raise UserError(
            f"No picture looks unlike {base.name!r}, so none can be the trap that everyone must call another scene. "
            "Add pictures of other scenes."
        )
    return shown[chosen]


def _addressed(item: _Item, beside: Path | None) -> dict[str, Any]:
    """An item as the page's script reads it; its pictures are written where they lie beside the page."""
    addresses = dict[str, str]()
    for letter, png in zip("abc", item.pngs, strict=True):
        if beside is None:
            addresses[letter] = "data:image/png;base64," + base64.b64encode(png).decode()
        else:
            beside.mkdir(parents=True, exist_ok=True)
            file = beside / f"{item.word}{letter}.png"
            file.write_bytes(png)
            addresses[letter] = f"{beside.name}/{file.name}"
    return {"id": item.word, "width": item.width, "height": item.height, **addresses}


# ---------------------------------------------------------------------------------------------------- page


def _html(title: str, form: str, items: list[dict[str, Any]], files: bool) -> str:
    """The page. Nothing but its own script runs, by that script's hash; texts are escaped, and data is JSON without < > & '."""
    folder = Path(__file__).parent
    script = (folder / "form.js").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(folder),
    )
    return environment.get_template("form.html.jinja").render(
        title=title,
        count=len(items),
        levels=LEVELS,
        people=PEOPLE,
        images="'self' data:" if files else "data:",
        form={"format": ANSWERS, "form": form, "items": items},
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
