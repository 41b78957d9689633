"""A docking program as a reward: `--reward "dock:smina -r receptor.pdb -l {ligand} --autobox_ligand known.sdf --cpu 1"`.

Each molecule is given three dimensions by RDKit and written to an SDF file; the command runs with {ligand} replaced by it (or with the
file as its last argument). The best affinity is read from the table that Vina, smina and gnina print, else it is the last number on
standard output, in kcal/mol; the reward is its negative. Use --workers and --timeout: a dock takes seconds to minutes.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from tropism.core import Batch, UserError
from tropism.worlds import molecules

_TABLE = re.compile(r"^\s*1\s+([-+]?\d+\.\d+)", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Docking:
    """Minus the affinity that a command prints for a molecule. Molecules that RDKit cannot give three dimensions score -inf.

    Raises UserError for a command that is not there, fails, or prints no number.
    """

    differentiable, name = False, "dock"

    def __init__(self, command: str):
        self.parts = shlex.split(command)
        if not self.parts or shutil.which(self.parts[0]) is None:
            raise UserError(
                f'The reward dock:{command} starts no program that can be found. Try --reward "dock:smina -r protein.pdb -l {{ligand}}".'
            )
        if not any("{ligand}" in part for part in self.parts):
            self.parts.append("{ligand}")

    def __call__(self, tokens: Tensor, batch: Batch) -> Tensor:
        return molecules.each(tokens, self.score)

    def score(self, mol: Any) -> float:
        """-affinity of one molecule."""
        block = molecules.in_space(mol)
        if block is None:
            return float("-inf")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "ligand.sdf"
            file.write_text(block, encoding="utf-8")
            command = [part.replace("{ligand}", str(file)) for part in self.parts]
            done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=_end_with_parent)
        if done.returncode:
            told = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(
                f"{shlex.join(command)} ended with code {done.returncode}: {told[-1] if told else 'it said nothing'}. "
                "Run it by hand on one molecule."
            )
        return -affinity(done.stdout)


def affinity(text: str) -> float:
    """Of mode 1 in the table of Vina and its kin, else the last number. Raises UserError if there is none."""
    found = _TABLE.findall(text) or _NUMBER.findall(text)[-1:]
    if not found:
        raise UserError(f"The docking program printed no number but: {text.strip()[:200]!r}.")
    return float(found[0])


def _end_with_parent() -> None:
    """On Linux the program ends when its worker is ended for taking too long."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
