"""(b) Half of the missing all-attribute accuracy closed by the alignment reward.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: the share of the missing accuracy that is closed is 0.5 or more.
Run: python recipes/alignment.py
"""

from study import CHAIN, closed, compared, options


def main():
    chain = {**CHAIN, "truncation": "3", "drift": 0.02}
    rows = compared(options(), "alignment", ["shapes-alignment"], chain, updates=80, lr=2e-3, ema=0.95)
    print(f"  share of the missing accuracy closed: {closed(rows['accuracy all'])}")


if __name__ == "__main__":
    main()
