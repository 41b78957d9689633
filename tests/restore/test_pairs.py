"""Pairing folders by name: right, or an error that names the files."""

import numpy as np
import pytest
from PIL import Image

from tropism.core import UserError
from tropism.restore import pairs


def folder(at, *names, size=(8, 12)):
    at.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(at / name)
    return at


@pytest.fixture
def three(tmp_path):
    """make(sr names, gt names, lr names) -> the three folders; results of 8 x 12 pixels, inputs of 2 x 3."""

    def make(sr, gt, lr=()):
        made = folder(tmp_path / "sr", *sr), folder(tmp_path / "gt", *gt), folder(tmp_path / "lr", *lr, size=(2, 3))
        return made if lr else made[:2]

    return make


def names(found):
    return [tuple(p and p.name for p in (pair.sr, pair.gt, pair.lr)) for pair in found.pairs]


@pytest.mark.parametrize(
    ("sr", "gt"),
    [
        ("a.png", "a.png"),
        ("a.png", "a.JPG"),
        ("a.PNG", "A.tif"),
        ("a_x4.png", "a.webp"),
        ("a_out.png", "a.jpg"),
        ("a_x4_out.png", "a.png"),
        ("a.png", "a_HR.png"),
        ("0801x4.png", "0801.png"),
        ("photo-4x.png", "photo.png"),
        ("my cat.v2_SR.png", "my cat.v2_gt.png"),
        ("Canon_001_SR.png", "Canon_001_HR.png"),
        ("a upscaled.png", "a.png"),
    ],
)
def test_names_that_belong_together(three, sr, gt):
    assert names(pairs.paired(*three([sr, "z.png"], [gt, "z.png"])))[0 if sr < "z.png" else 1] == (sr, gt, None)


@pytest.mark.parametrize(("sr", "gt"), [("box2.png", "box3.png"), ("fox4.png", "fo_hr.png"), ("mix2x.png", "mi.png")])
def test_a_name_is_not_cut_inside_a_word(three, sr, gt):
    with pytest.raises(UserError):
        pairs.paired(*three([sr], [gt]))


def test_three_folders(three):
    found = pairs.paired(*three(["b_x4.png", "a_x4.png"], ["a.jpg", "b.png", "c.png"], ["a_LR4.png", "b_LR4.png"]))
    assert names(found) == [("a_x4.png", "a.jpg", "a_LR4.png"), ("b_x4.png", "b.png", "b_LR4.png")]
    first = found.pairs[0]
    assert (first.name, first.width, first.height, first.scale) == ("a_x4", 8, 12, 4)
    assert [p.name for p in found.unused] == ["c.png"]


def test_without_references(three):
    sr, _ = three(["a.png", "b.png"], ["a.png"])
    assert names(pairs.paired(sr)) == [("a.png", None, None), ("b.png", None, None)]
    assert pairs.paired(sr).pairs[0].scale is None and pairs.paired(sr).unused == ()


def test_as_few_endings_as_needed(three):
    """photo and photo_2x are two pictures where both are there, whatever is added to them."""
    found = pairs.paired(*three(["photo_2x_out.png", "photo_out.png"], ["photo.png", "photo_2x.png"]))
    assert names(found) == [("photo_2x_out.png", "photo_2x.png", None), ("photo_out.png", "photo.png", None)]
    assert pairs.shorter_names("photo_2x_out") == ["photo_2x_out", "photo_2x", "photo"]
    assert pairs.shorter_names("X4") == ["x4"] and pairs.shorter_names("out") == ["out"]
    assert pairs.shorter_names("checkout") == ["checkout"]


def test_the_same_spelling_wins(three):
    assert names(pairs.paired(*three(["a.png"], ["a.png", "A.jpg"]))) == [("a.png", "a.png", None)]


def test_two_files_are_a_pair_whatever_their_names(tmp_path):
    one, other = folder(tmp_path / "x", "a.png") / "a.png", folder(tmp_path / "y", "b.png") / "b.png"
    assert names(pairs.paired(one, other)) == [("a.png", "b.png", None)]
    with pytest.raises(UserError, match="1 of 1 results have no picture"):
        pairs.paired(tmp_path / "x", tmp_path / "y")
    assert names(pairs.paired(one, folder(tmp_path / "y", "a.jpg"))) == [("a.png", "a.jpg", None)]


def test_what_is_no_picture_is_left_alone(three):
    sr, gt = three(["a.png"], ["a.png"])
    (sr / "scores.csv").touch()
    (sr / ".hidden.png").touch()
    (sr / "folder.png").mkdir()
    assert names(pairs.paired(sr, gt)) == [("a.png", "a.png", None)]


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sr", "gt", "says"),
    [
        (["a.png"], ["a.png", "a.jpg"], r"a\.png fits 2 files of --gt: a\.jpg, a\.png\. Keep one"),
        (["a.png"], ["a_HR.png", "a_LR4.png"], r"a\.png fits 2 files of --gt: a_HR\.png, a_LR4\.png"),
        (["a_out.png", "a_x4.png"], ["a.png"], r"2 results belong to a\.png of --gt: a_out\.png, a_x4\.png"),
        (
            ["a.png", "b.png", "c.png"],
            ["b.png"],
            r"2 of 3 results have no picture in --gt .*: a\.png, c\.png\. That .* b\.png",
        ),
        ([f"{i:02}.png" for i in range(11)], ["z.png"], r"11 of 11 .* 00\.png, .*07\.png and 3 more\."),
    ],
)
def test_names_that_do_not_fit(three, sr, gt, says):
    with pytest.raises(UserError, match=says):
        pairs.paired(*three(sr, gt))


def test_sizes_that_do_not_match(tmp_path):
    sr, gt = folder(tmp_path / "sr", "a.png"), folder(tmp_path / "gt", "a.png", size=(9, 12))
    with pytest.raises(
        UserError, match=r"a.png has 8 x 12 pixels and its reference a.png has 9 x 12.*-crop 8x12\+0\+0"
    ):
        pairs.paired(sr, gt)
    for size in ((3, 3), (2, 4), (4, 3), (16, 24)):
        lr = folder(tmp_path / f"lr{size}", "a.png", size=size)
        with pytest.raises(
            UserError, match=f"8 x 12 pixels, which is no whole multiple of the {size[0]} x {size[1]} of"
        ):
            pairs.paired(sr, lr=lr)
    assert pairs.paired(sr, lr=folder(tmp_path / "lr", "a.png")).pairs[0].scale == 1


def test_a_turned_reference_has_the_size_a_viewer_shows(tmp_path):
    sr, gt = folder(tmp_path / "sr", "a.png"), tmp_path / "gt"
    gt.mkdir()
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (12, 8)).save(gt / "a.jpg", exif=exif)
    assert pairs.paired(sr, gt).pairs[0].gt == gt / "a.jpg"


def test_folders_without_pictures(tmp_path):
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "deep", size=(1, 1))
    folder(tmp_path / "deep" / "x4", "a.png")
    for at, says in (
        ("none", "There is no folder"),
        ("empty", "holds no pictures.*Give the folder they are in"),
        ("deep", "some in its folder 'x4': give that"),
    ):
        with pytest.raises(UserError, match=says):
            pairs.paired(tmp_path / at)


def test_a_damaged_picture_is_found_before_anything_is_scored(three):
    sr, gt = three(["a.png", "b.png"], ["a.png", "b.png"])
    (gt / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.png is empty"):
        pairs.paired(sr, gt)
