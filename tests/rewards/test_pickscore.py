import pytest
import torch
from PIL import Image
from test_clip import photographs, processor
from tiny_clip import PROMPTS

from tropism.core import Batch, UserError
from tropism.rewards import pickscore
from tropism.rewards.load import load_reward
from tropism.rewards.pickscore import PickScore, pick_score


@torch.no_grad()
def test_score_is_that_of_transformers(clip, tokenizer):
    """The logit by PIL processor and CLIPModel.forward; PIL's rounding is 3e-3 of a cosine, times the scale."""
    pictures, model = photographs(80, 64), clip.frozen.module
    pixels = processor(48)([Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    theirs = model(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), pixel_values=pixels).logits_per_image
    ours = PickScore(clip)(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, Batch(PROMPTS))
    scale = model.logit_scale.exp().item()
    assert scale == pytest.approx(14.28, abs=0.01)
    torch.testing.assert_close(ours, theirs.diagonal(), rtol=0, atol=3e-3 * scale)
    assert ours.std() > 0.02 * scale


def test_by_name(clip, tokenizer, tmp_path, images, monkeypatch):
    clip.frozen.module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(f"pickscore:{tmp_path}")
    assert (reward.name, reward.about.size) == (f"pickscore:{tmp_path}", 48)
    monkeypatch.setattr(pickscore, "SOURCE", str(tmp_path))
    monkeypatch.setattr(pickscore, "TOKENIZER", str(tmp_path / "words"))
    assert pick_score(str(tmp_path)).name == "pickscore"
    x = images.float()
    torch.testing.assert_close(reward(x, Batch(PROMPTS)), PickScore(clip)(x, Batch(PROMPTS)))


def test_a_prompt_too_long(clip):
    with pytest.raises(UserError, match="tokens"):
        PickScore(clip).check_prompts(["a very long prompt " * 10])
