"""Agreement with people against scipy, against enumeration, against simulated worlds whose truth is known, and its messages."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tropism.core import UserError
from tropism.restore import resampled
from tropism.restore.agreement import MEASURES, agreement, ceiling
from tropism.restore.ratings import Ratings, Scores

NAMES = [f"{i:02d}.png" for i in range(40)]


def scores(values, worse=True, **more):
    return Scores(dict(zip(NAMES, map(float, values), strict=False)), worse, **more)


def drawn(seed, n, tied):
    """Two related columns, of whole numbers where `tied`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = x + rng.normal(size=n)
    return (np.round(x), np.round(2 * y) / 2) if tied else (x, y)


def groups(x, y):
    places, counts = np.unique(np.stack([x, y], 1), axis=0, return_counts=True)
    return *places.T, counts.astype(float)


# ---------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_scipys_with_and_without_ties(seed, tied):
    x, y = drawn(seed, 40, tied)
    assert len(set(x)) < 40 if tied else len(set(x)) == 40
    found = agreement(scores(x), scores(y), draws=100)
    for mine, theirs in [
        (found.pearson, stats.pearsonr),
        (found.spearman, stats.spearmanr),
        (found.kendall, stats.kendalltau),
    ]:
        assert mine.value == pytest.approx(theirs(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("piece", [7, 2_000_000])
def test_a_resampling_has_the_statistics_of_the_pictures_drawn_out(monkeypatch, piece):
    monkeypatch.setattr(resampled, "PIECE", piece)  # pieces of the pairs do not matter
    gx, gy, counts = groups(*drawn(3, 30, True))
    rng = np.random.default_rng(0)
    w = rng.multinomial(30, counts / 30, 20).astype(float)
    found = resampled.correlations(gx, gy, w)
    wrong, kappa = resampled.auroc(gx, gy > 0, w), resampled.kappa(gx, gy, w)
    for i, row in enumerate(w.astype(int)):
        x, y = np.repeat(gx, row), np.repeat(gy, row)
        assert found["pearson"][i] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
        assert found["spearman"][i] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert found["kendall"][i] == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
        assert found["pairwise"][i] == pytest.approx(pairwise_by_hand(x, y), abs=1e-12)
        u = stats.mannwhitneyu(x[y > 0], x[y <= 0]).statistic
        assert wrong[i] == pytest.approx(u / ((y > 0).sum() * (y <= 0).sum()), abs=1e-12)
        assert kappa[i] == pytest.approx(kappa_by_table(x, y), abs=1e-12)


def pairwise_by_hand(x, y):
    """Of the pairs that neither leaves tied, those ordered alike."""
    signs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in itertools.combinations(range(len(x)), 2)]
    return sum(s > 0 for s in signs) / sum(s != 0 for s in signs)


def kappa_by_table(x, y):
    """Cohen's weighted kappa as it is written: a table of counts, weights (i - j)^2, and the table of independent levels."""
    levels = np.unique(np.concatenate([x, y]))
    table = np.array([[np.sum((x == a) & (y == b)) for b in levels] for a in levels]) / len(x)
    weights = (levels[:, None] - levels[None]) ** 2
    return 1 - (weights * table).sum() / (weights * np.outer(table.sum(1), table.sum(0))).sum()


def test_kappa_of_a_table_by_hand():
    # 1-1, 2-2, 3-3, 1-3: mean (x - y)^2 = 4/4 = 1; expected 2: E x^2 + E y^2 - 2 Ex Ey = 15/4 + 23/4 - 2 (7/4)(9/4) = 13/8
    found = agreement(scores([1, 2, 3, 1], levels=True), scores([1, 2, 3, 3], levels=True), draws=100)
    assert found.kappa.value == pytest.approx(1 - 1 / (13 / 8), abs=1e-12)


def test_kappa_and_auroc_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(1, 6, (2, 25))
        w = np.ones((1, 25))
        expected = metrics.cohen_kappa_score(x, y, weights="quadratic")
        assert resampled.kappa(x.astype(float), y.astype(float), w)[0] == pytest.approx(expected, abs=1e-12)
        assert resampled.auroc(x, y > 2, w)[0] == pytest.approx(metrics.roc_auc_score(y > 2, x), abs=1e-12)


def test_means_are_rounded_with_halves_up_for_kappa():
    whole = agreement(scores([1, 3, 4, 5], levels=True), scores([2, 3, 4, 5], levels=True), draws=100)
    means = agreement(scores([1.4, 2.5, 4.2, 4.9], levels=True), scores([1.5, 2.6, 3.5, 5], levels=True), draws=100)
    assert means.kappa.value == pytest.approx(whole.kappa.value, abs=1e-12)


@pytest.mark.parametrize("counts", [(0, 0, 0, 1, 2), (0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 0, 1), (3, 1, 2, 0)])
def test_no_order_without_ties_comes_above_the_ceiling(counts):
    orders = np.array(list(itertools.permutations(range(len(counts)))))
    best = max(np.corrcoef(orders, stats.rankdata(counts))[-1, :-1])
    assert ceiling(counts) == pytest.approx(best, abs=1e-12)
    told = agreement(scores(range(len(counts))), scores(counts), draws=100)
    assert told.ceiling == ceiling(counts) and told.spearman.value <= told.ceiling + 1e-12


def test_the_ceiling_of_equal_values_is_not_defined():
    assert ceiling([2, 2, 2]) is None


def test_the_ceiling_of_mostly_zero_counts_is_as_the_shares_say():
    shares = np.array([math.comb(4, k) * 0.135**k * 0.865 ** (4 - k) for k in range(5)])  # the perfect sampler's count
    counts = np.repeat(np.arange(5), np.round(shares * 20_000).astype(int))
    assert ceiling(counts) == pytest.approx(math.sqrt(1 - (shares**3).sum()), abs=1e-3)
    assert ceiling(counts) == pytest.approx(0.88, abs=0.01)


# ---------------------------------------------------------------------------------------------------- laws

LEVELS = np.arange(1, 6)
JOINT = np.exp(-0.35 * (LEVELS[:, None] - LEVELS[None]) ** 2) * np.array([0.35, 0.25, 0.2, 0.12, 0.08])
JOINT /= JOINT.sum()
GX, GY = (v.ravel().astype(float) for v in np.meshgrid(LEVELS, LEVELS, indexing="ij"))


def every(w):
    found = resampled.correlations(GX, GY, w)
    return found | {"kappa": resampled.kappa(GX, GY, w), "auroc": resampled.auroc(GX, GY > 1, w)}


def coverage(sets, draws, n=200):
    """The share of `sets` samples of the joint law whose intervals hold the true values, which are the law's own."""
    truth = {k: float(v[0]) for k, v in every(JOINT.reshape(1, -1) * 1e9).items()}
    assert truth["pearson"] == pytest.approx(0.6609, abs=1e-4)
    rng, hits = np.random.default_rng(11), dict.fromkeys(truth, 0)
    for s in range(sets):
        drawn = rng.multinomial(n, JOINT.ravel())
        ends = resampled.intervals(every, drawn, draws, s)
        for name, (low, high) in ends.items():
            hits[name] += low <= truth[name] <= high
    return {name: hit / sets for name, hit in hits.items()}


def test_intervals_cover_the_truth():
    for name, share in coverage(100, 200).items():
        assert 0.9 <= share <= 0.99, name


@pytest.mark.slow
def test_intervals_of_500_sets_cover_the_truth_in_93_to_97_of_100():
    # the 500 sets themselves scatter by 0.01; over 1,500 sets all measures stood between 0.934 and 0.964 at 50, 200, 400 pictures
    for name, share in coverage(500, 1000, 400).items():
        assert 0.93 <= share <= 0.97, (name, share)


def test_the_interval_is_over_pictures_and_not_over_their_ratings():
    rng = np.random.default_rng(2)
    hidden = rng.uniform(1, 5, 30)
    machine = scores(hidden + rng.normal(size=30))
    few = Ratings({NAMES[i]: {"a": round(h)} for i, h in enumerate(hidden)})
    many = Ratings({n: {f"{r}{k}": v for r, v in of.items() for k in range(20)} for n, of in few.levels.items()})
    one, twenty = agreement(machine, few), agreement(machine, many)
    assert twenty.pearson == one.pearson  # twenty raters who all say the same add no picture
    assert twenty.ratings == 600 and twenty.raters == 20


def test_an_interval_narrows_with_the_root_of_the_pictures():
    wide, narrow = (
        np.diff(resampled.intervals(every, (JOINT.ravel() * n).round(), 400, 0)["pearson"]) for n in (100, 1600)
    )
    assert wide / narrow == pytest.approx(4, rel=0.25)


def test_the_interval_of_a_mean_of_few_is_students():
    x = stats.norm.ppf((np.arange(12) + 0.5) / 12)
    mean = lambda w: {"mean": w @ x / w.sum(1)}
    low, high = resampled.intervals(mean, np.ones(12, int), 4000, 0)["mean"]
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 11) * x.std(ddof=1) / math.sqrt(12), rel=0.06)


