"""Images of strangers: the formats that are read, how large they may be, and their pixels as RGB."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

logger = logging.getLogger(__name__)

# What Pillow reads by itself, from one file. Of the others some start a program (EPS: Ghostscript), need another
# library, or are hardly ever met and hardly ever tested.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
# Above which Pillow warns. RGB pixels of 3 bytes make 268 MB of it, and a decoder needs a multiple of that.
MAX_IMAGE_PIXELS = 89_478_485
_NAME_LENGTH = 160


def decode(image: Any, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """An RGB image, turned upright by its EXIF tag; transparency is dropped. Of several frames it is the first.

    Pixels of more than 8 bits are scaled to 8. Scanners, microscopes and satellites store 10, 12 or 14 bits in 16, and
    nothing in the file says so: an image has the fewest of 8, 10, 12, 14 and 16 bits that its largest value fits in.
    Floating-point pixels lie in [0, 1], or are whole numbers of such a range.

    Args:
        image: A dict with `path` and `bytes` (an undecoded `datasets.Image`), a path, bytes, or a PIL image.
        max_image_pixels: The most pixels, width x height, that are decoded. Above Pillow's own limit it raises that
            one, too, for the whole process.

    Raises:
        ValueError: It is None, of no format of :data:`FORMATS`, cut off or damaged, has pixels below 0 or above
            65,535, or more of them than `max_image_pixels`.
        FileNotFoundError: The file is gone.
        TypeError: `image` is something else.
    """
    name = image_name(image)
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image is not None and not isinstance(image, str | os.PathLike | bytes | Image.Image):
        raise TypeError(
            f"image is a {type(image).__name__}; it must be a path, bytes, a PIL image or a datasets.Image; pass one."
        )
    if Image.MAX_IMAGE_PIXELS is not None and max_image_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_image_pixels
    try:
        if image is None:
            raise ValueError("its row has neither a path nor bytes")
        if isinstance(image, Image.Image):
            return _checked_rgb(image, max_image_pixels)
        if not isinstance(image, bytes) and os.path.exists(image) and not os.path.isfile(image):
            raise ValueError("it is no file")  # to open a pipe would wait for ever
        with _open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _checked_rgb(opened, max_image_pixels)
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name} does not exist; restore it or remove its row.") from None
    except Exception as error:  # decoders raise what they like
        problem = " ".join(str(error).split())[:_NAME_LENGTH] or type(error).__name__
        raise ValueError(
            f"cannot decode image {name} ({problem}); replace the file, or leave it out with on_bad_image='skip'."
        ) from error


def image_name(image: Any) -> str:
    """What messages call an image: its path, of a long one the end, or how it was given."""
    path, given = image, "given as bytes"
    if isinstance(image, dict):
        path = image.get("path") or ""
        given = "None" if image.get("bytes") is None else given
    elif image is None:
        given = "None"
    elif isinstance(image, Image.Image):
        path, given = getattr(image, "filename", ""), "given as a PIL image"
    name = os.fsdecode(path) if isinstance(path, str | os.PathLike) else ""
    name = name if name.isprintable() else repr(name)
    return (name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}") or given


def bad_images(rows: Sequence[int], images: Any) -> str:
    """How many of `images`, a sequence, cannot be decoded, with the first of those `rows` and their names."""
    names = ", ".join(f"row {row} ({image_name(images[row])})" for row in rows[:3])
    return f"{len(rows)} of {len(images)} images cannot be decoded: {names}{', ...' if len(rows) > 3 else ''}"


def image_suffixes() -> set[str]:
    """The endings of files, such as `.jpg`, of the formats that are read."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in _formats()}


@cache
def _formats() -> tuple[str, ...]:
    Image.init()  # an old Pillow, or one that was built without a library, lacks some
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _open(file: Any) -> Image.Image:
    try:
        return Image.open(file, formats=_formats())
    except Image.UnidentifiedImageError as error:
        if isinstance(file, io.BytesIO):
            prefix = file.getvalue()[:16]
        else:
            with open(file, "rb") as stream:
                prefix = stream.read(16)
        kind = _format_of(prefix)
        raise ValueError(f"it is a damaged {kind}" if kind in FORMATS else _refused(kind)) from error


def _format_of(prefix: bytes) -> str | None:
    """What the first bytes of a file that is not read say of its format; nothing more of it is looked at."""
    for kind in (*_formats(), *Image.ID):
        accept = Image.OPEN[kind][1]
        try:
            if accept is not None and accept(prefix) is True:
                return kind
        except Exception:  # of fewer bytes than it expects
            continue
    return None


def _refused(kind: str | None) -> str:
    found = "is of no known format" if kind is None else f"is of the format {kind}, which is not read"
    return f"it {found}; those read are {', '.join(FORMATS)}"


def _checked_rgb(image: Any, max_image_pixels: int) -> Image.Image:
    if image.format not in (None, "DIB", *FORMATS):  # None: made in memory; DIB: a BMP without its file header
        raise ValueError(_refused(image.format))
    if image.width * image.height > max_image_pixels:
        raise ValueError(
            f"it has {image.width:,} x {image.height:,} pixels, more than max_image_pixels, {max_image_pixels:,}"
        )
    return _opened_rgb(image)


def _opened_rgb(image: Any) -> Image.Image:
    # Pillow reads colours of 16 bits by their upper 8, which leaves nothing of 12 bits; once loaded, they are lost.
    deep = ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I")
    if deep and image.fp is not None:  # None: closed, which load() says
        return _deep_colour(image)
    return _upright_rgb(image)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):  # convert() would clip them
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    return upright.convert("RGB")


def _deep_colour(opened: Any) -> Image.Image:
    if opened.format != "PNG":
        _say_once("16-bit colours of %s are read by their upper 8 bits.", opened.format)
        return _upright_rgb(opened)
    position = opened.fp.tell()
    opened.fp.seek(0)
    content = opened.fp.read()
    opened.fp.seek(position)
    with _open(io.BytesIO(content)) as copy:  # the caller's stays unloaded, and can be decoded again
        copy.load()  # which refuses what is cut off; torchvision fills it up
        exif = copy.getexif()
    try:
        values = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    image = Image.fromarray(_eight_bits(values.permute(1, 2, 0).numpy()))
    image.getexif().update(exif)
    return ImageOps.exif_transpose(image)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Pixels of any type as uint8, by the range that is found in them; see :func:`decode`."""
    least, most = values.min(initial=0), values.max(initial=0)
    if not (least >= 0 and most <= 65535):  # also NaN
        raise ValueError(f"pixels from {least:g} to {most:g}; they must lie in [0, 65535], or in [0, 1] as fractions")
    if values.dtype.kind == "f" and most <= 1:
        return np.round(values * 255).astype(np.uint8)
    bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)
    if bits < 16:
        _say_once("Pixels of up to %d bits in a file for more are scaled by 1 / %d to 8 bits.", bits, 2 ** (bits - 8))
    return (values.astype(np.int64) >> (bits - 8)).astype(np.uint8)


@cache
def _say_once(text: str, *values: Any) -> None:
    logger.info(text, *values)
