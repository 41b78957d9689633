"""The rating form: what its page holds and does not tell, its traps, and the files that come back."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tropism.core import UserError
from tropism.restore.form import LEVELS, write_form
from tropism.restore.form_answers import read_answers, read_people
from tropism.restore.ratings import write_ratings

NAMES = [f"seesr/face {i}.png" for i in range(6)]


def triples(names=NAMES, size=8):
    """Pictures of one grey level a name, so that each can be told from its pixels: reference, result + .05, low resolution - .05."""
    grey = lambda level, n: torch.full((3, n, n), level)
    levels = torch.linspace(0.1, 0.9, len(names)).tolist()
    return [
        (name, grey(v + 0.05, size), grey(v, size)[None], grey(v - 0.05, size // 4))
        for name, v in zip(names, levels, strict=True)
    ]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.scripts, self.policy, self.tags, self._in = [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag == "script"
        if self._in:
            self.scripts.append([dict(attrs), ""])
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_endtag(self, tag):
        self._in = self._in and tag != "script"

    def handle_data(self, data):
        if self._in:
            self.scripts[-1][1] += data


@pytest.fixture
def form(tmp_path):
    made = write_form(triples(), tmp_path / "form.html", seed=1)
    return made, Page(made.page.read_text("utf-8")), json.loads(made.key.read_text("utf-8"))


def data(page):
    return json.loads(next(text for attrs, text in page.scripts if attrs.get("type") == "application/json"))


def level_of(address, folder):
    """The grey level of a picture by its address in the page."""
    png = base64.b64decode(address.split(",")[1]) if address.startswith("data:") else (folder / address).read_bytes()
    return np.array(Image.open(io.BytesIO(png))).mean() / 255


# ---------------------------------------------------------------------------------------------------- page


def test_the_page_shows_every_item_in_its_place(form):
    made, page, key = form
    items = {i["id"]: i for i in data(page)["items"]}
    assert set(items) == set(key["items"]) and made.items == len(items) == 6 + 4 and made.traps == 4
    grey = dict(zip(NAMES, np.linspace(0.1, 0.9, 6), strict=True))
    for word, told in key["items"].items():
        a, b, c = (level_of(items[word][letter], made.page.parent) for letter in "abc")
        base = grey[told["name"]]
        assert (a, b) == pytest.approx((base - 0.05, base), abs=0.003)
        shown = {"picture": base + 0.05, "same": base}.get(told["kind"]) or grey[told["result_of"]] + 0.05
        assert c == pytest.approx(shown, abs=0.003)
        assert (items[word]["height"], items[word]["width"]) == (8, 8)


def test_traps_of_both_kinds_are_mixed_in_and_the_other_picture_is_far(form):
    _, page, key = form
    kinds = [key["items"][i["id"]]["kind"] for i in data(page)["items"]]
    assert sorted(kinds) == ["other"] * 2 + ["picture"] * 6 + ["same"] * 2
    assert kinds[:6] != ["picture"] * 6, "traps do not stand at the end"
    for told in key["items"].values():
        if told["kind"] == "other":
            assert abs(NAMES.index(told["name"]) - NAMES.index(told["result_of"])) >= 2


def test_the_page_tells_no_name_and_no_trap(form):
    _, page, _ = form
    told = data(page)
    assert set(told) == {"format", "form", "items"}
    assert all(set(item) == {"id", "width", "height", "a", "b", "c"} for item in told["items"])
    assert all(re.fullmatch("[0-9a-f]{12}", item["id"]) for item in told["items"])
    text = json.dumps([{k: v for k, v in i.items() if k not in "abc"} for i in told["items"]])
    outside = "".join(str(tag) for tag in page.tags) + page.scripts[-1][1]
    assert not any(word in text + outside for word in ("seesr", "face", 'same"', 'other"', "kind", "trap"))


def test_nothing_but_its_own_script_may_run_and_nothing_is_fetched(form):
    made, page, _ = form
    own = [text for attrs, text in page.scripts if "type" not in attrs]
    assert len(page.scripts) == 2 and len(own) == 1
    digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy and "default-src 'none'" in page.policy
    assert "img-src data:;" in page.policy and "unsafe-inline" not in page.policy.split("script-src")[1]
    assert not any(name.startswith("on") or name == "src" for _, attrs in page.tags for name in attrs)
    assert not re.search(r"https?://|//[a-z]+\.", made.page.read_text("utf-8").replace("// ----", ""))
    assert not re.search("innerHTML|insertAdjacent|eval|Function\\(|fetch|XMLHttp|WebSocket|import", own[0])


def test_texts_are_escaped(tmp_path):
    hostile = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&'
    made = write_form(triples([hostile + str(i) for i in range(3)]), tmp_path / "form.html", title=hostile)
    page = Page(made.page.read_text("utf-8"))
    assert len(page.scripts) == 2 and sum(tag == "img" for tag, _ in page.tags) == 3
    assert hostile + "0" in [i["name"] for i in json.loads(made.key.read_text("utf-8"))["items"].values()]


def test_the_levels_are_on_the_page_in_their_order(form):
    made, page, _ = form
    assert [attrs["data-level"] for _, attrs in page.tags if "data-level" in attrs] == ["1", "2", "3", "4", "5"]
    text = made.page.read_text("utf-8")
    places = [text.index(f"<b>{level}</b><span>{words}</span>") for level, words in LEVELS.items()]
    assert places == sorted(places)


def test_large_pictures_lie_beside_the_page(tmp_path):
    made = write_form(triples(), tmp_path / "study.html", seed=1, embedded=1000)
    assert made.pictures == tmp_path / "study_pictures"
    page = Page(made.page.read_text("utf-8"))
    items = data(page)["items"]
    assert "img-src 'self' data:" in page.policy
    assert {p.name for p in made.pictures.iterdir()} == {i["id"] + letter + ".png" for i in items for letter in "abc"}
    assert all(i[letter] == f"study_pictures/{i['id']}{letter}.png" for i in items for letter in "abc")
    assert made.page.stat().st_size < 20_000


def test_the_seed_alone_decides(tmp_path):
    texts = [
        write_form(triples(), tmp_path / f"{k}" / "form.html", seed=seed).page.read_text("utf-8")
        for k, seed in enumerate((1, 1, 2))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_form_is_not_written_over_another(form):
    made, _, key = form
    assert write_form(triples(), made.page, seed=1) == made  # the same once more
    with pytest.raises(UserError, match="Another form stands there already"):
        write_form(triples(), made.page, seed=2)
    assert json.loads(made.key.read_text("utf-8")) == key


def test_pictures_may_be_calls_and_more_traps_than_pictures(tmp_path):
    calls = [(name, *(lambda p=p: p for p in of)) for name, *of in triples(NAMES[:3])]
    assert write_form(calls, tmp_path / "form.html", traps=8).items == 11


GREY = torch.full((3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda t: t[:2], "at least 3 pictures.*here are 2"),
        (lambda t: [*t, t[0]], "Two pictures are named 'seesr/face 0.png'"),
        (lambda t: [*t, ("x", GREY, None, GREY)], "'x' has no reference"),
        (lambda t: [*t, ("x", GREY, GREY, None)], "'x' has no low-resolution picture"),
        (lambda t: [*t, ("x", GREY[:, :4], GREY, GREY)], "result of 'x' has 8 x 4 pixels and its reference 8 x 8"),
        (lambda t: [*t, ("x", GREY[:1], GREY, GREY)], r"result of 'x' is \(1, 8, 8\)"),
        (lambda t: [*t, ("x", GREY, (GREY * 255).byte(), GREY)], "reference of 'x' is .*uint8"),
        (lambda t: [*t, ("x", GREY * 255, GREY, GREY)], "result of 'x' has values outside 0 to 1"),
        (lambda t: [*t, ("x", GREY * torch.nan, GREY, GREY)], "result of 'x' has values outside 0 to 1"),
        (lambda t: [(n, GREY, GREY, GREY) for n in "abcd"], "No picture looks unlike"),
    ],
)
def test_pictures_that_make_no_form(tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        write_form(changed(triples()), tmp_path / "form.html")
    assert not list(tmp_path.iterdir())


def test_other_forms_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"ends in .html"):
        write_form(triples(), tmp_path / "form")
    with pytest.raises(UserError, match="traps is 1"):
        write_form(triples(), tmp_path / "form.html", traps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_form(triples(), tmp_path / "file" / "form.html")


# ---------------------------------------------------------------------------------------------------- answers


def right(told, level=3):
    return {"same": 1, "other": 5}.get(told["kind"], level)


@pytest.fixture
def saved(form, tmp_path):
    """Writes a rater's file as the page does; `change` may alter {item: level} or the file."""
    made, _, key = form

    def write(rater, change=lambda given, items: given, file=None, more=()):
        given = change({word: right(told) for word, told in key["items"].items()}, key["items"])
        told = {"format": "tropism-ratings-1", "form": key["form"], "rater": rater, "higher_is_worse": True}
        rows = [{"item": word, "level": level} for word, level in given.items()]
        path = tmp_path / (file or f"ratings-{rater}.json")
        path.write_text(json.dumps(told | {"ratings": rows} | dict(more)), "utf-8")
        return path

    return made.key, write


