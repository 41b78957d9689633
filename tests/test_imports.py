"""Imports flow one way; nothing needs torchvision; the code keeps its shape."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "tropism"
ORDER = [
    {"noise", "answers"},
    {"core", "plugin", "quiet"},
    {"process", "space"},
    {"worlds"},
    {"models", "rewards", "prompts"},
    {"align", "guide", "restore"},
    {"scene"},
    {"doctor"},
    {"run"},
    {"race", "judged"},
    {"commands"},
    {"flags"},
    {"cli_restore", "cli_scene"},
    {"cli"},
]
LEVEL = {unit: level for level, units in enumerate(ORDER) for unit in units}
FILES = sorted(SOURCE.rglob("*.py"))


def unit(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_flow_one_way(path):
    mine = unit(path)
    if mine == "__init__":
        return
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "tropism" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != mine:
            allowed = LEVEL[parts[1]] < LEVEL[mine] or {mine, parts[1]} == {"core", "plugin"}
            assert allowed, f"{mine} may not import {parts[1]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_forbidden_import(path):
    forbidden = {"torchvision", "open_clip", "timm", "lpips", "pyiqa", "pickle"}
    roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert not roots & forbidden
    if unit(path) in ("process", "align", "guide", "scene", "core"):
        assert "diffusers" not in roots, "mathematics never imports diffusers"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_functions_and_files_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # a signature is a configuration, one argument a line: the body is what must be short
            assert node.end_lineno - node.body[0].lineno < 60, f"{node.name} is too long"


def test_everything_imports_without_torchvision():
    names = [
        ".".join(("tropism", *p.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__") for p in FILES
    ]
    code = "import sys; sys.modules['torchvision'] = None\n" + "\n".join(f"import {n}" for n in names)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE.parent), "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
