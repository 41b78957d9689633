"""What one family of models alone can be told, by name: checked against what it has, with its own values where nothing is said."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from tropism.core import UserError


def settled(name: str, own: Mapping[str, float], given: Mapping[str, float]) -> dict[str, float]:
    """A family's settings: its own values with the given ones in their place.

    name: the family's, for the message. Raises UserError for a setting it does not have, and for one that is no finite number.
    """
    for key, value in given.items():
        if key not in own:
            near = difflib.get_close_matches(key, own, 1)
            has = f"It has {', '.join(own)}." if own else f"It has none: leave settings={dict(given)} out."
            raise UserError(f"{name} has no setting {key!r}. {f'Did you mean {near[0]}?' if near else has}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"The setting {key} is {value!r}; it must be a number. Its own value is {own[key]:g}.")
    return {**own, **given}
