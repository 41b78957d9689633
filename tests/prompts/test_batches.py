"""Prompt files, good and bad; the split; the order of batches."""

import random
from collections import Counter

import pytest

from tropism.core import UserError
from tropism.prompts.batches import Prompt, as_batch, batch_of, listed, read_prompts, split, train_and_held_out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeffa cat\r\n\r\n  a dog \r\n"),
        ("a.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "a dog", "metadata": {"n": 1}}\n'),
        ("a.csv", "prompt,negative_prompt\na cat,\na dog,blur\n"),
    ],
)
def test_the_three_kinds(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [p.text for p in read_prompts(tmp_path / name)] == ["a cat", "a dog"]


def test_prompts_name_the_rewards_they_are_meant_for(tmp_path):
    rows = [
        '{"prompt": "x", "reward": "jpeg"}',
        '{"prompt": "y", "reward": ["a", "b"], "metadata": {"n": 1}}',
        '{"prompt": "z"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    asked = as_batch(listed(tmp_path / "a.jsonl"))
    assert asked.meta == [{"reward": ("jpeg",)}, {"n": 1, "reward": ("a", "b")}, {}]
    for bad in ("3", '["a", 1]', '{"a": 1}'):
        (tmp_path / "b.jsonl").write_text(f'{{"prompt": "x", "reward": {bad}}}')
        with pytest.raises(UserError, match="line 1 has a `reward` that is neither"):
            listed(tmp_path / "b.jsonl")


def test_negative_prompts_and_metadata(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "negative_prompt": "y", "metadata": {"n": 1}}')
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt("x", "y", (("n", 1),))]


def test_unusual_but_valid_files(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n"three red\ncircles on sand"\n')
    assert [p.text for p in read_prompts(tmp_path / "a.csv")] == ["three red circles on sand"]
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a\u2028cat"}\n{"prompt": "x", "metadata": {"include": [{"class": "cat"}]}}'
    )
    found = read_prompts(tmp_path / "a.jsonl")
    assert [p.text for p in found] == ["a cat", "x"]
    assert split(found)[0] == found


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"a\0b", "binary"),
        ("a.txt", b"\xff\xfe\x00a", "not UTF-8"),
        ("a.png", b"x", "Use .txt"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}', "no `prompt`"),
        ("a.jsonl", b"[1]", "no `prompt`"),
        ("a.jsonl", 200_000 * b"[", "not JSON"),
        ("a.jsonl", b'{"prompt": ' + 5_000 * b"1" + b"}", "not JSON"),
        ("a.jsonl", b'{"prompt": "a \\ud800 cat"}', "half a character"),
        ("a.jsonl", b'{"prompt": "x", "negative_prompt": 3}', "not text"),
        ("a.csv", b'prompt\n"' + 200_000 * b"x", "not a table"),
        ("a.csv", b"text\nx\n", "no `prompt`"),
        ("a.txt", b"x" * 30_000, "30000 characters"),
    ],
)
def test_bad_files_are_explained(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="There is no prompt file"):
        read_prompts(tmp_path / "none.txt")


