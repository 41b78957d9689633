"""Published methods and ours at one budget, four objectives of the shapes world: the search, the test runs, the page.

    python recipes/methods.py --out runs/methods                            everything, one thread; what is there is not run again
    python recipes/methods.py --out runs/methods --objective count          one objective only, without the page
    python recipes/methods.py --out runs/methods --method DDPO              one method only

Hardware: one core a process; about 2.5 core-hours of search and 5 of tests, as planned. Settings: recipes/methods.yaml.
"""

import argparse
from pathlib import Path

from tropism.commands.race import race
from tropism.race.plan import read


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--plan", type=Path, default=Path(__file__).parent / "methods.yaml")
    parser.add_argument("--objective")
    parser.add_argument("--method")
    parser.add_argument("--search", action="store_true", help="the search alone")
    run = parser.parse_args()
    only = {n: v for n, v in (("objective", run.objective), ("method", run.method)) if v}
    print(
        race(
            read(run.plan),
            out=run.out,
            only=only,
            search_only=run.search,
            threads=1,
            command="python recipes/methods.py",
        )
    )


if __name__ == "__main__":
    main()
