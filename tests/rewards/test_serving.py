"""The reference reward server: the local reward's own numbers, and nothing that comes in is trusted."""

import base64
import http.client
import io
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from tropism import cli, commands
from tropism.core import Batch, UserError, scored
from tropism.rewards import protocol
from tropism.rewards.load import load_reward, load_rewards
from tropism.rewards.named import Named
from tropism.rewards.protocol import TOKEN, Refused, as_png, of_png
from tropism.rewards.remote import Remote
from tropism.rewards.serving import serving

SECRET = "s3cret-t0ken"


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)


@contextmanager
def served(reward, identity="x"):
    with serving(reward, identity=identity) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def eight_bits(n=5):
    return (torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255).round() / 255


@pytest.mark.parametrize("name", ["jpeg-bytes", "jpeg", "shapes-aesthetic", "shapes-count", "incompressibility"])
def test_the_same_scores_as_at_home(name):
    reward, images = load_reward(name), eight_bits()
    batch = Batch(["three red circles on sand", "two blue squares on sand"] * 2 + ["one green star on sand"])
    with served(reward) as server:
        found = scored(Remote(server.url, at_once=2), images, batch)
    torch.testing.assert_close(found, reward(images, batch).double(), rtol=1e-6, atol=1e-6)
    assert found.std() > 0


def test_the_same_scores_of_tokens():
    tokens = torch.randint(0, 4, (6, 50), generator=torch.Generator().manual_seed(2))
    reward, batch = load_reward("gc-window"), Batch([""] * 6)
    with served(reward) as server:
        assert torch.equal(Remote(server.url)(tokens, batch), reward(tokens, batch).double())


def test_a_picture_survives_to_its_eight_bits():
    image = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0))
    image[0, 0, :2] = torch.tensor([0.0, 1.0])
    back = of_png(base64.b64encode(as_png(image)).decode())
    assert torch.equal((back * 255).round(), (image * 255).round())
    assert torch.equal(of_png(base64.b64encode(as_png(back)).decode()), back)


def test_metadata_and_what_is_not_finite():
    def by_meta(images, batch):
        return torch.tensor([float(m["score"]) for m in batch.meta])

    meta = [{"score": s} for s in (1, "nan", "-inf", 2.5)]
    with served(by_meta) as server:
        found = Remote(server.url)(eight_bits(4), Batch(["a"] * 4, meta=meta))
    assert found.isnan().tolist() == [False, True, True, False] and found[[0, 3]].tolist() == [1, 2.5]


def test_the_handshake():
    reward = load_reward("jpeg")
    with served(reward, "a") as one, served(reward, "a") as two, served(reward, "b") as three:
        found = [Remote(s.url) for s in (one, two, three)]
    assert [f.name for f in found] == ["remote:jpeg"] * 3
    assert found[0].connection is not found[1].connection and found[0].hash == found[1].hash != found[2].hash


def test_failures_of_the_reward_reach_its_user():
    def broken(images, batch):
        if batch.prompts[0] == "mine":
            raise UserError("The prompt is mine. Take another.")
        raise KeyError("width")

    with served(broken) as server:
        reward = Remote(server.url, retries=1, pause=0.001)
        with pytest.raises(UserError, match=r"failed 2 times: status 500: Reward 'broken' raised KeyError"):
            reward(eight_bits(1), Batch(["a"]))
        with pytest.raises(UserError, match="status 422: The prompt is mine"):
            reward(eight_bits(1), Batch(["mine"]))
        assert reward.connection.requests == 4, "a mistake of the user's is not tried again"


# ---------------------------------------------------------------------------------------------------- what comes in


PNG = base64.b64encode(as_png(torch.zeros(3, 2, 2))).decode()
SAMPLE = {"id": "0", "prompt": "a", "meta": {}, "png": PNG}


def post(server, body, path="/score", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def red():
    with served(Named("red", True, lambda images, batch: images[:, 0].mean((1, 2)))) as server:
        yield server


def request(*samples, **more):
    return {"version": 1, "samples": list(samples), **more}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"\x80\x04\x95", "not JSON"),
        (b"[]", "a list instead of an object"),
        ({"samples": [SAMPLE]}, "protocol version 'None'"),
        (request(SAMPLE, reward="blue"), "another reward; this is 'red'"),
        (request(), "1 to 256 samples"),
        (request(*[SAMPLE] * 257), "1 to 256 samples"),
        (request(1), "1 to 256 samples"),
        (request({**SAMPLE, "id": 0}), "no text"),
        (request({**SAMPLE, "prompt": None}), "no text"),
        (request(SAMPLE, SAMPLE), "an id twice"),
        (request({**SAMPLE, "meta": [1]}), "meta that is no object"),
        (request({**SAMPLE, "png": "%%%"}), "no PNG"),
        (request({**SAMPLE, "png": 3}), "no PNG"),
        (request({"id": "0", "prompt": "a"}), "no PNG"),
        (request({**SAMPLE, "png": PNG[:40]}), "no PNG"),
        (request({**SAMPLE, "tokens": ["1"]}), "tokens"),
        (request({**SAMPLE, "tokens": [-1]}), "tokens"),
        (request({**SAMPLE, "tokens": []}), "tokens"),
        (request(SAMPLE, {**SAMPLE, "id": "1", "tokens": [1]}), "tokens"),
    ],
)
def test_requests_that_are_none(red, body, says):
    status, answer = post(red, body)
    assert status == 400 and says in answer["error"]


def other_format(kind):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def test_only_png_of_bounded_size(red, monkeypatch):
    for kind in ("JPEG", "TIFF", "GIF"):
        assert post(red, request({**SAMPLE, "png": other_format(kind)}))[0] == 400
    monkeypatch.setattr(protocol, "MOST_PIXELS", 3)
    with pytest.raises(Refused, match="2 x 2 pixels; the limit is 3"):
        of_png(PNG)