def test_intervals_hang_on_the_seed_alone():
    x, y = drawn(1, 30, False)
    told = lambda seed: agreement(scores(x), scores(y), draws=200, seed=seed)
    assert told(0) == told(0) and told(0).pearson != told(1).pearson


def test_pieces_of_draws_are_joined(monkeypatch):
    monkeypatch.setattr(resampled, "PIECE", 1000)
    x, y = drawn(1, 30, False)
    assert agreement(scores(x), scores(y), draws=200).spearman.low < agreement(scores(x), scores(y)).spearman.value


# ---------------------------------------------------------------------------------------------------- direction, definition


def test_a_score_of_the_other_direction_is_turned_and_said():
    x, y = drawn(4, 30, False)
    same, other = agreement(scores(x), scores(y)), agreement(scores(-x, False, source="'psnr.csv'"), scores(y))
    assert all(getattr(same, m) == getattr(other, m) for m in MEASURES)
    assert same.notes == () and "In 'psnr.csv' higher is better; its numbers were turned" in other.notes[0]


def test_levels_turn_about_the_middle():
    people = {n: {"a": int(v)} for n, v in zip(NAMES, [1, 1, 2, 3, 5, 4], strict=False)}
    turned = {n: {r: 6 - v for r, v in of.items()} for n, of in people.items()}
    machine = scores([1, 2, 2, 4, 5, 5], levels=True)
    one, other = agreement(machine, Ratings(people)), agreement(machine, Ratings(turned, False))
    assert one.kappa == other.kappa and one.auroc == other.auroc and one.kappa.value > 0.8
    assert "the ratings higher is better" in other.notes[0]


