"""Wildcards: what they become, in which order, and what is refused."""

import json

import pytest

from tropism.core import UserError
from tropism.prompts import wildcards as prompt_wildcards
from tropism.prompts.batches import read_prompts


def texts(tmp_path, *lines, **lists):
    for name, content in lists.items():
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    return [p.text for p in read_prompts(tmp_path / "prompts.txt")]


def test_every_combination_the_leftmost_slowest(tmp_path):
    assert texts(tmp_path, "a {red|blue} {cup|hat|sock}", "a dog") == [
        "a red cup",
        "a red hat",
        "a red sock",
        "a blue cup",
        "a blue hat",
        "a blue sock",
        "a dog",
    ]


def test_the_same_wildcard_twice_is_two_choices(tmp_path):
    assert texts(tmp_path, "__c__ on __c__", c="red\nblue") == [
        "red on red",
        "red on blue",
        "blue on red",
        "blue on blue",
    ]


def test_an_empty_alternative_leaves_no_second_space(tmp_path):
    assert texts(tmp_path, "a {|small} cat") == ["a cat", "a small cat"]


def test_a_list_beside_the_file_wins_over_the_bundled_set(tmp_path):
    assert texts(tmp_path, "a photo of __animals__")[:2] == ["a photo of a fox", "a photo of an otter"]
    assert texts(tmp_path, "a photo of __animals__", animals="a yak\n\na gnu\n") == [
        "a photo of a yak",
        "a photo of a gnu",
    ]


def test_a_bundled_set_keeps_its_own_lists(tmp_path):
    """Whoever has an animals.txt of their own still gets the bundled set they name."""
    found = texts(tmp_path, "__animals-activities__", animals="a yak")
    assert len(found) == 800
    assert not any("yak" in t for t in found)


def test_wildcards_within_lists_and_alternatives(tmp_path):
    found = texts(tmp_path, "{a __colour__ cup|my_own __my_list__}", colour="{light|dark} red\ngreen", my_list="x")
    assert found == ["a light red cup", "a dark red cup", "a green cup", "my_own x"]


def test_a_choice_that_is_met_twice_counts_once(tmp_path):
    assert len(texts(tmp_path, "__c__ and __c__", c="{red|blue} cup")) == 4
    for prompt in read_prompts(tmp_path / "prompts.txt"):
        assert len(set(prompt.choices)) == len(prompt.choices)


def test_jsonl_and_csv_expand_and_negatives_do_not(tmp_path):
    row = {"prompt": "a {red|blue} cup", "negative_prompt": "{a|b}", "metadata": {"n": 1}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "a.csv").write_text("prompt,negative_prompt\na {red|blue} cup,{a|b}\n")
    for name in ("a.jsonl", "a.csv"):
        found = read_prompts(tmp_path / name)
        assert [p.text for p in found] == ["a red cup", "a blue cup"]
        assert [p.negative for p in found] == ["{a|b}"] * 2
    assert read_prompts(tmp_path / "a.jsonl")[1].meta == (("n", 1),)


@pytest.mark.parametrize(
    "text",
    [
        "a {red} cup",
        '{"scene": {"object": "cup"}}',
        "a cat | oil painting",
        "a sad robot :{",
        "a file my_name and snake_case",
        "__../secrets__",
        "__/etc/hosts__",
        "__..__ and ____",
    ],
)
def test_what_is_no_wildcard_stays_as_it_is(tmp_path, text):
    (tmp_path.parent / "secrets.txt").write_text("a secret")
    assert texts(tmp_path, text) == [text]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a {red|blue cup", "without its other half"),
        ("a red|blue} cup", "without its other half"),
        ("a {red|{light|dark} blue} cup", "braces within braces"),
        ("a {{red|blue}} cup", "braces within braces"),
        ("a {{red}|blue} cup", "braces within braces"),
        ("{|}", "can become an empty prompt"),
        ("a photo of __colours__", "no such file in .* and no bundled set 'colours'"),
        ("a photo of __animal__", "'animal.txt'.*Did you mean 'animals'"),
        ("__loop__", "circle: prompts.txt -> loop.txt -> other.txt -> loop.txt"),
        ("__prompts__", "circle: prompts.txt -> prompts.txt"),
        ("__latin__", "'latin.txt' is not UTF-8"),
        ("__empty__", "'empty.txt' holds no prompt"),
        ("{1|2|3|4|5|6|7|8|9|0}" * 6, "1,000,000 prompts or more; the limit is 100,000"),
        ("{" + "x" * 30_000 + "|y}", "30000 characters"),
    ],
)
def test_bad_wildcards_are_explained(tmp_path, text, says):
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(UserError, match=says):
        texts(tmp_path, text, loop="x __other__", other="a\n__loop__", empty="\n")


def test_a_list_that_names_itself(tmp_path):
    with pytest.raises(UserError, match=r"prompts.txt -> animals.txt -> animals.txt"):
        texts(tmp_path, "__animals__", animals="a yak\n__animals__")


def test_the_limit_is_on_all_that_wildcards_make_and_not_on_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_wildcards, "MOST", 10)
    assert len(texts(tmp_path, *"abcdefghijklm", "{1|2}{1|2}{1|2}", "{1|2}")) == 23
    with pytest.raises(UserError, match="12 prompts or more"):
        texts(tmp_path, "{1|2}{1|2}{1|2}", "{1|2}{1|2}")
    with pytest.raises(UserError, match="the limit is 10"):
        texts(tmp_path, "__many__", many="{1|2}{1|2}{1|2}\n{3|4}{3|4}")
