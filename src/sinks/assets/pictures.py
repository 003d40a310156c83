"""Pictures to look at: a few photographs that packages carry, and any file that Pillow reads."""

import importlib.metadata
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError

from sinks.assets.catalogue import PICTURES, PictureAsset
from sinks.assets.fetch import fetch
from sinks.assets.progress import Progress
from sinks.errors import AssetError, InvalidInput
from sinks.files import expanded


def read_pictures(
    paths: Sequence[str | Path] | None = None, size: int = 518, *, progress: Progress | None = None
) -> list[tuple[str, Float[np.ndarray, "3 size size"]]]:
    """Read pictures as squares of red, green and blue between 0 and 1, not yet normalised for any model.

    Each picture is turned as its camera says, laid on white where it is transparent, cut to its largest central square
    and scaled (bicubic). The built-in ones are five photographs of 15 MB in all, of which one is already here; their
    licences stand in `sinks.assets.catalogue.PICTURES`.

    Args:
        paths: picture files; None for the built-in photographs.
        size: edge of the result in pixels; a vision transformer wants a multiple of its patch.
        progress: told about downloaded bytes; None draws a bar when standard error is a terminal.

    Returns:
        Name (of the catalogue, or the file's) and float32 values of each picture, in order.

    Raises:
        InvalidInput: no picture at all, a file that is missing or no picture, or a size below 1.
        AssetError: a built-in picture could not be had (`FetchError`, `ChecksumError`).
    """
    if size < 1:
        raise InvalidInput(f"size={size} pixels leaves nothing to see: give 1 or more, such as 518")
    if paths is None:
        return [(asset.name, _read(_locate(asset, progress), size)) for asset in PICTURES.values()]
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        raise InvalidInput("no picture was given: name at least one file, or none at all for the built-in ones")
    files = [expanded(path) for path in paths]
    return [(file.name, _read(file, size)) for file in files]


def _locate(asset: PictureAsset, progress: Progress | None) -> Path:
    if asset.payload is not None:
        return fetch(asset.payload, progress).parent / asset.file
    # Not by importing the package: it may be heavy, and only its file is wanted.
    files = importlib.metadata.files(asset.source) or ()
    found = next((file for file in files if file.as_posix().endswith(f"/{asset.file}")), None)
    path = None if found is None else Path(str(found.locate()))
    if path is None or not path.is_file():
        raise AssetError(
            f"the picture {asset.name} is a file of {asset.source} ({asset.file}), which this installation lacks: "
            f"install {asset.source} again, or name picture files of your own"
        )
    return path


def _read(path: Path, size: int) -> Float[np.ndarray, "3 {size} {size}"]:
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder, not a picture: name the files in it")
    if not path.is_file():
        raise InvalidInput(f"there is no picture {path}: check the path")
    try:
        with warnings.catch_warnings():
            # So large that it may be meant to fill the memory: an error, where Pillow warns first.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = _opaque(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise InvalidInput(f"{path} is no picture that Pillow can read: convert it to PNG or JPEG first") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{path} is too large a picture ({error}): make it smaller first") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # a damaged file, in the words of its decoder
        raise InvalidInput(f"{path} is a damaged picture, or cannot be read ({error}): give another file") from error
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 255


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture in red, green and blue, on white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
