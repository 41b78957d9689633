"""(c) Half of the missing count accuracy closed by the count reward.

Hardware: 2 CPU cores, at most 5 minutes a seed. Expected: the share of the missing accuracy that is closed is 0.5 or more.
Run: python recipes/count.py
"""

from study import closed, compared, options

CHAIN = {"steps": 8, "guidance": 2.0, "truncation": "3"}


def main():
    rows = compared(options(), "count", ["shapes-count"], CHAIN, updates=130, lr=2e-3, ema=0.95)
    print(f"  share of the missing accuracy closed: {closed(rows['accuracy count'])}")


if __name__ == "__main__":
    main()
