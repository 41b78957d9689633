"""(c) Half of the missing count accuracy closed by the count reward.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: the share of the missing accuracy that is closed is 0.5 or more.
Run: python recipes/count.py
"""

from study import CHAIN, closed, compared, options


def main():
    chain = {**CHAIN, "truncation": "3"}
    rows = compared(options(), "count", ["shapes-count"], chain, updates=90, lr=5e-4, ema=0.95, clip=0.1)
    print(f"  share of the missing accuracy closed: {closed(rows['accuracy count'])}")


if __name__ == "__main__":
    main()
