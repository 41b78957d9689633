"""The table of docs/faults.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_table_names_is_there():
    named, file = 0, None
    for part in re.findall(r"`((?:\w+\.py)?(?:::\w+)?)`", (HERE.parent / "docs" / "faults.md").read_text("utf-8")):
        name, _, test = part.partition("::")
        if name.startswith("test_"):
            (file,) = HERE.rglob(name)
        if test:
            assert f"def {test}(" in file.read_text("utf-8"), part
            named += 1
    assert named > 30
