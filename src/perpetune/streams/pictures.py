"""Images of every mode and depth as 8-bit RGB or grey: the one place where that is decided.

RGB and grey images of 8 bits are taken as they are. The others:

    16 bits a value         v -> round(v / 257), the whole range of 16 bits, as 65535 = 257 * 255
    32 bits, or floats      of the ranges [0, 1] (floats alone), [0, 255], [0, 65535] and [0, 2^31 - 1] the smallest
                            that holds all values of the image becomes [0, 255]: files do not say what is white
    alpha, transparency     composited on white
    palette, CMYK, YCbCr    as PIL converts them to RGB
    orientation (EXIF)      applied
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import StreamError

WIDE = ("I", "F")  # modes of PIL with 32 bits a value
RANGES = (1.0, 255.0, 65535.0, 2.0**31 - 1)


def eight_bits(image: Image.Image, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """The image in 8 bits a value, upright and opaque.

    Args:
        mode: "RGB", or "L" for grey.

    Raises:
        StreamError: it is broken or cut short, or has values that are no light (negative, or no numbers).
    """
    try:
        return _eight_bits(image).convert(mode)
    except StreamError:
        raise
    except Exception as error:  # decoders raise errors of every kind
        raise StreamError(f"an image cannot be read: {_said(error)}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" or image.mode == "L":
        image.load()
    png = image.format == "PNG" and image.mode == "I"  # how versions of PIL open a PNG of 16 bits
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(image).astype(np.float64), 65535.0))
    if image.mode in WIDE:
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(_scaled(values, 65535.0 if png else _white(values, image.mode)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _white(values: np.ndarray, mode: str) -> float:
    """What value is white in an image that does not say it."""
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > RANGES[-1]:
        raise StreamError(
            f"an image has values from {values.min():g} to {values.max():g}, and light is from 0 on: bring them to "
            "0 … 255 and save it with 8 bits"
        )
    ranges = RANGES if mode == "F" else RANGES[1:]
    return next(white for white in ranges if values.max(initial=0) <= white)


def _scaled(values: np.ndarray, white: float) -> np.ndarray:
    return np.rint(values * (255.0 / white)).astype(np.uint8)


def check(encoded: bytes) -> None:
    """Decode an encoded image to its last byte, JPEG at an eighth of its size.

    Raises:
        StreamError: it is none, broken, cut short, or of a kind that `eight_bits` refuses.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("L", (1, 1))
            image.load()
            if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16"):
                _eight_bits(image)
    except StreamError:
        raise
    except Exception as error:  # decoders raise errors of every kind
        raise StreamError(_said(error)) from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
