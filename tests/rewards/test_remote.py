"""A reward behind HTTP, against a server that answers well, badly, late, in another order, or not at all."""

import json
import math
import socket
import threading
import time

import pytest
import reward_stub
import torch

from tropism.core import Batch, UserError, scored
from tropism.rewards import remote as remotes
from tropism.rewards.connection import TIMEOUT, own_timeout, place_of
from tropism.rewards.load import load_reward, load_rewards, split
from tropism.rewards.protocol import TOKEN
from tropism.rewards.remote import Remote

SECRET = "s3cret-t0ken"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    with reward_stub.running() as stub:
        yield stub


def remote(server, **more):
    return Remote(server.url, **{"timeout": 5, "pause": 0.001, **more})


def pictures(n=4):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def red(images):
    return (images[:, 0] * 255).round().double().mean((1, 2))


def batch(n=4, meta=None):
    return Batch([f"prompt {i}" for i in range(n)], meta=meta)


def test_scores_and_what_is_sent(server):
    reward, images = remote(server), pictures()
    found = scored(reward, images, batch(meta=[{"n": i} for i in range(4)]))
    torch.testing.assert_close(found, red(images))
    assert (reward.name, reward.differentiable, found.dtype) == ("remote:red", False, torch.float64)
    (request,) = server.requests
    assert (request["version"], request["reward"]) == (1, "red")
    assert [s["prompt"] for s in request["samples"]] == [f"prompt {i}" for i in range(4)]
    assert [s["meta"] for s in request["samples"]] == [{"n": i} for i in range(4)]
    assert [set(s) for s in request["samples"]] == [{"id", "prompt", "meta", "png"}] * 4


def test_tokens_are_lists_of_numbers(server):
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert remote(server)(tokens, batch(2)).tolist() == [6, 15]
    assert server.requests[0]["samples"][1]["tokens"] == [4, 5, 6]


def test_a_few_samples_a_request(server):
    images = pictures(7)
    torch.testing.assert_close(remote(server, at_once=3, parallel=2)(images, batch(7)), red(images))
    assert sorted(len(r["samples"]) for r in server.requests) == [1, 3, 3]


@pytest.mark.parametrize(("told", "most"), [({}, 1), ({"parallel": 1}, 1), ({"parallel": 3}, 3)])
def test_no_request_waits_for_others_in_the_server(server, told, most):
    """Its clock would run: four at a time would make a limit of 120 s one of 30."""
    lock, now, seen = threading.Lock(), [], []

    def respond(n, ids, scores):
        with lock:
            now.append(n)
            seen.append(len(now))
        time.sleep(0.03)
        with lock:
            now.remove(n)
        return reward_stub.honest(n, ids, scores)

    server.health, server.respond = server.health | told, respond
    torch.testing.assert_close(remote(server, at_once=1)(pictures(6), batch(6)), red(pictures(6)))
    assert max(seen) == most


def test_large_pictures_go_a_few_at_a_time(server, monkeypatch):
    monkeypatch.setattr(remotes, "MOST_TOGETHER", 2 * 8 * 8 + 5)
    torch.testing.assert_close(remote(server)(pictures(5), batch(5)), red(pictures(5)))
    assert [len(r["samples"]) for r in server.requests] == [2, 2, 1]


def test_the_newest_scores_are_remembered(server, monkeypatch):
    monkeypatch.setattr(remotes, "REMEMBERED", 3)
    reward, images = remote(server), pictures(4)
    reward(images, batch(4))
    reward(images[1:], batch(4)[[1, 2, 3]])
    assert len(server.requests) == 1, "the three newest are known"
    torch.testing.assert_close(reward(images[:1], batch(4)[[0]]), red(images[:1]))
    assert len(server.requests) == 2, "the oldest is asked for again"
    reward(images[1:2], batch(4)[[1]])
    assert len(server.requests) == 3, "and has taken the place of the next"


def test_equal_samples_are_asked_for_once(server):
    reward, images = remote(server), pictures(2)[[0, 1, 0, 0]]
    same = Batch(["a", "b", "a", "c"])
    first = reward(images, same)
    assert len(server.requests[0]["samples"]) == 3, "equal but for its prompt is another sample"
    assert torch.equal(reward(images, same), first)
    assert len(server.requests) == 1
    reward(images, Batch(["a"] * 4, meta=[{"n": 1}] * 4))
    assert len(server.requests) == 2, "other metadata is another sample"


