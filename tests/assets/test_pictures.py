"""Pictures: squares of the right size and place, whatever the file; and clear words for what is none."""

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sinks.assets import pictures
from sinks.assets.catalogue import PICTURES
from sinks.assets.pictures import read_pictures
from sinks.errors import AssetError, InvalidInput
from tests.assets import packaging

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def stripes(*colours: tuple[int, ...], mode: str = "RGB", width: int = 40, height: int = 40) -> Image.Image:
    """Upright stripes, each `width` wide."""
    picture = Image.new(mode, (width * len(colours), height))
    for index, colour in enumerate(colours):
        picture.paste(colour, (index * width, 0, (index + 1) * width, height))
    return picture


def read(path: Path, size: int = 8) -> np.ndarray:
    [(name, picture)] = read_pictures([path], size)
    assert name == path.name and picture.shape == (3, size, size) and picture.dtype == np.float32
    return picture


def test_the_middle_is_cut_out_in_order_of_colours(tmp_path: Path):
    stripes(RED, GREEN, BLUE).save(tmp_path / "wide.png")
    picture = read(tmp_path / "wide.png")
    assert np.array_equal(picture, np.broadcast_to(np.array([0, 1, 0])[:, None, None], (3, 8, 8)))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16", "LA"])
def test_any_kind_of_file_becomes_three_colours(mode: str, tmp_path: Path):
    file = tmp_path / ("picture.tif" if mode in ("CMYK", "I;16") else "picture.png")
    Image.new("RGB", (20, 20), "white").convert("L" if mode == "I;16" else mode).convert(mode).save(file)
    assert read(file).min() >= 0


def test_what_is_transparent_is_white(tmp_path: Path):
    stripes((*RED, 0), mode="RGBA").save(tmp_path / "glass.png")
    assert read(tmp_path / "glass.png").min() == 1


def test_the_camera_says_where_up_is(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stripes(RED, BLUE, width=20).save(tmp_path / "turned.png", exif=exif)
    picture = read(tmp_path / "turned.png")
    assert picture[2, 4, 0] == 1 and picture[0, 4, -1] == 1


def test_a_thread_of_a_picture_takes_no_memory(tmp_path: Path):
    Image.new("RGB", (30_000, 1), RED).save(tmp_path / "thread.png")
    assert read(tmp_path / "thread.png", 64)[0].min() == 1


def test_what_is_no_picture_is_told(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InvalidInput, match="notes.txt is no picture"):
        read_pictures([tmp_path / "notes.txt"])
    with pytest.raises(InvalidInput, match="there is no picture .*none.png"):
        read_pictures([tmp_path / "none.png"])
    with pytest.raises(InvalidInput, match="is a folder"):
        read_pictures([tmp_path])
    with pytest.raises(InvalidInput, match="no picture was given"):
        read_pictures([])
    with pytest.raises(InvalidInput, match="size=0"):
        read_pictures(size=0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif"])
def test_a_damaged_picture_is_told(suffix: str, tmp_path: Path):
    file = tmp_path / f"whole.{suffix}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidInput, match=rf"whole\.{suffix}"):
        read_pictures([file])


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    for limit in (3000, 100):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InvalidInput, match="too large"):
            read_pictures([tmp_path / "large.png"])


def test_the_built_in_ones_come_from_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that a dependency carries, which is not imported; two that share a package."""
    monkeypatch.setenv("SINKS_CACHE", str(tmp_path / "cache"))
    for name, colour in (("first.png", RED), ("second.png", BLUE)):
        stripes(colour).save(tmp_path / name)
    contents = {name: (tmp_path / name).read_bytes() for name in ("first.png", "second.png")}
    payload, archives = packaging.bundle("first.png", contents)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD, log=tmp_path / "downloads")
    first, second = (replace(PICTURES["chelsea"], name=name, file=name, payload=payload) for name in contents)
    monkeypatch.setattr(pictures, "PICTURES", {"hopper": PICTURES["hopper"], "first": first, "second": second})
    imported = "matplotlib" in sys.modules
    found = dict(read_pictures(size=28))
    assert list(found) == ["hopper", "first.png", "second.png"]
    assert found["first.png"][0].min() == 1 == found["second.png"][2].min() and found["hopper"].std() > 0.1
    assert ("matplotlib" in sys.modules) == imported
    assert (tmp_path / "downloads").read_text().count("\n") == 1


def test_an_installation_without_its_picture_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    with pytest.raises(AssetError, match="hopper is a file of matplotlib.*install matplotlib again"):
        read_pictures()
