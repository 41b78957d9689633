"""A folder's scores: one row a picture, in order, whatever fails and however often it is interrupted."""

import csv
import math

import judge_stub
import numpy as np
import pytest
from judge_stub import scene, spoilt

from tropism.core import UserError
from tropism.restore import scoring
from tropism.restore.judge import HallucinationJudge
from tropism.restore.judge_client import Endpoint
from tropism.restore.judge_reply import JudgeUnavailable
from tropism.restore.scoring import COLUMNS, Row, bootstrap, read_scores, score_folder, summary

SPOILT = [0, 1, 6, 16, 2]


@pytest.fixture
def server():
    with judge_stub.running() as stub:
        yield stub


def judge(server, cache=None, repeats=1, **more):
    time = judge_stub.Time()
    client = Endpoint(server.url, "tiny", sleep=time.sleep, clock=time.clock, retries=0, **more)
    return HallucinationJudge(client, repeats=repeats, cache=cache)


def triples(count=5):
    for i in range(count):
        gt, lr = scene(i)
        yield f'{i}, "é".png', spoilt(gt, SPOILT[i % 5]), gt, lr


def table(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


LEVELS = [1, 3, 4, 5, 3]


@pytest.mark.parametrize("parallel", [1, 3])
def test_one_row_a_picture_in_order(server, tmp_path, parallel):
    rows = list(
        score_folder(
            judge(server, repeats=2), triples(), tmp_path / "new" / "scores.csv", parallel=parallel, swap_share=0
        )
    )
    assert [row.result.score for row in rows] == LEVELS and len(server.requests) == 10
    written = table(tmp_path / "new" / "scores.csv")
    assert list(written[0]) == list(COLUMNS)
    assert [(row["name"], float(row["score"])) for row in written] == [
        (f'{i}, "é".png', s) for i, s in enumerate(LEVELS)
    ]
    assert (written[2]["per_repeat"], written[2]["sd"], written[2]["judge"]) == ("[4, 4]", "0.0", "tiny")
    assert (written[2]["mode"], written[2]["prompt_version"], written[2]["higher_is_worse"]) == (
        "full",
        "hs-v1",
        "true",
    )


def test_the_table_is_read_back(server, tmp_path):
    file = tmp_path / "scores.csv"
    rows = list(
        score_folder(judge(server, repeats=2), [*triples(), ("bad", *[scene()[0][:1]] * 2, None)], file, swap_share=1)
    )
    for row, back in zip(rows, read_scores(file), strict=True):
        assert (back.name, back.error, back.swap_difference) == (row.name, row.error, row.swap_difference)
        for part in ("score", "per_repeat", "items", "omissions", "mode", "judge", "reward") if row.result else ():
            assert getattr(back.result, part) == getattr(row.result, part)
    assert rows[-1].result is None and "shape (1, 64, 64)" in read_scores(file)[-1].error


@pytest.mark.parametrize("text", ["", "name,score\na,1\n", ",".join(COLUMNS) + "\na,one" + "," * 10 + "\n"])
def test_tables_that_are_none(tmp_path, text):
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(UserError, match="is no table of scores"):
        read_scores(tmp_path / "scores.csv")


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_interruption_loses_nothing(server, tmp_path, parallel):
    file, cache = tmp_path / "scores.csv", tmp_path / "cache"
    rows = score_folder(judge(server, cache), triples(), file, swap_share=0, parallel=parallel)
    next(rows), next(rows)
    with pytest.raises(Interrupted):
        rows.throw(Interrupted())
    assert [float(row["score"]) for row in table(file)] == LEVELS[:2]
    asked = len(server.requests)
    assert asked == 2 if parallel == 1 else 2 <= asked <= 4
    again = list(score_folder(judge(server, cache), triples(), file, swap_share=0, parallel=parallel))
    assert [row.result.score for row in again] == LEVELS and len(server.requests) == 5
    list(score_folder(judge(server, cache), triples(), file, swap_share=0))
    assert len(server.requests) == 5 and len(table(file)) == 5


def test_the_table_is_kept_while_the_work_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "EVERY", 2)
    file, lengths = tmp_path / "scores.csv", []
    for _ in score_folder(judge(server), triples(), file, swap_share=0):
        lengths.append(len(table(file)) if file.exists() else 0)
    assert lengths == [0, 2, 2, 4, 4] and len(table(file)) == 5


def test_a_picture_that_fails_is_a_row(server, tmp_path):
    gt, lr = scene()

    def broken():
        raise UserError("b.png is cut off. Fetch it again.")

    given = [("a", gt, gt, lr), ("b", broken, gt, lr), ("c", gt, gt[:, :32], lr), ("d", lambda: gt, lambda: gt, None)]
    rows = list(score_folder(judge(server), given, tmp_path / "s.csv", swap_share=0))
    assert [row.error.split(".")[0] for row in rows[:2]] == ["", "b"]
    assert "one size" in rows[2].error and rows[3].result.score == 1
    written = table(tmp_path / "s.csv")
    assert [row["score"] for row in written] == ["1.0", "", "", "1.0"]
    assert written[1]["error"] == "b.png is cut off. Fetch it again."
    told = summary(rows)
    assert (told.scored, told.failed, told.mean) == (2, 2, 1)


