"""The judge that runs here, on tiny models of random weights: it sees what transformers' own processors would have shown it."""

import io

import pytest
import torch
from judge_stub import scene, spoilt
from PIL import Image
from test_clip import processor
from test_vqa import qwen_processor, saved
from tiny_vlm import tiny_llava, tiny_qwen25
from transformers import LlavaProcessor

from tropism.core import UserError
from tropism.restore import judge_local
from tropism.restore.judge import HallucinationJudge
from tropism.restore.judge_local import LocalJudge, inputs_of
from tropism.restore.judge_pictures import WHOLE, framed, shown
from tropism.restore.judge_prompt import Question
from tropism.restore.judge_reply import JudgeFailed, ParseError

MADE = {"llava": tiny_llava, "qwen2_5_vl": tiny_qwen25}
GT, LR = scene(side=48)
SR = spoilt(GT, 4)
QUESTION = Question(shown(framed(SR, GT, LR), WHOLE))


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """The tiny tokenizers spell: the whole instruction would be thousands of tokens."""
    monkeypatch.setattr(Question, "instruction", lambda _: "Compare A, B and C.")


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory):
    return saved(request.param, MADE[request.param], tmp_path_factory.mktemp(request.param))


def pictures(question):
    return [Image.open(io.BytesIO(p.png)) for p in question.pictures]


def asked(question, place):
    """The plain form of a question, spelled out."""
    a, b, c = question.parts()[1::2][:3]
    return f"{question.parts()[0]}\n{a}\n{place}{b}\n{place}{c}\n{place}{question.parts()[-1]}\n"


