"""Another package's scorer, named by its module and attribute."""

import sys

import pytest
import torch

from tropism.core import Batch, UserError, scored
from tropism.rewards.load import load_reward

MODULE = """
import functools
import torch

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.weight = torch.nn.Dropout(0.5), torch.nn.Parameter(torch.ones(3))

    def score(self, pixels, prompts):
        assert isinstance(prompts, list)
        return self.dropout((pixels.mean((2, 3)) * self.weight)).sum(1) + len(prompts[0])

class Wrapped:
    name, differentiable = "wrapped", False
    def __init__(self):
        self.model = Network()
    def score(self, pixels, prompts):
        return self.model.score(pixels, prompts)

class Costly:
    def __init__(self, path):
        pass
    def score(self, pixels, prompts):
        return None

class Scorers:
    inner = Network()

class Deep:
    def __init__(self):
        self.members = [Network(), {"one": (Network(),)}]
        self.inner = Inner(Network())
        self.call = functools.partial(Network().score)
        self.self = self
    def score(self, pixels, prompts):
        return sum(n.score(pixels, prompts) for n in self.all())
    def all(self):
        return [self.members[0], self.members[1]["one"][0], self.inner.network, self.call.func.__self__]

class Inner:
    def __init__(self, network):
        self.network = network

def make():
    return Network()

plain = Wrapped()
number = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "their_scorers.py").write_text(MODULE)
    (tmp_path / "their_broken.py").write_text("1 / 0\n")
    (tmp_path / "their_half.py").write_text("import surely_not_installed.inside\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "bridge:their_scorers"
    for name in ("their_scorers", "their_broken", "their_half"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("attribute", ["Network", "make", "Scorers.inner", "Wrapped", "plain"])
def test_an_object_a_class_or_what_makes_it(package, attribute):
    reward, pixels = load_reward(f"{package}:{attribute}"), torch.rand(4, 3, 8, 8, requires_grad=True)
    found = scored(reward, pixels, Batch(["abc"] * 4))
    torch.testing.assert_close(found, pixels.mean((2, 3)).sum(1) + 3), "dropout is off"
    assert reward.differentiable == (attribute not in ("Wrapped", "plain"))
    found.sum().backward()
    network = sys.modules["their_scorers"].plain.model
    assert pixels.grad is not None
    assert network.training is (attribute != "plain")


def test_its_networks_are_frozen(package):
    reward = load_reward(f"{package}:plain=2")
    assert reward.name == "2 wrapped"
    network = sys.modules["their_scorers"].plain.model
    assert not network.training and not network.weight.requires_grad


def test_networks_in_lists_and_other_objects_are_frozen_too(package):
    load_reward(f"{package}:make")
    deep = sys.modules["their_scorers"].Deep()
    assert [n.training for n in deep.all()] == [True] * 4
    sys.modules["their_scorers"].deep = deep
    load_reward(f"{package}:deep")
    assert not any(n.training or n.weight.requires_grad for n in deep.all())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bridge:surely_not_installed:Scorer", "pip install surely_not_installed"),
        ("bridge:their_half:Scorer", "pip install surely_not_installed"),
        ("bridge:their_broken:Scorer", "failed with ZeroDivisionError"),
        ("bridge:their_scorers:Netwrk", "has no 'Netwrk'. It has: functools, torch, Network"),
        ("bridge:their_scorers:number", "has no method score"),
        ("bridge:their_scorers:Costly", r"without arguments failed with TypeError.*FILE.py:FUNCTION"),
        ("bridge:their_scorers", "not of the form bridge:MODULE:ATTRIBUTE"),
        ("bridge::x", "not of the form"),
    ],
)
def test_what_cannot_be(package, text, says):
    with pytest.raises(UserError, match=says):
        load_reward(text)
