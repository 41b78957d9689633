import json

import pytest
import torch
from PIL import Image
from test_clip import photographs, processor
from tiny_clip import PROMPTS
from tiny_vlm import tiny_llava, tiny_qwen2, tiny_qwen25
from tiny_words import spelling
from transformers import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tropism.core import Batch, UserError
from tropism.rewards.load import load_reward
from tropism.rewards.pixels import STD
from tropism.rewards.vqa import QWEN_CHAT, one_token_words, vqa_score

MADE = {"llava": tiny_llava, "qwen2_vl": tiny_qwen2, "qwen2_5_vl": tiny_qwen25}
SIZES = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}


def qwen_processor():
    return Qwen2VLImageProcessorPil(patch_size=8, **SIZES)


def saved(kind, make, folder):
    """(kind, folder, the untouched transformers model, tokenizer) of a tiny model, written as a folder from the hub is."""
    model, words = make()
    for part in (model, words, processor(48) if kind == "llava" else qwen_processor()):
        part.save_pretrained(folder)
    return kind, folder, model, words


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    return saved(request.param, MADE[request.param], tmp_path_factory.mktemp(request.param))


def as_tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def theirs_of_llava(model, words, picture, question):
    reader = LlavaProcessor(processor(48), words, patch_size=16, vision_feature_select_strategy="default",
                            num_additional_image_tokens=1)  # fmt: skip
    text = f"USER: <image>\n{question} ASSISTANT:"
    return model(**reader(images=Image.fromarray(picture), text=text, return_tensors="pt")).logits[0, -1]


def theirs_of_qwen(model, words, picture, question):
    seen = qwen_processor()([Image.fromarray(picture)], return_tensors="pt")
    copies = int(seen["image_grid_thw"].prod()) // 4
    text = QWEN_CHAT.format(question=question).replace("<|image_pad|>", "<|image_pad|>" * copies)
    ids = words(text, return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).int()
    return model(input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **seen).logits[0, -1]


@torch.no_grad()
@pytest.mark.parametrize(("height", "width", "allowed"), [(48, 48, 1e-5), (60, 76, 0.1)])
def test_probability_is_that_of_transformers(made, height, width, allowed):
    """PIL processor, expanded image tokens, the model's own forward, softmax by hand; the rest is PIL's rounding."""
    kind, folder, model, words = made
    theirs_of = theirs_of_llava if kind == "llava" else theirs_of_qwen
    pictures = photographs(height, width)
    rows = []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        logits = theirs_of(model, words, picture, f"Does this figure show '{prompt}'? Please answer yes or no.")
        rows.append(logits.softmax(-1)[words.convert_tokens_to_ids(["yes", "Yes"])].sum())
    theirs, reward = torch.stack(rows), vqa_score(str(folder))
    ours = reward(as_tensor(pictures), Batch(PROMPTS))
    torch.testing.assert_close(ours.log(), theirs.log(), rtol=0, atol=allowed)
    assert theirs.log().std() > 0.3, "the comparison would prove nothing"
    assert reward.name == f"vqa:{folder}"
    assert reward.about.size == (48 if kind == "llava" else None)


def test_the_gradient_reaches_the_picture(made):
    """Central differences along the gradient, float64. Qwen turns its picture features in float32, so wider steps there."""
    kind, folder, _, _ = made
    reward, batch = vqa_score(str(folder)), Batch(PROMPTS[:2])
    x = 0.3 + 0.4 * torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, batch).log().sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    step, allowed = (1e-6, 1e-5) if kind == "llava" else (1e-3, 1e-2)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ends = [reward(x + sign * step * direction, batch).log().sum() for sign in (1, -1)]
    assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=allowed)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (20, 20), (200, 100), (37, 91)])
def test_qwens_patches_are_those_of_the_processor(made, height, width):
    kind, folder, _, _ = made
    if kind == "llava":
        return
    family = vqa_score(str(folder)).family
    pictures = photographs(height, width)
    theirs = qwen_processor()([Image.fromarray(p) for p in pictures], return_tensors="pt")
    ours = [family.patches(x[None]) for x in as_tensor(pictures)]
    assert torch.equal(torch.cat([grid for _, grid in ours]), theirs["image_grid_thw"])
    levels = (torch.cat([patches for patches, _ in ours]) - theirs["pixel_values"]).abs() * max(STD) * 255
    assert levels.max() < 2.2 and levels.mean() < 0.5


def test_a_chat_template_is_used(made, tmp_path):
    kind, _, model, words = made
    if kind != "llava":
        return
    said = "{% for c in messages[0].content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    template = "Q: " + said + "{{ ' A:' }}"
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    reward = vqa_score(str(tmp_path))
    asked = words("Q: <image>Does this figure show 'a cat'? Please answer yes or no. A:")["input_ids"]
    assert reward.tokens("a cat") == asked
    assert words.convert_ids_to_tokens(asked)[0] == "<s>"
    (tmp_path / "chat_template.jinja").write_text(template.replace("Q: ", "the tokenizer's own: "))
    ids = vqa_score(str(tmp_path)).tokens("a cat")
    assert words.decode(ids).replace(" ", "").startswith("<s>thetokenizer'sown:<image>Does")


def test_a_start_token_of_the_template_is_not_doubled(made):
    kind, folder, _, words = made
    if kind != "llava":
        return
    reward = vqa_score(str(folder))
    reward.chat = "<s>" + reward.chat
    assert reward.tokens("a cat").count(words.convert_tokens_to_ids("<s>")) == 1


def test_what_cannot_be_asked(made):
    kind, folder, _, _ = made
    token = "<image>" if kind == "llava" else "<|image_pad|>"
    with pytest.raises(UserError, match="2 image tokens"):
        vqa_score(str(folder)).check_prompts(["a cat", f"a {token}"])


def test_words_of_one_token():
    words = spelling(["<unk>", "yes", "Yes", "no"])
    assert one_token_words(words, "yes") == [1, 2]
    with pytest.raises(UserError, match="no token 'yes'"):
        one_token_words(spelling(["<unk>"]), "yes")


def test_other_models_and_a_missing_source(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"'clip', which this reward cannot use.*llava or qwen2_vl or qwen2_5_vl"):
        vqa_score(str(tmp_path))
    with pytest.raises(UserError, match=r"needs to know whose weights\. Give vqa:FOLDER"):
        load_reward("vqa")