def test_answers_come_back_by_name(saved):
    key, write = saved
    by_place = lambda given, items: given | {
        w: 1 + NAMES.index(i["name"]) % 5 for w, i in items.items() if i["kind"] == "picture"
    }
    backwards = lambda given, items: dict(
        reversed(by_place(given, items).items())
    )  # traps after their pictures or before
    found = read_answers(key, [write("ann", by_place), write("bob", backwards), write("cleo", by_place)])
    assert found.ratings.levels == {n: dict.fromkeys(("ann", "bob", "cleo"), 1 + i % 5) for i, n in enumerate(NAMES)}
    assert found.ratings.higher_is_worse and found.notes == ()
    assert all(r.kept and (r.rated, r.caught, r.traps) == (6, 4, 4) for r in found.raters)
    assert "ann: rated 6 of 6 pictures, and all of the 4 traps" in str(found)


@pytest.mark.parametrize(
    ("kind", "level", "said"),
    [
        ("same", 2, "the reference itself was rated 2, not 1"),
        ("other", 4, "another picture in place of .* was rated 4, not 5"),
    ],
)
def test_who_misses_a_trap_is_named_and_left_out(saved, kind, level, said):
    key, write = saved
    miss = lambda given, items: given | {next(w for w, i in items.items() if i["kind"] == kind): level}
    found = read_answers(key, [write("ann"), write("bob", miss)])
    assert found.ratings.raters == ("ann",)
    bob = found.raters[1]
    assert not bob.kept and (bob.caught, bob.answered) == (3, 4)
    assert re.search("bob: left out, missed 1 of 4 traps; " + said, str(found))


