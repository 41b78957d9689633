"""`file.py:name`: what it finds, and how it says what it does not."""

import pytest

from tropism.core import UserError
from tropism.plugin import is_spec, load_object


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Score:\n    scale: float = 2.0\nredness = Score()\n"
    )
    return path


def test_finds_the_object(file):
    assert load_object(f"{file}:redness").scale == 2
    assert load_object(f"{file}:Score")(3.0).scale == 3


def test_a_file_is_read_anew(file):
    load_object(f"{file}:redness")
    file.write_text("redness = 'changed to another length'\n")
    assert load_object(f"{file}:redness") == "changed to another length"


def test_what_is_a_spec():
    assert is_spec("a/b.py:f")
    assert not any(is_spec(s) for s in ("shapes", "b.py", "b.py:", "org/name", "http://x:80/y"))


def test_refusals(file, tmp_path):
    with pytest.raises(UserError, match=r"Did you mean .*mine.py:redness"):
        load_object(f"{file}:rednes")
    with pytest.raises(UserError, match=r"It has: .*redness"):
        load_object(f"{file}:zzz")
    with pytest.raises(UserError, match="no file"):
        load_object(f"{tmp_path}/nothing.py:f")
    with pytest.raises(UserError, match="not of the form"):
        load_object("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("import nope_nope", "nope_nope"),
    ],
)
def test_a_file_that_fails(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_object(f"{tmp_path}/bad.py:f")
