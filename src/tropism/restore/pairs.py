"""Which result belongs to which reference and which low-resolution picture: folders paired by name, sizes checked.

Names are compared without their suffix and without the endings that programs add, such as `_x4`, `_out`, `_SR`, `_HR`, `_LR4`: as few
endings are taken off as make two names equal, so `photo` and `photo_2x` stay two pictures where both are there. A name that fits
two files is an error that lists them: a score of the wrong pair looks like any other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tropism.core import UserError
from tropism.restore.pictures import SUFFIXES, size

ENDINGS = (
    "out",
    "output",
    "result",
    "restored",
    "upscaled",
    "enhanced",
    "pred",
    "sr",
    "hr",
    "lr",
    "gt",
    "hq",
    "lq",
    "ref",
    "bicubic",
)
_ENDING = re.compile(
    rf"(?:[ _.-]|(?<=[0-9]))(?:x[2-9]|x1[0-6])$|[ _.-][2-9]x$|[ _.-](?:{'|'.join(ENDINGS)})(?:x?[2-9])?$"
)
_SHOWN = 8


@dataclass(frozen=True)
class Pair:
    """One picture's files: the result and, where there are such folders, its reference and its low-resolution picture.

    width, height: of the result, in pixels. scale: how many times larger than the low-resolution picture it is, None without one.
    """

    name: str
    sr: Path
    gt: Path | None
    lr: Path | None
    width: int
    height: int
    scale: int | None


@dataclass(frozen=True)
class Pairs:
    """All pairs in the order of their names, and the files of either folder that no result asked for (for the record)."""

    pairs: tuple[Pair, ...]
    unused: tuple[Path, ...]


def pictures_of(folder: str | Path) -> list[Path]:
    """The picture files of a folder by their suffixes, sorted by name, or the one file that is given. Raises UserError if there is none."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give a folder of pictures, or one picture.")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    found = [p for p in found if p.is_file()]
    if not found:
        inside = sorted(p.parent.name for p in folder.glob("*/*") if p.suffix.lower() in SUFFIXES)
        raise UserError(
            f"{folder} holds no pictures ({', '.join(SUFFIXES)}). "
            + (f"There are some in its folder '{inside[0]}': give that." if inside else "Give the folder they are in.")
        )
    return found


def paired(sr: str | Path, gt: str | Path | None = None, lr: str | Path | None = None) -> Pairs:
    """Pair results with references and low-resolution pictures, each a folder or a single file, and check all sizes.

    A reference has the result's size; a low-resolution picture divides it by one whole number. Files that no result asks for are no error.
    Raises UserError for a folder without pictures, names that fit none or several, and sizes that do not match.
    """
    results = pictures_of(sr)
    columns = {}
    for role, at in (("--gt", gt), ("--lr", lr)):
        if at:
            both_files = (
                Path(sr).is_file() and Path(at).is_file()
            )  # then the user has paired them, whatever they are called
            columns[role] = [Path(at)] if both_files else _matched(results, pictures_of(at), role)
    made = []
    for i, result in enumerate(results):
        reference, low = (columns[role][i] if role in columns else None for role in ("--gt", "--lr"))
        made.append(_checked(result, reference, low))
    used = {p for column in columns.values() for p in column}
    unused = [p for at in (gt, lr) if at for p in pictures_of(at) if p not in used]
    return Pairs(tuple(made), tuple(unused))


# ---------------------------------------------------------------------------------------------------- names


def shorter_names(stem: str) -> list[str]:
    """A file's name in lower case, then with one ending after the other taken off."""
    names = [stem.lower()]
    while (shorter := _ENDING.sub("", names[-1])) and shorter != names[-1]:
        names.append(shorter)
    return names


def _matched(results: list[Path], others: list[Path], role: str) -> list[Path]:
    """The other file of each result, in the order of results."""
    by_name = defaultdict[str, dict[int, list[Path]]](lambda: defaultdict(list))
    for other in others:
        for cost, name in enumerate(shorter_names(other.stem)):
            by_name[name][cost].append(other)
    found, missing, taken = list[Path](), list[Path](), defaultdict[Path, list[Path]](list)
    for result in results:
        fits = _fits(result, by_name)
        if len(fits) > 1:
            raise UserError(
                f"{result.name} fits {len(fits)} files of {role}: {_listed(p.name for p in fits)}. Keep one of them, or "
                "give it the result's name."
            )
        if not fits:
            missing.append(result)
            continue
        found.append(fits[0])
        taken[fits[0]].append(result)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(results)} results have no picture in {role} {others[0].parent}: "
            f"{_listed(p.name for p in missing)}. That folder has {_listed(p.name for p in others)}. Give both the same names."
        )
    for other, askers in taken.items():
        if len(askers) > 1:
            raise UserError(
                f"{len(askers)} results belong to {other.name} of {role}: {_listed(p.name for p in askers)}. Score each "
                "method's folder by itself."
            )
    return found


def _fits(result: Path, by_name: dict[str, dict[int, list[Path]]]) -> list[Path]:
    """The files whose names equal the result's when the fewest endings are taken off both; of equals, those spelled alike."""
    fits: dict[int, list[Path]] = defaultdict(list)
    for mine, name in enumerate(shorter_names(result.stem)):
        for theirs, files in by_name.get(name, {}).items():
            fits[mine + theirs] += [f for f in files if f not in fits[mine + theirs]]
    best = fits[min(fits)] if fits else []
    return [f for f in best if f.stem == result.stem] or best


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


# ---------------------------------------------------------------------------------------------------- sizes


def _checked(result: Path, reference: Path | None, low: Path | None) -> Pair:
    width, height = size(result)
    if reference and (other := size(reference)) != (width, height):
        common = min(width, other[0]), min(height, other[1])
        cut = [p for p, own in ((result, (width, height)), (reference, other)) if own != common]
        how = " and ".join(f"magick {p} -crop {common[0]}x{common[1]}+0+0 +repage {p.with_suffix('.png')}" for p in cut)
        raise UserError(
            f"{result.name} has {width} x {height} pixels and its reference {reference.name} has {other[0]} x {other[1]}. "
            f"If they share their upper left corner, cut what is larger: {how}"
        )
    return Pair(
        result.stem, result, reference, low, width, height, _scale(result, (width, height), low) if low else None
    )


def _scale(result: Path, large: tuple[int, int], low: Path) -> int:
    small = size(low)
    k = large[0] // small[0]
    if k < 1 or (small[0] * k, small[1] * k) != large:
        raise UserError(
            f"{result.name} has {large[0]} x {large[1]} pixels, which is no whole multiple of the {small[0]} x {small[1]} of "
            f"{low.name}. Give the picture that the model was given, cut to a size that it keeps."
        )
    return k
