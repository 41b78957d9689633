import itertools

import pytest
import torch
from tiny_watchers import tiny_detr, tiny_yolos
from transformers import AutoModelForObjectDetection
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from tropism.core import UserError
from tropism.restore.detections import USUAL, Agreement, Detections, Detector, agreement, detector
from tropism.rewards.pixels import Preparation


def boxes(*rows):
    """Each (x, y, side, class)."""
    corners = [[float(x), float(y), float(x + s), float(y + s)] for x, y, s, _ in rows]
    return Detections(torch.tensor(corners).reshape(-1, 4), torch.tensor([c for *_, c in rows], dtype=torch.long))


WANTED = boxes((0, 0, 10, 1), (20, 0, 10, 2), (0, 20, 10, 3))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (WANTED, (3, 0, 0, 0)),
        (boxes((1, 1, 10, 1), (20, 0, 10, 2), (0, 20, 10, 3)), (3, 0, 0, 0)),  # 81 of 119
        (boxes((4, 0, 10, 1), (20, 0, 10, 2), (0, 20, 10, 3)), (2, 0, 1, 1)),  # 60 of 140
        (boxes((0, 0, 10, 9), (20, 0, 10, 2), (0, 20, 10, 3)), (2, 1, 0, 0)),
        (boxes((0, 0, 10, 1), (20, 0, 10, 2)), (2, 0, 0, 1)),
        (boxes((0, 0, 10, 1), (20, 0, 10, 2), (0, 20, 10, 3), (20, 20, 10, 3)), (3, 0, 1, 0)),
        (boxes((1, 0, 10, 1), (0, 0, 10, 1), (20, 0, 10, 2), (0, 20, 10, 3)), (3, 0, 1, 0)),  # found twice
        (boxes((0, 0, 10, 9), (0, 0, 10, 1), (20, 0, 10, 2), (0, 20, 10, 3)), (3, 0, 1, 0)),  # its own class goes first
        (boxes((0, 0, 10, 9), (1, 0, 10, 1), (20, 0, 10, 2), (0, 20, 10, 3)), (2, 1, 1, 0)),  # but not before a better place
        (boxes(), (0, 0, 0, 3)),
    ],
)  # fmt: skip
def test_every_kind_of_difference(found, expected):
    assert agreement(found, WANTED) == Agreement(*expected)
    assert agreement(found, WANTED).invented == expected[1] + expected[2]


def test_without_anything_and_at_another_overlap():
    assert agreement(boxes(), boxes()) == Agreement(0, 0, 0, 0)
    assert agreement(WANTED, boxes()) == Agreement(0, 0, 3, 0)
    moved = boxes((4, 0, 10, 1))
    assert agreement(moved, boxes((0, 0, 10, 1)), overlap=0.4).same == 1
    for wrong in (0, 1.1):
        with pytest.raises(UserError, match=rf"overlap is {wrong:g}; it must be above 0 and at most 1"):
            agreement(moved, moved, overlap=wrong)
    with pytest.raises(UserError, match=r"must be \(N, 4\) and \(N,\)"):
        Detections(torch.zeros(2, 3), torch.zeros(2))


def slowly(found, wanted):
    """The rule word by word: of all pairs of free boxes the best one, until none overlaps by half."""
    left, right, same, swaps = set(range(len(found.labels))), set(range(len(wanted.labels))), 0, 0

    def iou(i, j):
        a, b = found.boxes[i].tolist(), wanted.boxes[j].tolist()
        shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        area = lambda c: (c[2] - c[0]) * (c[3] - c[1])
        return shared / (area(a) + area(b) - shared)

    while pairs := [(iou(i, j), i, j) for i, j in itertools.product(left, right) if iou(i, j) >= 0.5]:
        _, i, j = max(pairs, key=lambda p: p[0])
        left.remove(i), right.remove(j)
        alike = found.labels[i] == wanted.labels[j]
        same, swaps = same + int(alike), swaps + int(not alike)
    return Agreement(same, swaps, len(left), len(right))


def test_crowds_are_matched_as_the_rule_says():
    generator, swaps = torch.Generator().manual_seed(1), 0
    for _ in range(20):
        draw = lambda: Detections(
            (lambda c: torch.cat([c, c + 3 + torch.rand(12, 2, generator=generator)], 1))(
                4 * torch.rand(12, 2, generator=generator)
            ),
            torch.randint(0, 3, (12,), generator=generator),
        )
        found, wanted = draw(), draw()
        assert agreement(found, wanted) == slowly(found, wanted)
        swaps += agreement(found, wanted).swaps
    assert swaps > 20


SMALL = Preparation((32,), mode="bilinear", mean=USUAL.mean, std=USUAL.std)


FAMILIES = {"yolos": (tiny_yolos, YolosImageProcessorPil), "detr": (tiny_detr, DetrImageProcessorPil)}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_those_of_transformers(family):
    images = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    model, processor = (make() for make in FAMILIES[family])
    theirs = processor.post_process_object_detection(model(pixel_values=SMALL(images)), 0.4, [(24, 40)] * 3)
    ours = Detector(model, SMALL, sure=0.4).detections(images)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.boxes, other["boxes"])
        assert torch.equal(mine.labels, other["labels"])
    counts = [len(d.labels) for d in ours]
    assert 0 < sum(counts) < 30, "some are sure and some are not"


def test_from_a_folder(tmp_path, monkeypatch):
    tiny_yolos().save_pretrained(tmp_path)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(tmp_path)
    found = detector(str(tmp_path))
    assert found.prepare == SMALL
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    assert [(a.swaps, a.insertions, a.omissions) for a in found.agreement(images, images)] == [(0, 0, 0)] * 2

    def needs_timm(*_, **__):
        raise ImportError("requires the timm library")

    monkeypatch.setattr(AutoModelForObjectDetection, "from_pretrained", needs_timm)
    with pytest.raises(UserError, match=r"No object detector could be read from .*: requires the timm library"):
        detector(str(tmp_path))
