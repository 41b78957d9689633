import math

import pytest
import torch
from PIL import Image
from test_clip import photographs
from tiny_detector import tiny_owl
from tiny_words import clip_words
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from tropism.core import Batch, UserError
from tropism.rewards.load import load_reward
from tropism.rewards.objects import Detector, ObjectCount, ObjectPresence, overlaps, soft_count
from tropism.rewards.owl_pixels import owl_pixels
from tropism.rewards.pixels import STD


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return clip_words(tmp_path_factory.mktemp("owl-words"))


@pytest.fixture(scope="module")
def owl(words):
    return tiny_owl(words)


@pytest.fixture(scope="module")
def detector(owl, words):
    return Detector(owl, words)


def as_tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def seen_by_theirs(pictures):
    processor = Owlv2ImageProcessorPil(size={"height": 48, "width": 48})
    return processor([Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"].float()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 48), (90, 64), (50, 211), (20, 31)])
def test_pixels_are_those_of_the_processor(height, width):
    pictures = photographs(height, width)
    levels = (owl_pixels(as_tensor(pictures), 48) - seen_by_theirs(pictures)) * torch.tensor(STD).reshape(3, 1, 1) * 255
    assert levels.abs().max() < 2e-3


@torch.no_grad()
def test_logits_and_boxes_are_those_of_transformers(owl, words, detector):
    pictures, things = photographs(80, 64), ["dog", "orange"]
    text = words(["a photo of a dog", "a photo of an orange"], padding=True, return_tensors="pt")
    tiled = {name: t.repeat(4, 1) for name, t in text.items()}
    theirs = owl(**tiled, pixel_values=seen_by_theirs(pictures))
    seen, corners = detector.look(as_tensor(pictures))
    ours = torch.stack([torch.stack([detector.logits(s, thing) for thing in things], -1) for s in seen])
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=1e-4)
    found = Owlv2ImageProcessorPil().post_process_object_detection(theirs, threshold=0.0)
    torch.testing.assert_close(corners, torch.stack([f["boxes"] for f in found]), rtol=0, atol=1e-5)
    assert ours.std() > 0.1 and ours.std(0).max() > 0.1, "the comparison would prove nothing"


def odds(p):
    return math.log(p / (1 - p))


def boxes(*starts, side=0.1):
    return torch.tensor([[x, y, x + side, y + side] for x, y in starts])


def test_overlaps():
    corners = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.1, 0.0, 0.3, 0.2], [0.5, 0.5, 0.6, 0.6]])
    expected = torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(overlaps(corners), expected)


def test_three_things_far_apart_are_three_and_copies_are_one():
    apart = boxes((0.1, 0.1), (0.5, 0.5), (0.8, 0.1))
    sure = torch.full((3,), odds(0.6))
    assert soft_count(sure, apart).item() == pytest.approx(3, abs=0.01)
    assert soft_count(sure, boxes(*[(0.1, 0.1)] * 3)).item() == pytest.approx(1, abs=0.01)
    nudged = boxes((0.1, 0.1), (0.105, 0.1), (0.1, 0.106))
    assert soft_count(sure, nudged).item() == pytest.approx(1, abs=0.01)


def test_copies_count_as_the_chance_that_one_of_them_does():
    """At the threshold, s = 1/2: n copies count 1 - 2^-n. Suppressing by p = .2 itself would count up to 2.5."""
    for n in (1, 2, 5):
        count = soft_count(torch.full((n,), odds(0.2)), boxes(*[(0.3, 0.3)] * n)).item()
        assert count == pytest.approx(1 - 0.5**n, abs=1e-4)


def test_a_background_of_thousands_counts_nothing():
    """With a threshold in p and not in logits, the surest 300 of these would count 6."""
    places = [(i % 60 / 60, i // 60 / 60) for i in range(3600)]
    background = torch.full((3600,), odds(0.01))
    assert soft_count(background, boxes(*places, side=0.01)).item() < 1e-3
    background[[100, 1900]] = odds(0.7)
    assert soft_count(background, boxes(*places, side=0.01)).item() == pytest.approx(2, abs=0.01)


def test_the_gradient_is_that_of_central_differences_and_boxes_have_none():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator, dtype=torch.float64) * 0.5 - 1.4
    low = 0.15 * torch.rand(12, 2, generator=generator, dtype=torch.float64)
    corners = torch.cat([low, low + 0.2], 1).requires_grad_()
    logits.requires_grad_()
    soft_count(logits, corners).backward()
    assert corners.grad is None
    for i in range(12):
        step = torch.zeros_like(logits)
        step[i] = 1e-6
        with torch.no_grad():
            slope = (soft_count(logits + step, corners) - soft_count(logits - step, corners)) / 2e-6
        assert logits.grad[i].item() == pytest.approx(slope.item(), abs=1e-7)


def test_what_is_wanted_comes_from_metadata_or_the_prompt(detector, images):
    x, count = images.float(), ObjectCount(detector, "count")
    counts = count.counts(x, "dog")
    meta = [{"object": "dog", "count": n} for n in (1, 2, 0, 4)]
    expected = -torch.nn.functional.huber_loss(counts, torch.tensor([1.0, 2.0, 0.0, 4.0]), reduction="none")
    torch.testing.assert_close(count(x, Batch(["anything at all"] * 4, meta=meta)), expected)
    spoken = ["a photo of a dog", "two dogs on grass", "no dogs", "4 dogs"]
    torch.testing.assert_close(count(x, Batch(spoken)), expected)


def test_several_things_add_up(detector, images):
    x, there = images.float(), ObjectPresence(detector, "objects")
    alone = [there(x, Batch([p] * 4)) for p in ("a dog", "two cats")]
    torch.testing.assert_close(there(x, Batch(["a dog and two cats"] * 4)), alone[0] + alone[1])


@torch.no_grad()
def test_presence_is_the_log_of_the_best_score_and_absence_of_its_rest(owl, words, detector):
    pictures = photographs(48, 48)
    text = {n: t.repeat(4, 1) for n, t in words(["a photo of a dog"], return_tensors="pt").items()}
    best = owl(**text, pixel_values=seen_by_theirs(pictures)).logits.amax((1, 2)).double().sigmoid()
    there = ObjectPresence(detector, "objects")
    torch.testing.assert_close(
        there(as_tensor(pictures), Batch(["a dog"] * 4)), best.log().float(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        there(as_tensor(pictures), Batch(["no dogs"] * 4)), (1 - best).log().float(), rtol=1e-3, atol=1e-4
    )


def test_words_are_embedded_once(detector, images, owl, words):
    fresh, calls = Detector(owl, words), []
    features = owl.owlv2.get_text_features
    try:
        owl.owlv2.get_text_features = lambda **tokens: calls.append(1) or features(**tokens)
        for _ in range(2):
            ObjectCount(fresh, "count")(images.float(), Batch(["two dogs", "a dog", "a cat", "no cats"]))
    finally:
        del owl.owlv2.get_text_features
    assert len(calls) == 2
    with pytest.raises(UserError, match="OWLv2 reads 60"):
        fresh._tokens("dog " * 20)


def test_from_a_folder(owl, words, tmp_path, images):
    owl.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    batch = Batch(["two dogs"] * 4)
    for kind, cls in (("count", ObjectCount), ("objects", ObjectPresence)):
        reward = load_reward(f"{kind}:{tmp_path}")
        assert (reward.name, reward.about.size) == (f"{kind}:{tmp_path}", 48)
        torch.testing.assert_close(reward(images, batch), cls(Detector(owl, words), kind)(images, batch))
