"""Decoding whatever a data set holds, and refusing what no decoder should be given; at every door alike."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import NAMES, make_dataset, tiny_resnet
from PIL import Image

from hf_balancemix.audit import audit_labels
from hf_balancemix.core.sampling import PairKey
from hf_balancemix.data import PlainInstances, TrainingPairs, ViewMaker, decode, drop_bad_images, given_labels
from hf_balancemix.frozen.cache import _Instances
from hf_balancemix.models import iter_probabilities, predict_probabilities, squash_processor

ORIENTATION = 0x0112


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Image.Image:
    """Four flat quarters of different colours, which JPEG keeps, with some variation."""
    rng = np.random.default_rng(seed)
    quarters = rng.integers(0, 256, (2, 2, 3)).repeat(height // 2, 0).repeat(width // 2, 1)
    return Image.fromarray((0.9 * quarters + rng.integers(0, 25, quarters.shape)).astype(np.uint8))


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_levels(image: Image.Image) -> np.ndarray:
    """The one channel of an RGB image whose three channels are equal."""
    values = np.asarray(image)
    assert np.array_equal(values[..., 0], values[..., 1])
    assert np.array_equal(values[..., 0], values[..., 2])
    return values[..., 0].astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
@pytest.mark.parametrize("form", ["path", "bytes", "dict of path", "dict of bytes", "PIL"])
def test_every_mode_and_form_becomes_the_same_rgb(mode, form, tmp_path):
    stored = picture().convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    file = tmp_path / "image"
    file.write_bytes(as_bytes(stored, kind))
    given = {
        "path": file,
        "bytes": file.read_bytes(),
        "dict of path": {"path": str(file), "bytes": None},
        "dict of bytes": {"path": "elsewhere.png", "bytes": file.read_bytes()},
        "PIL": stored,
    }[form]
    decoded = decode(given)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(stored.convert("RGB")))


def test_a_cmyk_jpeg_keeps_its_colours():
    original = picture()
    decoded = decode(as_bytes(original.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(original)).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("form", ["bytes", "PIL"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind, form):
    values = np.linspace(0, 65535, 24 * 20).astype(np.uint16).reshape(24, 20)
    stored = Image.fromarray(values)
    decoded = decode(as_bytes(stored, kind) if form == "bytes" else stored)
    assert np.abs(grey_levels(decoded) - values / 257).max() <= 1
    assert len(np.unique(grey_levels(decoded))) == 256


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("store", ["grey PNG", "colour PNG", "colour and alpha PNG", "I TIFF", "F TIFF"])
def test_fewer_bits_than_the_file_has_room_for_are_scaled_by_what_is_there(bits, store):
    values = np.linspace(0, 2**bits - 1, 24 * 20).astype(np.uint16).reshape(24, 20)
    if store.startswith("colour"):
        channels = 4 if "alpha" in store else 3
        decoded = decode(deep_png(np.stack([values] * channels, axis=-1)))
    else:
        dtype = {"grey": np.uint16, "I": np.int32, "F": np.float32}[store.split()[0]]
        decoded = decode(as_bytes(Image.fromarray(values.astype(dtype)), store.split()[1]))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded)[..., 1], values >> (bits - 8))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit colours, which Pillow cannot write."""

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def test_a_deep_image_that_pillow_has_opened_is_decoded_like_its_file():
    content = deep_png((np.arange(48).reshape(4, 4, 3) * 80).astype(np.uint16))
    expected = np.asarray(decode(content))
    assert expected.max() > 200
    opened = Image.open(io.BytesIO(content))
    for _ in range(2):
        assert np.array_equal(np.asarray(decode(opened)), expected)


def test_fractions_and_pixels_of_no_known_range():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    found = np.asarray(decode(Image.fromarray(values)))[..., 0]
    assert np.array_equal(found, np.round(values * 255))
    for wrong in (-1.0, 70_000.0, float("nan")):
        with pytest.raises(ValueError, match=r"pixels from .* to .*; they must lie in \[0, 65535\]"):
            decode(Image.fromarray(np.full((4, 4), wrong, dtype=np.float32)))
    cut_off = deep_png(np.random.default_rng(0).integers(0, 4096, (9, 9, 3)))[:-99]
    with pytest.raises(ValueError, match="cannot decode image given as bytes"):
        decode(cut_off)


