"""The client against a server that is busy, broken, late, picky, or talkative. No pause is really waited for."""

import json
import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import judge_stub
import pytest
import reward_stub
from judge_stub import completion, scene, spoilt

from tropism.core import UserError
from tropism.restore.judge import HallucinationJudge
from tropism.restore.judge_client import Endpoint
from tropism.restore.judge_reply import JudgeFailed, JudgeUnavailable, ParseError
from tropism.restore.judge_wire import KEY

SECRET = "s3cret-key"
GT, LR = scene()
SR = spoilt(GT, 6)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with judge_stub.running() as stub:
        yield stub


@pytest.fixture
def time():
    return judge_stub.Time()


def endpoint(server, time, **more):
    return Endpoint(server.url, **{"model": "tiny", "sleep": time.sleep, "clock": time.clock, **more})


def score(client):
    return HallucinationJudge(client, repeats=1).score(SR, GT, LR).score


def refusal(status, message, **headers):
    return (status, {"error": {"message": message, "type": "x"}}, headers)


# ---------------------------------------------------------------------------------------------------- failures that pass


@pytest.mark.parametrize(
    "how",
    [
        refusal(500, "out of memory"),
        refusal(503, "loading"),
        refusal(429, "slow down"),
        refusal(408, "late"),
        refusal(409, "conflict"),
        (200, {"error": {"message": "upstream", "code": 502}}),
        lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
        lambda handler: None,
    ],
)
def test_failures_that_pass_are_tried_again(server, time, how):
    server.script = [how, how]
    assert score(endpoint(server, time)) == 4
    assert len(server.requests) == 3
    assert all(0.25 * 2**i <= p <= 0.75 * 2**i for i, p in enumerate(time.pauses)) and len(time.pauses) == 2


def test_pauses_differ_and_end(server, time):
    server.respond = lambda _: refusal(500, "broken\nfor good")
    client = endpoint(server, time, retries=9)
    with pytest.raises(
        JudgeUnavailable, match=r"failed 10 times, the last time with: status 500: broken for good\. .*limit=1200"
    ):
        score(client)
    assert (len(server.requests), len(time.pauses)) == (10, 9)
    usual = [min(30, 0.5 * 2**i) for i in range(9)]
    assert all(0.5 * u <= pause <= 1.5 * u for u, pause in zip(usual, time.pauses, strict=True))
    assert len({pause / u for u, pause in zip(usual, time.pauses, strict=True)}) == 9


def test_retry_after_is_waited_for(server, time):
    server.script = [refusal(429, "slow down", Retry_After="7"), refusal(429, "slow down", Retry_After="0")]
    assert score(endpoint(server, time)) == 4
    assert time.pauses[0] == 7 and 0.5 <= time.pauses[1] <= 1.5 and len(server.requests) == 3


def test_retry_after_may_be_a_date(server, time):
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.script = [refusal(503, "", Retry_After=then), refusal(503, "", Retry_After="soon")]
    assert score(endpoint(server, time)) == 4
    assert 90 < time.pauses[0] <= 100 and time.pauses[1] <= 1.5


def test_who_asks_for_more_than_the_limit_is_left(server, time):
    server.script = [refusal(429, "come back tomorrow", Retry_After="86400")]
    with pytest.raises(JudgeUnavailable, match="come back tomorrow"):
        score(endpoint(server, time))
    assert (len(server.requests), time.pauses) == (1, [])


def test_all_attempts_together_end_in_time(server, time):
    """Nine retries would be allowed, but each request takes 40 s of 100."""

    def busy(_):
        time.now += 40
        return refusal(500, "busy")

    server.respond = busy
    with pytest.raises(JudgeUnavailable, match="failed 3 times"):
        score(endpoint(server, time, retries=9, limit=100))
    assert time.now >= 100 and len(server.requests) == 3


def hanging(handler):
    handler.stub.stop.wait()


