import time

import numpy as np
import pytest
import torch

from tropism.core import Batch, UserError
from tropism.rewards.count import BLOB, Count, Counter, density_target, training_loss
from tropism.worlds import shapes


def scene(count, rng):
    """One picture of `count` objects (3, 64, 64) and their centres (count, 2)."""
    placed = shapes._place(count, rng)
    shape, colour, ground = (rng.choice(list(names)) for names in (shapes.SHAPES, shapes.COLOURS, shapes.BACKGROUNDS))
    picture = np.broadcast_to(np.array(shapes.BACKGROUNDS[ground], float), (64, 64, 3))
    for x, y, r in placed:
        alpha = shapes.coverage(shape, x, y, r)[..., None]
        picture = (1 - alpha) * picture + alpha * np.array(shapes.COLOURS[colour], float)
    centres = torch.tensor([p[:2] for p in placed], dtype=torch.float32)
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255, centres


def scenes(n, seed):
    drawn = [scene(1 + i % 5, np.random.default_rng([seed, i])) for i in range(n)]
    return torch.stack([d[0] for d in drawn]), [d[1] for d in drawn]


def test_target_blobs_sum_to_one_each_and_lie_where_the_objects_are():
    two, corner = torch.tensor([[10.0, 50.0], [40.0, 20.0]]), torch.tensor([[1.0, 63.0]])
    target = density_target([two, torch.zeros(0, 2), corner])
    assert target.shape == (3, 1, 32, 32)
    torch.testing.assert_close(target.sum((1, 2, 3)), torch.tensor([2.0, 0.0, 1.0]))
    y, x = (torch.arange(32) + 0.5) * 2, (torch.arange(32) + 0.5) * 2
    one = density_target([torch.tensor([[40.0, 20.0]])])[0, 0]
    assert (one.sum(0) * x).sum() == pytest.approx(40, abs=1e-3)
    assert (one.sum(1) * y).sum() == pytest.approx(20, abs=1e-3)
    assert (one.sum(0) * (x - 40) ** 2).sum() == pytest.approx(BLOB**2, rel=1e-3)
    assert (one.sum(1) * (y - 20) ** 2).sum() == pytest.approx(BLOB**2, rel=1e-3)


@pytest.mark.parametrize(("missed", "loss"), [(0, 0.0), (1, 1 + 0.5), (2, 2 + 1.5)])
def test_one_missed_object_costs_one_in_shape_and_its_huber_in_count(missed, loss):
    """A network that draws the target of the first picture but leaves `missed` far-apart objects out of the second."""
    centres = torch.tensor([[14.0, 14.0], [50.0, 50.0], [14.0, 50.0]])
    drawn = lambda images: density_target([centres, centres[missed:]])
    value = training_loss(drawn, torch.zeros(2, 3, 64, 64), [centres, centres])
    assert value.item() == pytest.approx(loss / 2, rel=1e-3)


def test_the_network_is_small_and_its_density_is_not_negative():
    torch.manual_seed(0)
    counter = Counter()
    density = counter(torch.rand(2, 3, 64, 64))
    assert density.shape == (2, 1, 32, 32)
    assert (density >= 0).all()
    assert 1 < density.sum((1, 2, 3)).mean() < 10
    assert 100_000 < sum(p.numel() for p in counter.parameters()) < 200_000


def test_it_is_quick():
    counter, x = Count(Counter()), torch.rand(16, 3, 64, 64, requires_grad=True)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        counter.counts(x).sum().backward()
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5  # about 0.05 on one idle core


def test_training_learns_to_count():
    torch.manual_seed(0)
    counter = Counter()
    images, centres = scenes(64, 0)
    optimiser = torch.optim.AdamW(counter.parameters(), lr=4e-3)
    losses = []
    for i in range(50):
        rows = [(16 * i + j) % 64 for j in range(16)]
        loss = training_loss(counter, images[rows], [centres[r] for r in rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.55 * losses[0]
    truth = torch.tensor([float(len(c)) for c in centres])
    counts = Count(counter).counts(images)
    assert np.corrcoef(counts, truth)[0, 1] > 0.8


def test_reward_is_huber_of_the_count():
    torch.manual_seed(0)
    reward = Count(Counter())
    images = torch.rand(3, 3, 64, 64)
    counts = reward.counts(images)
    values = reward(images, Batch(["one red star on sky", "three red stars on sky", "five red stars on sky"]))
    for value, count, wanted in zip(values, counts, (1, 3, 5), strict=True):
        d = abs(count - wanted)
        assert value == pytest.approx(float(-(d**2) / 2 if d < 1 else 0.5 - d), abs=1e-5)


def test_another_worlds_prompt():
    with pytest.raises(UserError, match="three red circles on sand"):
        Count(Counter())(torch.rand(1, 3, 64, 64), Batch(["a photo of two dogs"]))
