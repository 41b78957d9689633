"""The world of molecules: every row is one, tokens and SMILES agree, properties by hand, drawings."""

import pytest
import torch

from tropism.core import UserError
from tropism.run import guided_molecules
from tropism.worlds import molecules

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


def test_the_file_that_ships_with_rdkit():
    every = molecules.corpus()
    assert len(every) == len(set(every)) > 3900
    assert not any("." in s or "@" in s for s in every)


def test_every_row_is_a_molecule_or_nothing():
    rows = torch.randint(len(molecules.ALPHABET), (500, molecules.LENGTH), generator=torch.Generator().manual_seed(0))
    texts = molecules.text(rows)
    assert sum(s == "" for s in texts) < 5
    chem = molecules._chem()
    assert all(chem.MolFromSmiles(s) is not None for s in texts if s)
    nothing = torch.zeros(1, molecules.LENGTH, dtype=torch.long)
    assert molecules.text(nothing) == [""]
    assert molecules.each(nothing, molecules.qed).item() == -torch.inf


def test_tokens_say_what_smiles_say():
    chem = molecules._chem()
    texts = [ASPIRIN, "c1ccncc1", "O=[N+]([O-])c1ccccc1"]
    assert molecules.text(molecules.tokens_of(texts)) == [chem.MolToSmiles(chem.MolFromSmiles(s)) for s in texts]
    with pytest.raises(UserError, match=r"\[Na\+\] cannot be said"):
        molecules.tokens_of(["CC", "[Na+]"])
    with pytest.raises(UserError, match="cannot be said"):
        molecules.tokens_of(["C(C", "CC"])
    with pytest.raises(UserError, match="cannot be said"):
        molecules.tokens_of(["C" * 41])


def test_training_sequences_are_the_files_molecules():
    rows = molecules.sequences(40, 3)
    assert torch.equal(rows, molecules.sequences(40, 3))
    assert not torch.equal(rows, molecules.sequences(40, 4))
    assert set(molecules.text(rows)) <= set(molecules.corpus())


def test_properties():
    mol = molecules._chem().MolFromSmiles(ASPIRIN)
    assert molecules.qed(mol) == pytest.approx(0.550, abs=2e-3)
    assert molecules.ease(mol) == pytest.approx((10 - 1.58) / 9, abs=2e-3)
    assert molecules.logp(mol) == pytest.approx(1.31, abs=0.01)
    reference = molecules._chem().MolFromSmiles(molecules.REFERENCE)
    assert molecules.pharmacophore(reference) == pytest.approx(1.0)
    assert 0 < molecules.pharmacophore(mol) < 0.6
    quinone = molecules._chem().MolFromSmiles("O=C1C=CC(=O)C=C1")
    assert molecules.alerts(quinone) == 1 and molecules.hidden(quinone) == 0
    assert molecules.nearest([ASPIRIN, molecules.corpus()[5]])[1] == 1.0


def test_measures_and_drawings():
    rows = molecules.tokens_of(["CCO", ASPIRIN, "CCO"])
    rows = torch.cat([rows, torch.zeros(1, molecules.LENGTH, dtype=torch.long)])
    found = guided_molecules.measures(rows)
    assert found["valid"].tolist() == [1, 1, 1, 0]
    known = molecules.tokens_of([molecules.corpus()[7], "CCO"])
    assert guided_molecules.measures(known)["new"].tolist() == [0, 1]
    assert found["new"].isnan().tolist() == [False, False, False, True]
    assert found["qed"].isnan().tolist() == [False, False, False, True]
    assert found["heavy atoms"][1] == 13
    together = guided_molecules.together(rows)
    assert together["distinct molecules"] == 0.5
    assert 0 < together["diversity (1 - Tanimoto)"] < 1
    drawn = guided_molecules.drawn(rows, [0.1, 0.2, 0.3, -1.0])
    assert drawn.width > 600 and len(drawn.convert("L").histogram()) == 256 and drawn.convert("L").getextrema()[0] < 100
