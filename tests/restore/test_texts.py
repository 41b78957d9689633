from functools import cache

import pytest
import torch

from tropism.core import UserError
from tropism.noise import generator
from tropism.restore.texts import edit_distance, text_distance
from tropism.worlds import glyphs
from tropism.worlds.glyphs_reading import read


def slowly(a, b):
    """The definition, by recursion."""

    @cache
    def d(i, j):
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


def test_edits_by_hand_and_by_recursion():
    assert [edit_distance(*p) for p in (("", ""), ("a", ""), ("", "abc"), ("kitten", "sitting"), ("12", "21"))] == [
        0,
        1,
        3,
        3,
        2,
    ]
    rng = generator(1, 0, 0)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert edit_distance(a, b) == slowly(a, b) == edit_distance(b, a)


def test_any_reader_of_pictures():
    """The reader of the digit world: a swapped digit is one letter of five."""
    states = 9 * torch.tensor([[3, 7, 10, 1], [3, 7, 10, 1], [10, 10, 10, 10], [10, 10, 10, 10]])
    others = 9 * torch.tensor([[3, 7, 10, 1], [3, 8, 10, 1], [10, 10, 10, 10], [5, 10, 10, 10]])
    reader = lambda picture: glyphs.captions(read(picture[None]))[0].replace("_", " ").replace("/", " ")
    found = text_distance(reader, glyphs.render(others), glyphs.render(states))
    torch.testing.assert_close(found, torch.tensor([0, 1 / 5, 0, 1], dtype=torch.float64))
    with pytest.raises(UserError, match="returned list; it must return a str"):
        text_distance(lambda picture: ["3"], glyphs.render(states), glyphs.render(states))
