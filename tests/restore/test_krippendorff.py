"""Krippendorff's alpha against worked examples that were published, and against arithmetic by hand."""

import itertools

import numpy as np
import pytest

from tropism.core import UserError
from tropism.restore.agreement import agreement
from tropism.restore.krippendorff import METRICS, krippendorff
from tropism.restore.ratings import Ratings, Scores


def table(text):
    return np.array([[np.nan if c == "." else float(c) for c in row.split()] for row in text.strip().splitlines()])


KRIPPENDORFF_2011 = table("""
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
""")
"""Computing Krippendorff's Alpha-Reliability, 2011, section C: four observers, twelve units."""
ENCYCLOPEDIA = table("""
. . . . . 3 4 1 2 1 1 3 3 . 3
1 . 2 1 3 3 4 3 . . . . . . .
. . 2 1 3 4 4 . 2 1 1 3 3 . 4
""")
"""The example of Wikipedia's article "Krippendorff's alpha": three coders, fifteen units."""


@pytest.mark.parametrize(
    ("ratings", "metric", "published"),
    [
        (KRIPPENDORFF_2011, "nominal", 0.743),
        (KRIPPENDORFF_2011, "ordinal", 0.815),
        (KRIPPENDORFF_2011, "interval", 0.849),
        (ENCYCLOPEDIA, "nominal", 0.691),
        (ENCYCLOPEDIA, "interval", 0.811),
    ],
)
def test_published_examples(ratings, metric, published):
    assert krippendorff(ratings, metric) == pytest.approx(published, abs=5e-4)


def test_by_hand():
    # pictures (1, 1), (1, 2), (3, .): pairs 1-1 twice, 1-2 and 2-1; three 1s, one 2; the lone 3 does not count
    ratings = table("1 1 3\n1 2 .")
    # D_o = 2/4; D_e = 2 (3) (1) / (4 * 3) = 1/2, in every metric times the same difference
    for metric in METRICS:
        assert krippendorff(ratings, metric) == pytest.approx(0, abs=1e-12)
    # (1, 1), (3, 3), (1, 2): n = 3, 1, 2; interval D_o = 2/6, D_e = 2 (3*1*1 + 3*2*4 + 1*2*1) / 30
    assert krippendorff(table("1 3 1\n1 3 2"), "interval") == pytest.approx(1 - (2 / 6) / (58 / 30), abs=1e-12)
    # ordinal differences: 1-2: (3 + 1)/2 = 2, 1-3: 3 + 1 + 2 - 5/2 = 3.5, 2-3: 1.5
    expected = 2 * (3 * 1 * 2**2 + 3 * 2 * 3.5**2 + 1 * 2 * 1.5**2) / 30
    assert krippendorff(table("1 3 1\n1 3 2"), "ordinal") == pytest.approx(1 - (2 * 2**2 / 6) / expected, abs=1e-12)


def pair_by_pair(ratings, metric):
    """The definition, with loops: mean difference within pictures over that of all ratings which have a partner."""
    units = [[v for v in column if not np.isnan(v)] for column in ratings.T]
    units = [u for u in units if len(u) > 1]
    every = sorted(itertools.chain(*units))

    def difference(a, b):
        if metric == "nominal":
            return float(a != b)
        low, high = sorted((a, b))
        between = sum(low <= v <= high for v in every) - (every.count(a) + every.count(b)) / 2
        return (between if metric == "ordinal" and a != b else a - b) ** 2

    within = sum(sum(difference(a, b) for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in units)
    return 1 - within / len(every) / (
        sum(difference(a, b) for a, b in itertools.permutations(every, 2)) / len(every) / (len(every) - 1)
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_definition_pair_by_pair(metric):
    rng = np.random.default_rng(0)
    for _ in range(10):
        ratings = rng.integers(1, 6, (3, 6)).astype(float)
        ratings[rng.random(ratings.shape) < 0.25] = np.nan
        assert krippendorff(ratings, metric) == pytest.approx(pair_by_pair(ratings, metric), abs=1e-12)


def test_agreement_beyond_chance_and_by_chance():
    rng = np.random.default_rng(0)
    assert krippendorff(np.tile(rng.integers(1, 6, 30).astype(float), (3, 1))) == pytest.approx(1)
    assert krippendorff(rng.integers(1, 6, (4, 3000)).astype(float)) == pytest.approx(0, abs=0.02)


def test_what_is_not_defined():
    assert np.isnan(krippendorff(np.full((2, 4), 3.0)))
    with pytest.raises(UserError, match="No picture has ratings of two"):
        krippendorff(table("1 2 .\n. . 3"))
    with pytest.raises(UserError, match=r"no alpha 'ratio'\. Take one of ordinal, interval, nominal"):
        krippendorff(ENCYCLOPEDIA, "ratio")


def people(ratings):
    levels = {
        f"{i}": {f"r{k}": int(v) for k, v in enumerate(column) if not np.isnan(v)} for i, column in enumerate(ratings.T)
    }
    return Ratings({name: given for name, given in levels.items() if given})


def test_agreement_tells_alpha_with_an_interval_over_pictures():
    ratings = people(KRIPPENDORFF_2011)
    machine = Scores({name: float(i) for i, name in enumerate(ratings.levels)}, True)
    found = agreement(machine, ratings)
    assert (found.raters, found.ratings, found.pictures) == (4, 41, 12)
    for metric in METRICS:
        told = found.alpha[metric]
        assert told.value == pytest.approx(krippendorff(KRIPPENDORFF_2011, metric), abs=1e-12)
        assert told.low < told.value < told.high <= 1
    assert agreement(machine, ratings.means).alpha == {}  # of means nothing is known


def test_an_interval_of_alpha_takes_all_ratings_of_a_picture_together():
    rng = np.random.default_rng(1)
    hidden = rng.integers(1, 6, 24)
    given = np.clip(hidden + rng.integers(-1, 2, (3, 24)), 1, 5).astype(float)
    machine = Scores({f"{i}": float(v) for i, v in enumerate(hidden)}, True)
    told = agreement(machine, people(given), seed=3).alpha["interval"]
    rows = [given[:, rng.integers(24, size=24)] for _ in range(300)]  # picture by picture, the slow way
    low, high = np.quantile([krippendorff(r, "interval") for r in rows], [0.025, 0.975])
    assert (told.low, told.high) == pytest.approx((low, high), abs=0.06)


def test_alpha_of_one_rater_or_of_equal_levels_says_why():
    machine = Scores({f"{i}": float(i) for i in range(5)}, True)
    one = agreement(machine, people(np.array([[1.0, 2, 3, 4, 5]])))
    assert one.alpha["ordinal"].value is None and "two people" in one.alpha["ordinal"].why
    equal = agreement(machine, people(np.full((2, 5), 4.0)))
    assert "every rating is the same level" in equal.alpha["nominal"].why