def test_held_out_prompts_are_never_trained_on():
    train, held = split([Prompt(str(i // 2)) for i in range(80)])
    assert len(train) == 36
    assert len(held) == 4
    assert not set(train) & set(held)


def test_plain_lines_give_up_every_tenth_as_they_always_did():
    prompts = [Prompt(f"number {i}") for i in range(137)]
    assert split(prompts)[1] == prompts[9::10]


def test_a_list_given_in_python_is_taken_as_it_is():
    train, _ = train_and_held_out(["a {red|blue} cup", "__animals__"], None, "any")
    assert [p.text for p in train] == ["a {red|blue} cup", "__animals__"]


# ------------------------------------------------------------------------------------- held out among wildcards

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
THINGS = ["cup", "hat", "sock", "lamp", "vase", "boot", "door"]


def read(tmp_path, *lines):
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    return read_prompts(tmp_path / "prompts.txt")


def alternation(words):
    return "{" + "|".join(words) + "}"


def test_the_held_out_are_not_all_of_one_alternative(tmp_path):
    """Ten colours: every tenth prompt in order is the white one."""
    train, held = split(read(tmp_path, f"a {alternation(THINGS)} that is {alternation(COLOURS)}"))
    assert (len(train), len(held)) == (63, 7)
    assert all(len({p.text.split()[place] for p in held}) > 3 for place in (1, 4))
    for words in (COLOURS, THINGS):
        assert all(any(word in p.text.split() for p in train) for word in words)


@pytest.mark.parametrize("name", ["animals-activities", "objects-colors", "counting"])
def test_nothing_of_a_bundled_set_is_missing_from_training(name):
    train, held = split(read_prompts(name))
    assert len(held) == (len(train) + len(held)) // 10
    assert {c for p in held for c in p.choices} <= {c for p in train for c in p.choices}
    assert {word for p in held for word in p.text.split()} <= {word for p in train for word in p.text.split()}


def test_no_alternative_is_ever_missing_from_training(tmp_path):
    """Random files: an alternative that two prompts have is trained on, and a tenth is held out."""
    draw = random.Random(3)
    for _ in range(150):
        lines = [
            " ".join(
                alternation(draw.sample(COLOURS, draw.randint(2, 10))) if draw.random() < 0.6 else draw.choice(THINGS)
                for _ in range(draw.randint(1, 3))
            )
            for _ in range(draw.randint(1, 6))
        ]
        prompts = list(dict.fromkeys(read(tmp_path, *lines)))
        if len(prompts) < 10:
            continue
        train, held = split(prompts)
        assert len(held) == len(prompts) // 10
        assert sorted(map(repr, train + held)) == sorted(map(repr, prompts))
        seen, trained = Counter(c for p in prompts for c in p.choices), {c for p in train for c in p.choices}
        assert not [c for c, n in seen.items() if n > 1 and c not in trained], lines


def test_the_same_word_in_two_places_is_two_alternatives(tmp_path):
    """'red' in the first place does not stand in for a 'red' in the second that is held out with all its prompts."""
    for i in range(300):
        line = f"{alternation(COLOURS[i % 5 : i % 5 + 2])} {alternation(COLOURS)} {i}"
        train, held = split(read(tmp_path, line))
        assert len(held) == 2
        assert {p.text.split()[1] for p in train} == set(COLOURS)


def test_choices_within_a_list_are_not_missing_either(tmp_path):
    for i in range(100):
        (tmp_path / "list.txt").write_text(f"{alternation(THINGS[:2])} {alternation(COLOURS)}")
        train, held = split(read(tmp_path, f"a __list__ {i}"))
        assert len(held) == 2
        assert {p.text.split()[2] for p in train} == set(COLOURS)


def test_a_line_with_one_choice_is_like_its_alternatives_written_out(tmp_path):
    train, held = split(read(tmp_path, f"a {alternation(COLOURS)} cup"))
    assert (len(train), len(held)) == (9, 1)


def test_a_prompt_added_at_the_end_moves_none_of_the_others(tmp_path):
    lines = ["a dog", f"a {alternation(COLOURS)} {alternation(THINGS)}", *(f"dog {i}" for i in range(30))]
    lines += [f"my {alternation(THINGS)} in {alternation(COLOURS[:3])}", f"one {alternation(COLOURS)} house"]
    before = split(read(tmp_path, *lines[:2]))[1]
    for end in range(3, len(lines) + 1):
        prompts = read(tmp_path, *lines[:end])
        held = split(prompts)[1]
        assert held[: len(before)] == before
        assert len(held) == len(prompts) // 10
        before = held


def test_the_split_is_the_same_everywhere(tmp_path):
    """Fixed by the text alone: a run that is resumed on another machine holds out the same."""
    _, held = split(read(tmp_path, f"a {alternation(COLOURS)} {alternation(THINGS[:3])}"))
    assert [p.text for p in held] == ["a purple sock", "a black hat", "a white sock"]


def test_every_pass_sees_every_prompt_once():
    prompts = [Prompt(str(i)) for i in range(10)]
    seen = [t for u in range(10) for t in batch_of(prompts, 4, 3, u).prompts]
    assert set(Counter(seen).values()) == {4}
    assert seen[:10] != seen[10:20]
    assert batch_of(prompts, 4, 3, 7).prompts == seen[28:32]


def test_a_group_is_one_prompt_several_times_and_no_prompt_is_passed_over():
    prompts = [Prompt(str(i)) for i in range(10)]
    alone = [t for u in range(5) for t in batch_of(prompts, 4, 3, u).prompts]
    grouped = [batch_of(prompts, 12, 3, u, group=3) for u in range(5)]
    assert [t for b in grouped for t in b.prompts] == [t for t in alone for _ in range(3)]
    assert all(b.index == tuple(range(12)) for b in grouped)  # each with its own noise