# What a camera stores so that the image appears upright after the turn that the tag names.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_that_exif_says_is_turned_comes_out_upright(tag, kind):
    upright = picture()
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    stored = as_bytes(upright.transpose(TURNS[tag]), kind, exif=exif)
    decoded = decode(stored)
    assert decoded.size == upright.size
    difference = np.abs(np.asarray(decoded).astype(int) - np.asarray(upright))
    assert difference.mean() < (1e-9 if kind == "PNG" else 8)


def test_16_bit_grey_with_exif_is_turned_too():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10000
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    decoded = decode(as_bytes(Image.fromarray(values), exif=exif))
    assert np.array_equal(grey_levels(decoded), values[::-1, ::-1] // 256)


def broken(tmp_path: Path, how: str) -> Path:
    file = tmp_path / f"{how.replace(' ', '_')}.jpg"
    content = as_bytes(picture(), "JPEG")
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "cut in the header":
        content = content[:50]
    elif how == "truncated png":
        content = as_bytes(picture())[:-300]
    elif how == "empty":
        content = b""
    elif how == "text":
        content = b"<html>404 Not Found</html>"
    elif how == "bomb":  # a BMP header that claims 60,000 x 60,000 pixels
        content = bytearray(as_bytes(picture(), "BMP"))
        content[18:26] = (60_000).to_bytes(4, "little") * 2
    file.write_bytes(bytes(content))
    return file


@pytest.mark.parametrize("how", ["truncated", "cut in the header", "truncated png", "empty", "text", "bomb"])
@pytest.mark.parametrize("form", ["path", "dict of path", "dict of bytes"])
def test_a_broken_file_gives_one_error_that_names_it(how, form, tmp_path):
    file = broken(tmp_path, how)
    given = {
        "path": str(file),
        "dict of path": {"path": str(file), "bytes": None},
        "dict of bytes": {"path": str(file), "bytes": file.read_bytes()},
    }[form]
    with pytest.raises(ValueError, match="cannot decode image") as error:
        decode(given)
    assert file.name in str(error.value)
    assert "on_bad_image='skip'" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_pil_image_is_named_as_well(tmp_path):
    file = broken(tmp_path, "truncated png")
    with pytest.raises(ValueError, match=r"cannot decode image .*truncated_png\.jpg"):
        decode(Image.open(file))


def test_an_absent_file_and_a_wrong_type(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg does not exist; restore it"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        decode({"path": str(tmp_path / "gone.jpg"), "bytes": None})
    for absent in (None, {"path": None, "bytes": None}):
        with pytest.raises(ValueError, match=r"cannot decode image None .*neither a path nor bytes"):
            decode(absent)
    for wrong in (3, np.zeros((4, 4, 3))):
        with pytest.raises(TypeError, match="a path, bytes, a PIL image or a datasets"):
            decode(wrong)


def test_an_image_of_a_hugging_face_data_set_in_either_form(tmp_path):
    file = tmp_path / "a.png"
    picture().save(file)
    data = datasets.Dataset.from_dict({"image": [str(file)]}, features=datasets.Features(image=datasets.Image()))
    raw = data.cast_column("image", datasets.Image(decode=False))
    assert np.array_equal(np.asarray(decode(data[0]["image"])), np.asarray(decode(raw[0]["image"])))


# ---- what no decoder is given ----

READ = {
    "JPEG": {}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}, "GIF": {}, "AVIF": {}, "JPEG2000": {},
    "MPO": {"save_all": True, "append_images": [Image.new("RGB", (30, 20))]},
}  # fmt: skip
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n"


def refused(kind: str) -> bytes:
    return EPS if kind == "EPS" else as_bytes(picture(), kind)


@pytest.mark.parametrize("kind", READ)
def test_each_format_of_the_list_is_read_whatever_the_file_is_called(kind, tmp_path):
    file = tmp_path / "image.jpg"
    file.write_bytes(as_bytes(picture(), kind, **READ[kind]))
    assert np.abs(np.asarray(decode(file), int) - np.asarray(picture())).mean() < 30  # GIF's colours are far off
    with Image.open(file) as opened:
        assert opened.format == kind
        assert np.array_equal(np.asarray(decode(opened)), np.asarray(decode(file)))


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PCX", "SGI", "DDS"])
@pytest.mark.parametrize("form", ["path", "bytes", "PIL"])
def test_other_formats_are_refused_before_any_decoder_sees_them(kind, form, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    file = tmp_path / "image.jpg"
    file.write_bytes(refused(kind))
    given = {"path": str(file), "bytes": file.read_bytes(), "PIL": Image.open(file) if form == "PIL" else None}[form]
    with pytest.raises(ValueError, match=rf"cannot decode image .*{kind}.*those read are JPEG, MPO, PNG") as error:
        decode(given)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("form", ["path", "bytes", "PIL"])
def test_more_pixels_than_the_limit_are_not_decoded(form, tmp_path, monkeypatch):
    file = tmp_path / "wide.png"
    Image.new("1", (400, 300)).save(file)
    given = {"path": file, "bytes": file.read_bytes(), "PIL": Image.open(file)}[form]
    with pytest.raises(ValueError, match="400 x 300 pixels, more than max_image_pixels, 119,999"):
        decode(given, max_image_pixels=119_999)
    assert decode(given, max_image_pixels=120_000).size == (400, 300)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit gives way to a higher one
    assert decode(file.read_bytes(), max_image_pixels=120_000).size == (400, 300)


def test_an_image_that_would_cost_a_gigabyte_is_refused_by_its_header(tmp_path):
    """13,300 x 13,300 pixels in 30 kB, which Pillow only warns of."""
    header, row = struct.pack(">IIBBBBB", 13_300, 13_300, 1, 0, 0, 0, 0), b"\0" * (1 + -(-13_300 // 8))
    packer = zlib.compressobj(9)
    content = b"".join(packer.compress(row) for _ in range(13_300)) + packer.flush()
    (tmp_path / "bomb.png").write_bytes(png((b"IHDR", header), (b"IDAT", content), (b"IEND", b"")))
    with pytest.raises(
        ValueError, match=r"bomb\.png .*13,300 x 13,300 pixels, more than max_image_pixels, 89,478,485"
    ):
        decode(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "error", [NotImplementedError, SyntaxError, struct.error, MemoryError, KeyError, RecursionError, OverflowError]
)
def test_whatever_a_decoder_raises_the_image_is_bad(error, monkeypatch):
    def fail(*_):
        raise error("of the\ndecoder" * 100)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=r"cannot decode image given as bytes .*of the") as raised:
        decode(as_bytes(picture()))
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_and_a_folder_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for bad in (tmp_path / "pipe.jpg", tmp_path):
        with pytest.raises(ValueError, match="it is no file"):
            decode(bad)


# ---- every door ----


def test_all_doors_call_the_same_images_bad_and_by_the_same_names(tmp_path, caplog):
    """Training, scan and evaluation views, prediction, audit, a check before, and the feature cache."""
    data = make_dataset(tmp_path / "images", 12)
    files = sorted((tmp_path / "images").iterdir())
    files[1].write_bytes(EPS)
    files[3].write_bytes(files[3].read_bytes()[:99])
    files[4].unlink()
    Image.new("RGB", (300, 300)).save(files[6])
    rows = data.cast_column("image", datasets.Image(decode=False))["image"][:]
    rows[8] = None
    features = data.features
    data = data.remove_columns("image").add_column("image", rows, feature=features["image"])
    bad, limit = [1, 3, 4, 6, 8], {"max_image_pixels": 10_000}
    model, processor = tiny_resnet(), squash_processor(None, 16)
    model.config.id2label = dict(enumerate(NAMES))
    message = f"5 of 12 images cannot be decoded: row 1 ({files[1]}), row 3 ({files[3]}), row 4 ({files[4]}), ..."

    kept = drop_bad_images(data, **limit)
    assert kept["image_id"][:] == [100 + i for i in range(12) if i not in bad]
    found = [
        i
        for indices, _ in iter_probabilities(model, data, processor, batch_size=5, on_bad_image="skip", **limit)
        for i in indices
    ]
    assert found == [i for i in range(12) if i not in bad]
    audit_labels(model, data, processor, on_bad_image="skip", **limit)
    said = [record.getMessage() for record in caplog.records if "cannot be decoded" in record.getMessage()]
    assert said == [f"{message}; they are left out."] * 3

    views = ViewMaker(16, 0, **limit)
    plain, cached = PlainInstances(data, views), _Instances(data, views, 1)
    pairs = TrainingPairs(data, given_labels(data), views)
    for i in range(12):
        doors = (
            lambda i=i: plain[i],
            lambda i=i: pairs[PairKey(0, i, None)],
            lambda i=i: cached[i],
            lambda i=i: predict_probabilities(model, data.select([i]), processor, **limit),
            lambda i=i: audit_labels(model, data.select([i]), processor, **limit),
        )
        errors = set()
        for door in doors:
            try:
                door()
            except (ValueError, FileNotFoundError) as error:
                errors.add(f"{type(error).__name__}: {error}")
            else:
                assert i not in bad
        assert len(errors) == (i in bad), errors
        assert not errors or (str(files[i]) if i != 8 else "None") in errors.pop()
