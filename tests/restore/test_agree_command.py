"""`tropism hallucination agree`, `form` and `benchmark` from a user's side, and scores by features to compare."""

import itertools
import json
import re
import sys
from types import SimpleNamespace

import judge_stub
import pytest
import torch
from command_line import called
from restore import folders
from restore.folders import LEVELS, table
from tiny_detector import tiny_dino

from tropism.cli_restore import as_flags
from tropism.judged.cases import _heated
from tropism.restore.agreement import agreement
from tropism.restore.distances import FeatureProxy, measure_folder
from tropism.restore.ratings import read_ratings, read_scores

SCORES = [1.0, 2.0, 2.3, 3.7, 3.0, 4.0, 5.0, 1.3]
PEOPLE = [[1, 1, 2], [2, 1, 2], [2, 3, 3], [3, 4, 4], [4, 4, 3], [4, 5, 4], [5, 5, 5], [2, 1, 1]]


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words):
        return called(monkeypatch, "hallucination", *words), *capsys.readouterr()

    return run


@pytest.fixture
def rated(tmp_path):
    """scores.csv, ratings.csv and counts.csv of eight pictures."""
    lines = {"scores": ["name,score,per_repeat,higher_is_worse"], "ratings": ["name,rater,level,higher_is_worse"]}
    lines["counts"] = ["name,wrong"]
    for i, (score, levels) in enumerate(zip(SCORES, PEOPLE, strict=True)):
        lines["scores"].append(f"p{i},{score},[],true")
        lines["ratings"] += [f"p{i},r{k},{level},true" for k, level in enumerate(levels)]
        lines["counts"].append(f"p{i},{max(0, levels[0] - 2)}")
    for name, text in lines.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(text) + "\n")
    return tmp_path


def test_agreement_with_people(run, rated):
    code, printed, _ = run("agree", "--scores", rated / "scores.csv", "--people", rated / "ratings.csv")
    assert code == 0 and "8 pictures, 24 ratings of 3 people" in printed
    expected = agreement(read_scores(rated / "scores.csv"), read_ratings(rated / "ratings.csv"))
    rows = {row["measure"]: row for row in table(rated / "agreement.csv")}
    for name in ("pearson", "spearman", "kendall", "pairwise", "kappa", "auroc"):
        measure = getattr(expected, name)
        told = [rows[name][k] and float(rows[name][k]) for k in ("value", "low", "high")]
        assert told == ["" if v is None else v for v in (measure.value, measure.low, measure.high)]
    assert float(rows["ceiling"]["value"]) == expected.ceiling
    assert float(rows["alpha_ordinal"]["value"]) == expected.alpha["ordinal"].value
    page = (rated / "agreement.html").read_text()
    assert f"{expected.spearman.value:.3f}" in page and "Krippendorff" in page and page.count("<circle") == 8
    assert "default-src 'none'" in page and "<script" not in page and 'src="' not in page


def test_agreement_with_a_count(run, rated):
    words = ("agree", "--scores", rated / "scores.csv", "--exact", rated / "counts.csv", "--exact-column", "wrong")
    code, _, said = run(*words)
    assert code == 2 and "Say --people-higher-is worse (or better), or add a column higher_is_worse" in said
    assert run(*words, "--people-higher-is", "worse", "--out", rated / "new")[0] == 0
    rows = {row["measure"]: row for row in table(rated / "new" / "agreement.csv")}
    assert float(rows["spearman"]["value"]) > 0.8 and rows["kappa"]["value"] == "" and "levels" in rows["kappa"]["why"]
    turned = run(*words, "--people-higher-is", "better", "--out", rated / "turned")
    rows_turned = {row["measure"]: row for row in table(rated / "turned" / "agreement.csv")}
    assert float(rows_turned["spearman"]["value"]) == -float(rows["spearman"]["value"]) and "were turned" in turned[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), r"one of: --people FILE of ratings.*--exact FILE.*--benchmark FOLDER"),
        (("--people", "ratings.csv", "--exact", "counts.csv"), r"one of: --people"),
        (("--people", "nowhere.csv"), r"'nowhere\.csv' cannot be read"),
        (("--people", "short.csv"), r"Name them alike, or compare the 6 that both have by --common"),
        (("--people", "answers.json"), r"only its key knows\. Give the \.key\.json"),
        (("--people", "ratings.csv", "--people-higher-is", "up"), r"--people-higher-is is worse or better, not 'up'"),
        (("--people", "ratings.csv", "--column", "hs"), r"has no column 'hs'"),
    ],
)
def test_what_cannot_be_compared(words, said, run, rated, monkeypatch):
    monkeypatch.chdir(rated)
    lines = (rated / "ratings.csv").read_text().splitlines()
    (rated / "short.csv").write_text("\n".join(lines[:-6]) + "\n")
    (rated / "answers.json").write_text("{}")
    code, _, error = run("agree", "--scores", "scores.csv", *words)
    assert code == 2 and re.search(said, error), error
    assert not (rated / "agreement.csv").exists()


