"""`tropism hallucination score` from a user's side: a folder scored by the loopback judge, and every bad input explained or done right."""

import json
import os
import re
import signal

import judge_stub
import numpy as np
import pytest
from command_line import called
from judge_stub import scene
from PIL import Image
from restore import folders
from restore.folders import LEVELS, table

from tropism.restore import loading
from tropism.restore.judge_client import Endpoint
from tropism.restore.pictures import Picture


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Endpoint, "_pause", lambda *_: None)
    with judge_stub.running() as stub:
        yield stub


@pytest.fixture
def score(server, tmp_path, monkeypatch, capsys):
    """score("--lr", ..., roles="sr gt lr") -> (exit code, what was printed, what was said of errors)."""

    def run(*words, roles="sr gt lr", judge=None, repeats=1, out="out"):
        given = [w for role in roles.split() for w in (f"--{role}", tmp_path / role)]
        own = ["--repeats", repeats, "--swap-share", 0, "--parallel", 1] if judge is None else []
        code = called(
            monkeypatch,
            "hallucination",
            "score",
            *given,
            "--judge",
            judge or server.url,
            "--out",
            tmp_path / out,
            *own,
            *words,
        )
        return code, *capsys.readouterr()

    return run


def saved(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


# ---------------------------------------------------------------------------------------------------- the main job


def test_a_folder_is_scored(server, score, tmp_path):
    folders.write(tmp_path)
    code, printed, _ = score("--price-in", 2, "--price-out", 10, repeats=2)
    assert code == 0 and "Hallucination score 3.20 (1 is best, 5 worst), mean of 5 pictures, 95 % interval" in printed
    rows = table(tmp_path / "out" / "scores.csv")
    assert [(r["name"], float(r["score"]), r["higher_is_worse"]) for r in rows] == [
        (f"photo_{i}", s, "true") for i, s in enumerate(LEVELS)
    ]
    assert len(server.requests) == 10
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert not re.search(r"<script|<link|src=\"(?!data:image/png)|href=\"(?!#)|@import|url\(", page)
    cases = re.findall(r'<figure class="case" id="case-\d+">\s*<h3>(\S+)', page)
    assert cases == ["photo_3", "photo_2", "photo_1", "photo_4", "photo_0"], "the worst first"
    assert page.count("data:image/png") == 15, "three pictures a case"
    # the single spoilt block of photo_1 is the upper left 16 of 64 px, in each of its three pictures
    assert (
        page.split('id="case-3"')[1].split("</figure>")[0].count("left: 0.0%; top: 0.0%; width: 25.0%; height: 25.0%")
        == 3
    )
    assert "block 0, 0" in page and "seen in 2 of 2 repeats" in page
    assert "<td>11</td><td>10</td><td>0</td><td>10,000</td><td>500</td><td>0.0250</td>" in page, "2 * .01 + 10 * .0005"


def test_the_same_command_goes_on(server, score, tmp_path):
    folders.write(tmp_path, 3)
    assert score()[0] == 0 and len(server.requests) == 3
    folders.write(tmp_path, 5)
    assert score()[0] == 0 and len(server.requests) == 5
    assert [float(r["score"]) for r in table(tmp_path / "out" / "scores.csv")] == LEVELS
    runs = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert [(r["replies"], r["cached"]) for r in runs] == [(3, 0), (2, 3)]


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_interrupted_scoring_goes_on(server, score, tmp_path, parallel):
    folders.write(tmp_path)

    def interrupted(body):
        if len(server.requests) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    server.respond = interrupted
    code, _, said = score("--parallel", parallel)
    assert code == 130 and re.search(
        r"Stopped after [1-4] of 5 pictures, all kept in .*out\. The same command goes on\.", said
    )
    kept = table(tmp_path / "out" / "scores.csv")
    assert [float(r["score"]) for r in kept] == LEVELS[: len(kept)] and 1 <= len(kept) < 5
    server.respond = None
    assert score("--parallel", parallel)[0] == 0 and len(server.requests) == 5, "nothing is asked twice"
    assert [float(r["score"]) for r in table(tmp_path / "out" / "scores.csv")] == LEVELS


def test_the_key_is_written_nowhere(server, score, tmp_path, monkeypatch):
    folders.write(tmp_path, 1)
    server.key = "sk-not-to-be-told"
    monkeypatch.setenv("TROPISM_JUDGE_KEY", server.key)
    code, *said = score()
    assert code == 0 and not any(server.key in text for text in said)
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert len(files) == 5 and not any(server.key.encode() in f.read_bytes() for f in files)


def test_what_the_judge_says_is_text_on_the_page(server, score, tmp_path):
    folders.write(tmp_path, 1, names="<b>{}")
    item = {"box": [0.1, 0.1, 0.5, 0.5], "kind": "<i>", "description": "<script>alert(1)</script>", "severity": 3}
    server.respond = lambda _: json.dumps({"items": [item], "score": 4})
    assert score()[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "&lt;script&gt;alert(1)" in page
        and "<script" not in page
        and "&lt;b&gt;0" in page
        and "<i>" not in page.replace("<i>1</i>", "")
    )


def test_the_other_order_is_told(server, score, tmp_path):
    folders.write(tmp_path, 2)
    server.respond = lambda body: '{"score": 2}' if judge_stub.seen(body)[-1][0] == "C" else '{"score": 3}'
    assert score("--swap-share", 1)[0] == 0
    assert "<b>1.00</b>levels of difference" in (tmp_path / "out" / "report.html").read_text()


def test_without_references_it_says_what_it_cannot_know(server, score, tmp_path):
    folders.write(tmp_path, 3)
    assert score(roles="sr lr")[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No references were given" in page and "tend to be too low" in page and "no reference" in page
    assert {r["mode"] for r in table(tmp_path / "out" / "scores.csv")} == {"lr_only"}
    assert [label for label, _ in server.pictures[0]] == ["A", "C"]


# ---------------------------------------------------------------------------------------------------- kinds of pictures


def kinds(folder, pixels):
    """The same picture in kinds of files: (kind, note on the page)."""
    rgb = Image.fromarray(pixels)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.where(np.arange(64)[:, None] < 32, 255, 0).astype(np.uint8).repeat(64, 1)))
    white = pixels.copy()
    white[32:] = 255
    exif = Image.Exif()
    exif[274] = 6
    grey = rgb.convert("L")
    deep = np.array(grey).astype(np.uint16) * 257
    return {
        "alpha": (alpha, {}, white, "transparent parts laid over white"),
        "turned": (
            rgb.transpose(Image.Transpose.ROTATE_90),
            {"exif": exif},
            pixels,
            "turned as its EXIF orientation says",
        ),
        "grey": (grey, {}, np.repeat(np.array(grey)[..., None], 3, 2), ""),
        "deep": (Image.fromarray(deep), {}, np.repeat(np.array(grey)[..., None], 3, 2), ""),
    }


