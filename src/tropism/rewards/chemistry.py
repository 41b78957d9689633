"""Rewards on molecules given as SELFIES tokens: RDKit's estimates. None has a gradient; where no atom is left they are -inf."""

from __future__ import annotations

import math

from tropism.rewards.named import Named
from tropism.rewards.sources import About
from tropism.worlds import molecules

LOGP = (1.0, 3.0)
"""The window of `logp-window`: fat enough to pass a membrane, not too fat to dissolve."""


def _about(low: float, high: float, source: str) -> About:
    return About((low, high), None, "RDKit's: BSD-3-Clause", source)


def drug_likeness() -> Named:
    """Quantitative estimate of drug-likeness, in (0, 1)."""
    molecules.installed()
    return Named(
        "qed", False, lambda tokens, batch: molecules.each(tokens, molecules.qed), _about(0.0, 1.0, "RDKit's QED")
    )


def synthesis() -> Named:
    """Ease of synthesis, in [0, 1]; 1 is easiest."""
    molecules.installed()
    return Named(
        "sa", False, lambda tokens, batch: molecules.each(tokens, molecules.ease), _about(0.0, 1.0, "RDKit's SA_Score")
    )


def logp_window() -> Named:
    """Minus the distance of Crippen's log P to the window 1 to 3."""
    molecules.installed()
    return Named(
        "logp-window",
        False,
        lambda tokens, batch: molecules.each(tokens, _outside),
        _about(-math.inf, 0.0, "RDKit's Crippen"),
    )


def _outside(mol) -> float:
    value = molecules.logp(mol)
    return -max(LOGP[0] - value, value - LOGP[1], 0.0)


def pharmacophore() -> Named:
    """Likeness of the pharmacophore to olaparib's, in [0, 1]: a stand-in for docking that needs no protein."""
    molecules.installed()
    return Named(
        "pharmacophore",
        False,
        lambda tokens, batch: molecules.each(tokens, molecules.pharmacophore),
        _about(0.0, 1.0, "RDKit's ErG"),
    )