def dribbling(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not handler.stub.stop.wait(0.03):
        handler.wfile.write(b" ")


@pytest.mark.parametrize("how", [hanging, dribbling])
def test_who_hangs_is_left_and_asked_again(server, time, how):
    """It hangs until the client has paused; then it has all the time that a busy machine may need."""
    client = endpoint(server, time, timeout=0.1)
    server.respond = lambda _: how if not time.pauses else None

    def sleep(seconds):
        client.timeout = 60
        time.sleep(seconds)

    client.sleep = sleep
    assert HallucinationJudge(client, repeats=1).score(SR, GT).score == 4
    assert (client.ledger.requests, len(time.pauses)) == (2, 1)


@pytest.mark.parametrize("how", [hanging, dribbling])
def test_who_hangs_for_good_is_given_up(server, time, how):
    server.respond = lambda _: how
    client = endpoint(server, time, timeout=0.1, retries=1)
    with pytest.raises(JudgeUnavailable, match=r"failed 2 times, the last time with: no answer within 0\.1 s"):
        score(client)
    assert client.ledger.requests == 2


def test_nobody_there(time):
    with pytest.raises(JudgeUnavailable, match=r"http://127.0.0.1:9/v1 failed 2 times.*refused.*answers /models"):
        score(Endpoint("http://127.0.0.1:9/v1", "tiny", sleep=time.sleep, clock=time.clock, retries=1))


# ---------------------------------------------------------------------------------------------------- replies

ODD = {
    "fenced": ('```json\n{"items": [], "score": 3}\n```', 3, 1),
    "prose around": ('Surely. {"items": [], "score": 3} Anything else?', 3, 1),
    "two objects": ('{"score": 1} {"score": 3}', 3, 1),
    "a text": ('{"score": "4"}', 4, 1),
    "a float": ('{"score": 4.0}', 4, 1),
    "parts": ((200, completion([{"type": "text", "text": '{"score": 2}'}])), 2, 1),
    "out of range": ('{"score": 9}', None, 3),
    "between": ('{"score": 3.7}', None, 3),
    "missing": ('{"items": []}', None, 3),
    "prose": ("What a lovely picture!", None, 3),
    "empty": ("", None, 3),
    "no choices": ((200, {"choices": []}), None, 3),
    "odd choices": ((200, {"choices": [None]}), None, 3),
    "no message": ((200, {"choices": [{"message": None}]}), None, 3),
    "no content": ((200, completion(None)), None, 3),
    "a list": (b"[1, 2]", None, 3),
    "html": (b"<html>hello</html>", None, 3),
    "bytes": (b"\xff\xfe", None, 3),
    "cut off": ((200, completion('{"score": 3}, but', finish_reason="length")), None, 3),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_replies_give_the_right_score_or_none(server, time, kind):
    reply, wanted, requests = ODD[kind]
    server.respond = lambda _: reply
    if wanted is None:
        with pytest.raises(ParseError, match=r"The judge's reply.*(Ask a model|Give the address)"):
            score(endpoint(server, time))
    else:
        assert score(endpoint(server, time)) == wanted
    assert len(server.requests) == requests
    assert len(time.pauses) == requests - 1


def test_an_unreadable_reply_is_asked_for_again_in_another_way(server, time):
    server.script = ["I would rather not say.", "Hm."]
    assert score(endpoint(server, time, retries=0)) == 4
    assert [(r["seed"], r["temperature"]) for r in server.requests] == [(0, 0.0), (1000, 0.3), (2000, 0.3)]


def test_a_refusal_is_told(server, time):
    told = completion(None)
    told["choices"][0]["message"]["refusal"] = "I do not look at faces."
    server.respond = lambda _: (200, told)
    with pytest.raises(ParseError, match="a refusal: I do not look at faces"):
        score(endpoint(server, time))


def test_an_answer_without_end_is_not_read(server, time):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")

    server.respond = lambda _: endless
    with pytest.raises(JudgeFailed, match="longer than 8388608 bytes"):
        score(endpoint(server, time))
    assert len(server.requests) == 1


# ---------------------------------------------------------------------------------------------------- what servers understand


def picky(*words, status=400):
    """A server that refuses requests with any of these fields or formats."""

    def respond(body):
        shape = (body.get("response_format") or {}).get("type")
        wrong = next((w for w in words if w in body or w == shape), None)
        return wrong and refusal(
            status, f"Unsupported value: '{'response_format' if wrong == shape else wrong}' of {wrong}"
        )

    return respond


def shapes(server):
    return [(r.get("response_format") or {"type": None})["type"] for r in server.requests]


@pytest.mark.parametrize(
    ("refused", "tried"),
    [
        ((), ["json_schema"]),
        (("json_schema",), ["json_schema", "json_object"]),
        (("response_format",), ["json_schema", "json_object", None]),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_format_that_is_refused_is_never_asked_for_again(server, time, refused, tried, status):
    server.respond = picky(*refused, status=status)
    client = endpoint(server, time, retries=0)
    assert [score(client), score(client)] == [4, 4]
    assert shapes(server) == [*tried, tried[-1]]
    assert server.requests[0]["response_format"]["json_schema"]["strict"] is True
    assert time.pauses == []


def test_two_requests_at_once_go_down_one_level(server, time):
    """A refusal of a form that another request has already left must not cost a second level."""
    server.respond = picky("json_schema")
    client = endpoint(server, time)
    before = client.spoken
    score(client)
    assert client._adapted("response_format", before, server.requests[0]) and client.spoken.level == 1


def test_parameters_that_a_model_does_not_know(server, time):
    """OpenAI's words of 2025 for its reasoning models, one refusal after the other."""

    def respond(body):
        if "max_tokens" in body:
            return refusal(
                400, "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            )
        if "temperature" in body:
            return refusal(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        return None

    server.respond = respond
    client = endpoint(server, time)
    assert [score(client), score(client)] == [4, 4]
    assert len(server.requests) == 4
    assert server.requests[-1]["max_completion_tokens"] == 2048
    assert not {"max_tokens", "temperature"} & set(server.requests[-1])


def test_repeats_without_seeds_are_warm(server, time):
    server.respond = picky("seed")
    HallucinationJudge(endpoint(server, time), repeats=2).score(SR, GT)
    assert [(r.get("seed"), r["temperature"]) for r in server.requests] == [(0, 0.0), (None, 0.3), (None, 0.3)]


def test_a_model_without_eyes(server, time):
    server.respond = lambda _: refusal(400, "image_url is not supported by this model")
    with pytest.raises(JudgeUnavailable, match=r"'tiny' at .* takes no pictures.*image_url.*--mmproj"):
        score(endpoint(server, time))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        (refusal(400, "context length exceeded"), JudgeFailed, r"status 400: context length exceeded"),
        (
            refusal(400, "maximum context length is 8192, you requested 9000 image tokens"),
            JudgeFailed,
            "maximum context",
        ),
        (refusal(422, "Failed to decode image 2"), JudgeFailed, "decode image 2"),
        (refusal(400, "image exceeds 20 megapixels"), JudgeFailed, "20 megapixels"),
        (refusal(413, "too large"), JudgeFailed, r"status 413: too large"),
        ((400, {"detail": "bad body"}), JudgeFailed, r"bad body"),
        ((400, {"error": "bad body"}), JudgeFailed, r"bad body"),
        ((200, {"error": {"message": "no credit", "code": 402}}), JudgeFailed, r"status 402: no credit"),
        (refusal(404, "no such model"), JudgeUnavailable, r"status 404: no such model.*with /models"),
        (refusal(403, "not you"), JudgeUnavailable, rf"set the environment variable {KEY} \(status 403\): not you"),
    ],
)
def test_refusals_are_not_repeated(server, time, how, kind, says):
    server.respond = lambda _: how
    with pytest.raises(kind, match=says) as error:
        score(endpoint(server, time))
    assert type(error.value) is kind and len(server.requests) == 1


def test_probabilities_of_the_score(server, time):
    top = [{"token": t, "logprob": math.log(p)} for t, p in (("4", 0.75), ("2", 0.25))]
    rows = [{"token": '{"score": '}, {"token": "4", "top_logprobs": top}]
    server.respond = lambda _: (200, completion('{"score": 4}', logprobs={"content": [*rows, {"token": "}"}]}))
    assert score(endpoint(server, time, logprobs=True)) == pytest.approx(3.5)
    assert server.requests[0]["logprobs"] is True and server.requests[0]["top_logprobs"] == 10
    server.respond = lambda body: refusal(400, "logprobs is not supported") if "logprobs" in body else None
    assert score(endpoint(server, time, logprobs=True)) == 4
    assert not {"logprobs", "top_logprobs"} & set(server.requests[-1])


# ---------------------------------------------------------------------------------------------------- models, addresses, keys


def test_the_only_model_of_a_server(server, time):
    assert endpoint(server, time, model=None).name == "tiny"
    server.models = ["one", "two"]
    with pytest.raises(JudgeUnavailable, match=r"2 models: one, two\. Name one"):
        endpoint(server, time, model=None)
    assert endpoint(server, time).models() == ["one", "two"]


def test_the_whole_path_may_be_given(server, time):
    server.url += "/chat/completions"
    assert score(endpoint(server, time)) == 4


def test_an_address_without_its_path(server, time):
    server.url = server.url.removesuffix("/v1")
    with pytest.raises(JudgeUnavailable, match="status 404"):
        score(endpoint(server, time))


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://h/v1", f"http://u:{SECRET}@h/v1", f"http://h/v1?key={SECRET}"]
)
def test_addresses_that_cannot_be(url):
    with pytest.raises(UserError, match=r"judge.*(Write http|" + KEY + ")") as error:
        Endpoint(url, "tiny")
    assert SECRET not in str(error.value)


def test_the_key_goes_with_every_request(server, time, monkeypatch, tmp_path):
    server.key = SECRET
    monkeypatch.setenv(KEY, SECRET)
    assert score(endpoint(server, time)) == 4
    monkeypatch.delenv(KEY)
    with pytest.raises(JudgeUnavailable, match=rf"asks for a key; set the environment variable {KEY} \(status 401\)"):
        score(endpoint(server, time))
    (tmp_path / "key").write_text(f"{SECRET}\n")
    assert score(endpoint(server, time, key_file=tmp_path / "key")) == 4


def test_key_files_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"key file .* cannot be read \(FileNotFoundError\)"):
        Endpoint("http://h/v1", "tiny", key_file=tmp_path / "none")
    (tmp_path / "key").write_text(f"{SECRET} and more")
    with pytest.raises(UserError, match="holds spaces") as error:
        Endpoint("http://h/v1", "tiny", key_file=tmp_path / "key")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "how",
    [
        refusal(401, f"no: Bearer {SECRET}"),
        refusal(500, SECRET),
        refusal(400, SECRET),
        (200, {"error": {"message": SECRET, "code": 400}}),
        (302, {}, {"Location": f"http://elsewhere/{SECRET}"}),
        SECRET,
        SECRET.encode(),
    ],
)
def test_the_key_is_never_told(server, time, monkeypatch, tmp_path, how, capfd):
    """Neither by errors, though the server repeats it, nor in the cache."""
    monkeypatch.setenv(KEY, SECRET)
    server.respond = lambda _: how
    client = endpoint(server, time, retries=1)
    with pytest.raises(UserError) as error:
        score(client)
    server.respond = lambda _: json.dumps({"score": 2, "items": [{"description": SECRET}]})
    result = HallucinationJudge(client, repeats=1, cache=tmp_path).score(SR, GT)
    written = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    for text in (str(error.value), repr(client), written, result.to_json(), *capfd.readouterr()):
        assert SECRET not in text
    assert "***" in written


def test_redirects_are_not_followed(server, time, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with reward_stub.running() as other:
        server.respond = lambda _: (307, {}, {"Location": f"{other.url}/v1/chat/completions"})
        with pytest.raises(
            JudgeUnavailable, match=rf"sends elsewhere, to {other.url}/v1/chat/completions \(status 307\)"
        ):
            score(endpoint(server, time))
        assert other.headers == []


# ---------------------------------------------------------------------------------------------------- the ledger


def test_every_paid_reply_is_counted(server, time):
    client = endpoint(server, time, prices=(2.5, 10.0))
    server.script = [refusal(500, "busy"), "no number", None]
    score(client)
    assert client.ledger.as_json() == {
        "requests": 3, "replies": 2, "uncounted": 0, "cached": 0, "tokens_in": 2000, "tokens_out": 100,
        "cost": pytest.approx(2000 * 2.5e-6 + 100 * 10e-6), "prices": [2.5, 10.0],
    }  # fmt: skip


def test_a_cost_is_not_known_where_tokens_are_not(server, time):
    client = endpoint(server, time, prices=(1, 1))
    server.script = [(200, {**completion('{"score": 2}'), "usage": {"prompt_tokens": True}})]
    score(client)
    assert (client.ledger.uncounted, client.ledger.cost) == (1, None)
    assert endpoint(server, time).ledger.cost is None
    with pytest.raises(UserError, match="prices"):
        endpoint(server, time, prices=(-1, 1))
