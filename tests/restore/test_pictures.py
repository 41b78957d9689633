"""Reading every kind of picture file, refusing what cannot be read, and saving; each file is made here."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tropism.core import UserError
from tropism.restore import pictures

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
PHOTO = Image.fromarray(COLOURS)


def saved(image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def pixels(path, **options) -> np.ndarray:
    """(H, W, 3) float of a file's picture in 0..255."""
    return pictures.read(path, **options).whole()[0].permute(1, 2, 0).numpy() * 255


def png(width, height, depth, colour, rows: bytes, more=b"") -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tif", {}),
        ("a.tiff", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True}),
        ("a.jpg.png", {}),
    ],
)
def test_colours_of_lossless_files(tmp_path, name, options):
    picture = pictures.read(saved(PHOTO, tmp_path / name, **options))
    assert (picture.height, picture.width, picture.notes, picture.profile) == (12, 20, (), None)
    np.testing.assert_allclose(picture.whole()[0].permute(1, 2, 0) * 255, COLOURS, atol=1e-4)
    assert picture.whole().dtype == torch.float32 and picture.whole().is_contiguous()


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_colours_of_lossy_files_are_pillows(tmp_path, name):
    path = saved(PHOTO, tmp_path / name, quality=80)
    np.testing.assert_allclose(pixels(path), np.asarray(Image.open(path).convert("RGB")), atol=1e-4)


def test_the_content_decides_and_not_the_suffix(tmp_path):
    path = saved(PHOTO, tmp_path / "a.jpg", format="PNG")
    np.testing.assert_allclose(pixels(path), COLOURS, atol=1e-4)


def test_a_window_is_a_part(tmp_path):
    path = saved(PHOTO, tmp_path / "a.png")
    picture = pictures.read(path)
    assert torch.equal(picture.window(3, 5, 7, 11), picture.whole()[..., 3:10, 5:16])


