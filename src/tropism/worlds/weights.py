"""Finds the bundled networks: safetensors that ship inside the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tropism.core import UserError


def path(name: str) -> Path:
    """The folder or file `name` (for example "shapes/model") of the bundled weights. Raises UserError if it is missing."""
    found = Path(str(files("tropism") / "weights" / name))
    if not found.exists():
        raise UserError(
            f"The bundled weights '{name}' are missing from this installation. Reinstall the package, or train "
            f"them anew: tropism pretrain {name.partition('/')[0]} --out DIR"
        )
    return found
