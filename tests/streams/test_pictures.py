"""Images of every mode and depth become 8-bit RGB or grey in one place; broken ones are refused by row."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perpetune.core.errors import StreamError
from perpetune.streams import load_stream
from perpetune.streams.pictures import check, eight_bits

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def stored(image: Image.Image, kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_eight_bits_keep_their_bits(mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (7, 5, 3) if mode == "RGB" else (7, 5), dtype=np.uint8)
    image = stored(Image.fromarray(values), "PNG")
    assert np.array_equal(np.asarray(eight_bits(image)), np.asarray(image.convert("RGB")))
    assert np.array_equal(np.asarray(eight_bits(image, "L")), np.asarray(image.convert("L")))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
        (Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        (Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
        (Image.fromarray((GREY / 255 * (2**31 - 1)).astype(np.int32)), "TIFF"),
        (Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
        (Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        (Image.fromarray(GREY.astype(np.float32) * 257), "TIFF"),
        (Image.fromarray(GREY).convert("P"), "PNG"),
        (Image.fromarray(GREY).convert("LA"), "PNG"),
        (Image.fromarray(GREY).convert("RGBA"), "PNG"),
    ],
)
def test_every_depth_gives_the_values_of_eight_bits(image: Image.Image, kind: str) -> None:
    opened = stored(image, kind)
    assert np.array_equal(np.asarray(eight_bits(opened, "L")), GREY)
    assert np.array_equal(np.asarray(eight_bits(opened)), np.repeat(GREY[..., None], 3, axis=2))


def test_dark_images_of_16_bits_stay_dark() -> None:
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))  # 200 of 65535, not of 255
    assert np.asarray(eight_bits(stored(dark, "PNG"), "L")).max() == 1


def test_what_is_transparent_is_white() -> None:
    red = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    red.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(eight_bits(stored(red, "PNG"))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    half = Image.new("LA", (1, 1), (0, 128))
    assert np.asarray(eight_bits(half)).tolist() == [[[127, 127, 127]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    opened = stored(palette, "PNG", transparency=0)
    assert np.asarray(eight_bits(opened)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    named = stored(Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], dtype=np.uint8)), "PNG", transparency=(9, 9, 9))
    assert np.asarray(eight_bits(named)).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_pictures_stand_upright() -> None:
    values = np.zeros((8, 16), dtype=np.uint8)
    values[:, :8] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = np.asarray(eight_bits(stored(Image.fromarray(values), "PNG", exif=exif), "L"))
    assert upright.shape == (16, 8) and (upright[:8] == 250).all() and (upright[8:] == 0).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "1", "HSV"])
def test_other_modes_are_those_of_pil(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)).convert(mode)
    assert np.array_equal(np.asarray(eight_bits(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("values", [[[-1.0, 0.5]], [[float("nan"), 0.0]], [[1e12, 0.0]]])
def test_values_that_are_no_light_are_refused(values: list[list[float]]) -> None:
    image = Image.fromarray(np.array(values, dtype=np.float32))
    with pytest.raises(StreamError, match="light is from 0 on"):
        eight_bits(image)
    file = io.BytesIO()
    image.save(file, "TIFF")
    with pytest.raises(StreamError, match="light is from 0 on"):
        check(file.getvalue())


def image_folder(folder: Path, kind: str = "jpg", size: int = 64) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("left", "right"):
            (folder / "w1" / split / label).mkdir(parents=True)
            for i in range(3):
                values = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(values).save(folder / "w1" / split / label / f"{i}.{kind}")
    return folder


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "bmp", "gif"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_an_image_cut_short_is_refused_by_task_split_and_row(tmp_path: Path, kind: str, kept: float) -> None:
    cut = image_folder(tmp_path, kind) / "w1" / "test" / "right" / f"1.{kind}"
    assert len(load_stream(tmp_path).tasks[0].test) == 6
    cut.write_bytes(cut.read_bytes()[: int(kept * cut.stat().st_size)])
    with pytest.raises(StreamError, match=rf"row 4 of the test split of task `w1` holds no .*right/1\.{kind}\)$"):
        load_stream(tmp_path)


def test_folders_within_folders_are_refused(tmp_path: Path) -> None:
    train = image_folder(tmp_path) / "w1" / "train"
    (train / "animals" / "cats").mkdir(parents=True)
    (train / "left" / "0.jpg").rename(train / "animals" / "cats" / "0.jpg")
    with pytest.raises(StreamError, match=r"animals/cats/0.jpg of .* its label could be animals or cats: put all"):
        load_stream(tmp_path)


def test_images_beside_the_folders_and_folders_without_are_refused(tmp_path: Path) -> None:
    train = image_folder(tmp_path) / "w1" / "train"
    (train / "left" / "notes.txt").write_text("a note is no image", encoding="utf-8")
    (train / "left" / ".hidden.jpg").write_bytes(b"")
    assert len(load_stream(tmp_path).tasks[0].train) == 6
    (train / "0.jpg").write_bytes((train / "left" / "0.jpg").read_bytes())
    with pytest.raises(
        StreamError, match=r"train/0.jpg of .* lies in no folder of a class: put it into train/<label>/"
    ):
        load_stream(tmp_path)
    (train / "0.jpg").unlink()
    (train / "raw").mkdir()
    (train / "raw" / "1.heic").write_bytes(b"of another program")
    with pytest.raises(StreamError, match="train/raw of .* holds no image"):
        load_stream(tmp_path)


def test_a_list_of_images_is_read_as_files_of_text_are(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = image_folder(tmp_path / split) / "w1" / "train"
        target = tmp_path / "s" / "w1" / split
        target.mkdir(parents=True)
        for i, label in enumerate(("left", "right")):
            (folder / label / "0.jpg").rename(target / f"{i}.jpg")
        (target / "metadata.csv").write_text("file_name,label\n1.jpg,007\n0.jpg,NA\n", encoding="utf-8")
    stream = load_stream(tmp_path / "s")
    assert stream.labels == ("007", "NA") and stream.tasks[0].train["label"][:] == [0, 1]
    for name in ("2.jpg", "../../../train/w1/train/left/1.jpg"):
        (target / "metadata.csv").write_text(f"file_name,label\n1.jpg,007\n{name},NA\n", encoding="utf-8")
        with pytest.raises(StreamError, match=r"row 1 of the test split of task `w1` \(.*metadata.csv, line 3\) names"):
            load_stream(tmp_path / "s")
