"""(b) How much of the missing all-attribute accuracy the alignment reward closes, and where it turns.

Hardware: 2 CPU cores, at most 5 minutes a seed. Aim: 0.5. Expected: 0.1 to 0.2; LOG.md tells why, and what was tried.
Run: python recipes/alignment.py
"""

from study import CHAIN, followed, options


def main():
    chain = {**CHAIN, "truncation": "3", "drift": 0.02}
    settings = {"updates": 60, "evaluate_every": 15, "lr": 2e-3, "ema": 0.95}
    followed(options(), "alignment", ["shapes-alignment"], chain, key="all", **settings)


if __name__ == "__main__":
    main()
