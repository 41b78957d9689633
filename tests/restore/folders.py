"""Small folders of results, references and low-resolution pictures, as a user has them."""

import csv

import numpy as np
from judge_stub import scene, spoilt
from PIL import Image

SPOILT = [0, 1, 6, 16, 2]
"""Blocks of 16 that are invented in each picture of 64 x 64."""
LEVELS = [1, 3, 4, 5, 3]
"""What the judge of judge_stub says of them."""


def as_picture(x):
    return Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())


def write(root, count=5, names="photo_{}", roles=("sr", "gt", "lr")):
    """`count` pictures in root/sr, root/gt, root/lr."""
    for i in range(count):
        gt, lr = scene(i)
        for role, x in (("sr", spoilt(gt, SPOILT[i % 5])), ("gt", gt), ("lr", lr)):
            if role in roles:
                (root / role).mkdir(parents=True, exist_ok=True)
                as_picture(x).save(root / role / f"{names.format(i)}.png")
    return root


def table(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def noisy(height, width, seed=0):
    """Bytes (height, width, 3) with detail at every size."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