@pytest.mark.parametrize("kind", ["alpha", "turned", "grey", "deep"])
def test_what_a_viewer_shows_is_what_is_judged(kind, server, score, tmp_path):
    pixels = (scene(0)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    image, options, seen, note = kinds(tmp_path, pixels)[kind]
    saved(image, tmp_path / "sr" / "a.png", **options)
    saved(Image.fromarray(seen), tmp_path / "gt" / "a.png")
    assert score(roles="sr gt")[0] == 0
    assert table(tmp_path / "out" / "scores.csv")[0]["score"] == "1.0"
    shown = dict(server.pictures[0])
    assert (shown["B"] == seen).all() and (shown["C"] == seen).all()
    assert note in (tmp_path / "out" / "report.html").read_text()


def test_a_picture_of_20_000_pixels(server, score, tmp_path, monkeypatch):
    """Read in bands, shown as far as the tiles reach, and said so; what is invented in one part is found and placed there."""
    gt = folders.noisy(20_000, 48)
    sr = gt.copy()
    sr[:5000] = 255
    saved(Image.fromarray(sr), tmp_path / "sr" / "long.png", compress_level=1)
    saved(Image.fromarray(gt), tmp_path / "gt" / "long.png", compress_level=1)
    monkeypatch.setattr(loading, "BAND", 100_000)
    monkeypatch.setattr(Picture, "whole", None)
    windows, window = [], Picture.window
    monkeypatch.setattr(Picture, "window", lambda self, *at: windows.append(at[2] * at[3]) or window(self, *at))

    def judged(body):
        shown = {label: x.astype(float) for label, x in judge_stub.seen(body)}
        rows = (shown["B"] != shown["C"]).mean((1, 2)) > 0.5
        item = {"box": [0, 0, 1, float(rows.mean())], "kind": "added", "severity": 3, "description": "white"}
        return json.dumps({"items": [item] if rows.any() else [], "score": 5 if rows.mean() > 0.4 else 2})

    server.respond = judged
    code, _, said = score("--tiles", 2, roles="sr gt")
    assert code == 0, said
    assert max(windows) <= 100_000 and sum(windows) == 4 * gt[..., 0].size, "scored once and shown once"
    assert {x.shape[0] for shown in server.pictures for _, x in shown} == {1024} and len(server.requests) == 5
    row = table(tmp_path / "out" / "scores.csv")[0]
    assert row["score"] == "5.0", "half of an upper tile, a quarter of the whole"
    assert [item["box"][3] for item in json.loads(row["items"])] == pytest.approx([0.25] * 3, abs=0.01)
    assert "20,000 pixels on the longest side shown as 2,048" in (tmp_path / "out" / "report.html").read_text()


def test_mixed_names_are_paired(server, score, tmp_path):
    folders.write(tmp_path, 2, "photo_{}_x4_out", ["sr"])
    folders.write(tmp_path, 2, "Photo_{}", ["gt"])
    folders.write(tmp_path, 2, "photo_{}_LR4", ["lr"])
    assert score()[0] == 0
    assert [r["score"] for r in table(tmp_path / "out" / "scores.csv")] == ["1.0", "3.0"]


def test_a_damaged_picture_costs_one_row(server, score, tmp_path):
    folders.write(tmp_path, 3)
    file = tmp_path / "gt" / "photo_1.png"
    file.write_bytes(file.read_bytes()[:-2000])
    code, printed, _ = score()
    assert code == 1 and "1 could not be scored" in printed
    rows = table(tmp_path / "out" / "scores.csv")
    assert [r["score"] for r in rows] == ["1.0", "", "4.0"] and "photo_1.png" in rows[1]["error"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Pictures with errors" in page and rows[1]["error"].split("photo_1.png")[1][:30] in page


# ---------------------------------------------------------------------------------------------------- what cannot be


def spoil(tmp_path, what):
    """One thing wrong with three good pictures."""
    file = {"header": "sr", "size": "gt", "part": "lr", "extra": "sr", "twice": "gt"}.get(what)
    if what == "header":
        (tmp_path / file / "photo_1.png").write_bytes(b"not a picture")
    elif what == "size":
        folders.as_picture(scene(1, 48)[0]).save(tmp_path / file / "photo_1.png")
    elif what == "part":
        Image.new("RGB", (15, 16)).save(tmp_path / file / "photo_1.png")
    elif what == "extra":
        Image.new("RGB", (64, 64)).save(tmp_path / file / "photo_9.png")
    elif what == "twice":
        folders.as_picture(scene(1)[0]).save(tmp_path / file / "photo_1.bmp")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("header", r"photo_1\.png is not a PNG"),
        (
            "size",
            r"photo_1\.png has 64 x 64 pixels and its reference photo_1\.png has 48 x 48\. .*magick \S*sr/photo_1\.png -crop 48x48",
        ),
        ("part", r"no whole multiple of the 15 x 16"),
        ("extra", r"1 of 4 results have no picture in --gt .*photo_9\.png.*Give both the same names"),
        ("twice", r"photo_1\.png fits 2 files of --gt: photo_1\.bmp, photo_1\.png"),
    ],
)
def test_pictures_that_do_not_belong_together(what, said, server, score, tmp_path):
    spoil(folders.write(tmp_path, 3), what)
    code, _, error = score()
    assert code == 2 and re.search(said, error) and error.startswith("tropism: ")
    assert not server.requests and not (tmp_path / "out").exists(), "nothing is asked or written"


