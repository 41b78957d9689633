"""A docking program as a reward: `--reward "dock:smina -r receptor.pdb -l {ligand} --autobox_ligand known.sdf --cpu 1"`.

Each molecule is given three dimensions by RDKit and written to an SDF file; the command runs with {ligand} replaced by it (or with the
file as its last argument). The affinity is read from what Vina, smina and gnina print, else it is the last number on standard output,
in kcal/mol; the reward is its negative. Use --workers and --timeout: a dock takes seconds to minutes.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from tropism.core import Batch, UserError
from tropism.rewards.sources import About
from tropism.worlds import molecules

_KNOWN = (
    re.compile(r"^-+\+[-+]*\s*\n\s*1\s+([-+]?\d+(?:\.\d+)?)", re.MULTILINE),
    re.compile(r"^(?:Affinity|Estimated Free Energy of Binding)\s*:\s*([-+]?\d+(?:\.\d+)?)", re.MULTILINE),
)
"""The first mode of the table, and the line of a program that only scores."""
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
PATIENCE = 3
"""So many molecules in a row may fail before any has been docked; then the command is at fault, not a molecule."""


class Docking:
    """Minus the affinity that a command prints for a molecule; -inf for one without a conformer, or that the program refuses.

    `failed` counts those that it refused, `refusal` says why the newest was, `patience` is how many may be before any is docked.
    Raises UserError for a command that is not there, or that fails on the first few molecules.
    """

    differentiable, name = False, "dock"
    about = About((-math.inf, math.inf), None, "that of the program given", "the command")

    def __init__(self, command: str):
        molecules.installed()
        self.parts, self.failed, self.known = shlex.split(command), 0, dict[str, float]()
        self.refusal, self.patience = "", float(PATIENCE)
        if not self.parts or shutil.which(self.parts[0]) is None:
            raise UserError(
                f'The reward dock:{command} starts no program that can be found. Try --reward "dock:smina -r protein.pdb -l {{ligand}}".'
            )
        if not any("{ligand}" in part for part in self.parts):
            self.parts.append("{ligand}")

    def __call__(self, tokens: Tensor, batch: Batch) -> Tensor:
        return molecules.each(tokens, self.score, self.known)

    def score(self, mol: Any) -> float:
        """-affinity of one molecule."""
        block = molecules.in_space(mol)
        if block is None:
            return float("-inf")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "ligand.sdf"
            file.write_text(block, encoding="utf-8")
            command = [part.replace("{ligand}", str(file)) for part in self.parts]
            code, out, err = _ran(command)
        found = affinity(out) if code == 0 else None
        if found is not None:
            return -found
        self.failed += 1
        told = (err or out).strip().splitlines()
        what = f"ended with code {code}" if code else "printed no number"
        self.refusal = f"{shlex.join(command)} {what}: {told[-1] if told else 'it said nothing'}."
        if self.failed >= self.patience and not any(v > float("-inf") for v in self.known.values()):
            raise UserError(f"{self.refusal} Run it by hand on one molecule.")
        return float("-inf")


def affinity(text: str) -> float | None:
    """Of the first mode in the table of Vina and its kin, or of their scoring line, else the last number; None if there is none."""
    for pattern in _KNOWN:
        if match := pattern.search(text):
            return float(match[1])
    numbers = _NUMBER.findall(text)
    return float(numbers[-1]) if numbers else None


def _ran(command: list[str]) -> tuple[int, str, str]:
    """(code, standard output, standard error). The program and all that it started end with this process, when that is terminated."""
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )

    def end(*_: Any) -> None:
        os.killpg(program.pid, signal.SIGKILL)
        sys.exit(128 + signal.SIGTERM)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        before = None
    try:
        out, err = program.communicate()
    except BaseException:
        os.killpg(program.pid, signal.SIGKILL)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return program.returncode, out, err