def test_wrong_is_above_the_lowest_level_or_above_what_is_said():
    people, machine = scores([1, 1, 2, 3], levels=True), scores([0.1, 0.3, 0.2, 0.4])
    assert agreement(machine, people).auroc.value == pytest.approx(3 / 4)  # of 1, 1 | 2, 3: .3 stands above .2
    assert agreement(machine, people, above=2).auroc.value == 1
    counts = scores([0, 0, 2, 3])
    assert agreement(machine, counts).auroc.value == pytest.approx(3 / 4)
    many = scores([1.2, 1.4, 2, 3], levels=True)  # one of five raters saw something in the first two: most did not
    assert agreement(machine, many).auroc.value == pytest.approx(3 / 4)


def test_what_is_not_defined_says_why():
    flat = agreement(scores([2, 2, 2, 2], levels=True), scores([1, 2, 3, 4], levels=True), draws=100)
    for name in ("pearson", "spearman", "kendall", "pairwise"):
        assert getattr(flat, name).value is None and getattr(flat, name).why == "every picture has the same score"
    assert flat.kappa.value == pytest.approx(0) and flat.auroc.value == 0.5  # these are defined
    assert flat.told_apart == 0
    people = agreement(scores([1, 2, 3, 4]), scores([2, 2, 2, 2]), draws=100)
    assert "the same rating" in people.spearman.why and people.ceiling is None and people.told_apart is None
    assert "no picture above 2" in people.auroc.why and "levels" in people.kappa.why
    assert "every picture above 1" in agreement(scores([1, 2, 3]), scores([2, 3, 4], levels=True)).auroc.why
    assert "nan" not in str(flat) + str(people) and "not defined: every picture has the same score" in str(flat)


