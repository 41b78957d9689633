"""A judge's findings for a person: one place told once, the right part shown, boxes where they belong; pictures read small."""

import numpy as np
import pytest
import torch
from PIL import Image
from restore import folders

from tropism.judged.findings import Finding, grouped, inside, overlap, view
from tropism.restore.judge_pictures import WHOLE, outward
from tropism.restore.judge_reply import Item
from tropism.restore.loading import Sources, reduced
from tropism.restore.pictures import read
from tropism.rewards.pixels import resized


def item(box, repeat=0, severity=2, omission=False, what="a"):
    return Item(box, "added", what, severity, omission, repeat)


def boxes(n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        (x, y), (w, h) = rng.uniform(0, 0.8, 2), rng.uniform(0.02, 0.2, 2)
        yield float(x), float(y), float(x + w), float(y + h)


def test_overlap_is_that_of_counted_pixels():
    def mask(box):
        x, y = torch.arange(400) / 400 + 1 / 800, torch.arange(400) / 400 + 1 / 800
        return ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))

    for one, other in zip(boxes(20), boxes(20, 1), strict=True):
        for a, b in ((one, other), (one, tuple(v + 0.01 for v in one))):
            counted = float((mask(a) & mask(b)).sum() / (mask(a) | mask(b)).sum())
            assert overlap(a, b) == pytest.approx(counted, abs=0.05) and overlap(a, b) == overlap(b, a)


def test_one_place_is_told_once():
    here, near, there = (0.1, 0.1, 0.3, 0.3), (0.12, 0.1, 0.3, 0.32), (0.6, 0.6, 0.8, 0.8)
    found = grouped(
        [
            item(here, 0),
            item(near, 1, 3),
            item(near, 1),
            item(there, 1),
            item(here, 0, 1, True),
            item(None),
            item(None, 2),
        ]
    )
    told = [(f.severity, len(f.repeats), f.omission, f.box is None) for f in found]
    assert told == [(3, 2, False, False), (2, 2, False, True), (2, 1, False, False), (1, 1, True, False)]
    assert grouped([]) == []


def test_what_is_shown_holds_the_gravest_findings():
    for box in boxes(30):
        part = view([Finding(box, "", "", 3, False)], 2000, 3000)
        width, height = (part[2] - part[0]) * 3000, (part[3] - part[1]) * 2000
        assert part[0] >= 0 and part[1] >= 0 and part[2] <= 1 + 1e-9 and part[3] <= 1 + 1e-9
        assert width == pytest.approx(height) and width >= 384 - 1e-6
        assert (
            part[0] <= box[0] + 1e-9
            and part[1] <= box[1] + 1e-9
            and part[2] >= box[2] - 1e-9
            and part[3] >= box[3] - 1e-9
        )
        assert outward(inside(box, part), part) == pytest.approx(box)
    far = (0.9, 0.9, 0.92, 0.92)
    two = [Finding((0.1, 0.1, 0.12, 0.12), "", "", 2, False), Finding((0.14, 0.1, 0.16, 0.12), "", "", 2, False)]
    assert inside(far, view([*two, Finding(far, "", "", 3, False)], 2000, 2000)) is None, "two clear ones outweigh it"
    assert inside(far, view([two[0], Finding(far, "", "", 3, False)], 2000, 2000))


def test_small_pictures_and_unplaced_findings_are_shown_whole():
    assert view([Finding((0.1, 0.1, 0.2, 0.2), "", "", 3, False)], 512, 512) == WHOLE
    assert view([Finding(None, "", "", 3, False)], 5000, 5000) == WHOLE == view([], 5000, 5000)
    assert inside((0.1, 0.1, 0.3, 0.3), (0.2, 0.2, 0.6, 0.6)) == pytest.approx((0, 0, 0.25, 0.25)), "cut at the edge"


@pytest.mark.parametrize(("size", "most"), [((90, 130), 50), ((130, 40), 64), ((40, 64), 64), ((64, 2), 16)])
def test_a_picture_read_small_is_the_whole_one_reduced(tmp_path, monkeypatch, size, most):
    from tropism.restore import loading

    monkeypatch.setattr(loading, "BAND", 700)
    Image.fromarray(folders.noisy(*size)).save(tmp_path / "a.png")
    whole, scale = read(tmp_path / "a.png").whole(), min(1, most / max(size))
    height, width = (max(1, round(n * scale)) for n in size)
    sources = Sources(most)
    assert torch.equal(sources.load(tmp_path / "a.png"), resized(whole, height, width))
    assert torch.equal(reduced(read(tmp_path / "a.png"), most), resized(whole, height, width))
    assert bool(sources.notes) == (max(size) > most)