@pytest.mark.parametrize(
    ("words", "roles", "judge", "said"),
    [
        ((), "sr", None, r"nothing to compare the pictures with\. Give the references \(--gt FOLDER\)"),
        (
            (),
            "sr gt",
            "localhost:8000/v1",
            r"There is no judge 'localhost:8000/v1'\. Give a server's address \(http://",
        ),
        ((), "sr gt", "local:", r"There is no judge 'local:'"),
        ((), "sr lr", "features", r"compared with a reference.*Give --gt FOLDER"),
        (("--tiles", 2), "sr gt", "features", r"--tiles is for a judge, and --judge is 'features'\. Leave it out"),
        (("--model", "x"), "sr gt", "local:x", r"--model is for a judge behind an address"),
        (("--price-in", 1), "sr gt", None, r"both sides: --price-in and --price-out"),
        (("--cache-only",), "sr gt", None, r"Give it: --model NAME"),
        (("--repeats", 0), "sr gt", None, r"repeats"),
        (("--gt", "nowhere"), "sr", None, r"There is no folder nowhere"),
        ((), "sr gt", "http://me:secret@host/v1", r"address holds a secret.*TROPISM_JUDGE_KEY"),
        (("--model", "other", "--cache-only"), "sr gt", None, r"holds no whole reply.*leave --cache-only out"),
    ],
)
def test_settings_that_cannot_be(words, roles, judge, said, server, score, tmp_path):
    folders.write(tmp_path, 1)
    code, _, error = score(*words, roles=roles, judge=judge)
    assert code == 2 and re.search(said, error), error
    assert not server.requests


