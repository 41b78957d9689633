"""A world of small molecules as SELFIES: 40 tokens, every row of which is a molecule that RDKit accepts.

The molecules are those of the public NCI file that ships inside RDKit, neutral, of nine elements, 6 to 38 heavy atoms, without
stereochemistry; nothing is downloaded. Needs RDKit and selfies: the extra "molecules".
Source: SELFIES, arXiv 1905.13741; the file: Developmental Therapeutics Program, National Cancer Institute (not under copyright).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tropism.core import UserError

_TOKENS = """
[nop] [#Branch1] [#Branch2] [#C] [#N] [=Branch1] [=Branch2] [=C] [=N+1] [=N] [=O] [=Ring1] [=S] [Br] [Branch1]
[Branch2] [C] [Cl] [F] [I] [N+1] [NH1] [N] [O-1] [O] [P] [Ring1] [Ring2] [S]
"""
ALPHABET = tuple(_TOKENS.split())
"""Tokens found 20 times or more in the file; [nop] is nothing, and fills the end."""
LENGTH = 40
_ELEMENTS = {"C", "N", "O", "F", "S", "Cl", "Br", "I", "P"}
REFERENCE = "O=C(C1CC1)N1CCN(CC1)C(=O)c1cc(Cc2n[nH]c(=O)c3ccccc23)ccc1F"
"""Olaparib, a ligand of PARP1: what `pharmacophore` compares with."""


def installed() -> None:
    """Raises UserError where RDKit or selfies are missing."""
    for name in ("rdkit", "selfies"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f'Molecules need {name}, which is not installed: pip install "tropism[molecules]".')


@cache
def _chem() -> Any:
    """rdkit.Chem. Raises UserError where RDKit or selfies are missing."""
    installed()
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")  # pyright: ignore[reportAttributeAccessIssue]
    return Chem


# ---------------------------------------------------------------------------------------------------- sequences


@cache
def corpus() -> tuple[str, ...]:
    """The canonical SMILES of RDKit's NCI file that the alphabet and the length can say, sorted."""
    chem = _chem()
    from rdkit import RDConfig

    found = set()
    with open(os.path.join(RDConfig.RDDataDir, "NCI", "first_5K.smi"), encoding="utf-8") as f:
        molecules = [chem.MolFromSmiles(line.split()[0]) for line in f if line.strip()]
    for whole in filter(None, molecules):
        mol = max(chem.GetMolFrags(whole, asMols=True), key=lambda m: m.GetNumHeavyAtoms())
        chem.RemoveStereochemistry(mol)
        plain = all(
            a.GetSymbol() in _ELEMENTS and not a.GetIsotope() and not a.GetNumRadicalElectrons() for a in mol.GetAtoms()
        )
        if plain and 6 <= mol.GetNumHeavyAtoms() <= 38 and chem.GetFormalCharge(mol) == 0:
            found.add(chem.MolToSmiles(mol))
    return tuple(s for s in sorted(found) if _encoded(s) is not None)


def _encoded(smiles: str) -> list[int] | None:
    """Token numbers, filled up with [nop]; None for what cannot be said."""
    import selfies

    try:
        names = list(selfies.split_selfies(selfies.encoder(smiles)))
    except selfies.EncoderError:
        return None
    if len(names) > LENGTH or not set(names) <= set(ALPHABET):
        return None
    return [ALPHABET.index(n) for n in names] + [0] * (LENGTH - len(names))


def tokens_of(smiles: Sequence[str]) -> Tensor:
    """(B, 40) tokens of SMILES. Raises UserError for a molecule that is not one, or that the alphabet or the length cannot say."""
    _chem()
    rows = [_encoded(s) if _chem().MolFromSmiles(s) is not None else None for s in smiles]
    if None in rows:
        raise UserError(
            f"{smiles[rows.index(None)]} cannot be said in {LENGTH} SELFIES tokens of this world. Its tokens are {' '.join(ALPHABET)}."
        )
    return torch.tensor(rows)


def sequences(n: int, seed: int) -> Tensor:
    """(n, 40) tokens of molecules of the file, each written from an atom of chance; a pure function of n and seed."""
    chem, every, rng = _chem(), corpus(), np.random.default_rng([19_051_374, seed])
    rows = []
    while len(rows) < n:
        mol = chem.MolFromSmiles(every[rng.integers(len(every))])
        row = _encoded(chem.MolToSmiles(mol, rootedAtAtom=int(rng.integers(mol.GetNumAtoms()))))
        if row is not None:
            rows.append(row)
    return torch.tensor(rows)


def text(tokens: Tensor) -> list[str]:
    """Canonical SMILES of tokens (B, L); "" where no atom is left."""
    return [_smiles(tuple(row)) for row in tokens.tolist()]


@lru_cache(maxsize=200_000)
def _smiles(row: tuple[int, ...]) -> str:
    chem = _chem()
    import selfies

    mol = chem.MolFromSmiles(selfies.decoder("".join(ALPHABET[i] for i in row)))
    return "" if mol is None else chem.MolToSmiles(mol)


# ---------------------------------------------------------------------------------------------------- properties


def each(tokens: Tensor, score: Any, known: dict[str, float] | None = None) -> Tensor:
    """score(molecule) -> float of every row (B,); -inf where there is no molecule. Equal molecules are scored once.

    known: {SMILES: score} of those scored before; it is added to.
    """
    texts, known = text(tokens), {} if known is None else known
    for s in dict.fromkeys(texts):
        if s not in known:
            known[s] = score(_chem().MolFromSmiles(s)) if s else -torch.inf
    return torch.tensor([known[s] for s in texts], dtype=torch.float64)


def qed(mol: Any) -> float:
    """Quantitative estimate of drug-likeness in (0, 1). Source: Bickerton et al., Nature Chemistry 4 (2012) 90."""
    from rdkit.Chem import QED

    return QED.qed(mol)


@cache
def _sascorer() -> Any:
    from rdkit import RDConfig

    file = os.path.join(RDConfig.RDContribDir, "SA_Score", "sascorer.py")
    spec = importlib.util.spec_from_file_location("sascorer", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ease(mol: Any) -> float:
    """Ease of synthesis in [0, 1]: (10 - SA) / 9. Source: Ertl and Schuffenhauer, Journal of Cheminformatics 1 (2009) 8."""
    return (10 - _sascorer().calculateScore(mol)) / 9


def logp(mol: Any) -> float:
    """Crippen's estimate of the octanol-water partition coefficient."""
    from rdkit.Chem import Crippen

    return Crippen.MolLogP(mol)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _reference() -> np.ndarray:
    return _reduced(_chem().MolFromSmiles(REFERENCE))


def _reduced(mol: Any) -> np.ndarray:
    from rdkit.Chem import rdReducedGraphs

    return np.asarray(rdReducedGraphs.GetErGFingerprint(mol))


def pharmacophore(mol: Any) -> float:
    """Likeness in [0, 1] to REFERENCE: Tanimoto's coefficient of extended reduced graphs (donors, acceptors, rings and their distances).

    A stand-in for docking. Source: ErG, Stiefl et al., Journal of Chemical Information and Modeling 46 (2006) 208.
    """
    a, b = _reduced(mol), _reference()
    return float(a @ b / (a @ a + b @ b - a @ b)) if a.any() else 0.0


@cache
def _alerts() -> Any:
    from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogParams

    kinds = FilterCatalogParams.FilterCatalogs
    parameters = FilterCatalogParams()
    parameters.AddCatalog(kinds.PAINS)
    parameters.AddCatalog(kinds.NIH)
    return FilterCatalog(parameters)


def alerts(mol: Any) -> float:
    """1 for a substructure of the PAINS or NIH filters, else 0."""
    return float(_alerts().HasMatch(mol))


def hidden(mol: Any) -> float:
    """The measure that guides nothing, in [0, 1]: half ease of synthesis, half QED with equal weights, nothing for what has an alert."""
    from rdkit.Chem import QED

    return 0.0 if alerts(mol) else (ease(mol) + QED.qed(mol, w=QED.WEIGHT_NONE)) / 2


@lru_cache(maxsize=50_000)
def fingerprint(smiles: str) -> Any:
    """Morgan bits of radius 2, 2,048 of them."""
    from rdkit.Chem import rdFingerprintGenerator

    return rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048).GetFingerprint(
        _chem().MolFromSmiles(smiles)
    )


def likeness(smiles: Sequence[str]) -> float:
    """Mean Tanimoto coefficient of all pairs."""
    from rdkit.DataStructs import BulkTanimotoSimilarity

    prints = [fingerprint(s) for s in smiles]
    pairs = [v for i in range(1, len(prints)) for v in BulkTanimotoSimilarity(prints[i], prints[:i])]
    return float(np.mean(pairs)) if pairs else 1.0


def nearest(smiles: Sequence[str]) -> Tensor:
    """(B,) Tanimoto coefficient to the most similar molecule of the file."""
    from rdkit.DataStructs import BulkTanimotoSimilarity

    known = [fingerprint(s) for s in corpus()]
    return torch.tensor([max(BulkTanimotoSimilarity(fingerprint(s), known)) for s in smiles], dtype=torch.float64)


def in_space(mol: Any) -> str | None:
    """The molecule with its hydrogens and three dimensions, as an SDF block; None where RDKit finds no conformer."""
    from rdkit.Chem import AllChem

    solid = _chem().AddHs(mol)
    if AllChem.EmbedMolecule(solid, randomSeed=7, maxAttempts=20) != 0:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    if AllChem.MMFFHasAllMoleculeParams(solid):  # pyright: ignore[reportAttributeAccessIssue]
        AllChem.MMFFOptimizeMolecule(solid)  # pyright: ignore[reportAttributeAccessIssue]
    return _chem().MolToMolBlock(solid) + "$$$$\n"
