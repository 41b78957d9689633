"""Prompt files, good and bad; the split; the order of batches."""

from collections import Counter

import pytest

from tropism.core import UserError
from tropism.run.prompts import Prompt, batch_of, read_prompts, split


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


def test_every_pass_sees_every_prompt_once():
    prompts = [Prompt(str(i)) for i in range(10)]
    seen = [t for u in range(10) for t in batch_of(prompts, 4, 3, u).prompts]
    assert set(Counter(seen).values()) == {4}
    assert seen[:10] != seen[10:20]
    assert batch_of(prompts, 4, 3, 7).prompts == seen[28:32]