def test_ids_are_matched_and_not_their_order(server):
    server.respond = lambda n, ids, scores: reward_stub.honest(n, ids[::-1], scores[::-1])
    torch.testing.assert_close(remote(server)(pictures(), batch()), red(pictures()))


def without(n, ids, scores):
    return reward_stub.honest(n, ids[1:], scores[1:])


def twice(n, ids, scores):
    return reward_stub.honest(n, [*ids, ids[0]], [*scores, 0.0])


def extra(n, ids, scores):
    return reward_stub.honest(n, [*ids, "other"], [*scores, 0.0])


def giving(score):
    return lambda n, ids, scores: reward_stub.honest(n, ids, [score, *scores[1:]])


@pytest.mark.parametrize(
    ("respond", "says"),
    [
        (without, r"without a score for 1 of 4 samples, the first id '0'"),
        (twice, r"two scores for id '0'"),
        (extra, r"unknown id 'other'"),
        (giving("0.5"), r"score '0.5' for id '0', which is neither a number nor null"),
        (giving(True), r"neither a number nor null"),
        (giving([1.0]), r"neither a number nor null"),
        (lambda *_: b"<html>", r"not JSON"),
        (lambda *_: b"\xff\xfe", r"not JSON"),
        (lambda *_: b"[" * 200_000, r"not JSON"),
        (lambda *_: [1, 2], r"a list instead of an object"),
        (lambda *_: {"version": 1}, r"without a list of scores"),
        (lambda *_: {"version": 1, "scores": [1, 2, 3, 4]}, r"no \{id, score\}: '1'"),
        (lambda *_: {"version": 1, "scores": [{"id": 0, "score": 1}]}, r"no \{id, score\}"),
        (lambda *_: {"version": 2, "scores": []}, r"protocol version '2'; this is version 1"),
        (lambda *_: b'{"version": 1, "scores": ' + b" " * 2**21, r"longer than 1048576 bytes"),
        (lambda *_: lambda h: h.send(200, b"{}", length=10**12), r"longer than 1048576 bytes"),
    ],
)
def test_answers_that_are_none(server, respond, says):
    server.respond = respond
    reward = remote(server)
    with pytest.raises(UserError, match=rf"The answer of the reward server http://127.*{says}.*tropism serve") as error:
        reward(pictures(), batch())
    assert len(server.requests) == 1, "trying again does not help"
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf, 10**400])
def test_a_sample_that_cannot_be_scored_is_nan(server, score):
    server.respond = giving(score)
    found = remote(server)(pictures(), batch())
    assert found[0].isnan() and torch.equal(found[1:], red(pictures())[1:])


def test_a_picture_that_is_not_finite_is_not_sent(server):
    images = pictures()
    images[2, 1, 0, 0] = torch.nan
    found = remote(server)(images, batch())
    assert found.isnan().tolist() == [False, False, True, False]
    assert len(server.requests[0]["samples"]) == 3


def failing(times, how):
    return lambda n, ids, scores: how if n <= times else reward_stub.honest(n, ids, scores)


HALF = lambda handler: handler.send(200, b'{"version": 1, "scores": [', length=1000)


def HALF_UNTOLD(handler):
    """Without a length only the text shows that it is half."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\n\r\n{"version": 1, "scores": [')
    handler.close_connection = True


CLOSED = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "how", [(500, {"error": "busy"}), (503, {}), (429, {}), (500, b"<html>"), HALF, HALF_UNTOLD, CLOSED]
)
def test_failures_that_pass_are_tried_again(server, how):
    server.respond = failing(2, how)
    torch.testing.assert_close(remote(server)(pictures(), batch()), red(pictures()))
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ((500, {"error": "out of\nmemory"}), r"failed 3 times: status 500: out of memory\."),
        (HALF, r"failed 3 times: it sent 26 of 1000 bytes"),
        (HALF_UNTOLD, r"failed 3 times: an answer that did not tell its length is not JSON"),
        (CLOSED, r"failed 3 times"),
    ],
)
def test_failures_that_stay_end_with_one_line(server, how, says):
    server.respond = failing(99, how)
    with pytest.raises(UserError, match=says) as error:
        remote(server, retries=2)(pictures(), batch())
    assert len(server.requests) == 3
    assert "\n" not in str(error.value)


def test_a_request_that_is_refused_is_not_repeated(server):
    server.respond = lambda *_: (422, {"error": "no such prompt"})
    with pytest.raises(UserError, match="status 422: no such prompt"):
        remote(server)(pictures(), batch())
    assert len(server.requests) == 1


def test_pauses_grow_and_differ(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.respond = failing(99, (500, {}))
    with pytest.raises(UserError, match="failed 5 times"):
        remote(server, retries=4, pause=1.0)(pictures(), batch())
    assert all(0.5 * 2**i <= p <= 1.5 * 2**i for i, p in enumerate(pauses)) and len(pauses) == 4
    assert len({p / 2**i for i, p in enumerate(pauses)}) == 4


def dribbling(stub):
    """A byte now and then, each well within a socket's own limit; without a length the end would look like a whole answer."""

    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not stub.stop.wait(0.05):
            handler.wfile.write(b" ")

    return answer


