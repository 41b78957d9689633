import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import PROMPTS, tiny_clip
from tiny_siglip import tiny_siglip
from transformers import CLIPImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tropism.core import Batch, UserError
from tropism.rewards.clip import MEAN, STD, Clip, ClipScore, clip_pixels, clip_score
from tropism.rewards.pixels import Preparation, published


def photographs(height, width, count=4):
    """Smooth and sharp content in 8 bits: (B, H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def processor(size):
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 48), (96, 64), (50, 75), (200, 131), (32, 40)])
def test_pixels_are_those_of_the_pil_processor(height, width):
    """Within two grey levels: PIL rounds to 8 bits after each of its two passes. No resize: equal."""
    pictures = photographs(height, width)
    theirs = processor(48)([Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    ours = clip_pixels(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, 48)
    grey_levels = (ours - theirs) * torch.tensor(STD).reshape(3, 1, 1) * 255
    assert ours.shape == theirs.shape
    assert grey_levels.abs().max() < (1e-3 if (height, width) == (48, 48) else 2.0)
    assert grey_levels.abs().mean() < 0.5


def test_score_is_that_of_transformers(clip, tokenizer):
    """The cosine by PIL processor and CLIPModel.forward, a batch with padding; 3e-3 is PIL's rounding."""
    pictures = photographs(80, 64)
    model = clip.frozen.module
    inputs = processor(48)([Image.fromarray(p) for p in pictures], return_tensors="pt")
    text = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**text, pixel_values=inputs["pixel_values"]).logits_per_image
        theirs = logits.diagonal() / model.logit_scale.exp()
    ours = ClipScore(clip)(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, Batch(PROMPTS))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-3)
    assert theirs.std() > 0.02, "the comparison would prove nothing"


def test_a_contrast_is_the_log_probability_among_rivals(clip, images):
    """log softmax by hand over the prompt and each group of rivals, added up."""
    x, scale = images.double(), 30.0
    groups = lambda prompt: [[p for p in PROMPTS if p != prompt], [p for p in PROMPTS[:2] if p != prompt]]
    ours = ClipScore(clip, contrast=groups, scale=scale)(x, Batch(PROMPTS))
    cosines = torch.stack([ClipScore(clip)(x, Batch([p] * len(x))) for p in PROMPTS], 1)
    for i, prompt in enumerate(PROMPTS):
        own, pair = cosines[i, i], [cosines[i, j] for j in (0, 1) if PROMPTS[j] != prompt]
        by_hand = (scale * cosines[i]).log_softmax(0)[i] + (scale * torch.stack([own, *pair])).log_softmax(0)[0]
        torch.testing.assert_close(ours[i], by_hand, rtol=0, atol=1e-9)
    assert ours.std() > 0.02


def test_prompts_matter_and_are_computed_once(clip, images):
    calls = []
    features = clip.frozen.module.get_text_features
    try:
        fresh = Clip(clip.frozen.module, clip.tokenizer)
        clip.frozen.module.get_text_features = lambda **tokens: calls.append(1) or features(**tokens)
        x = images.float()
        first = ClipScore(fresh)(x, Batch(PROMPTS))
        second = ClipScore(fresh)(x, Batch(PROMPTS[::-1]))
    finally:
        del clip.frozen.module.get_text_features
    assert len(calls) == 4
    assert (first - second).abs().min() > 1e-3


def test_a_text_embedding_has_the_same_bits_in_any_company(tokenizer, images):
    alone = Clip(tiny_clip(tokenizer), tokenizer).texts(PROMPTS[:1], images)
    together = Clip(tiny_clip(tokenizer), tokenizer).texts(PROMPTS[::-1], images)
    assert torch.equal(alone[0], together[-1])


def test_a_folder_is_read_with_its_own_normalisation(clip, tokenizer, tmp_path, images):
    clip.frozen.module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = clip_score(str(tmp_path))
    assert plain.name == f"clip:{tmp_path}"
    assert plain.clip.prepare.mean == MEAN
    torch.testing.assert_close(plain(images, Batch(PROMPTS)), ClipScore(clip)(images, Batch(PROMPTS)))
    other = tmp_path / "other"
    clip.frozen.module.save_pretrained(other)
    tokenizer.save_pretrained(other)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(other)
    assert clip_score(str(other)).clip.prepare.mean == (0.5, 0.5, 0.5)
    assert clip_score(str(other)).clip.prepare.std == (0.25, 0.25, 0.25)


def test_a_folder_without_a_clip(tmp_path):
    with pytest.raises(UserError, match="No CLIP model could be read"):
        clip_score(str(tmp_path))


def test_a_prompt_too_long_is_not_cut_silently(clip, images):
    with pytest.raises(UserError, match="tokens"):
        ClipScore(clip)(images[:1], Batch(["a very long prompt " * 10]))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    model, words = tiny_siglip()
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder, model, words


@pytest.mark.parametrize(("height", "width"), [(80, 64), (48, 48)])
@torch.no_grad()
def test_siglip_is_that_of_transformers(siglip, height, width):
    """The cosine by PIL processor, full-length padding and SiglipModel.forward; 3e-3 is PIL's rounding."""
    folder, model, words = siglip
    pictures = photographs(height, width)
    pixels = SiglipImageProcessorPil(size={"height": 48, "width": 48})([Image.fromarray(p) for p in pictures])
    ids = words(PROMPTS, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids, pixel_values=torch.tensor(np.stack(pixels["pixel_values"]))).logits_per_image
    theirs = (logits.diagonal() - model.logit_bias) / model.logit_scale.exp()
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    reward = clip_score(str(folder))
    torch.testing.assert_close(reward(x, Batch(PROMPTS)), theirs, rtol=0, atol=3e-3)
    assert theirs.std() > 0.02, "the comparison would prove nothing"
    assert (reward.clip.width, reward.clip.size, reward.clip.longest) == (32, 48, 64)
    upper = [p.upper() for p in PROMPTS]  # trained on lower case
    torch.testing.assert_close(reward(x, Batch(upper)), reward(x, Batch(PROMPTS)))


def test_siglip_refuses_what_it_cannot_read(siglip, tmp_path):
    folder, _, _ = siglip
    with pytest.raises(UserError, match="this CLIP reads 64"):
        clip_score(str(folder)).check_prompts(["very " * 13])
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(UserError, match=r"'siglip2', which this reward cannot use.*clip or siglip"):
        clip_score(str(tmp_path))


def test_a_folders_own_size_and_resampling(siglip, tmp_path):
    _, model, words = siglip
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=2, image_mean=[0.4] * 3).save_pretrained(
        tmp_path
    )
    prepare = clip_score(str(tmp_path)).clip.prepare
    assert (prepare.resize, prepare.crop, prepare.mode, prepare.mean) == ((48, 48), (), "bilinear", (0.4,) * 3)
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 40, "size": 48}')  # no crop unless it says so
    assert published(str(tmp_path), Preparation((48, 48))).crop == ()
    assert published(str(tmp_path), Preparation((48,), (48, 48))) == Preparation((48,), (40, 40))
    SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="resampling 1; Tropism has 2"):
        published(str(tmp_path), Preparation((48,)))
