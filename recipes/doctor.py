"""Does the doctor name planted faults, and keep silent where nothing is wrong?

    python recipes/doctor.py --out docs/results/doctor       9 minutes on one core

planted.csv: every fault of tests/doctor, the library's own list and those of the field, on two models each where it can be: rewards
on a small model of one's own and on the bundled `shapes`, models on a tiny Stable Diffusion 1 and on `shapes`. named: the check
that is about it spoke, at its level; alone: nothing else did. healthy.csv: set-ups without a fault, and what was said of them.
seconds: processor time of one thread. Nothing is drawn at random (seed 0 throughout). A run goes on where it stopped; delete the files
to begin anew.
"""

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "doctor"))
import faults  # the plants and the healthy set-ups of the suite
import field_faults
import health
from tiny_families import Folders

from tropism.core import Batch
from tropism.doctor.examine import examine
from tropism.models.load import load_model

SQUARE = {"height": 16, "width": 16}
OTHER_SIZE = ("dropout", "not frozen")
"""Rewards whose network sees 4 x 4 pictures only."""
NEGATIVES = Batch(health.SHAPES.prompts, negative_prompts=["", "grey"])


def loaded(folders: Folders, source: str, options: dict):
    if source == "own":
        return faults.Painter()
    place = "shapes" if source == "shapes" else folders[source]
    return load_model(place, **(SQUARE if source in ("flux", "schnell", "auraflow", "chroma") else {}), **options)


def examined(model, reward, batch, guidance, gradient=True, autocast=False):
    """([(level, check)] of what is louder than a note, seconds of processor time)."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = examine(model, reward, batch, guidance=guidance, gradient=gradient)
    return [(f.level, f.check) for f in found if f.level != "note"], time.process_time() - began


def cases(small: bool):
    """Of the small models or of `shapes`: (kind, bug, where it happened, check, level, source, what is done)."""
    for kind, own, of_field in (
        ("reward", faults.REWARDS, field_faults.REWARDS),
        ("model", faults.MODELS, field_faults.MODELS),
        ("reward without gradient", {}, field_faults.BLACK_BOX),
    ):
        every = {n: (*row, "") for n, row in own.items()} | of_field
        source = "shapes" if not small else "sd1" if kind == "model" else "own"
        for bug, (check, level, what, where) in every.items():
            if not (source == "shapes" and bug in OTHER_SIZE):
                yield kind, bug, where, check, level, source, what


def planted(folders: Folders, small: bool, done: set):
    for kind, bug, where, check, level, source, what in cases(small):
        if (kind, bug, source) in done:
            continue
        model = loaded(folders, source, {})
        if kind == "model":
            what(model)
        reward = faults.colour if kind == "model" else what()
        batch = {"own": health.PLAIN, "sd1": health.BATCH, "shapes": NEGATIVES}[source]
        guidance = {"own": 3.0, "sd1": 7.5, "shapes": 2.0}[source]
        said, seconds = examined(model, reward, batch, guidance, kind != "reward without gradient", check == "autocast")
        named = (level, check) in said if check else None
        yield {
            "kind": kind,
            "bug": bug,
            "field": where,
            "model": source,
            "check": check or "none",
            "level": level,
            "named": bool(named),
            "alone": said == [(level, check)],
            "said": "; ".join(f"{s} {c}" for s, c in said),
            "seconds": f"{seconds:.2f}",
        }


def healthy(folders: Folders, done: set):
    every = {n: (*row, True, health.batch_of(row[0])) for n, row in health.HEALTHY.items()} | health.MORE
    for name, (source, options, reward, guidance, gradient, batch) in every.items():
        if (name,) in done:
            continue
        model = loaded(folders, source, options)
        said, seconds = examined(model, health.reward_of(reward), batch, guidance, gradient)
        yield {"set-up": name, "alarms": "; ".join(f"{s} {c}" for s, c in said), "seconds": f"{seconds:.2f}"}


def read(file: Path) -> list[dict]:
    return list(csv.DictReader(file.open(encoding="utf-8"))) if file.exists() else []


def written(rows, file: Path) -> None:
    """Append rows as they come, so that a run goes on where it stopped."""
    for row in rows:
        with file.open("a", newline="", encoding="utf-8") as stream:
            out = csv.DictWriter(stream, list(row), lineterminator="\n")
            if not stream.tell():
                out.writeheader()
            out.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/doctor"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    faulty, well = out / "planted.csv", out / "healthy.csv"
    done = {(r["kind"], r["bug"], r["model"]) for r in read(faulty)}
    with tempfile.TemporaryDirectory() as place:
        folders = Folders(Path(place))
        written(planted(folders, True, done), faulty)
        written(healthy(folders, {(r["set-up"],) for r in read(well)}), well)
        written(planted(folders, False, done), faulty)
    found, well = read(faulty), read(well)
    for first in (True, False):
        rows = [r for r in found if (r["model"] != "shapes") == first]
        print(
            f"{'Small models' if first else 'shapes'}: {sum(r['named'] == 'True' for r in rows)} of {len(rows)} faults named, "
            f"{sum(r['alone'] == 'True' for r in rows)} of them alone, at most {max(float(r['seconds']) for r in rows):.1f} s."
        )
    print(
        f"{sum(bool(r['alarms']) for r in well)} of {len(well)} healthy set-ups alarmed, "
        f"at most {max(float(r['seconds']) for r in well):.1f} s."
    )


if __name__ == "__main__":
    main()
