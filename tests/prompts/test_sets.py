"""Bundled prompt sets and data sets on the Hub, the latter against a stand-in for the `datasets` package."""

import sys
from types import SimpleNamespace

import pytest

from tropism.core import UserError
from tropism.prompts import sets as prompt_sets
from tropism.prompts.batches import read_prompts, train_and_held_out

# ---------------------------------------------------------------------------------------------------- bundled


@pytest.mark.parametrize(
    ("name", "count", "member"),
    [
        ("animals", 80, "a fox"),
        ("animals-activities", 800, "an otter playing the piano"),
        ("counting", 102, "three apples on a table"),
        ("objects-colors", 200, "a red mug"),
        ("scenes", 72, "a cat asleep on a stack of old atlases"),
    ],
)
def test_the_bundled_sets(name, count, member):
    found = [p.text for p in read_prompts(name)]
    assert len(found) == len(set(found)) == count
    assert member in found
    assert not any(sign in text for text in found for sign in "{}|_#")
    assert f"| `{name}` | {count} |" in (prompt_sets.bundled()[name].parent / "README.md").read_text()


def test_all_bundled_sets_are_tested():
    assert list(prompt_sets.bundled()) == ["animals", "animals-activities", "counting", "objects-colors", "scenes"]


def test_scenes_are_captions():
    assert all(6 <= len(p.text.split()) <= 15 for p in read_prompts("scenes"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("animal", "Did you mean 'animals'"),
        ("Scenes", "Did you mean 'scenes'"),
        ("zzz", "no bundled prompt set 'zzz'. Bundled: animals, animals-activities, counting"),
        ("", "no bundled prompt set ''"),
        ("a red cat on a mat", "no prompt file and no bundled"),
        ("x" * 5_000, "no prompt file and no bundled"),
        ("x" * 5_000 + ".txt", "There is no prompt file"),
        ("../animals", "no prompt file and no bundled"),
        ("animals.txt", "bundled set goes by its bare name: animals"),
    ],
)
def test_names_that_are_not_there(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        read_prompts(name)


def test_what_lies_on_the_disk_wins(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name.txt").write_text("mine")
    assert [p.text for p in read_prompts("org/name.txt")] == ["mine"]
    (tmp_path / "org" / "name").mkdir()
    for asked in ("org/name", "org/name:text"):
        with pytest.raises(UserError, match="is a folder"):
            read_prompts(asked)
    (tmp_path / "animals").write_text("mine")
    with pytest.raises(UserError, match=r"Use .txt"):
        read_prompts("animals")
    assert hub.asked == []


# ---------------------------------------------------------------------------------------------------- the hub


class Rows(list):
    chosen = None

    def select_columns(self, names):
        Rows.chosen = names
        return [{name: row.get(name) for name in names} for row in self]


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package whose `load_dataset` gives `rows` or raises `error`."""
    made = SimpleNamespace(rows=[{"image": 1, "prompt": "a cat", "tag": "x"}], error=None, asked=[])

    def load_dataset(name, *, split, streaming):
        made.asked.append((name, split, streaming))
        if made.error:
            raise made.error
        return Rows(made.rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return made


def test_a_data_set_by_id(hub):
    hub.rows = [{"id": 1, "prompt": " a cat\n"}, {"id": 2, "prompt": None}, {"id": 3, "prompt": "a {red|blue} __x__"}]
    assert [p.text for p in read_prompts("org/name")] == ["a cat", "a {red|blue} __x__"]
    assert hub.asked == [("org/name", "train", True)]
    assert Rows.chosen == ["prompt"], "pictures that lie beside the prompts are never decoded"


@pytest.mark.parametrize(
    ("source", "text", "asked"),
    [
        ("org/name-1.0:tag", "x", "train"),
        ("org/name-1.0:tag@test", "x", "test"),
        ("org/name-1.0@test", "a cat", "test"),
    ],
)
def test_another_column_and_split(hub, source, text, asked):
    assert [p.text for p in read_prompts(source)] == [text]
    assert hub.asked == [("org/name-1.0", asked, True)]


@pytest.mark.parametrize("columns", [("prompt", "text"), ("text", "caption"), ("caption", "Prompt"), ("Prompt", "x")])
def test_the_column_when_none_is_named(hub, columns):
    hub.rows = [dict.fromkeys(reversed(columns), "wrong") | {columns[0]: "right"}]
    assert read_prompts("org/name")[0].text == "right"


class NotFound(FileNotFoundError):
    """As the package's own DatasetNotFoundError."""


@pytest.mark.parametrize(
    ("source", "change", "says"),
    [
        ("org/name:colour", {}, "no column 'colour'. It has: image, prompt, tag. Write org/name:COLUMN"),
        ("org/name", {"rows": [{"words": "a"}]}, "none of the columns prompt, text, caption, Prompt. It has: words"),
        ("org/name:image", {}, "'image' of 'org/name' holds int, not text"),
        ("org/name", {"rows": []}, "holds no prompt"),
        ("org/name", {"rows": [{"prompt": " "}]}, "holds no prompt"),
        ("org/name", {"rows": [{"prompt": "x" * 30_000}]}, "30000 characters"),
        (
            "org/name",
            {"error": ConnectionError("Couldn't\nreach it")},
            r"cannot be reached \(.*Couldn't reach it.*\.txt",
        ),
        ("org/name", {"error": RuntimeError("scripts")}, "cannot be reached .*scripts"),
        ("org/name", {"error": NotFound("it is gated")}, "it is gated.*datasets/org/name; if .*hf auth login"),
        ("org/name@dev", {"error": ValueError("Bad split: dev. Available: ['train']")}, "split 'dev'.*Available"),
    ],
)
def test_a_data_set_that_cannot_be_read(hub, source, change, says):
    vars(hub).update(change)
    with pytest.raises(UserError, match=says) as caught:
        read_prompts(source)
    assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'no prompt file \'org/name\'.*pip install "tropism\[data\]"$'):
        read_prompts("org/name")


def test_only_the_first_rows_are_read_and_it_is_said(hub, monkeypatch, capsys):
    monkeypatch.setattr(prompt_sets, "MOST_ROWS", 3)
    hub.rows = [{"prompt": str(i)} for i in range(3)]
    assert len(read_prompts("org/name")) == 3
    assert capsys.readouterr().out == ""
    hub.rows = [{"prompt": str(i)} for i in range(9)]
    assert [p.text for p in read_prompts("org/name")] == ["0", "1", "2"]
    assert "Only the first 3 rows of 'org/name'" in capsys.readouterr().out


def test_held_out_prompts_go_by_the_same_names(hub):
    train, held = train_and_held_out("animals", "org/name", "any")
    assert len(train) == 80
    assert [p.text for p in held] == ["a cat"]