def test_a_file_that_was_saved_half_way(saved):
    key, write = saved
    half = lambda given, items: {w: v for k, (w, v) in enumerate(given.items()) if items[w]["kind"] == "same" or k % 2}
    found = read_answers(key, [write("ann", half), write("bob"), write("cleo")])
    assert found.raters[0].kept and found.raters[0].rated < 6
    assert f"{6 - found.raters[0].rated} of 6 pictures have fewer than 3 ratings" in found.notes[0]
    none = lambda given, items: {w: v for w, v in given.items() if items[w]["kind"] == "picture"}
    assert "answered no trap" in str(read_answers(key, [write("bob"), write("dan", none)]))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"form": "f00"}, r"answers another form \('f00'\)"),
        ({"format": "x"}, "is not a file that the form saved"),
        ({"rater": " "}, "has no rater or no ratings"),
        ({"ratings": {}}, "has no rater or no ratings"),
        ({"higher_is_worse": False}, "does not say that higher is worse"),
        ({"ratings": [{"item": "nobody", "level": 1}]}, "rates what the key does not know: 'nobody'"),
        ({"ratings": [3]}, "does not know"),
        ({"ratings": [{"item": ["x"], "level": 1}]}, "does not know"),
    ],
)
def test_files_that_are_not_this_forms(saved, more, said):
    key, write = saved
    with pytest.raises(UserError, match=said):
        read_answers(key, [write("ann", more=more)])


@pytest.mark.parametrize("level", [0, 6, 2.5, "x", None, True])
def test_levels_that_are_none(saved, level):
    key, write = saved
    with pytest.raises(UserError, match="and a level is one of 1, 2, 3, 4, 5"):
        read_answers(key, [write("ann", lambda given, items: given | {next(iter(given)): level})])


def test_raters_and_items_twice(saved):
    key, write = saved
    with pytest.raises(UserError, match="are both by the rater 'ann'"):
        read_answers(key, [write("ann"), write("ann", file="again.json")])
    told = json.loads(write("bob").read_text())
    with pytest.raises(UserError, match="rates twice"):
        read_answers(key, [write("bob", more={"ratings": told["ratings"] + told["ratings"][:1]})])


def test_nobody_is_left(saved):
    key, write = saved
    ones = lambda given, items: dict.fromkeys(given, 1)
    with pytest.raises(UserError, match="No rater is left: ann: left out, missed 2 of 4 traps"):
        read_answers(key, [write("ann", ones)])
    with pytest.raises(UserError, match="No file of a rater"):
        read_answers(key, [])


def test_files_that_cannot_be_read(saved, tmp_path):
    key, write = saved
    ann = write("ann")
    with pytest.raises(UserError, match="is not the key of a form"):
        read_answers(ann, [ann])
    (tmp_path / "cut.json").write_text(ann.read_text()[:40])
    with pytest.raises(UserError, match=r"is no JSON.*cut short"):
        read_answers(key, [tmp_path / "cut.json"])
    with pytest.raises(UserError, match="cannot be read"):
        read_answers(tmp_path / "none.json", [ann])
    key.write_text(json.dumps({"format": "tropism-form-key-1", "items": {"a": {"kind": "picture"}}}))
    with pytest.raises(UserError, match="does not tell its items"):
        read_answers(key, [ann])


def test_people_by_either_kind_of_file(saved, tmp_path):
    key, write = saved
    files = [write("ann"), write("bob")]
    found = read_people(files, key)
    write_ratings(tmp_path / "p.csv", found)
    assert read_people([tmp_path / "p.csv"]).levels == found.levels
    with pytest.raises(UserError, match="only its key knows"):
        read_people(files)
    for wrong in ([*files, tmp_path / "p.csv"], [tmp_path / "p.txt"], []):
        with pytest.raises(UserError, match=r"Ratings are read from .csv files or"):
            read_people(wrong, key)
