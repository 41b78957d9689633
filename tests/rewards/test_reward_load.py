import pytest
import torch

from tropism.core import Batch, UserError
from tropism.rewards.load import BUILT_IN, load_reward, load_rewards, require_gradient, split

MINE = """
def bright(images, batch):
    return images.mean((1, 2, 3))

def black_box(images, batch):
    return images.detach().mean((1, 2, 3))

black_box.differentiable = False
black_box.name = "box"

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


def test_unknown_names():
    with pytest.raises(UserError, match=r"Did you mean jpeg\?.*shapes-count"):
        load_reward("jpg=2")
    with pytest.raises(UserError, match="Known are") as error:
        load_reward("zzz")
    assert "Did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in BUILT_IN)


def test_a_users_function(mine, images):
    batch, reward = Batch(["a"] * 4), load_reward(f"{mine}:bright")
    assert (reward.name, reward.differentiable) == ("bright", True)
    torch.testing.assert_close(reward(images, batch), images.mean((1, 2, 3)))
    combined = load_rewards([f"{mine}:bright", f"{mine}:black_box=2"])
    assert combined.name == "bright + 2 box"
    assert combined.blocking == ("box",)
    assert load_reward(f"{mine}:kept").name == "kept"


def test_what_is_not_a_function(mine):
    with pytest.raises(UserError, match="a class"):
        load_reward(f"{mine}:Kept")
    with pytest.raises(UserError, match="int"):
        load_reward(f"{mine}:number")


def test_a_gradient_is_required():
    require_gradient(load_reward("jpeg"), "align alignprop")
    with pytest.raises(UserError, match=r"align alignprop.*jpeg-bytes has none.*--reward jpeg.*svdd.*best-of-n.*ddpo"):
        require_gradient(load_reward("jpeg-bytes"), "align alignprop")
    with pytest.raises(UserError, match="jpeg-bytes has none"):
        require_gradient(load_rewards(["jpeg", "jpeg-bytes=2"]), "align alignprop")