def test_pictures_that_both_have(run, rated, monkeypatch):
    monkeypatch.chdir(rated)
    lines = (rated / "ratings.csv").read_text().splitlines()
    (rated / "short.csv").write_text("\n".join(lines[:-6]) + "\n")
    code, printed, _ = run("agree", "--scores", "scores.csv", "--people", "short.csv", "--common")
    assert code == 0 and "6 pictures" in printed and "2 pictures are left out" in printed


def test_from_the_form_to_the_agreement(run, rated, tmp_path):
    """A form of eight pictures, three people who answer it (one carelessly), and what comes of it."""
    folders.write(tmp_path, 8, "p{}")
    given = [w for role in ("sr", "gt", "lr") for w in (f"--{role}", tmp_path / role)]
    code, printed, _ = run("form", *given, "--out", tmp_path / "form.html")
    assert code == 0 and "has 12 items, 4 of them traps" in printed and "Keep" in printed and "--key" in printed
    key = json.loads((tmp_path / "form.key.json").read_text())
    must = {"same": 1, "other": 5}
    for k, rater in enumerate(("ann", "bob", "careless")):
        levels = {
            w: PEOPLE[int(i["name"][1:])][k] if i["kind"] == "picture" else must[i["kind"]]
            for w, i in key["items"].items()
        }
        ratings = [{"item": w, "level": 3 if rater == "careless" else level} for w, level in levels.items()]
        told = {
            "format": "tropism-ratings-1",
            "form": key["form"],
            "rater": rater,
            "higher_is_worse": True,
            "ratings": ratings,
        }
        (tmp_path / f"ratings-{rater}.json").write_text(json.dumps(told))
    files = [w for rater in ("ann", "bob", "careless") for w in ("--people", tmp_path / f"ratings-{rater}.json")]
    code, printed, _ = run("agree", "--scores", tmp_path / "scores.csv", *files, "--key", tmp_path / "form.key.json")
    assert code == 0 and "careless: left out, missed 4 of 4 traps" in printed and "16 ratings of 2 people" in printed
    assert "careless: left out" in (tmp_path / "agreement.html").read_text()
    code, _, said = run("form", *given, "--out", tmp_path / "form.txt")
    assert code == 2 and "ends in .html" in said


def test_a_form_of_pictures_too_large_to_look_at(run, tmp_path):
    from PIL import Image

    for role, size in (("sr", (4100, 4)), ("gt", (4100, 4)), ("lr", (1025, 1))):
        (tmp_path / role).mkdir()
        Image.new("RGB", size).save(tmp_path / role / "wide.png")
    given = [w for role in ("sr", "gt", "lr") for w in (f"--{role}", tmp_path / role)]
    code, _, said = run("form", *given, "--out", tmp_path / "form.html")
    assert code == 2 and "wide.png has 4100 x 4 pixels" in said and "Cut" in said


# ---------------------------------------------------------------------------------------------------- the benchmark


@pytest.fixture
def library(monkeypatch):
    """A `datasets` package with ten pairs of two methods, rated as the judge of judge_stub sees them."""
    scenes = [(judge_stub.scene(i)[0], folders.SPOILT[i % 5], LEVELS[i % 5]) for i in range(10)]
    rows = [
        {
            "gt": folders.as_picture(gt),
            "sr": folders.as_picture(judge_stub.spoilt(gt, blocks)),
            "sample_id": f"set/{i}",
            "image_id": i,
        }
        | {"method": ("SeeSR", "VOSR")[i // 5], "human_score": float(level), "n_ratings": 20}
        for i, (gt, blocks, level) in enumerate(scenes)
    ]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: iter(rows)))


def test_a_judge_on_the_benchmark(run, library, tmp_path):
    code, printed, _ = run("benchmark", "--out", tmp_path / "vha")
    assert code == 0 and "10 pairs are in" in printed and "--benchmark" in printed
    vha, out = tmp_path / "vha", tmp_path / "out"
    with judge_stub.running() as server:
        own = ("--repeats", 1, "--swap-share", 0, "--judge", server.url)
        assert run("score", "--sr", vha / "sr", "--gt", vha / "gt", "--out", out, *own)[0] == 0
    for source in (vha, "dhryou/VHA-bench"):
        assert run("agree", "--scores", out / "scores.csv", "--benchmark", source)[0] == 0
        rows = [r for r in table(out / "agreement.csv") if r["measure"] in ("spearman", "kappa")]
        assert {r["group"]: r["pictures"] for r in rows} == {"All": "10", "SeeSR": "5", "VOSR": "5"}
        assert {float(r["value"]) for r in rows} == {1.0}
    assert "mixture of methods" in (out / "agreement.html").read_text()
    code, _, said = run("benchmark", "--out", vha)
    assert code == 2 and "is not empty" in said


# ---------------------------------------------------------------------------------------------------- features


