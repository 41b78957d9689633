import pytest
import torch
from PIL import Image
from test_clip import photographs
from tiny_detector import tiny_dino
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from tropism.core import Batch, UserError
from tropism.rewards.features import USUAL, FeatureSimilarity
from tropism.rewards.load import load_reward
from tropism.rewards.pixels import Preparation

SMALL = Preparation((64,), (56, 56), mean=USUAL.mean, std=USUAL.std)


def as_tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def processor(side=64, crop=56):
    return BitImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": crop, "width": crop},
        image_mean=USUAL.mean,
        image_std=USUAL.std,
    )


@torch.no_grad()
def test_likeness_is_that_of_transformers():
    """The cosine of class tokens by PIL processor and Dinov2Model.forward; 5e-3 is PIL's rounding of two pictures."""
    model, pictures, others = tiny_dino(), photographs(90, 70), photographs(72, 100)[::-1].copy()
    token = lambda p: model(**processor()([Image.fromarray(x) for x in p], return_tensors="pt")).last_hidden_state[:, 0]
    theirs = torch.cosine_similarity(token(pictures), token(others))
    ours = FeatureSimilarity(model, SMALL)(as_tensor(pictures), Batch(["a"] * 4, reference=as_tensor(others)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    assert theirs.std() > 0.02, "the comparison would prove nothing"


def test_a_picture_is_most_like_itself_and_the_reference_gets_no_gradient(images):
    reward = FeatureSimilarity(tiny_dino(), SMALL)
    x, reference = images.clone().requires_grad_(), images.clone().requires_grad_()
    torch.testing.assert_close(reward(x, Batch(["a"] * 4, reference=reference)), torch.ones(4, dtype=torch.float64))
    reward(x, Batch(["a"] * 4, reference=reference.flip(0))).sum().backward()
    assert reference.grad is None and x.grad.abs().max() > 0


def test_without_a_reference(images):
    with pytest.raises(UserError, match=r"the batch has none.*reference=pictures"):
        FeatureSimilarity(tiny_dino(), SMALL)(images, Batch(["a"] * 4))


def test_from_a_folder_with_and_without_its_preprocessor(tmp_path, images):
    model = tiny_dino()
    model.save_pretrained(tmp_path)
    assert load_reward(f"features:{tmp_path}").about.size == 224, "DINOv2's own, which is not its position grid"
    processor().save_pretrained(tmp_path)
    reward, batch = load_reward(f"features:{tmp_path}"), Batch(["a"] * 4, reference=images.flip(0))
    assert (reward.name, reward.about.size) == (f"features:{tmp_path}", 56)
    torch.testing.assert_close(reward(images, batch), FeatureSimilarity(model, SMALL)(images, batch))
