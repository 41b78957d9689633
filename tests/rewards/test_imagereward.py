import layouts
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_clip import photographs, processor
from tiny_clip import PROMPTS
from tiny_words import bert_words

from tropism.core import Batch, UserError
from tropism.rewards.imagereward import image_reward


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return folder, bert_words(folder)


@pytest.fixture
def published(words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = layouts.image_reward_state(len(words[1]))
    torch.save(state, tmp_path / "ImageReward.pt")
    return tmp_path, state


def test_score_is_that_of_the_published_layout(published, words):
    """PIL's pixels and the authors' padding to 35 tokens, within 1e-2; the same pixels, within 1e-5."""
    folder, state = published
    reward = image_reward(str(folder), str(words[0]))
    pictures = photographs(200, 160)
    pixels = processor(112)([Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    text = words[1](PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    ours = reward(x, Batch(PROMPTS))
    theirs = layouts.image_reward(state, pixels, text["input_ids"], text["attention_mask"])
    assert theirs.std() > 0.2, "the comparison would prove nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    same = layouts.image_reward(state, reward.prepare(x), text["input_ids"], text["attention_mask"])
    torch.testing.assert_close(ours, same, rtol=0, atol=1e-5)


def test_the_prompt_is_read_with_the_picture(published, words):
    reward = image_reward(str(published[0] / "ImageReward.pt"), str(words[0]))
    x = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    spread = torch.stack([reward(x, Batch([p] * 4)) for p in PROMPTS])
    effect = spread - spread.mean(0) - spread.mean(1, keepdim=True) + spread.mean()
    assert effect.abs().max() > 1e-2, "a picture's score would not depend on what was asked"


def test_tokens_are_kept(published, words):
    reward = image_reward(str(published[0]), str(words[0]))
    calls, inner = [], reward.tokenizer
    reward.tokenizer = lambda prompt: calls.append(prompt) or inner(prompt)
    for _ in range(2):
        reward(torch.zeros(2, 3, 112, 112), Batch(PROMPTS[:2]))
    assert calls == PROMPTS[:2]


def test_a_prompt_too_long_is_not_cut_silently(published, words):
    reward = image_reward(str(published[0]), str(words[0]))
    with pytest.raises(UserError, match="ImageReward reads 35"):
        reward.check_prompts(["a very long prompt " * 3])


def test_another_file(published, words, tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"not ImageReward's file.*Give ImageReward\.pt"):
        image_reward(str(tmp_path / "other.safetensors"), str(words[0]))
    headless = {name: x for name, x in published[1].items() if not name.startswith("mlp.layers.7")}
    save_file(headless, tmp_path / "headless.safetensors")
    with pytest.raises(UserError, match="no head of linear layers from 64 features"):
        image_reward(str(tmp_path / "headless.safetensors"), str(words[0]))
