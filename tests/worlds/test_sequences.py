"""The DNA and RNA worlds: planted sites are seen on either strand, scanning counts by hand, gradients are slopes."""

import pytest
import torch

from tropism.worlds import dna, utr


def planted(*sites):
    """A sequence without any site, with these (text, place) put in."""
    letters = list("ACACTCTACT" * 20)
    for text, at in sites:
        letters[at : at + len(text)] = text
    return torch.tensor([[dna.ALPHABET.index(c) for c in letters]])


def reversed_complement(tokens):
    return 3 - tokens.flip(1)


CONSENSUS = {f: "".join({"N": "A", "W": "A", "R": "A", "S": "C"}.get(c, c) for c in m) for f, m in dna.MOTIFS.items()}


@pytest.mark.parametrize("factor", dna.MOTIFS)
def test_a_site_is_found_on_either_strand(factor):
    bare, site = planted(), planted((CONSENSUS[factor], 90))
    assert dna.sites(bare)[factor].item() == 0
    assert dna.sites(site)[factor].item() >= 1
    assert dna.occupancy(site, factor)[0].argmax().item() == 90
    back = reversed_complement(site)
    assert dna.sites(back)[factor].item() == dna.sites(site)[factor].item()
    torch.testing.assert_close(
        dna.occupancy(back, factor).sum(), dna.occupancy(site, factor).sum(), rtol=1e-4, atol=1e-5
    )


def test_activities_are_what_their_factors_say():
    bare = planted()
    for factor, weight in dna.LIVER.items():
        gain = dna.liver(planted((CONSENSUS[factor], 90))) - dna.liver(bare)
        assert gain.sign().item() == (1 if weight > 0 else -1)
    blood = planted((CONSENSUS["GATA1"], 90))
    assert dna.specific(blood) < dna.specific(bare)
    near, far = (planted((CONSENSUS["HNF4A"], 40), (CONSENSUS["HNF1A"], 40 + d)) for d in (30, 120))
    assert dna.liver(near) > dna.liver(far) + 0.1
    assert dna.gold(near) == pytest.approx(dna.gold(far).item(), abs=0.02)


def test_activity_of_probabilities_has_its_slope():
    p = (
        torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        .softmax(-1)
        .requires_grad_()
    )
    (g,) = torch.autograd.grad(dna.specific(p).sum(), p)
    d = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        measured = (dna.specific(p + 1e-5 * d) - dna.specific(p - 1e-5 * d)) / 2e-5
    torch.testing.assert_close((g * d).sum((1, 2)), measured, rtol=1e-4, atol=1e-8)
    tokens = dna.sequences(3, 5)
    torch.testing.assert_close(dna.liver(dna.one_hot(tokens)), dna.liver(tokens))


def test_sequences_are_keyed_and_have_the_worlds_letters():
    assert torch.equal(dna.sequences(4, 7), dna.sequences(4, 7))
    assert not torch.equal(dna.sequences(4, 7), dna.sequences(4, 8))
    many = dna.sequences(500, 0)
    assert (many.min().item(), many.max().item(), many.shape) == (0, 3, (500, 200))
    assert dna.gc(many).mean().item() == pytest.approx(0.46, abs=0.03)
    pairs = dna.words(many, 2)
    assert pairs[1 * 4 + 2] < 0.6 * pairs[2 * 4 + 1], "CG is rare, GC is not"
    found = {f: n.double().mean().item() for f, n in dna.sites(many).items()}
    assert all(n > 0.05 for n in found.values())


def test_runs():
    assert dna.longest_run(torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 1, 0]])).tolist() == [3, 1]
    assert dna.gold(planted(("A" * 20, 50))) < dna.gold(planted()) - 1


# ---------------------------------------------------------------------------------------------------- RNA

BLANK = "A" * 50
HOW = utr.Ribosome()


def with_(text, at):
    return BLANK[:at] + text + BLANK[at + len(text) :]


def test_scanning_by_hand():
    """The main start has an A at -3 and a G at +4."""
    assert utr.scanned(BLANK) == pytest.approx(0.9)
    assert utr.scanned(with_("AUG", 20)) == pytest.approx(0.5 + 0.5 * 0.9), (
        "in frame, no stop: it counts as the main one"
    )
    assert utr.scanned(with_("AUG", 21)) == pytest.approx(0.5 * 0.9), "out of frame: lost"
    assert utr.scanned(with_("AUGG", 21)) == pytest.approx(0.1 * 0.9), "a strong context takes nearly all"
    assert utr.scanned("CCC" + with_("CCCAUGC", 18)[3:]) == pytest.approx(0.85 * 0.9), "a weak one little"
    again = 0.4 * (1 - 2 ** (-(56 - 23) / 15))
    assert utr.scanned(with_("AUGAUAA", 20).replace("AUGAUAA", "AUGUAAA")) == pytest.approx((0.5 + 0.5 * again) * 0.9)


def test_load_falls_with_folding():
    pytest.importorskip("RNA")
    assert utr.energy("GGGGAAAACCCC") == pytest.approx(-5.4, abs=0.01)
    tokens = lambda s: torch.tensor([[utr.ALPHABET.index(c) for c in s]])
    hairpin = "GGGGGGGGCCAAAAGGCCCCCCCC" + "A" * 26
    assert utr.load(tokens(BLANK)) > 0.8 > 0.1 > utr.load(tokens(hairpin))
    many = utr.sequences(60, 0)
    corr = torch.corrcoef(torch.stack([utr.load(many), utr.load(many, utr.GOLD)]))[0, 1]
    assert 0.7 < corr < 0.999, "the hidden oracle is another one"


def test_the_prior():
    share = torch.bincount(utr.sequences(2000, 1).flatten(), minlength=4).double() / 100_000
    torch.testing.assert_close(share, torch.tensor(utr.PRIOR).double(), rtol=0, atol=0.006)
