"""A user's own object from `file.py:name`: their reward function or their model class."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tropism.core import UserError


def is_spec(text: str) -> bool:
    """Whether `text` reads as `file.py:name`."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and bool(name)


def _run(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tropism_user_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up while they are being made
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"Importing {file} failed with {type(error).__name__}: {error}. "
            f"Run `python {file}` to see where, and mend it."
        ) from error
    return module


def load_object(spec: str) -> Any:
    """The object `name` of the Python file in `file.py:name`. The file is run: name only files you trust.

    Raises UserError if the text has another form, the file is missing, running it fails, or it holds no such name.
    """
    if not is_spec(spec):
        raise UserError(f"{spec!r} is not of the form file.py:name. Write for example my_reward.py:score.")
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file {file} (named in {spec!r}). Check the path; it is read from {Path.cwd()}.")
    module = _run(path)
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        close = difflib.get_close_matches(name, names, 1)
        hint = f"Did you mean {file}:{close[0]}?" if close else f"It has: {', '.join(names) or 'nothing public'}."
        raise UserError(f"{file} has no {name!r}. {hint}")
    return getattr(module, name)
