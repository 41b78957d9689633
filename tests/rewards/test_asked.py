import pytest

from tropism.core import Batch, UserError
from tropism.rewards.asked import singular, wanted_of, wanted_of_prompt


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("three dogs", [("dog", 3)]),
        ("a dog", [("dog", 1)]),
        ("an orange.", [("orange", 1)]),
        ("12 cherries", [("cherry", 12)]),
        ("no people in the street", [("person", 0)]),
        ("A photo of two cats and a red ball on grass", [("cat", 2), ("red ball", 1)]),
        ("two dogs, three buses, and one glass with water", [("dog", 2), ("bus", 3), ("glass", 1)]),
        ("three red circles on sand", [("red circle", 3)]),
        ("four dogs running through snow", [("dog", 4)]),
        ("a tall building at night", [("tall building", 1)]),
        ("two cats, oil painting", [("cat", 2)]),
        ("zero shelves", [("shelf", 0)]),
    ],
)
def test_prompts(prompt, wanted):
    assert wanted_of_prompt(prompt) == wanted


@pytest.mark.parametrize(
    "prompt", ["dogs", "", "the dog", "beautiful landscape with three trees", "two", "a on the table"]
)
def test_prompts_that_name_no_number_of_things(prompt):
    with pytest.raises(UserError, match=r"Cannot tell how many.*three dogs.*jsonl"):
        wanted_of_prompt(prompt)


@pytest.mark.parametrize(
    ("word", "one"),
    [("dogs", "dog"), ("boxes", "box"), ("churches", "church"), ("horses", "horse"), ("houses", "house"), ("keys", "key"),
     ("knives", "knife"), ("children", "child"), ("sheep", "sheep"), ("glass", "glass"), ("dishes", "dish"),
     ("vases", "vase"), ("pies", "pie"), ("ties", "tie"), ("bees", "bee"), ("shoes", "shoe"), ("buses", "bus")],
)  # fmt: skip
def test_singular(word, one):
    assert singular(word) == one


def test_metadata_wins_over_the_prompt_and_is_checked():
    batch = Batch(["two dogs", "anything", "one cat"], meta=[{"object": "cat", "count": 3}, {"object": "bird"}, {}])
    assert wanted_of(batch) == [[("cat", 3)], [("bird", 1)], [("cat", 1)]]
    for bad in ({"object": "dog", "count": -1}, {"object": "dog", "count": 1.5}, {"object": " "}, {"object": 3}):
        with pytest.raises(UserError, match="whole number"):
            wanted_of(Batch(["a dog"], meta=[bad]))