def test_nearly_constant_columns_have_a_value_and_no_interval():
    found = agreement(scores([0] * 39 + [1]), scores(range(40)), draws=400)
    assert found.pearson.value is not None and found.pearson.low is not None  # 63 % of draws have the odd one
    three = agreement(scores([1, 1, 1, 1]), scores([0, 0, 0, 1]), draws=400)
    assert three.auroc.value == 0.5


def test_pairs_that_a_coarse_score_leaves_tied_are_told():
    found = agreement(scores([1, 1, 2, 2]), scores([1, 2, 3, 3]), draws=100)
    assert found.pairwise.value == 1  # 4 pairs are told apart by both
    assert found.told_apart == pytest.approx(4 / 5)  # of the 5 that people tell apart


def test_the_table_for_people_names_everything():
    levels = {n: {"a": 1 + i % 5, "b": 1 + i % 4} for i, n in enumerate(NAMES)}
    told = str(agreement(scores(range(40)), Ratings(levels)))
    assert told.startswith("40 pictures, 80 ratings of 2 people")
    assert all(name in told for name in (*MEASURES, "alpha ordinal", "alpha nominal", "ceiling of spearman"))


# ---------------------------------------------------------------------------------------------------- names


def test_pictures_are_matched_by_name_in_any_order():
    x, y = drawn(5, 20, False)
    human = scores(y)
    mixed = Scores(dict(reversed(human.values.items())), True)
    assert agreement(scores(x), mixed).pearson.value == agreement(scores(x), human).pearson.value


def test_names_that_only_one_side_has():
    one = scores(range(6), source="'scores.csv'")
    other = Scores({n.removesuffix(".png"): float(i) for i, n in enumerate(NAMES[:6])}, True, source="'people.csv'")
    with pytest.raises(
        UserError, match=r"'people.csv' has nothing for '00.png', .* 3 more of 6 .*is '00.png' there called '00'"
    ):
        agreement(one, other)
    more = scores(range(8), source="'people.csv'")
    with pytest.raises(UserError, match=r"'scores.csv' has nothing for '06.png', '07.png' of 8 pictures.*common=True"):
        agreement(one, more)
    assert agreement(one, more, common=True).pictures == 6
    assert agreement(one, more, common=True).notes == ("2 pictures are left out, for which 'scores.csv' has nothing.",)


def test_pictures_that_could_not_be_scored_are_left_out_and_counted():
    one = Scores({n: float(i) for i, n in enumerate(NAMES[:5])}, True, left_out=(NAMES[5],))
    found = agreement(one, scores(range(6)))
    assert found.pictures == 5 and found.notes == ("1 pictures have no score and are left out, the first '05.png'.",)


@pytest.mark.parametrize("n", [0, 2])
def test_too_few_pictures(n):
    with pytest.raises(UserError, match=f"have {n} pictures in common; agreement needs at least 3"):
        agreement(scores(range(n)), scores(range(n)))


def test_too_few_draws():
    with pytest.raises(UserError, match="at least 100"):
        agreement(scores(range(5)), scores(range(5)), draws=50)