def test_bands_join(tmp_path, monkeypatch):
    """A large picture becomes numbers in bands, the last of them shorter."""
    monkeypatch.setattr(pictures, "_BAND", 20 * 5)
    np.testing.assert_allclose(pixels(saved(PHOTO, tmp_path / "a.png")), COLOURS, atol=1e-4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "lzw.tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    """Pixels and size are those of a viewer; the expected turn is numpy's, written out for all eight."""
    corners = np.zeros((16, 32, 3), np.uint8)
    corners[:8, :16], corners[:8, 16:], corners[8:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[274] = orientation
    options = {
        "webp": {"lossless": True},
        "jpg": {"quality": 98, "subsampling": 0},
        "lzw.tif": {"compression": "tiff_lzw"},
    }
    path = saved(Image.fromarray(corners), tmp_path / f"a.{suffix}", exif=exif, **options.get(suffix, {}))
    expected = turns[orientation](corners)
    assert pictures.size(path) == (expected.shape[1], expected.shape[0])
    picture = pictures.read(path)
    assert (picture.width, picture.height) == pictures.size(path)
    assert np.abs(pixels(path) - expected).mean() < (4 if suffix == "jpg" else 1e-4)
    assert picture.notes == (() if orientation == 1 else ("turned as its EXIF orientation says",))


def test_nonsense_in_exif_is_no_turn(tmp_path):
    exif = Image.Exif()
    exif[274] = 77
    assert pictures.size(saved(PHOTO, tmp_path / "a.jpg", exif=exif)) == (20, 12)
    assert pictures.read(tmp_path / "a.jpg").notes == ()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette(tmp_path, mode):
    image = PHOTO.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_allclose(pixels(saved(image, tmp_path / "a.png")), expected, atol=1e-4)
    assert pictures.read(tmp_path / "a.png").notes == ()


def test_cmyk(tmp_path):
    picture = pictures.read(saved(PHOTO.convert("CMYK"), tmp_path / "a.tif"))
    assert picture.notes == ("CMYK turned into RGB without a colour profile",)
    np.testing.assert_allclose(picture.whole()[0].permute(1, 2, 0) * 255, COLOURS, atol=1.01)
    path = saved(PHOTO.convert("CMYK"), tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels(path) - np.asarray(Image.open(path).convert("RGB"))).max() < 1e-3


# ---------------------------------------------------------------------------------------------------- alpha


def over_white(alpha):
    share = np.asarray(alpha, float)[..., None] / 255
    return COLOURS * share + 255 * (1 - share)


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.tif", {}), ("a.webp", {"lossless": True, "exact": True})]
)
def test_alpha_is_laid_over_white(tmp_path, name, options):
    alpha = np.linspace(0, 255, 240).reshape(12, 20).astype(np.uint8)
    image = PHOTO.copy()
    image.putalpha(Image.fromarray(alpha))
    path = saved(image, tmp_path / name, **options)
    np.testing.assert_allclose(pixels(path), over_white(alpha), atol=1e-3)
    picture = pictures.read(path)
    assert picture.notes == ("transparent parts laid over white",)
    whole = picture.window(0, 0, 12, 20)
    assert torch.equal(picture.window(0, 18, 12, 2), whole[..., 18:]), "a window without a transparent pixel, too"


def test_an_opaque_alpha_is_no_news(tmp_path):
    image = PHOTO.copy()
    image.putalpha(255)
    picture = pictures.read(saved(image, tmp_path / "a.png"))
    assert picture.notes == ()
    np.testing.assert_allclose(picture.whole()[0].permute(1, 2, 0) * 255, COLOURS, atol=1e-4)


def test_grey_with_alpha_and_marked_colours(tmp_path):
    clear = ("transparent parts laid over white",)
    grey = Image.new("LA", (4, 3), (100, 51))
    assert pixels(saved(grey, tmp_path / "la.png"))[0, 0] == pytest.approx([100 * 0.2 + 255 * 0.8] * 3)
    key = Image.new("RGB", (4, 3), (10, 20, 30))
    key.putpixel((1, 1), (200, 0, 0))
    saved(key, tmp_path / "key.png", transparency=(10, 20, 30))
    assert pixels(tmp_path / "key.png")[0, 0].tolist() == [255] * 3
    assert pixels(tmp_path / "key.png")[1, 1] == pytest.approx([200, 0, 0], abs=1e-3)
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([9, 9, 9, 40, 50, 60])
    saved(palette, tmp_path / "p.png", transparency=b"\xff\x33")
    assert pixels(tmp_path / "p.png")[0, 0] == pytest.approx([v * 0.2 + 255 * 0.8 for v in (40, 50, 60)], abs=1e-3)
    assert {pictures.read(tmp_path / f"{n}.png").notes for n in ("la", "key", "p")} == {clear}


# ---------------------------------------------------------------------------------------------------- 16 bits and floats


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_of_16_bits_keeps_them(tmp_path, name):
    """Pillow's own conversion would cut everything above 255 off."""
    values = np.linspace(0, 65535, 240).reshape(12, 20).astype(np.uint16)
    picture = pictures.read(saved(Image.fromarray(values), tmp_path / name))
    np.testing.assert_allclose(picture.whole()[0].numpy(), np.stack([values / 65535] * 3), atol=1e-7)
    assert picture.notes == ()


def test_grey_of_16_bits_with_a_marked_value_or_white_as_0(tmp_path):
    values = np.full((3, 4), 20000, np.uint16)
    values[1, 2] = 7
    file = saved(Image.fromarray(values), tmp_path / "key.png", transparency=7)
    picture = pictures.read(file)
    assert picture.notes == ("transparent parts laid over white",)
    assert picture.whole()[0, :, 1, 2].tolist() == [1, 1, 1] and picture.whole().mean() < 0.4
    with pytest.raises(UserError, match="keeps its white as 0 in 16 bits"):
        pictures.read(saved(Image.fromarray(values), tmp_path / "white.tif", tiffinfo={262: 0}))


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    file = saved(Image.new("RGB", (4, 3)), tmp_path / "a.jpg")
    monkeypatch.setattr(Image.Image, "getexif", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="not enough memory"):
        pictures.read(file)


def test_how_a_file_was_made(tmp_path):
    with pictures.png(tmp_path / "a.png", 2, 3, made="seed 1") as write:
        write(torch.rand(1, 3, 2, 3))
    assert pictures.made_by(tmp_path / "a.png") == "seed 1"
    assert pictures.read(tmp_path / "a.png").whole().shape == (1, 3, 2, 3)
    assert pictures.made_by(saved(Image.new("RGB", (4, 3)), tmp_path / "b.png")) == ""
    assert pictures.made_by(tmp_path / "none.png") == ""


def test_grey_of_16_bits_from_the_other_end(tmp_path):
    values = np.linspace(0, 65535, 240).reshape(12, 20).astype(np.uint16)
    image = Image.frombytes("I;16B", (20, 12), values.astype(">u2").tobytes())
    np.testing.assert_allclose(pixels(saved(image, tmp_path / "a.tif"))[..., 0] / 255, values / 65535, atol=1e-7)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_colours_of_16_bits_lose_half_and_say_so(tmp_path, colour, channels):
    values = np.full((2, 4, channels), 65535, np.uint16)
    values[..., 0] = [0, 20000, 40000, 65535]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(4, 2, 16, colour, rows))
    picture = pictures.read(tmp_path / "a.png")
    assert picture.notes == ("16 bits a channel read as 8",)
    assert np.abs(picture.whole()[0, 0, 0].numpy() - values[0, :, 0] / 65535).max() < 1 / 255