def test_scores_by_features(run, tmp_path):
    """Equal pictures have distance 0, more spoilt ones a larger one, and the table is one that `agree` takes, with no levels in it."""
    folders.write(tmp_path, 4)
    tiny_dino().save_pretrained(tmp_path / "dino")
    words = ("score", "--sr", tmp_path / "sr", "--gt", tmp_path / "gt", "--judge", f"features:{tmp_path / 'dino'}")
    code, printed, _ = run(*words, "--out", tmp_path / "out")
    assert code == 0 and re.search(r"Feature distance 0\.\d+ \(0: equal features\), mean of 4 pictures", printed)
    rows = table(tmp_path / "out" / "scores.csv")
    scores = [float(r["score"]) for r in rows]
    assert scores[0] == pytest.approx(0, abs=1e-6) and min(scores[1:]) > 1e-4 and max(scores) == scores[3]
    assert "per_repeat" not in rows[0] and {r["higher_is_worse"] for r in rows} == {"true"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "does not say what is invented" in page and page.count("data:image/png") == 4 * 3
    assert re.search(r"where features differ, by [\d.e-]+ at most", page)
    counts = [f"photo_{i},{n},true\n" for i, n in enumerate(folders.SPOILT[:4])]
    (tmp_path / "exact.csv").write_text("name,score,higher_is_worse\n" + "".join(counts))
    code, printed, _ = run("agree", "--scores", tmp_path / "out" / "scores.csv", "--exact", tmp_path / "exact.csv")
    assert code == 0 and "turned" not in printed


def test_the_map_is_of_the_patch_that_was_changed_and_options_reach_the_proxy(run, tmp_path):
    folders.write(tmp_path, 2)
    tiny_dino().save_pretrained(tmp_path / "dino")
    gt = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    sr = gt.clone()
    sr[..., 14:28, 42:] = 1 - sr[..., 14:28, 42:]
    proxy = FeatureProxy(f"{tmp_path / 'dino'}?size=56&tokens=patch")
    found = proxy.map(sr, gt)
    assert found.shape == (4, 4) and divmod(int(found.argmax()), 4) == (1, 3)
    assert proxy(sr, gt) == pytest.approx(found.mean().item(), rel=1e-6)
    assert FeatureProxy(f"{tmp_path / 'dino'}?tokens=cls").map(sr, gt) is None
    heated = _heated(sr, found)[0]
    assert heated[:, 16:26, 46:].mean() > heated[:, 30:, :30].mean() + 0.2
    words = ("score", "--sr", tmp_path / "sr", "--gt", tmp_path / "gt", "--out", tmp_path / "out", "--judge")
    assert run(*words, f"features:{tmp_path / 'dino'}?tokens=cls")[0] == 0
    assert "where features differ" not in (tmp_path / "out" / "report.html").read_text()
    code, _, said = run(*words, f"features:{tmp_path / 'dino'}?token=cls")
    assert code == 2 and "Did you mean tokens?" in said


def test_what_is_measured_is_not_measured_again(tmp_path):
    """After an interruption only new pictures, and those whose pixels changed, go through the network; another distance starts anew."""
    asked, out = [], tmp_path / "scores.csv"
    images = [torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def distance(sr, gt):
        asked.append(len(asked))
        return float((sr - gt).abs().mean())

    def measured(judge, count):
        triples = [(f"p{i}", lambda i=i: images[i], lambda: images[0], None) for i in range(4)]
        return list(itertools.islice(measure_folder(distance, judge, triples, out), count))

    begun = measure_folder(distance, "a", [(f"p{i}", images[i], images[0], None) for i in range(4)], out)
    first = [next(begun), next(begun)]
    begun.close()
    whole = measured("a", 4)
    assert len(asked) == 4 and whole[:2] == first
    assert measured("a", 4) == whole and len(asked) == 4
    measured("a", 1)  # interrupted again before it has come to where it was
    assert measured("a", 4) == whole and len(asked) == 4
    images[2] = 1 - images[2]
    assert measured("a", 4)[2] != whole[2] and len(asked) == 5
    assert measured("b", 4) and len(asked) == 9


def test_a_damaged_picture_costs_one_distance(run, tmp_path):
    folders.write(tmp_path, 2)
    tiny_dino().save_pretrained(tmp_path / "dino")
    file = tmp_path / "sr" / "photo_0.png"
    file.write_bytes(file.read_bytes()[:-2000])
    words = ("--sr", tmp_path / "sr", "--gt", tmp_path / "gt", "--judge", f"features:{tmp_path / 'dino'}")
    assert run("score", *words, "--out", tmp_path / "out")[0] == 1
    rows = table(tmp_path / "out" / "scores.csv")
    assert [bool(r["score"]) for r in rows] == [False, True] and "photo_0.png" in rows[0]["error"]
    (tmp_path / "sr" / "photo_1.png").write_bytes(file.read_bytes())
    code, _, said = run("score", *words, "--out", tmp_path / "none")
    assert code == 2 and "None of the 2 pictures could be scored" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Try max_tokens=4096.", "Try --max-tokens 4096."),
        ("by common=True. Next", "by --common. Next"),
        ("leave cache_only out", "leave --cache-only out"),
        ("reduce='max' and seeds=3", "reduce='max' and seeds=3"),
        ("see /a/cache_only/x?cache_only=1", "see /a/cache_only/x?cache_only=1"),
    ],
)
def test_messages_name_flags(text, said):
    assert as_flags(text, {"max_tokens", "common", "cache_only"}) == said
