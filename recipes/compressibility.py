"""(a) Fewer JPEG bytes without forgetting the prompt, and the unguarded collapse beside it.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: bytes above flat down by 40 % or more, all-attribute accuracy down by less
than 5 points, entropies above 80 % of the base's; unguarded, the pictures are erased.
Run: python recipes/compressibility.py
"""

from study import compared, options

CHAIN = {"steps": 8, "guidance": 2.0, "truncation": "2"}
GUARDED = ["jpeg", "shapes-alignment=2"]


def main():
    run = options()
    compared(run, "compressibility-guarded", GUARDED, CHAIN, updates=60, lr=2e-3)
    compared(run, "compressibility-unguarded", ["jpeg"], CHAIN, updates=60, lr=2e-3)


if __name__ == "__main__":
    main()
