"""What a guided run shows of molecules: drawings, and measures that did not guide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tropism.worlds import molecules


def measures(tokens: Tensor) -> dict[str, Tensor]:
    """Columns (B,) of tokens (B, L); properties of what is no molecule are NaN."""
    texts = molecules.text(tokens)
    known = set(molecules.corpus())
    columns = {
        "valid": torch.tensor([float(bool(s)) for s in texts]),
        "new": torch.tensor([float(s not in known) if s else torch.nan for s in texts]),
        "gold": molecules.each(tokens, molecules.hidden),
        "qed": molecules.each(tokens, molecules.qed),
        "sa": molecules.each(tokens, molecules.ease),
        "log P": molecules.each(tokens, molecules.logp),
        "pharmacophore": molecules.each(tokens, molecules.pharmacophore),
        "alerts": molecules.each(tokens, molecules.alerts),
        "heavy atoms": molecules.each(tokens, lambda mol: float(mol.GetNumHeavyAtoms())),
    }
    return {name: torch.where(torch.isinf(v), torch.nan, v.double()) for name, v in columns.items()}


def together(tokens: Tensor) -> dict[str, float]:
    """Numbers of a set: how many molecules are distinct, how different they are, how near the file's."""
    texts = [s for s in molecules.text(tokens) if s]
    if not texts:
        return {}
    return {
        "distinct molecules": len(set(texts)) / len(tokens),
        "diversity (1 - Tanimoto)": 1 - molecules.likeness(texts),
        "nearest of the file (Tanimoto)": molecules.nearest(texts).mean().item(),
    }


def drawn(
    tokens: Tensor, rewards: Sequence[float] = (), most: int = 24, columns: int = 6, names: Sequence[str] = ()
) -> Image.Image:
    """Molecules as RDKit draws them, with their rewards or names where these are given."""
    from rdkit import Chem
    from rdkit.Chem import Draw

    texts = molecules.text(tokens[:most])
    notes = [f"{rewards[i]:.4g}" if len(rewards) else names[i] if names else "" for i in range(len(texts))]
    notes = [note if s else f"no molecule {note}" for s, note in zip(texts, notes, strict=True)]
    made = Draw.MolsToGridImage(
        [Chem.MolFromSmiles(s) for s in texts], molsPerRow=columns, subImgSize=(190, 150), legends=notes
    )
    return made if isinstance(made, Image.Image) else Image.fromarray(np.asarray(made))