@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        ((400, {"error": {"message": "this model does not support image input"}}), r"takes no pictures.*--mmproj", 1),
        ("What a lovely picture!", r"no verdict on any of the first 3 pictures.*lovely.*--max-tokens 4096", 9),
        ((404, {"error": {"message": "no such model"}}), r"Compare its address and model name with /models", 1),
        (
            (401, {"error": {"message": "who are you"}}),
            r"asks for a key; set the environment variable TROPISM_JUDGE_KEY",
            1,
        ),
        ((503, {"error": {"message": "loading"}}), r"failed 6 times.*loading.*give it more time: --limit 1200", 6),
    ],
)
def test_a_judge_that_cannot_be_asked(answer, said, requests, server, score, tmp_path):
    folders.write(tmp_path, 4)
    server.respond = lambda _: answer
    code, _, error = score()
    assert code == 2 and re.search(said, error), error
    assert len(server.requests) == requests


def test_a_judge_that_goes_away_leaves_what_was_scored(server, score, tmp_path):
    folders.write(tmp_path)
    server.respond = lambda _: (500, {"error": "gone"}) if len(server.requests) > 2 else None
    code, _, error = score()
    assert code == 2 and "2 of 5 pictures are scored, and every reply is kept: the same command goes on." in error
    server.respond = None
    assert score()[0] == 0 and [float(r["score"]) for r in table(tmp_path / "out" / "scores.csv")] == LEVELS


def test_several_models_ask_for_a_name(server, score, tmp_path):
    folders.write(tmp_path, 1)
    server.models = ["one", "two"]
    code, _, error = score()
    assert code == 2 and "has 2 models: one, two. Name one of them: --model NAME." in error
    assert score("--model", "two")[0] == 0 and server.requests[0]["model"] == "two"


def test_another_scoring_is_not_written_over(server, score, tmp_path):
    folders.write(tmp_path, 2)
    assert score()[0] == 0
    code, _, error = score(repeats=2)
    assert (
        code == 2
        and "holds a scoring with other settings: --repeats 1, now 2. Choose another --out, or say --overwrite" in error
    )
    assert score("--overwrite", repeats=2)[0] == 0 and len(server.requests) == 4, "the cache is kept"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    code, _, error = score(out="mine")
    assert code == 2 and "is not empty and holds no scoring" in error


def test_replies_are_enough_without_the_judge(server, score, tmp_path):
    folders.write(tmp_path, 3)
    assert score()[0] == 0
    before = (tmp_path / "out" / "scores.csv").read_text()
    words = (
        "--model",
        "tiny",
        "--cache-only",
        "--cache",
        tmp_path / "out" / "cache",
        "--repeats",
        1,
        "--swap-share",
        0,
    )
    assert score(*words, judge="http://127.0.0.1:9/v1", out="again")[0] == 0 and len(server.requests) == 3
    assert (tmp_path / "again" / "scores.csv").read_text() == before


def test_weights_that_are_none_end_the_scoring(score, tmp_path):
    folders.write(tmp_path, 2)
    (tmp_path / "weights").mkdir()
    code, _, error = score("--repeats", 1, judge=f"local:{tmp_path / 'weights'}")
    assert code == 2 and error.count("tropism:") == 1 and "weights" in error
    assert len(table(tmp_path / "out" / "scores.csv")) == 0