def test_the_pictures_of_a_request_are_bounded_together(red, monkeypatch):
    """A black picture of 4096 x 4096 is 64 KiB and 200 MB unpacked; a request may hold 256."""
    monkeypatch.setattr(protocol, "MOST_TOGETHER", 2 * 4)
    samples = [{**SAMPLE, "id": str(i)} for i in range(3)]
    assert post(red, request(*samples[:2]))[0] == 200
    status, answer = post(red, request(*samples))
    assert status == 400 and "more than 8 pixels in all; send fewer" in answer["error"]
    unpacked = []
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: unpacked.append(image))
    with pytest.raises(Refused, match="in all"):
        of_png(PNG, left=3)
    assert unpacked == []


def test_one_request_is_scored_at_a_time():
    """Rewards are not made to be called from two threads at once; the server says so."""
    lock, now, seen = threading.Lock(), [], []

    def one(images, batch):
        with lock:
            now.append(1)
            seen.append(len(now))
        time.sleep(0.03)
        with lock:
            now.pop()
        return images.mean((1, 2, 3))

    with served(one) as server:
        assert Remote(server.url).parallel == 1
        Remote(server.url, at_once=1, parallel=4)(eight_bits(4), Batch(["a"] * 4))
    assert seen == [1] * 4


def test_prompts_that_name_a_reward_name_one_of_the_client(red):
    """A sum behind a server is one reward to its client."""
    with served(load_rewards(["jpeg", "incompressibility=0.5"])) as server:
        found = Remote(server.url)(eight_bits(1), Batch(["a"], meta=[{"reward": "remote:both"}]))
    assert found.item() != 0


def test_pictures_of_different_sizes(red):
    wide = base64.b64encode(as_png(torch.zeros(3, 2, 3))).decode()
    status, answer = post(red, request(SAMPLE, {**SAMPLE, "id": "1", "png": wide}))
    assert status == 400 and "different sizes" in answer["error"]


def test_lengths_and_places(red):
    assert post(red, request(SAMPLE))[0] == 200
    assert post(red, request(SAMPLE), path="/other")[0] == 404
    for length, status in (("-1", 411), ("x", 411), (str(protocol.MOST_BYTES + 1), 413), ("9" * 5000, 413)):
        with socket.create_connection(("127.0.0.1", red.server_port), timeout=5) as raw:
            raw.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
            assert raw.recv(1000).split()[1] == str(status).encode(), "answered without waiting for the body"


def test_a_client_that_goes_away_is_no_news(red, capfd):
    with socket.create_connection(("127.0.0.1", red.server_port), timeout=5) as raw:
        raw.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert post(red, request(SAMPLE))[0] == 200
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("header", [None, "Bearer other", SECRET, "Bearer ", "Bearer \xe9"])
def test_a_token_is_asked_for(monkeypatch, header, capfd):
    monkeypatch.setenv(TOKEN, SECRET)
    with served(load_reward("jpeg")) as server:
        status, answer = post(server, request(SAMPLE), **({"Authorization": header} if header else {}))
        assert status == 401 and SECRET not in str(answer)
        assert Remote(server.url)(eight_bits(1), Batch(["a"])).isfinite().all()
        monkeypatch.setenv(TOKEN, "other")
        with pytest.raises(UserError, match="refused the token in"):
            Remote(server.url)
    assert SECRET not in "".join(capfd.readouterr())


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_serves_until_it_is_interrupted(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def bright(images, batch):\n    return images.mean((1, 2, 3))\n")
    seen = []

    def interrupted(server):
        assert server.server_address[0] == "127.0.0.1"
        seen.append(server.hash)
        raise KeyboardInterrupt

    place = f"{tmp_path}/mine.py:bright"
    commands.serve(f"{place}=2", port=0, ready=interrupted)
    said = capsys.readouterr().out
    assert "Reward 2 bright listens: --reward http://127.0.0.1:" in said and "Stopped." in said and "TLS" not in said
    commands.serve([f"{place}=2"], port=0, ready=interrupted)
    commands.serve(f"{place}=3", port=0, ready=interrupted)
    (tmp_path / "mine.py").write_text("def bright(images, batch):\n    return -images.mean((1, 2, 3))\n")
    commands.serve(f"{place}=2", port=0, ready=interrupted)
    assert seen[0] == seen[1] and len(set(seen)) == 3, "the hash stands for weights and the content of the file"


def test_a_port_that_is_taken():
    with served(load_reward("jpeg")) as server, pytest.raises(UserError, match=r"cannot listen.*--port"):
        commands.serve("jpeg", port=server.server_port)


def test_a_guided_run_by_a_server(tmp_path, monkeypatch):
    """The whole way: a run whose reward is a server draws what it draws at home, and its folder does not hold the token."""
    monkeypatch.setenv(TOKEN, SECRET)
    how = {"model": "utr", "samples": 2, "pool": 0, "options": {"m": 2, "steps": 3}}
    with served(load_reward("gc-window")) as server:
        there = commands.guide("best-of-n", reward=server.url, out=tmp_path / "there", **how)
    home = commands.guide("best-of-n", reward="gc-window", out=tmp_path / "home", **how)
    for a, b in zip(there.pieces, home.pieces, strict=True):
        assert torch.equal(a.samples, b.samples) and torch.equal(a.rewards, b.rewards)
    for file in (f for f in (tmp_path / "there").rglob("*") if f.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file


def test_it_is_a_command():
    assert {"serve"} <= {c.callback.__name__ for c in cli.app.registered_commands if c.callback}