def colour_tiff(bits: int, values: bytes) -> bytes:
    """Two pixels of three channels, little-endian, which Pillow cannot write."""
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 206)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, len(values))]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)
    return head.ljust(200, b"\0") + struct.pack("<3H", bits, bits, bits) + values


def test_colour_tiffs_of_16_and_32_bits(tmp_path):
    values = [0, 20000, 40000, 65535, 300, 1]
    (tmp_path / "deep.tif").write_bytes(colour_tiff(16, struct.pack("<6H", *values)))
    picture = pictures.read(tmp_path / "deep.tif")
    assert picture.notes == ("16 bits a channel read as 8",)
    assert np.abs(picture.whole()[0, :, 0].T.flatten().numpy() - np.array(values) / 65535).max() < 1 / 255
    (tmp_path / "deeper.tif").write_bytes(colour_tiff(32, bytes(24)))
    with pytest.raises(UserError, match=r"32-bit colour TIFF. Convert it: magick deeper.tif -depth 8 deeper.png"):
        pictures.read(tmp_path / "deeper.tif")


def test_floats_count_from_0_to_1(tmp_path):
    values = np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20)
    path = saved(Image.fromarray(values), tmp_path / "a.tif")
    np.testing.assert_array_equal(pictures.read(path).whole()[0, 2].numpy(), values)
    for wrong, says in ((values * 255, "from 0 to 255"), (values - 0.5, "from -0.5 to 0.5"), (values * np.nan, "nan")):
        with pytest.raises(UserError, match=says):
            pictures.read(saved(Image.fromarray(wrong), tmp_path / "b.tif"))
    whole = Image.fromarray((values * 1000).astype(np.int32))
    with pytest.raises(UserError, match=r"has I pixels\. Convert it: magick c\.tif"):
        pictures.read(saved(whole, tmp_path / "c.tif"))


# ---------------------------------------------------------------------------------------------------- many frames, profiles


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_the_first_frame_counts(tmp_path, name):
    others = [Image.new("RGB", PHOTO.size, colour) for colour in ("red", "blue")]
    path = saved(PHOTO, tmp_path / name, save_all=True, append_images=others, lossless=True)
    np.testing.assert_allclose(pixels(path), COLOURS, atol=1e-4)
    assert pictures.read(path).notes == ("the first of its 3 frames",)


def test_a_telephones_jpeg_with_a_second_picture_in_it(tmp_path):
    """Format MPO: what a viewer shows is the first picture, and there is nothing to tell."""
    path = saved(PHOTO, tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[PHOTO.copy()], quality=100)
    assert np.abs(pixels(path) - np.asarray(Image.open(path))).max() < 1e-4
    assert pictures.read(path).notes == ()


@pytest.mark.parametrize(
    ("space", "mode", "kept"), [(b"RGB ", "RGB", True), (b"CMYK", "RGB", False), (b"RGB ", "L", False)]
)
def test_a_colour_profile_is_kept_where_it_fits(tmp_path, space, mode, kept):
    profile = b"\0" * 16 + space + b"\0" * 108
    picture = pictures.read(saved(PHOTO.convert(mode), tmp_path / "a.png", icc_profile=profile))
    assert picture.profile == (profile if kept else None)


# ---------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "lzw.tif", "a.webp", "a.bmp"])
def test_files_cut_short(tmp_path, name):
    """At any length: an error of ours, never a picture half grey."""
    options = {"lzw.tif": {"compression": "tiff_lzw"}}.get(name, {})
    whole = saved(PHOTO, tmp_path / name, **options).read_bytes()
    short = tmp_path / f"short.{name}"
    for length in sorted({1, 4, 30, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 20}):
        short.write_bytes(whole[:length])
        if length == len(whole) - 20 and name in ("a.png",):  # what is missing are checksums
            assert np.array_equal(pixels(short), pixels(tmp_path / name))
            continue
        with pytest.raises(UserError, match=r"short\."):
            pictures.read(short)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_flipped_bytes_never_raise_anything_else(tmp_path, name):
    whole = saved(PHOTO, tmp_path / name).read_bytes()
    rng, path = np.random.default_rng(3), tmp_path / f"bad.{name}"
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), 3):
            damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        for look in (pictures.size, pictures.read):
            with contextlib.suppress(UserError):
                look(path)