def test_a_reply_without_a_score_costs_one_row(server, tmp_path):
    server.script = [None, "no", "no", "no"]
    rows = list(score_folder(judge(server), triples(), tmp_path / "s.csv", swap_share=0))
    assert [bool(row.result) for row in rows] == [True, False, True, True, True] and "holds no score" in rows[1].error


def test_a_judge_that_only_talks_is_left_soon(server, tmp_path):
    server.respond = lambda _: "What a lovely picture!"
    with pytest.raises(JudgeUnavailable, match=r"no verdict on any of the first 3 pictures.*lovely"):
        list(score_folder(judge(server), triples(), tmp_path / "s.csv", swap_share=0))
    assert len(server.requests) == 9 and [bool(row["error"]) for row in table(tmp_path / "s.csv")] == [True] * 3


def test_a_damaged_picture_does_not_hide_that_a_judge_only_talks(server, tmp_path):
    def broken():
        raise UserError("broken.png is cut off.")

    server.respond = lambda _: "What a lovely picture!"
    given = [("broken", broken, broken, None), *triples()]
    with pytest.raises(JudgeUnavailable, match="no verdict on any of the first 3 pictures"):
        list(score_folder(judge(server), given, tmp_path / "s.csv", swap_share=0))
    assert len(server.requests) == 9


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_judge_that_goes_away_ends_the_work(server, tmp_path, parallel):
    rows = score_folder(judge(server), triples(), tmp_path / "s.csv", swap_share=0, parallel=parallel)
    next(rows)
    server.respond = lambda _: (500, {"error": "gone"})
    with pytest.raises(JudgeUnavailable, match="gone"):
        list(rows)
    assert 1 <= len(table(tmp_path / "s.csv")) <= 2


def test_a_share_is_also_shown_in_the_other_order(server, tmp_path):
    server.respond = lambda body: '{"score": 2}' if judge_stub.seen(body)[-1][0] == "C" else '{"score": 3}'
    gt, _ = scene()
    given = [(f"{i}.png", gt, gt, None) for i in range(30)]

    def tried(given):
        rows = list(score_folder(judge(server, tmp_path / "c"), given, tmp_path / "s.csv", swap_share=0.3))
        return rows, [row.name for row in rows if row.swap_difference is not None]

    rows, names = tried(given)
    assert 3 < len(names) < 15 and {row.swap_difference for row in rows if row.name in names} == {1.0}
    assert len(server.requests) == 2, "equal pictures are one question"
    told = summary(rows)
    assert (told.swaps, told.swap_difference) == (len(names), 1.0)
    assert tried(given[::-1])[1] == names[::-1]


def test_where_only_the_other_order_fails_the_score_stays(server, tmp_path):
    gt, _ = scene()
    server.script = [None, "no", "no", "no"]
    (row,) = score_folder(judge(server), [("a", gt, gt, None)], tmp_path / "s.csv", swap_share=1)
    assert row.result.score == 1 and row.swap_difference is None and "holds no score" in row.error


@pytest.mark.parametrize("parallel", [1, 2])
def test_two_pictures_of_one_name(server, tmp_path, parallel):
    gt, _ = scene()
    with pytest.raises(UserError, match="Two pictures are named 'a'"):
        list(score_folder(judge(server), [("a", gt, gt, None)] * 2, tmp_path / "s.csv", parallel=parallel))


@pytest.mark.parametrize("wrong", [{"parallel": 0}, {"swap_share": 1.5}])
def test_values_that_cannot_be(server, tmp_path, wrong):
    with pytest.raises(UserError, match=r"Try parallel=4"):
        score_folder(judge(server), [], tmp_path / "s.csv", **wrong)


def test_nothing_to_score(server, tmp_path):
    assert list(score_folder(judge(server), [], tmp_path / "s.csv")) == []
    told = summary(read_scores(tmp_path / "s.csv"))
    assert told.scored == 0 and math.isnan(told.mean) and math.isnan(told.low)


# ---------------------------------------------------------------------------------------------------- the interval


def test_the_interval_covers_the_mean():
    """Check 14: 93 to 97 % of simulated sets; 400 of them have a standard error of 1.1 %. Of 8 pictures a little less, of 5 only
    80 %, and of 100 of which ten are above level 1 about 91 %: the page says so (page.FEW, page.SPREAD).
    """
    rng = np.random.default_rng(0)
    even, mostly_one = [0.4, 0.3, 0.15, 0.1, 0.05], [0.9, 0.05, 0.03, 0.01, 0.01]
    for n, shares, least in ((80, even, 0.92), (12, even, 0.91), (8, even, 0.9), (100, mostly_one, 0.88)):
        mean, hits = float(np.dot(shares, [1, 2, 3, 4, 5])), 0
        for trial in range(400):
            low, high = bootstrap(rng.choice([1, 2, 3, 4, 5], n, p=shares).tolist(), trial, 300)
            hits += low <= mean <= high
        assert least <= hits / 400 <= 0.98, n


def test_the_interval_is_seeded_and_needs_two():
    assert bootstrap([1, 2, 5], 3) == bootstrap([1, 2, 5], 3)
    assert bootstrap([2, 2, 2]) == (2, 2)
    assert all(math.isnan(x) for x in (*bootstrap([2.0]), *bootstrap([])))


def test_failed_pictures_are_no_scores():
    assert math.isnan(summary([Row("a", error="x")]).mean) and summary([Row("a", error="x")]).failed == 1
