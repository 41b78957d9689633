"""Replies as models write them: each gives the score that it names, or none at all."""

import json
import math

import pytest

from tropism.restore.judge_reply import MOST_TEXT, ParseError, expected_level, parse

WHOLE = '{"items": [], "score": 4, "confidence": 0.5}'


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (WHOLE, 4),
        (f"```json\n{WHOLE}\n```", 4),
        (f"Here is my verdict:\n{WHOLE}\nI hope it helps {{really}}.", 4),
        (f'<think>a draft: {{"score": 1}}</think>{WHOLE}', 4),
        (f'The template began the thought. {{"score": 1}} </think> {WHOLE}', 4),
        (f'{{"score": 2}} or rather {WHOLE}', 4),
        (f'{WHOLE} and {{"note": "done"}}', 4),
        (f"I saw {{nothing}} of B. {WHOLE}", 4),
        ('{"items": [{"box": {"left": 0}, "kind": "text"}], "score": "4"}', 4),
        ('{"score": 4.0}', 4),
        ('{"score": "4.0"}', 4),
        ('{"score": 1}', 1),
        ('{"score": 5}', 5),
        ("My score is 4.", 4),
        ("**Score:** 4/5", 4),
        ("Score: 4.0", 4),
        ("level 4, so the score is 4", 4),
        ("On a score from 1 to 5 I would say: score = 3", 3),
    ],
)
def test_scores_that_are_named(text, score):
    assert parse(text).score == score
    assert parse(text).raw == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "The candidate looks fine to me.",
        "There are 3 discrepancies.",
        '{"items": []}',
        '{"score": 9}',
        '{"score": 0}',
        '{"score": -1}',
        '{"score": 3.7}',
        '{"score": "3.7"}',
        '{"score": null}',
        '{"score": true}',
        '{"score": [4]}',
        '{"score": "four"}',
        '{"score": NaN}',
        '{"score": 1e400}',
        '{"score": 2} no: {"score": 9}',
        '{"score": 9} on a scale where score 4 is bad',
        "Score: 3.7",
        "Score: 9",
        "score 1-5",
        "score 1 to 5",
        "a score of 2 would be kind, my score is 4",
        "<think>my score is 4",
        '<think>{"score": 4}',
        '{"items": [], "scor',
        "{" * 5000,
        '{"a":' * 1500,
        "Score: 45",
    ],
)
def test_scores_that_are_not(text):
    with pytest.raises(ParseError, match="The judge's reply") as error:
        parse(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert error.value.raw == text


def test_only_the_end_of_an_endless_reply_is_read():
    assert parse("{" * 10 * MOST_TEXT + WHOLE).score == 4


def item(**parts):
    (found,) = parse(json.dumps({"items": [parts], "score": 3}), size=(200, 100)).items
    return found


@pytest.mark.parametrize(
    ("box", "shares"),
    [
        ({"left": 0.1, "top": 0.2, "right": 0.3, "bottom": 0.4}, (0.1, 0.2, 0.3, 0.4)),
        ([0.1, 0.2, 0.3, 0.4], (0.1, 0.2, 0.3, 0.4)),
        (["0.1", 0, 1, 1], (0.1, 0, 1, 1)),
        ([20, 10, 100, 50], (0.1, 0.1, 0.5, 0.5)),
        ([0, 0, 201, 50], None),
        ([0.5, 0.2, 0.3, 0.4], None),
        ([-0.1, 0.2, 0.3, 0.4], None),
        ([0.1, 0.2, 0.3], None),
        ("left", None),
        (None, None),
        ({"left": None, "top": 0, "right": 1, "bottom": 1}, None),
    ],
)
def test_boxes(box, shares):
    assert item(box=box).box == (None if shares is None else pytest.approx(shares))


def test_a_reply_in_thousandths_is_so_throughout():
    """In a picture of 200 x 100 the first box could be of pixels; the second cannot, so neither is."""
    asked = {
        "items": [{"box": [20, 10, 100, 50]}, {"box": [500, 250, 1000, 750]}, {"box": [0.1, 0.1, 0.2, 0.2]}],
        "score": 3,
    }
    boxes = [i.box for i in parse(json.dumps(asked), size=(200, 100)).items]
    assert boxes == [pytest.approx(b) for b in ((0.02, 0.01, 0.1, 0.05), (0.5, 0.25, 1, 0.75), (0.1, 0.1, 0.2, 0.2))]


def test_items_keep_what_can_be_kept():
    found = item(kind="text", description="7 for 1", severity=2, omission=False)
    assert (found.kind, found.description, found.severity, found.omission) == ("text", "7 for 1", 2, False)
    assert item(severity=9).severity is None and item(severity="3").severity == 3
    assert item(kind="missing").omission and item(kind="text", omission=True).omission
    assert not item(kind="removed").omission and not item(omission="no").omission
    assert parse('{"items": ["x", 3, {}], "score": 2}').items[0].kind == ""
    assert len(parse(json.dumps({"items": [{}] * 999, "score": 2})).items) == 200
    assert parse('{"items": "none", "score": 2, "confidence": 7}').confidence is None


def tokens(*texts, at=None, top=()):
    rows = [{"token": t, "logprob": -0.1} for t in texts]
    if at is not None:
        rows[at]["top_logprobs"] = [{"token": t, "logprob": math.log(p)} for t, p in top]
    return rows


def test_the_expected_level_is_the_mean_under_the_token():
    top = [("4", 0.5), ("3", 0.25), ("x", 0.2), (" 3", 0.05)]
    rows = tokens(
        '{"items": [{"severity": ', "3", '}], "score', '": ', "4", ', "confidence": ', "1", "}", at=4, top=top
    )
    assert expected_level(rows) == pytest.approx((4 * 0.5 + 3 * 0.3) / 0.8)
    assert expected_level(tokens('"score": ', "4")) is None
    assert expected_level(tokens("no number")) is None
    assert expected_level(tokens('"score": ', "4", at=1, top=[("x", 1.0)])) is None
