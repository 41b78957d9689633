"""Replies are kept by what was asked, whole, and never asked for twice."""

import json
import threading

import judge_stub
import pytest
import torch
from judge_stub import scene, spoilt

from tropism.core import UserError
from tropism.restore.judge import HallucinationJudge
from tropism.restore.judge_cache import Cache, CacheMiss, described, key_of
from tropism.restore.judge_client import Endpoint
from tropism.restore.judge_pictures import shown
from tropism.restore.judge_prompt import Question
from tropism.restore.judge_reply import ParseError, parse

GT, LR = scene()
SR = spoilt(GT, 6)


@pytest.fixture
def server():
    with judge_stub.running() as stub:
        yield stub


def judge(server, cache, model="tiny", repeats=1, tiles=1, cache_only=False, cap_omissions=True, **more):
    time = judge_stub.Time()
    client = Endpoint(server.url, model, sleep=time.sleep, clock=time.clock, retries=0, **more)
    return HallucinationJudge(
        client, repeats=repeats, tiles=tiles, cache=cache, cache_only=cache_only, cap_omissions=cap_omissions
    )


def test_the_second_identical_call_asks_nothing(server, tmp_path):
    first = judge(server, tmp_path, repeats=2, tiles=2).score(SR, GT, LR)
    assert len(server.requests) == 10 == len(list(tmp_path.rglob("*.json")))
    again = judge(server, tmp_path, repeats=2, tiles=2)
    assert again.score(SR, GT, LR) == first and len(server.requests) == 10
    assert (again.backend.ledger.cached, again.backend.ledger.requests) == (10, 0)
    assert {p.stem for p in tmp_path.rglob("*.json")} == set(first.cache_keys)


def test_another_host_with_the_same_model_is_the_same_judge(server, tmp_path):
    judge(server, tmp_path).score(SR, GT)
    with judge_stub.running() as other:
        assert judge(other, tmp_path).score(SR, GT).score == 4
        assert other.requests == []


@pytest.mark.parametrize(
    "more", [{"model": "other"}, {"temperature": 0.5}, {"seed": 1}, {"max_tokens": 99}, {"logprobs": True}]
)
def test_another_model_or_sampling_is_another_judge(server, tmp_path, more):
    judge(server, tmp_path).score(SR, GT)
    judge(server, tmp_path, **more).score(SR, GT)
    assert len(server.requests) == 2


def test_what_a_key_holds():
    def key(model="m", sampling=0.0, repeat=0, **pictures):
        frame = {"B": torch.zeros(1, 3, 4, 6), "C": torch.zeros(1, 3, 4, 6)} | pictures
        question = Question(shown(frame, (0, 0, 1, 1)))
        return key_of(described(question, model, {"temperature": sampling}, repeat))

    one_pixel = torch.zeros(1, 3, 4, 6)
    one_pixel[0, 2, 3, 5] = 1 / 255
    upright = {label: torch.zeros(1, 3, 6, 4) for label in "BC"}
    swapped = Question(shown({label: torch.zeros(1, 3, 4, 6) for label in "BC"}, (0, 0, 1, 1))).swapped
    keys = [
        key(), key(model="n"), key(sampling=0.1), key(repeat=1), key(B=one_pixel), key(C=one_pixel), key(**upright),
        key(A=torch.zeros(1, 3, 4, 6)), key_of(described(swapped, "m", {"temperature": 0.0}, 0)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) and key() == keys[0]


def test_another_wording_is_another_key(monkeypatch):
    question = Question(shown({label: torch.zeros(1, 3, 4, 4) for label in "BC"}, (0, 0, 1, 1)))
    before = key_of(described(question, "m", {}, 0))
    monkeypatch.setattr("tropism.restore.judge_cache.VERSION", "hs-v2")
    assert key_of(described(question, "m", {}, 0)) != before


def test_an_entry_tells_what_was_asked(server, tmp_path):
    judge(server, tmp_path).score(SR, GT)
    (file,) = tmp_path.rglob("*.json")
    entry = json.loads(file.read_text())
    assert entry["key"] == file.stem and (entry["prompt"], entry["model"], entry["repeat"]) == ("hs-v1", "tiny", 0)
    assert [(p["label"], p["role"], p["size"]) for p in entry["pictures"]] == [
        ("B", "gt", [64, 64]),
        ("C", "sr", [64, 64]),
    ]
    assert json.loads(entry["raw"])["score"] == 4 and entry["usage"] == [1000, 50]
    assert server.url not in file.read_text() and "127.0.0.1" not in file.read_text()


DAMAGE = {
    "half": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "another": lambda text: text.replace('"key": "', '"key": "0'),
    "no score": lambda text: json.dumps({**json.loads(text), "raw": "nothing"}),
    "no text": lambda text: json.dumps({**json.loads(text), "raw": None}),
    "a list": lambda _: "[]",
    "no usage": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "usage"}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_filled_again(server, tmp_path, kind):
    first = judge(server, tmp_path).score(SR, GT)
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    file.write_text(DAMAGE[kind](whole))
    with pytest.raises(CacheMiss):
        judge(server, tmp_path, cache_only=True).score(SR, GT)
    assert judge(server, tmp_path).score(SR, GT) == first
    assert len(server.requests) == 2 and file.read_text() == whole


def test_a_cache_alone_asks_nobody(server, tmp_path):
    first = judge(server, tmp_path, repeats=2).score(SR, GT)
    only = judge(server, tmp_path, repeats=2, cache_only=True)
    assert only.score(SR, GT) == first
    with pytest.raises(CacheMiss, match=r"holds no whole reply .* nothing may be asked"):
        judge(server, tmp_path, repeats=3, cache_only=True).score(SR, GT)
    assert len(server.requests) == 2


def test_a_reply_without_a_score_is_not_kept(server, tmp_path):
    server.respond = lambda _: "no idea"
    with pytest.raises(ParseError):
        judge(server, tmp_path).score(SR, GT)
    assert list(tmp_path.rglob("*.json")) == []


def test_the_cap_is_not_in_the_cache(server, tmp_path):
    lost = {"kind": "missing", "omission": True}
    server.respond = lambda _: json.dumps({"items": [lost], "score": 4})
    assert judge(server, tmp_path).score(SR, GT).score == 2
    assert judge(server, tmp_path, cap_omissions=False).score(SR, GT).score == 4
    assert len(server.requests) == 1


def test_many_writers_of_one_key(tmp_path):
    cache, verdict = Cache(tmp_path), parse(" " * 100_000 + '{"score": 3}')
    writers = [threading.Thread(target=cache.put, args=("ab" * 32, {}, verdict)) for _ in range(8)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        found = cache.get("ab" * 32)
        assert found is None or found.raw == verdict.raw
    for thread in writers:
        thread.join()
    assert cache.get("ab" * 32).score == 3
    assert [p.name for p in (tmp_path / "ab").iterdir()] == [f"{'ab' * 32}.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    cache.put("ab" * 32, {}, parse('{"score": 3}'))

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("tropism.restore.judge_cache.os.fsync", full)
    with pytest.raises(UserError, match="cannot be written: no space left"):
        cache.put("ab" * 32, {}, parse('{"score": 5}'))
    assert cache.get("ab" * 32).score == 3 and len(list((tmp_path / "ab").iterdir())) == 1


def test_a_folder_that_is_a_file(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache .*file cannot be written"):
        judge(server, tmp_path / "file").score(SR, GT)
