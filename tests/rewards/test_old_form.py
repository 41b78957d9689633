"""Functions of the older trainers' form, unchanged, give the rewards that they gave there."""

import numpy as np
import pytest
import torch

from tropism.core import Batch, UserError, scored
from tropism.rewards.load import load_reward, load_rewards
from tropism.rewards.old_form import adapted

OLD = '''
import io
import numpy as np
import torch
from PIL import Image

def brightness(images, prompts, metadata):
    assert 0 <= images.min() and images.max() <= 1 and images.shape[1] == 3
    return images.mean((1, 2, 3)), {}

def lengths(images, prompts, metadata):
    return [len(p) + m.get("more", 0) for p, m in zip(prompts, metadata)], None

def jpeg_incompressibility():
    """As in ddpo-pytorch."""
    def _fn(images, prompts, metadata):
        if isinstance(images, torch.Tensor):
            images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            images = images.transpose(0, 2, 3, 1)
        images = [Image.fromarray(image) for image in images]
        buffers = [io.BytesIO() for _ in images]
        for image, buffer in zip(images, buffers):
            image.save(buffer, format="JPEG", quality=95)
        return np.array([buffer.tell() / 1000 for buffer in buffers]), {}
    return _fn

def reds(images, prompts, metadata):
    assert isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[3] == 3
    return images[..., 0].mean((1, 2))

def new(samples, batch):
    return samples.mean((1, 2, 3))

def declared(images, prompts, metadata):
    return images.mean((1, 2, 3))

declared.differentiable = False
number = 3
'''


@pytest.fixture
def old(tmp_path):
    (tmp_path / "old.py").write_text(OLD)
    return f"old:{tmp_path}/old.py"


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


BATCH = Batch(["a", "bb", "ccc"])


def test_pictures_in_0_1_and_a_gradient(old, pictures):
    reward = load_reward(f"{old}:brightness")
    assert (reward.name, reward.differentiable) == ("brightness", True)
    found = scored(reward, pictures.requires_grad_(), BATCH)
    torch.testing.assert_close(found, pictures.mean((1, 2, 3)))
    assert torch.autograd.grad(found.sum(), pictures)[0].abs().min() > 0


def test_prompts_and_metadata_are_lists(old, pictures):
    reward = load_reward(f"{old}:lengths")
    assert scored(reward, pictures, BATCH).tolist() == [1, 2, 3]
    meta = Batch(BATCH.prompts, meta=[{"more": 10 * i} for i in range(3)])
    assert scored(reward, pictures, meta).tolist() == [1, 12, 23]


def test_a_maker_of_a_function(old, pictures):
    """ddpo-pytorch names makers: jpeg_incompressibility() returns the function. The bytes are those of our own reward."""
    reward = load_reward(f"{old}:jpeg_incompressibility")
    assert reward.name == "jpeg_incompressibility"
    ours = -load_reward("jpeg-bytes")(pictures, BATCH)
    found = scored(reward, pictures, BATCH)
    assert torch.equal(found.argsort(), ours.argsort())


def test_bytes_for_those_that_want_them(old, pictures):
    reward = load_reward(f"{old.replace('old:', 'old-uint8:')}:reds")
    assert not reward.differentiable
    torch.testing.assert_close(scored(reward, pictures, BATCH), (pictures[:, 0] * 255).round().mean((1, 2)))


def test_declared_and_weighted(old):
    assert not load_reward(f"{old}:declared").differentiable
    assert load_rewards([f"{old}:declared=0.5", f"{old}:lengths"]).name == "0.5 declared + lengths"


@pytest.mark.parametrize(
    ("found", "scores"),
    [
        ((torch.ones(2), {"a": 1}), [1, 1]),
        (([1.0, 2.0], None), [1, 2]),
        ((0.5, 0.25), [0.5, 0.25]),
        ((np.array([1, 2]), {}), [1, 2]),
        ([None, 2.0], [None, 2]),
        ((3.0, None), [3, None]),
    ],
)
def test_rewards_with_and_without_information(found, scores):
    value = scored(adapted(lambda *_: found), torch.rand(2, 3, 4, 4), Batch(["a", "b"]))
    assert [None if v != v else v for v in value.tolist()] == scores


@pytest.mark.parametrize("name", ["new", "number"])
def test_what_is_not_of_this_form(old, name):
    with pytest.raises(UserError, match=r"cannot be called with \(images, prompts, metadata\)"):
        load_reward(f"{old}:{name}")


def test_without_a_file():
    with pytest.raises(UserError, match=r"not of the form file.py:name"):
        load_reward("old:brightness")
