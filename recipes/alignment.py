"""(b) Half of the missing all-attribute accuracy closed by the alignment reward.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: the share of the missing accuracy that is closed is 0.5 or more.
Run: python recipes/alignment.py
"""

from study import closed, compared, options

CHAIN = {"steps": 8, "guidance": 2.0, "truncation": "2"}


def main():
    rows = compared(options(), "alignment", ["shapes-alignment"], CHAIN, updates=60, lr=2e-3)
    print(f"  share of the missing accuracy closed: {closed(rows['accuracy all'])}")


if __name__ == "__main__":
    main()