def test_what_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("a cat")
    (tmp_path / "empty.png").touch()
    saved(PHOTO, tmp_path / "moving.gif")
    for name, says in (
        ("text.png", "is not a PNG, JPEG, TIFF, WebP or BMP file"),
        ("empty.png", r"empty \(0 bytes\)"),
        ("moving.gif", "is not a PNG"),
        ("none.png", "There is no picture"),
        (".", "is a folder"),
    ):
        for look in (pictures.read, pictures.size):
            with pytest.raises(UserError, match=says):
                look(tmp_path / name)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    saved(PHOTO, tmp_path / "a.png").chmod(0)
    with pytest.raises(UserError, match="chmod u"):
        pictures.read(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------------- large pictures


def test_pillows_limit_is_not_ours(tmp_path, monkeypatch):
    """Pillow refuses twice its limit; we read it, without a warning, and leave the limit as it was."""
    path = saved(PHOTO, tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    monkeypatch.setattr(pictures, "_BAND", 60)
    assert pictures.read(path).window(0, 0, 5, 20).shape == (1, 3, 5, 20)
    np.testing.assert_allclose(pixels(path), COLOURS, atol=1e-4)
    assert pictures.Image.MAX_IMAGE_PIXELS == 100
    (tmp_path / "bad.png").write_text("a cat")
    with pytest.raises(UserError):
        pictures.read(tmp_path / "bad.png")
    assert pictures.Image.MAX_IMAGE_PIXELS == 100


def test_a_side_of_20000_pixels(tmp_path):
    path = saved(Image.new("L", (20_000, 3), 51), tmp_path / "a.png")
    assert pictures.size(path) == (20_000, 3)
    assert pictures.read(path).window(1, 19_990, 2, 10).mean().item() == pytest.approx(0.2)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    """60,000 x 60,000 pixels in a header of a file that holds none of them."""
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 2, b""))
    for look in (pictures.read, pictures.size):
        with pytest.raises(UserError, match=r"60,000 x 60,000 pixels, 3,600 million, and 500 million.*magick bomb.png"):
            look(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"240|0 million are the most"):
        pictures.read(saved(PHOTO, tmp_path / "a.png"), most=239)
    assert pictures.read(tmp_path / "a.png", most=240).width == 20


# ---------------------------------------------------------------------------------------------------- saving


def test_what_is_saved_is_what_pillow_reads(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    image = torch.from_numpy(COLOURS).permute(2, 0, 1) / 255
    pictures.save(image, path)
    with Image.open(path) as found:
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), COLOURS)
    pictures.save(image[None] * 3 - 1, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.round((COLOURS / 255 * 3 - 1).clip(0, 1) * 255))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("band", [1, 20 * 4, 10**6])
def test_rows_in_pieces(tmp_path, monkeypatch, band):
    monkeypatch.setattr(pictures, "_BAND", band)
    image = torch.from_numpy(COLOURS).permute(2, 0, 1)[None] / 255
    profile = b"\0" * 16 + b"RGB " + b"\0" * 108
    with pictures.png(tmp_path / "a.png", 12, 20, profile) as write:
        for first, last in ((0, 1), (1, 1), (1, 7), (7, 12)):
            write(image[..., first:last, :])
        assert not (tmp_path / "a.png").exists(), "it has its name before it is whole"
    with Image.open(tmp_path / "a.png") as found:
        found.verify()
    with Image.open(tmp_path / "a.png") as found:
        np.testing.assert_array_equal(np.asarray(found), COLOURS)
        assert found.info["icc_profile"] == profile


def test_rows_that_are_missing_are_no_file(tmp_path):
    with pytest.raises(AssertionError, match="2 rows are missing"), pictures.png(tmp_path / "a.png", 12, 20) as write:
        write(torch.zeros(1, 3, 10, 20))
    assert not list(tmp_path.iterdir())


def test_saving_where_it_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "a.png").mkdir()
    image = torch.zeros(3, 4, 4)
    for path, says in (
        (tmp_path / "a.jpg", "ends in .png, not a.jpg"),
        (tmp_path / "file" / "a.png", "cannot be written"),
        (tmp_path / "a.png", "cannot be written: Is a directory"),
    ):
        with pytest.raises(UserError, match=says):
            pictures.save(image, path)
    with pytest.raises(UserError, match="not finite"):
        pictures.save(image / 0, tmp_path / "b.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]
