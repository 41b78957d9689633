"""What every reward must do. A new reward is one more line in REWARDS."""

import pytest
import tiny_catalogue
import torch
from tiny_clip import PROMPTS

from tropism.core import Batch
from tropism.rewards import jpeg
from tropism.rewards.aesthetic import Aesthetic, Head
from tropism.rewards.clip import ClipScore
from tropism.rewards.combine import weighted
from tropism.rewards.count import Count, Counter
from tropism.rewards.feature_distance import LPIPS_LIKE
from tropism.rewards.low_res import LowResConsistency
from tropism.rewards.named import Named
from tropism.rewards.objects import ObjectCount, ObjectPresence
from tropism.rewards.pickscore import PickScore


def seeded(build):
    torch.manual_seed(1)
    return build()


REWARDS = {
    "jpeg": lambda clip: jpeg.compressibility(),
    "jpeg-bytes": lambda clip: jpeg.black_box(),
    "incompressibility": lambda clip: jpeg.incompressibility(),
    "alignment": lambda clip: ClipScore(clip),
    "count": lambda clip: Count(seeded(Counter)),
    "aesthetic": lambda clip: Aesthetic(clip, seeded(lambda: Head(clip.width))),
    "function": lambda clip: Named("mine", True, lambda samples, batch: samples.square().mean((1, 2, 3))),
    "sum": lambda clip: weighted([(Count(seeded(Counter)), 1), (jpeg.compressibility(), 0.3), (ClipScore(clip), -2)]),
    "siglip": lambda clip: tiny_catalogue.siglip(),
    "laion aesthetic": tiny_catalogue.laion,
    "pickscore": PickScore,
    "hps": lambda clip: tiny_catalogue.human_preference(),
    "imagereward": lambda clip: tiny_catalogue.image_reward(),
    "object count": lambda clip: tiny_catalogue.detections(ObjectCount),
    "object presence": lambda clip: tiny_catalogue.detections(ObjectPresence),
    "features": lambda clip: tiny_catalogue.likeness(),
    "feature distance": lambda clip: tiny_catalogue.distance(),
    "lpips-like": lambda clip: tiny_catalogue.distance(**LPIPS_LIKE),
    "low-res consistency": lambda clip: LowResConsistency(),
    "vqa": lambda clip: tiny_catalogue.asked(),
    "mixed sum": lambda clip: weighted([(Count(seeded(Counter)), 1), (jpeg.black_box(), 0.3)]),
}


@pytest.fixture(params=REWARDS, scope="module")
def reward(request, clip):
    return REWARDS[request.param](clip)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(8)
    reference, low = (torch.rand(4, 3, n, n, generator=generator, dtype=torch.float64) for n in (56, 16))
    return Batch(PROMPTS, reference=reference, low_res=low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_finite_number_a_sample_in_the_input_precision(reward, images, batch, dtype):
    value = reward(images.to(dtype), batch)
    assert value.shape == (4,)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert value.std() > 0, "says the same of every picture"


def test_float32_agrees_with_float64(reward, images, batch):
    wide = images.float().double()
    torch.testing.assert_close(reward(wide.float(), batch).double(), reward(wide, batch), rtol=1e-4, atol=1e-5)


def test_half_precision_is_judged_in_float32(reward, images, batch):
    assert reward(images.bfloat16(), batch).dtype == (torch.float32 if reward.name != "mine" else torch.bfloat16)


def test_says_what_it_is(reward):
    assert isinstance(reward.name, str)
    assert isinstance(reward.differentiable, bool)


def test_a_value_is_in_the_range_that_is_declared(reward, images, batch):
    if getattr(reward, "about", None) is None:
        return
    low, high = reward.about.range
    value = reward(images, batch)
    assert ((low <= value) & (value <= high)).all()


def test_a_sample_is_judged_alone(reward, images, batch):
    together = reward(images, batch)
    alone = torch.cat([reward(images[i : i + 1], batch[[i]]) for i in range(4)])
    order = [2, 0, 3, 1]
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reward(images[order], batch[order]), together[order], rtol=1e-12, atol=1e-12)


def test_deterministic(reward, images, batch):
    assert torch.equal(reward(images, batch), reward(images, batch))


def test_the_flag_is_honest(reward, images, batch):
    value = reward(images.clone().requires_grad_(), batch)
    assert value.requires_grad == reward.differentiable
    with torch.no_grad():
        silent = reward(images.clone().requires_grad_(), batch)
    assert not silent.requires_grad
    assert torch.equal(silent, value.detach())


def test_gradient_equals_central_differences(reward, images, batch):
    if not reward.differentiable:
        return
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, batch).sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    h, generator = 1e-6, torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        with torch.no_grad():
            slope = (reward(images + h * direction, batch) - reward(images - h * direction, batch)) / (2 * h)
        exact = (gradient * direction).flatten(1).sum(1)
        torch.testing.assert_close(exact, slope, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_no_gradient_reaches_another_sample(reward, images, batch):
    if not reward.differentiable:
        return
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, batch)[1], x)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2, 3]].abs().max() == 0


def test_its_networks_are_not_trained(reward, images, batch):
    if reward.differentiable:
        reward(images.clone().requires_grad_(), batch).sum().backward()
    for network in networks(reward):
        assert not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def networks(reward):
    holders = [reward] if not hasattr(reward, "terms") else [part for part, _ in reward.terms]
    frozen = [getattr(h, "frozen", None) or (h.clip.frozen if hasattr(h, "clip") else None) for h in holders]
    frozen += [h.head for h in holders if hasattr(h, "head")]
    return [network for f in frozen if f for network in f._copies.values()]


def test_networks_are_found(clip):
    found = {name: len(networks(build(clip))) for name, build in REWARDS.items()}
    assert found["count"] == 1
    assert found["alignment"] >= 1
    assert found["aesthetic"] >= 2
    assert found["sum"] >= 2
