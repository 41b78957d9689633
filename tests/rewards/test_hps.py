import layouts
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_clip import photographs
from tiny_clip import PROMPTS
from tiny_words import clip_words

from tropism.core import Batch, UserError
from tropism.rewards.hps import Letterbox, human_preference
from tropism.rewards.load import load_reward
from tropism.rewards.pixels import MEAN, STD


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    return folder, clip_words(folder)


@pytest.fixture
def published(words, tmp_path, monkeypatch):
    """A file as its authors publish it: half precision, inside a checkpoint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = {name: x.half() for name, x in layouts.open_clip_state(len(words[1])).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "HPS_v2_compressed.pt")
    return tmp_path / "HPS_v2_compressed.pt", {name: x.float() for name, x in state.items()}


def letterboxed(picture, size):
    """The longer side to `size` by PIL, black bars, pixels as the authors' code makes them."""
    image = Image.fromarray(picture)
    scale = size / max(image.size)
    small = image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)
    board = Image.new("RGB", (size, size))
    board.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    x = torch.frombuffer(bytearray(board.tobytes()), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1) / 255
    return (x - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def padded(tokenizer, prompts):
    rows = [tokenizer(p)["input_ids"] for p in prompts]
    return torch.tensor([row + [0] * (layouts.LONGEST - len(row)) for row in rows])


def as_tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(("height", "width"), [(160, 160), (80, 60), (150, 275), (112, 112)])
def test_pixels_are_those_of_the_authors(height, width):
    pictures = photographs(height, width)
    theirs = torch.stack([letterboxed(p, 112) for p in pictures])
    ours = Letterbox(112)(as_tensor(pictures))
    levels = (ours - theirs) * torch.tensor(STD).reshape(3, 1, 1) * 255
    assert levels.abs().max() < (1e-3 if (height, width) == (112, 112) else 2.0)
    assert levels.abs().mean() < 0.5


def test_score_is_that_of_the_open_clip_layout(published, words):
    """Within 1e-3 with PIL's pixels, the limit for HPS; within 1e-6 with the same pixels."""
    file, state = published
    reward = human_preference(str(file), str(words[0]))
    pictures = photographs(160, 160)
    text = layouts.open_clip_text(state, padded(words[1], PROMPTS))
    pixels = torch.stack([letterboxed(p, 112) for p in pictures])
    theirs = (layouts.open_clip_image(state, pixels) * text).sum(1)
    x = as_tensor(pictures)
    ours = reward(x, Batch(PROMPTS))
    assert theirs.std() > 0.03, "the comparison would prove nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    same = (layouts.open_clip_image(state, Letterbox(112)(x)) * text).sum(1)
    torch.testing.assert_close(ours, same, rtol=0, atol=1e-6)


def test_what_it_says_of_itself(published, words):
    reward = human_preference(str(published[0]), str(words[0]))
    assert (reward.name, reward.about.size, reward.about.range) == (f"hps:{published[0]}", 112, (-1.0, 1.0))
    assert reward.about.licence == "that of the file given"


def test_by_name_with_the_default_file_in_a_folder(published, words, monkeypatch):
    from tropism.rewards import hps

    monkeypatch.setattr(hps, "TOKENIZER", str(words[0]))
    monkeypatch.setattr(hps, "HUB", str(published[0].parent))
    reward = load_reward("hps:v2")
    assert (reward.name, reward.about.licence) == ("hps:v2", "Apache-2.0")
    with pytest.raises(UserError, match=r"neither HPS_v2\.1_compressed\.pt nor"):
        load_reward("hps:v2.1")


def test_a_file_of_another_architecture(published, words, tmp_path):
    state = published[1]
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"not a CLIP in open_clip's layout.*HPS_v2"):
        human_preference(str(tmp_path / "other.safetensors"), str(words[0]))
    cut = {
        name: x.contiguous() for name, x in state.items() if name != "visual.transformer.resblocks.1.mlp.c_fc.weight"
    }
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"1 of \d+ are missing"):
        human_preference(str(tmp_path / "cut.safetensors"), str(words[0]))
