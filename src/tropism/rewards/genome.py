"""Rewards on DNA and RNA: activities of the bundled worlds, and a window for the share of G and C."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.core import Batch
from tropism.rewards.named import Named
from tropism.rewards.sources import NOT_CONFIRMED, OWN, About
from tropism.worlds import dna, utr


def liver() -> Named:
    """Activity of an enhancer in the liver-like cell of the DNA world; has a gradient."""
    return Named("dna-liver", True, dna.liver, About((-3.0, 3.0), None, OWN, "worlds.dna"))


def specific() -> Named:
    """That activity less the one in the blood-like cell; has a gradient."""
    return Named("dna-specific", True, dna.specific, About((-6.0, 6.0), None, OWN, "worlds.dna"))


def ribosome_load() -> Named:
    """Ribosome load of a 5' untranslated region by leaky scanning and ViennaRNA's folding energy; counts, so it has no gradient."""
    about = About((0.0, 1.0), None, f"{OWN}; ViennaRNA's: {NOT_CONFIRMED}", "worlds.utr, folded by ViennaRNA")
    return Named("utr-load", False, lambda tokens, batch: utr.load(tokens), about)


def gc_window() -> Named:
    """Minus the largest excess of the G and C share over .45 to .55 in any 50 bases, in percent points; no gradient."""
    return Named("gc-window", False, _gc_excess, About((-45.0, 0.0), None, OWN, "a count"))


def _gc_excess(tokens: Tensor, batch: Batch) -> Tensor:
    strong = ((tokens == 1) | (tokens == 2)).double()
    shares = strong.unfold(1, min(50, tokens.shape[1]), 1).mean(-1)
    excess = torch.maximum(0.45 - shares, shares - 0.55).clamp_min(0)
    return -100 * excess.amax(1)
