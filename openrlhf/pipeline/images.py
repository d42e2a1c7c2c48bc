"""Checks an image and makes a JPEG of it that every reader takes. Knows nothing about models."""

import io
import warnings
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

MIN_SIDE = 32  # pixels; smaller images are icons and rules
MAX_SIDE = 2048
MAX_PIXELS = 100_000_000
_QUALITY = 90


class BadImage(ValueError):
    """The image is of no use; the message is the reason."""


def jpeg_of(data: bytes) -> tuple[bytes, int, int]:
    """An upright JPEG on white of at most MAX_SIDE pixels a side, with the width and height of the original.

    Raises:
        BadImage: it is damaged, no image, too large, tiny, or of one colour.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit here is MAX_PIXELS
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImage(f"has {width:,} x {height:,}, more pixels than can be unpacked safely")
                if min(width, height) < MIN_SIDE:
                    raise BadImage(f"is smaller than {MIN_SIDE} pixels a side ({width} x {height})")
                image.verify()
            with Image.open(
                io.BytesIO(data)
            ) as image:  # verify() leaves nothing to be used, and misses what is cut off
                image.load()
                flat = _flat(ImageOps.exif_transpose(image))
        except BadImage:
            raise
        except Image.DecompressionBombError:
            raise BadImage("has more pixels than can be unpacked safely") from None
        except UnidentifiedImageError:
            raise BadImage("is not an image that Pillow can read") from None
        except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
            raise BadImage(f"is damaged: {' '.join(str(error).split())[:200]}") from None
    if all(high - low <= 2 for low, high in cast(tuple[tuple[int, int], ...], flat.getextrema())):
        raise BadImage("is of one colour")
    flat.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    held = io.BytesIO()
    flat.save(held, "JPEG", quality=_QUALITY)
    return held.getvalue(), width, height


def _flat(image: Image.Image) -> Image.Image:
    """RGB, what is transparent on white."""
    if image.mode.startswith(("I", "F")):  # 16 bits and more: the range that is there becomes 0 to 255
        low, high = cast(tuple[float, float], image.getextrema())
        scale = 255 / ((high - low) or 1)
        return image.point(lambda value: value * scale - low * scale).convert("L").convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
