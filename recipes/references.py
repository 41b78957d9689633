"""Makes the references of `tropism reproduce` anew, and their tolerances from how far other arithmetic leads.

    python recipes/references.py recipes/reproducible/*.yaml --out runs/references      writes OUT/NAME.yaml, for src/tropism/recipes

recipes/reproducible holds settings without a reference yet; a name of `tropism reproduce` does too.

Seeds 0, 1, 2 with one thread are the reference. Seed 0 is run again with two threads and AVX2 instructions only, as another machine might.
A column's tolerance is five times the largest difference found so, and at least: for shares of pictures two pictures, for others .002 of
the column's largest value. --wrong runs what was made before with the sign of every reward flipped: it must FAIL.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tropism import commands
from tropism.run.recipes import Recipe, read_recipe, write_recipe

OTHER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
TIMES, SMALLEST, PICTURES = 5.0, 2e-3, 2


def tolerances(made: Recipe, other: Recipe) -> dict[str, float]:
    """By column, of the reference and the same seed under other arithmetic."""
    (seed,), found = other.reference, {}
    pictures = PICTURES / made.settings["evaluate_prompts"]
    for column, values in made.reference[seed].items():
        if column != "update":
            off = max(abs(a - b) for a, b in zip(values, other.reference[seed][column], strict=True))
            least = pictures if "/parser/" in column else SMALLEST * max(map(abs, values))
            found[column] = float(f"{1.05 * max(TIMES * off, least):.2g}")  # two digits, not rounded down
    return found


def one(name: str, out: Path) -> None:
    stem = Path(name).stem
    made, other = out / f"{stem}.yaml", out / f"{stem}-other.yaml"
    if not made.exists():
        commands.reproduce(name, out=out / stem, write=made)
    words = ["reproduce", name, "--seeds", "0", "--threads", "2", "--out", out / f"{stem}-other", "--write", other]
    subprocess.run(
        [sys.executable, "-m", "tropism.cli", *map(str, words)],
        env={**os.environ, **OTHER},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    first = read_recipe(str(made))
    second = read_recipe(str(other))
    told = (
        f"{TIMES:g} x the largest difference of seed 0 between one thread and two with AVX2 only ({second.made_with})"
    )
    write_recipe(replace(first, tolerance=tolerances(first, second), tolerance_from=told), made)
    print(made.read_text())


def wrong(name: str, out: Path) -> None:
    """The recipe of OUT with every reward's sign flipped, seed 0."""
    name = Path(name).stem
    made = read_recipe(str(out / f"{name}.yaml"))
    flipped = [
        f"{part}={-float(weight or 1):g}" for part, _, weight in (r.partition("=") for r in made.settings["reward"])
    ]
    write_recipe(replace(made, settings={**made.settings, "reward": flipped}), out / f"{name}-wrong.yaml")
    commands.reproduce(str(out / f"{name}-wrong.yaml"), seeds=[0], out=out / f"{name}-wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/references"))
    parser.add_argument("--wrong", action="store_true", help="run what was made before with flipped rewards")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.names:
        (wrong if asked.wrong else one)(name, asked.out)


if __name__ == "__main__":
    main()