def theirs(kind, model, words, question):
    """Logits of the first written token, by transformers' own processors."""
    if kind == "llava":
        reader = LlavaProcessor(processor(48), words, patch_size=16, vision_feature_select_strategy="default",
                                num_additional_image_tokens=1)  # fmt: skip
        text = f"USER: {asked(question, '<image>' + chr(10))} ASSISTANT:"
        return model(**reader(images=pictures(question), text=text, return_tensors="pt")).logits[0, -1]
    seen = qwen_processor()(pictures(question), return_tensors="pt")
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{asked(question, '<|vision_start|><|image_pad|><|vision_end|>')}<|im_end|>\n<|im_start|>assistant\n"
    )
    head, *rest = text.split("<|image_pad|>")
    text = head + "".join(
        "<|image_pad|>" * (int(g.prod()) // 4) + r for g, r in zip(seen["image_grid_thw"], rest, strict=True)
    )
    ids = words(text, return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).int()
    return model(input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **seen).logits[0, -1]


@torch.no_grad()
def test_it_sees_what_transformers_shows(made):
    """PIL processors, expanded image tokens and the model's own forward; the rest is PIL's rounding."""
    kind, folder, model, words = made
    judge = LocalJudge(str(folder))
    ours = lambda q: judge.loaded.model(**inputs_of(judge.loaded, q, judge.device, judge.dtype)).logits[0, -1]
    torch.testing.assert_close(ours(QUESTION), theirs(kind, model, words, QUESTION), rtol=0, atol=1e-3)
    assert (ours(QUESTION) - ours(QUESTION.swapped)).abs().max() > 1e-2, "the comparison would prove nothing"


def test_what_is_written_is_the_models_own(made):
    """Greedy: token by token the likeliest, as a loop of forward calls finds them."""
    kind, folder, model, words = made
    judge = LocalJudge(str(folder), temperature=0, max_tokens=3)
    inputs = inputs_of(judge.loaded, QUESTION, judge.device, judge.dtype)
    found = judge._generated(judge.loaded, inputs, 0.0)
    with torch.no_grad():
        assert int(found[0]) == int(theirs(kind, model, words, QUESTION).argmax())
    assert 1 <= len(found) <= 3


def writing(judge, *texts):
    """`judge` with a model that writes these texts, one after the other; returns what it was given each time."""
    given, left = [], list(texts)

    def generate(**inputs):
        given.append(inputs | {"drawn": float(torch.rand(1))})
        ids = torch.arange(5)[None]
        return torch.cat([inputs["input_ids"], ids], 1) if "input_ids" in inputs else ids

    def decode(ids, skip_special_tokens):
        assert ids.tolist() == [0, 1, 2, 3, 4] and skip_special_tokens
        return left.pop(0)

    judge.loaded.model.generate, judge.loaded.tokenizer.decode = generate, decode
    return given


def test_a_score_from_its_words(made):
    _, folder, _, _ = made
    local = LocalJudge(str(folder))
    given = writing(local, '{"items": [], "score": 2}', "Well.", '```json\n{"score": 3}\n```')
    state = torch.get_rng_state()
    got = HallucinationJudge(local, repeats=2).score(SR, GT, LR)
    assert (got.per_repeat, got.judge, got.mode) == ([2, 3], str(folder), "full")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert len({g["drawn"] for g in given}) == 3, "repeats and retries draw anew"
    assert {g["max_new_tokens"] for g in given} == {1024} and {g["temperature"] for g in given} == {0.3}
    ledger = local.ledger.as_json()
    assert (ledger["requests"], ledger["replies"], ledger["tokens_out"]) == (3, 3, 15) and ledger["tokens_in"] > 300


def test_the_same_repeat_draws_the_same(made):
    _, folder, _, _ = made
    local = LocalJudge(str(folder), seed=7)
    given = writing(local, *['{"score": 2}'] * 3)
    for repeat in (0, 1, 0):
        local.ask(QUESTION, repeat)
    assert given[0]["drawn"] == given[2]["drawn"] != given[1]["drawn"]


def test_words_without_a_score(made):
    _, folder, _, _ = made
    local = LocalJudge(str(folder), temperature=0)
    given = writing(local, "a", "b", "c")
    with pytest.raises(ParseError, match="begins 'c'"):
        local.ask(QUESTION, 0)
    assert [g["do_sample"] for g in given] == [False, True, True]
    cut = LocalJudge(str(folder), max_tokens=5)
    writing(cut, *['{"score": 2}'] * 3)
    with pytest.raises(ParseError, match="cut off"):
        cut.ask(QUESTION, 0)


def test_a_full_cache_needs_no_model(made, tmp_path, monkeypatch):
    _, folder, _, _ = made
    local = LocalJudge(str(folder))
    writing(local, '{"score": 2}')
    first = HallucinationJudge(local, repeats=1, cache=tmp_path).score(SR, GT)
    monkeypatch.setattr(judge_local, "_load", None)
    again = HallucinationJudge(LocalJudge(str(folder)), repeats=1, cache=tmp_path, cache_only=True)
    assert again.score(SR, GT) == first


def test_templates(made):
    kind, folder, _, words = made
    local = LocalJudge(str(folder))
    token = "<image>" if kind == "llava" else "<|image_pad|>"
    for template, says in (
        ("{% for c in messages[0].content %}{{ '" + token + "' if c.type == 'image' else c.text }}{% endfor %}", None),
        ("{{ '" + token + "' }} only one", "places 1 pictures where 3 were shown"),
    ):
        object.__setattr__(local.loaded, "chat", template)
        if says:
            with pytest.raises(JudgeFailed, match=says):
                inputs_of(local.loaded, QUESTION, local.device, local.dtype)
        else:
            inputs = inputs_of(local.loaded, QUESTION, local.device, local.dtype)
            assert inputs["attention_mask"].shape[1] > 27
            text = judge_local._chatted(local.loaded, QUESTION.parts())
            assert text.index("Picture A") < text.index(token) < text.index("Picture B") and text.count(token) == 3
    assert words.name_or_path is not None


def test_other_families_and_missing_folders(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"'clip', which this reward cannot use"):
        LocalJudge(str(tmp_path)).ask(QUESTION, 0)
    with pytest.raises(UserError, match=r"could not be fetched|could be read"):
        LocalJudge(str(tmp_path / "none")).ask(QUESTION, 0)
