import json

import pytest
import torch
from command_line import called
from PIL import Image
from test_clip import photographs
from tiny import tiny_pipeline
from tiny_detector import tiny_dino
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from tropism.core import Batch, UserError
from tropism.prompts.batches import as_batch, read_prompts
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


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The folder of a tiny DINOv2 with its preprocessor."""
    folder = tmp_path_factory.mktemp("judge")
    tiny_dino().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture
def asked(tmp_path):
    """Prompts that name pictures of two sizes, from the file's own folder."""
    (tmp_path / "pictures").mkdir()
    for name, size in (("a", (90, 70)), ("b", (72, 100))):
        Image.fromarray(photographs(*size)[0]).save(tmp_path / "pictures" / f"{name}.png")
    lines = [{"prompt": f"a {n}", "reference": f"pictures/{n}.png"} for n in ("a", "b")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "asked.jsonl"


def test_references_of_a_prompt_file_are_those_of_a_batch(judge, asked, images):
    reward, batch = load_reward(f"features:{judge}"), as_batch(read_prompts(asked))
    found = reward(images[:2], batch)
    for i, size in enumerate([(90, 70), (72, 100)]):
        alone = Batch(["a"], reference=as_tensor(photographs(*size)[:1]))
        torch.testing.assert_close(found[i : i + 1], reward(images[i : i + 1], alone), rtol=1e-6, atol=1e-6)
    assert abs(found[0] - reward(images[:2], batch[[1, 1]])[0]) > 1e-3, "the second picture is another one"


def test_likeness_on_the_command_line(judge, asked, tmp_path, monkeypatch, capsys):
    model, small = tiny_pipeline(tmp_path / "model"), ["--updates", 1, "--batch", 2, "--steps", 2, "--truncation", 1]
    words = ["align", "alignprop", "--model", model, "--reward", f"features:{judge}", "--threads", 1, *small]
    assert called(monkeypatch, *words, "--prompts", asked, "--out", tmp_path / "run") == 0
    (tmp_path / "bare.txt").write_text("a cat")
    assert called(monkeypatch, *words, "--prompts", tmp_path / "bare.txt", "--out", tmp_path / "no") == 2
    assert "has none for 'a cat'. Give one a prompt: in a .jsonl file" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_pictures_that_are_not_there_or_are_none(judge, asked, images):
    (asked.parent / "pictures" / "a.png").write_text("text")
    with pytest.raises(UserError, match=r"reference picture .*a\.png cannot be read"):
        load_reward(f"features:{judge}")(images[:2], as_batch(read_prompts(asked)))
    (asked.parent / "pictures" / "a.png").unlink()
    with pytest.raises(
        UserError, match=r"'asked\.jsonl' names the reference picture 'pictures/a\.png' for 'a a'.*own folder"
    ):
        read_prompts(asked)
