"""The command line inside this process: starting another one and importing torch there takes seconds."""

import sys

import pytest

from tropism import cli


def called(monkeypatch, *words) -> int:
    """The exit code of `tropism WORDS...`."""
    monkeypatch.setattr(sys, "argv", ["tropism", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code