def slow_headers(stub):
    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not stub.stop.wait(0.05):
            handler.wfile.write(b"X-More: 1\r\n")

    return answer


@pytest.mark.parametrize("kind", [lambda stub: lambda _: stub.stop.wait(), dribbling, slow_headers])
def test_who_is_late_is_left(server, kind):
    server.respond = lambda *_: kind(server)
    began, reward = time.monotonic(), remote(server, timeout=0.2, retries=1)
    with pytest.raises(UserError, match=rf"failed 2 times: no answer within 0\.2 s.*{TIMEOUT}=300"):
        reward(pictures(), batch())
    assert time.monotonic() - began < 2


def test_who_is_slow_once_is_asked_again(server):
    server.respond = failing(1, lambda _: server.stop.wait())
    torch.testing.assert_close(remote(server, timeout=0.3)(pictures(), batch()), red(pictures()))


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"http://127.0.0.1:{port} failed: .*refused.*runs and answers /health"):
            load_reward(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("health", "says"),
    [
        (None, "status 404: nothing here"),
        ({"version": 0, "name": "red", "hash": "a"}, "protocol version '0'"),
        ({"name": "red", "hash": "a"}, "protocol version 'None'"),
        ({"version": 1, "hash": "a"}, "without a name"),
        ({"version": 1, "name": "red"}, "without a hash"),
        *(
            ({"version": 1, "name": "red", "hash": "a", "parallel": n}, "whole number above 0")
            for n in (0, "2", True, 1.5)
        ),
        ({"version": 1, "name": "r\x1b[2Jed", "hash": "a"}, "without a name"),
        ({"version": 1, "name": "r" * 201, "hash": "a"}, "without a name"),
        (b"hello", "not JSON"),
    ],
)
def test_a_handshake_that_fails(server, health, says):
    server.health = health
    with pytest.raises(UserError, match=says):
        remote(server)


def test_a_reward_that_changes_while_a_run_goes_on(server):
    server.respond = lambda n, ids, scores: {**reward_stub.honest(n, ids, scores), "hash": "a1" if n == 1 else "b2"}
    reward = remote(server)
    reward(pictures(), batch())
    with pytest.raises(UserError, match="changed its reward"):
        reward(pictures() / 2, batch())


# ---------------------------------------------------------------------------------------------------- tokens


def test_a_token_that_is_asked_for_but_absent(server):
    server.token = SECRET
    with pytest.raises(UserError, match=rf"asks for a token; set the environment variable {TOKEN} \(status 401\)"):
        remote(server)


def test_the_right_token_goes_with_every_request(server, monkeypatch):
    server.token = SECRET
    monkeypatch.setenv(TOKEN, SECRET)
    torch.testing.assert_close(remote(server)(pictures(), batch()), red(pictures()))
    assert [h["Authorization"] for h in server.headers] == [f"Bearer {SECRET}"] * 2


@pytest.mark.parametrize(
    "how",
    [
        (401, {"error": f"no: Bearer {SECRET}"}),
        (500, {"error": f"no: Bearer {SECRET}"}),
        (422, {"error": f"no: Bearer {SECRET}"}),
        {"version": 1, "scores": [{"id": SECRET, "score": 1}]},
        {"version": SECRET},
        lambda handler: handler.wfile.write(f"{SECRET}\r\n".encode()),
        lambda handler: handler.send(302, b"", Location=f"http://elsewhere/{SECRET}"),
    ],
)
def test_a_token_is_never_told(server, monkeypatch, how, capfd):
    """Neither by errors, though the server repeats it, nor by the reward's own words."""
    monkeypatch.setenv(TOKEN, SECRET)
    reward = remote(server, retries=1)
    server.respond = lambda *_: how
    with pytest.raises(UserError) as error:
        reward(pictures(), batch())
    for text in (str(error.value), repr(reward), repr(reward.connection.place), *capfd.readouterr()):
        assert SECRET[:6] not in text


