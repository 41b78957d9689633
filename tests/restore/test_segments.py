import numpy as np
import pytest
import torch
from tiny_watchers import tiny_segformer
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from tropism.core import UserError
from tropism.restore import segments
from tropism.rewards.pixels import Preparation

SMALL = Preparation((32, 32), mode="bilinear", mean=segments.USUAL.mean, std=segments.USUAL.std)


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(2))


def by_confusion(a, b):
    """Pixel accuracy and mean IU from a confusion matrix, as the source defines them."""
    n = np.zeros((9, 9))
    np.add.at(n, (a.ravel(), b.ravel()), 1)
    union = n.sum(0) + n.sum(1) - np.diag(n)
    return np.trace(n) / n.sum(), np.mean((np.diag(n) / np.where(union, union, 1))[union > 0])


def test_agreement_is_that_of_the_confusion_matrix():
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(0, 9, (5, 6, 7), generator=generator)
    b = torch.where(
        torch.rand(a.shape, generator=generator) < 0.5, a, torch.randint(0, 4, a.shape, generator=generator)
    )
    for i, (pixels, iou) in enumerate(zip(segments.pixel_agreement(a, b), segments.mean_iou(a, b), strict=True)):
        assert (pixels.item(), iou.item()) == pytest.approx(by_confusion(a[i].numpy(), b[i].numpy()), rel=1e-12)


def test_by_hand():
    a, b = torch.zeros(1, 2, 4, dtype=torch.long), torch.zeros(1, 2, 4, dtype=torch.long)
    b[0, 0, 0] = 5
    assert segments.pixel_agreement(a, b).item() == 7 / 8
    assert segments.mean_iou(a, b).item() == (7 / 8 + 0) / 2
    assert segments.mean_iou(a, a).item() == segments.pixel_agreement(a, a).item() == 1
    with pytest.raises(UserError, match=r"\(1, 2, 4\) and \(1, 2, 3\) cannot be compared"):
        segments.mean_iou(a, b[..., :3])


@torch.no_grad()
def test_classes_are_those_of_transformers(images):
    model = tiny_segformer()
    processor = SegformerImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False)
    theirs = processor.post_process_semantic_segmentation(
        model(pixel_values=SMALL(images)), target_sizes=[(24, 40)] * 3
    )
    ours = segments.Segmenter(model, SMALL).classes(images)
    assert torch.equal(ours, torch.stack(theirs)) and len(ours.unique()) > 2


def test_from_a_folder(tmp_path, images):
    tiny_segformer().save_pretrained(tmp_path)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = segments.segmenter(str(tmp_path))
    assert found.prepare == SMALL
    same, other = found.agreement(images, images), found.agreement(images, images.flip(0))
    assert same["pixels"].tolist() == same["mean_iou"].tolist() == [1, 1, 1]
    assert other["pixels"][0] < 1 and other["mean_iou"][0] < other["pixels"][0]
