"""Does the doctor name planted faults, and keep silent where nothing is wrong?

    python recipes/doctor.py --out docs/results/doctor       10 minutes on one core

planted.csv: every fault of tests/doctor, the library's own list and those of the field, on two models each where it can be: rewards
on a small model of one's own and on the bundled `shapes`, models on a tiny Stable Diffusion 1 and on `shapes`. named: the check
that is about it spoke, at its level; alone: nothing else did. healthy.csv: set-ups without a fault, and what was said of them.
seconds: processor time of one thread. Nothing is drawn at random (seed 0 throughout).
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


def cases():
    """(kind, bug, where it happened, check, level, source, what is done)."""
    for kind, own, of_field in (
        ("reward", faults.REWARDS, field_faults.REWARDS),
        ("model", faults.MODELS, field_faults.MODELS),
        ("reward without gradient", {}, field_faults.BLACK_BOX),
    ):
        every = {n: (*row, "") for n, row in own.items()} | of_field
        for source in ("own", "shapes") if kind != "model" else ("sd1", "shapes"):
            for bug, (check, level, what, where) in every.items():
                if not (source == "shapes" and bug in OTHER_SIZE):
                    yield kind, bug, where, check, level, source, what


def planted(folders: Folders):
    for kind, bug, where, check, level, source, what in cases():
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


def healthy(folders: Folders):
    every = {n: (*row, True, health.batch_of(row[0])) for n, row in health.HEALTHY.items()} | health.MORE
    for name, (source, options, reward, guidance, gradient, batch) in every.items():
        model = loaded(folders, source, options)
        said, seconds = examined(model, health.reward_of(reward), batch, guidance, gradient)
        yield {"set-up": name, "alarms": "; ".join(f"{s} {c}" for s, c in said), "seconds": f"{seconds:.2f}"}


def written(rows, file: Path) -> list[dict]:
    kept = []
    with file.open("w", newline="", encoding="utf-8") as stream:
        for row in rows:
            if not kept:
                out = csv.DictWriter(stream, list(row), lineterminator="\n")
                out.writeheader()
            out.writerow(row)
            stream.flush()
            kept.append(row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/doctor"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folders = Folders(Path(place))
        found = written(planted(folders), out / "planted.csv")
        well = written(healthy(folders), out / "healthy.csv")
    for first in (True, False):
        rows = [r for r in found if (r["model"] != "shapes") == first]
        print(
            f"{'Small models' if first else 'shapes'}: {sum(r['named'] for r in rows)} of {len(rows)} faults named, "
            f"{sum(r['alone'] for r in rows)} of them alone, at most {max(float(r['seconds']) for r in rows):.1f} s."
        )
    print(
        f"{sum(bool(r['alarms']) for r in well)} of {len(well)} healthy set-ups alarmed, "
        f"at most {max(float(r['seconds']) for r in well):.1f} s."
    )


if __name__ == "__main__":
    main()