def test_a_name_that_holds_the_token_is_not_taken(server, monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)
    server.health = {"version": 1, "name": SECRET, "hash": "a"}
    assert SECRET not in remote(server).name


def test_a_token_that_no_header_can_hold(server, monkeypatch):
    monkeypatch.setenv(TOKEN, f"{SECRET}\r\nX: y")
    with pytest.raises(UserError, match=TOKEN) as error:
        remote(server)
    assert SECRET not in str(error.value)


def test_redirects_are_not_followed(server, monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)
    with reward_stub.running() as other:
        server.respond = lambda *_: lambda handler: handler.send(307, b"", Location=f"{other.url}/score")
        with pytest.raises(UserError, match=rf"sends elsewhere, to {other.url}/score \(status 307\)"):
            remote(server)(pictures(), batch())
        assert other.headers == []


# ---------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("http://h:8000", "http://h:8000", 1.0),
        ("http://h:8000=0.5", "http://h:8000", 0.5),
        ("https://h/a/b=-2", "https://h/a/b", -2.0),
        ("http://h:8000/?model=3", "http://h:8000/?model=3", 1.0),
        ("http://h:8000/?model=3=0.5", "http://h:8000/?model=3", 0.5),
        ("http://h:8000/?a=1&b=2", "http://h:8000/?a=1&b=2", 1.0),
        ("http://h:8000/?a=1&b=2=3", "http://h:8000/?a=1&b=2", 3.0),
        ("http://h/a=1/b", "http://h/a=1/b", 1.0),
    ],
)
def test_addresses_and_weights(text, name, weight):
    assert split(text) == (name, weight)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://user:hidden@h:8000", "holds a secret"),
        ("http://h:8000/?api_key=hidden", r"holds a secret \(api_key\)"),
        ("http://h:800000", "cannot be read"),
        ("http://", "no address"),
        ("http://h/a b", "no address"),
        ("http://h/#a", "no address"),
        ("ftp://h", "no address"),
    ],
)
def test_addresses_that_cannot_be(url, says):
    with pytest.raises(UserError, match=says) as error:
        place_of(url)
    assert "hidden" not in str(error.value)


def test_a_path_and_a_query_go_before_and_after(server):
    Remote(f"{server.url}/my/rewards/?model=3")
    assert server.paths == ["/my/rewards/health?model=3"]
    assert str(place_of("http://[::1]:80/x/")) == "http://[::1]:80/x"


def test_weights_and_sums(server):
    reward = load_rewards([f"{server.url}=0.5", "jpeg-bytes"])
    assert reward.name == "0.5 remote:red + jpeg-bytes"
    images = pictures()
    torch.testing.assert_close(
        reward(images, batch()), 0.5 * red(images) + load_reward("jpeg-bytes")(images, batch()).double()
    )


@pytest.mark.parametrize("value", [torch.ones(1), math.nan])
def test_metadata_that_is_not_json(server, value):
    with pytest.raises(UserError, match=r"metadata of the prompt 'prompt 0' cannot be sent"):
        remote(server)(pictures(), batch(meta=[{"x": value}] * 4))


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e300"])
def test_a_time_limit_that_cannot_be(monkeypatch, text):
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(UserError, match="seconds above 0"):
        own_timeout()


def test_other_shapes(server):
    reward = remote(server)
    for samples in (torch.rand(4, 1, 8, 8), torch.rand(4, 8), torch.ones(4, 3, 8, 8, dtype=torch.long)):
        with pytest.raises(UserError, match=r"pictures \(B, 3, H, W\) or tokens \(B, L\)"):
            reward(samples, batch())


def test_the_request_is_json_all_the_way(server):
    remote(server)(pictures(1), batch(1))
    assert json.loads(json.dumps(server.requests[0])) == server.requests[0]
    assert server.headers[-1]["Content-Type"] == "application/json"
