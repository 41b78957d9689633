"""The public benchmark's loader: on a small data set of its columns, with the real package where it is installed, else a stand-in."""

import importlib
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tropism.core import UserError
from tropism.restore import benchmark
from tropism.restore.agreement import agreement
from tropism.restore.ratings import Scores


def picture(level, size=(6, 4)):
    return Image.new("RGB", size, (level, 0, 255))


def rows():
    return [
        {"gt": picture(10 * i), "sr": picture(10 * i + k), "sample_id": f"s{i}{k}", "image_id": f"i{i}"}
        | {"method": ("SeeSR", "VOSR")[k], "human_score": 1 + (i + k) % 9 / 2, "n_ratings": 20 + k}
        for i in range(4)
        for k in range(2)
    ]


@pytest.fixture
def library(monkeypatch):
    """A `datasets` package whose `load_dataset` gives `rows` or raises `error`."""
    made = SimpleNamespace(rows=rows(), error=None, asked=[])

    def load_dataset(name, *, split, streaming):
        made.asked.append((name, split, streaming))
        if made.error:
            raise made.error
        return iter(made.rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return made


def check(found):
    assert [p.name for p in found] == [f"s{i}{k}" for i in range(4) for k in range(2)]
    one = found[5]  # i = 2, k = 1
    assert (one.image, one.method, one.human_score, one.ratings) == ("i2", "VOSR", 2.5, 21)
    assert one.gt.shape == one.sr.shape == (3, 4, 6) and one.gt.dtype == torch.float32
    for pixels, level in ((one.gt, 20), (one.sr, 21)):
        assert pixels[:, 1, 2].tolist() == pytest.approx([level / 255, 0, 1])


def test_pairs_of_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    text, number = datasets.Value("string"), datasets.Value("float64")
    kinds = {
        "gt": datasets.Image(),
        "sr": datasets.Image(),
        "human_score": number,
        "n_ratings": datasets.Value("int64"),
    }
    features = datasets.Features({name: kinds.get(name, text) for name in benchmark.COLUMNS})
    table = importlib.import_module("pyarrow").Table.from_pylist(
        [features.encode_example(row) for row in rows()], schema=features.arrow_schema
    )
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "test.parquet")
    check(list(benchmark.pairs(str(tmp_path))))
    with pytest.raises(UserError, match=r"cannot be read .*another split than 'dev'"):
        list(benchmark.pairs(str(tmp_path), "dev"))


def test_pairs_of_the_card(library):
    check(list(benchmark.pairs()))
    assert library.asked == [("dhryou/VHA-bench", "test", True)], "streamed: one pair at a time"


def test_pictures_as_bytes_or_a_path(library, tmp_path):
    buffer = io.BytesIO()
    picture(40).save(buffer, "PNG")
    picture(41).convert("RGBA").save(tmp_path / "sr.png")
    library.rows[0] |= {
        "gt": {"bytes": buffer.getvalue(), "path": None},
        "sr": {"bytes": None, "path": tmp_path / "sr.png"},
    }
    one = next(benchmark.pairs())
    assert (one.gt[0, 0, 0] * 255, one.sr[0, 0, 0] * 255) == pytest.approx((40, 41))


def test_pairs_are_read_when_their_turn_comes(library):
    library.rows = iter([rows()[0], {"broken": 1}])
    found = benchmark.pairs()
    assert next(found).name == "s00"
    with pytest.raises(UserError, match="Row 2 of 'dhryou/VHA-bench' has no gt; it has: broken"):
        next(found)


def test_peoples_scores_of_all_or_of_one_method(library):
    found = list(benchmark.pairs())
    human = benchmark.human(found)
    assert human.higher_is_worse and human.levels and len(human.values) == 8 and human.values["s21"] == 2.5
    assert list(benchmark.human(found, "VOSR").values) == [f"s{i}1" for i in range(4)]
    with pytest.raises(UserError, match=r"No pair is by the method 'seesr'. There are: SeeSR, VOSR"):
        benchmark.human(found, "seesr")


def test_a_distance_that_sees_what_people_see_agrees(library):
    found = list(benchmark.pairs())
    for pair, row in zip(found, library.rows, strict=True):
        pair.sr[0] += (row["human_score"] - 1) / 50
    distance = {p.name: float((p.sr - p.gt).abs().mean()) for p in found}
    told = agreement(Scores(distance, True), benchmark.human(found), draws=100)
    assert told.spearman.value > 0.9 and told.alpha == {} and told.raters == 0


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("human_score", 5.5, r"Row 3 .* has the human_score 5.5, and it is from 1 to 5"),
        ("human_score", np.nan, "human_score nan"),
        ("human_score", "3", "human_score '3'"),
        ("method", None, "Row 3 .* has no method"),
        ("sample_id", "s00", "Row 3 .* has the sample_id 's00' a second time"),
        ("sr", picture(1, (3, 3)), "a reference of 6 x 4 pixels and a result of 3 x 3"),
        ("gt", {"bytes": b"no picture"}, "Row 3 .*, gt, is no picture .*UnidentifiedImageError"),
        ("gt", "gt.png", "is no picture"),
    ],
)
def test_rows_that_are_not_what_the_card_says(library, column, value, said):
    library.rows[2][column] = value
    with pytest.raises(UserError, match=said):
        list(benchmark.pairs())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't\nreach it"), r"ConnectionError: Couldn't reach it\).*HF_HUB_OFFLINE"),
        (
            FileNotFoundError("none there"),
            "none there.*Check the name and https://huggingface.co/datasets/dhryou/VHA-bench",
        ),
        (ValueError("Bad split"), "Bad split.*another split than 'test'"),
    ],
)
def test_a_benchmark_out_of_reach(library, error, said):
    library.error = error
    with pytest.raises(UserError, match=said):
        list(benchmark.pairs())


def test_an_empty_split(library):
    library.rows = []
    with pytest.raises(UserError, match="holds no row in its split 'test'"):
        list(benchmark.pairs())


def test_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "tropism\[data\]"'):
        list(benchmark.pairs())
