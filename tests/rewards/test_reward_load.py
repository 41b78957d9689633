import pytest
import torch

from tropism.core import Batch, UserError
from tropism.rewards.clip import ClipScore
from tropism.rewards.load import BUILT_IN, load_reward, load_rewards, require_gradient, split

MINE = """
def bright(images, batch):
    return images.mean((1, 2, 3))

def black_box(images, batch):
    return images.detach().mean((1, 2, 3))

black_box.differentiable = False
black_box.name = "box"

def undeclared(images, batch):
    return images.detach().mean((1, 2, 3))

undeclared.differentiable = False

class Kept:
    name, differentiable = "kept", True
    def __call__(self, images, batch):
        return images.amax((1, 2, 3))

kept = Kept()
number = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("jpeg", ("jpeg", 1.0)),
        ("jpeg=0.3", ("jpeg", 0.3)),
        ("clip:a/b=-2", ("clip:a/b", -2.0)),
        ("jpeg=1e-3", ("jpeg", 1e-3)),
        ("lr=1/mine.py:bright", ("lr=1/mine.py:bright", 1.0)),
        ("lr=1/mine.py:bright=0.5", ("lr=1/mine.py:bright", 0.5)),
        ("clip:runs/lr=1/clip", ("clip:runs/lr=1/clip", 1.0)),
        ("mine=2.py:bright", ("mine=2.py:bright", 1.0)),
    ],
)
def test_split_at_the_last_equals_sign(text, expected):
    assert split(text) == expected


@pytest.mark.parametrize("text", ["jpeg=", "jpeg=much", "jpeg=nan", "jpeg=inf", "jpeg=0.3=x"])
def test_a_weight_that_is_no_number(text):
    with pytest.raises(UserError, match="finite number"):
        load_reward(text)


def test_built_in_and_weighted():
    assert load_reward("jpeg").name == "jpeg"
    assert load_reward("jpeg=0.3").name == "0.3 jpeg"
    both = load_rewards(["jpeg-bytes", "incompressibility=0.5"])
    assert both.name == "jpeg-bytes + 0.5 incompressibility"
    assert not both.differentiable


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_reward_answers_to_its_name(name):
    assert load_reward(name).name == name


def test_a_clip_of_a_folder(clip, tokenizer, tmp_path, images):
    clip.frozen.module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward, batch = load_reward(f"clip:{tmp_path}"), Batch(["a", "b", "c d", "e"])
    assert reward.name == f"clip:{tmp_path}"
    torch.testing.assert_close(reward(images, batch), ClipScore(clip)(images, batch))


def test_unknown_names():
    with pytest.raises(UserError, match=r"Did you mean jpeg\?.*shapes-count"):
        load_reward("jpg=2")
    with pytest.raises(UserError, match="Known are") as error:
        load_reward("zzz")
    assert "Did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in BUILT_IN)


@pytest.mark.parametrize("name", ["clip", "clip:", "vqa", "pickscore:"])
def test_a_catalogue_reward_without_its_source(name):
    with pytest.raises(UserError, match=rf"needs to know whose weights\. Give {name.rstrip(':')}:FOLDER"):
        load_reward(name)


@pytest.mark.parametrize(
    ("name", "what"), [("pickscore", "CLIP model"), ("count", "OWLv2"), ("aesthetic", "CLIP model")]
)
def test_a_hub_id_without_a_network_is_one_line(name, what, monkeypatch):
    import transformers

    def offline(source, **options):
        raise OSError("We couldn't connect to the hub.\nMany more lines.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(
        UserError, match=rf"No {what}.*couldn't connect to the hub\. Give a folder.*a folder does not"
    ) as error:
        load_reward(f"{name}=0.5")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"Did you mean {name}\?"):
        load_reward(name[:-1])


def test_a_users_function(mine, images):
    batch, reward = Batch(["a"] * 4), load_reward(f"{mine}:bright")
    assert (reward.name, reward.differentiable) == ("bright", True)
    torch.testing.assert_close(reward(images, batch), images.mean((1, 2, 3)))
    combined = load_rewards([f"{mine}:bright", f"{mine}:black_box=2"])
    assert combined.name == "bright + 2 box"
    assert combined.blocking == ("box",)
    nameless = load_reward(f"{mine}:undeclared")
    assert (nameless.name, nameless.differentiable) == ("undeclared", False)
    kept = load_reward(f"{mine}:kept")
    assert (kept.name, type(kept).__name__) == ("kept", "Kept"), "a finished reward is used as it is"


def test_what_is_not_a_function(mine):
    with pytest.raises(UserError, match="a class"):
        load_reward(f"{mine}:Kept")
    with pytest.raises(UserError, match="int"):
        load_reward(f"{mine}:number")


def test_a_gradient_is_required():
    require_gradient(load_reward("jpeg"), "align alignprop")
    with pytest.raises(UserError, match=r"align alignprop.*jpeg-bytes has none.*--reward jpeg.*svdd.*smc.*best-of-n"):
        require_gradient(load_reward("jpeg-bytes"), "align alignprop")
    with pytest.raises(UserError, match="and jpeg-bytes has none"):  # and not the sum as a whole
        require_gradient(load_rewards(["jpeg", "jpeg-bytes=2"]), "align alignprop")
