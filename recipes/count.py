"""(c) How much of the missing count accuracy the count reward closes, and where it turns.

Hardware: 2 CPU cores, at most 5 minutes a seed. Aim: 0.5. Expected: about 0.4; LOG.md tells why, and what was tried.
Run: python recipes/count.py
"""

from study import CHAIN, followed, options


def main():
    chain = {**CHAIN, "truncation": "3"}
    settings = {"updates": 90, "evaluate_every": 15, "lr": 5e-4, "ema": 0.95, "clip": 0.1}
    followed(options(), "count", ["shapes-count"], chain, key="count", **settings)


if __name__ == "__main__":
    main()
