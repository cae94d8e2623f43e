"""The built-in sample: a small long-tailed multi-label scene set, drawn once, stored in the official COCO layout.

Each image shows one to five objects (toys, crockery, plants and animals) on a textured, cluttered ground. Objects vary
in colour, size, tilt, grain and lighting, and hide one another in part. Each class has a usual hue, but neighbouring
hues overlap, and four pairs differ by a texture or by one detail only (ball / beach ball, mushroom / toadstool, fish /
striped fish, cup / mug). What lies on grass, sand and tables differs, so labels co-occur as they do in photographs.

With the defaults about 590 of 1,500 training images show the commonest class and about 90 the rarest, a tail as long
as a network can learn from scratch in a demo's time; an image has 2.2 labels on average. The 500 validation images,
drawn in the same way, have at least 30 positives of each class.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import maximum_filter
from tqdm.auto import tqdm

from hf_balancemix.files import cache_folder, check_writable

logger = logging.getLogger(__name__)

Colour = tuple[int, int, int]
Rng = np.random.Generator

# Raise it whenever a change alters a single pixel or label: the version is part of the cache folder's name.
SCENES_VERSION = 3

SCENES_FILE = "scenes.json"  # marks a whole sample
_HUE_SPREAD = 0.025  # of a whole turn
_SPRITE = 96  # pixels a side of the canvas on which an object is drawn before it is turned and scaled
_MIN_VISIBLE = 0.65  # share of an object that must stay visible, inside the frame and not hidden by others
_PLACEMENT_TRIES = 30
_OBJECTS_PER_IMAGE = (0.20, 0.30, 0.28, 0.15, 0.07)  # probabilities of 1, 2, ... 5 objects
_THEME_BOOST = 3.0  # how much likelier an object is where it belongs
_VAL_FIRST_ID = 500_000
_INK: Colour = (38, 30, 36)


def _near(rng: Rng, hue: float) -> float:
    """A hue around the usual one of a class."""
    return hue + _HUE_SPREAD * rng.standard_normal()


def _colour(rng: Rng, hue: float | None = None, saturation: tuple[float, float] = (0.6, 1.0)) -> Colour:
    """A random opaque colour; `hue` in [0, 1) where it matters."""
    hue = rng.random() if hue is None else hue
    rgb = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(*saturation), rng.uniform(0.62, 1.0))
    red, green, blue = (round(255 * c) for c in rgb)
    return red, green, blue


def _other_colour(rng: Rng, colour: Colour) -> Colour:
    """A colour that stands out from `colour`: white now and then, else a hue at least a quarter turn away."""
    if rng.random() < 0.6:
        return (246, 243, 236)
    hue = colorsys.rgb_to_hsv(*(c / 255 for c in colour))[0]
    return _colour(rng, hue + rng.uniform(0.25, 0.75))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Colour) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _ring(n: int, radius: float, start: float) -> list[tuple[float, float]]:
    """`n` points around the middle of the canvas; the first at the angle `start`."""
    angles = [start + 2 * math.pi * i / n for i in range(n)]
    return [(48 + radius * math.cos(a), 48 + radius * math.sin(a)) for a in angles]


def _draw_ball(sprite: Image.Image, rng: Rng) -> None:
    draw = ImageDraw.Draw(sprite)
    _disc(draw, 48, 48, 42, _colour(rng, _near(rng, 0.13)))


def _draw_beach_ball(sprite: Image.Image, rng: Rng) -> None:
    first = _colour(rng, _near(rng, 0.13))
    colours = [first, _other_colour(rng, first)]
    _disc(ImageDraw.Draw(sprite), 48, 48, 42, first)
    wedges = Image.new("RGB", sprite.size, first)
    draw = ImageDraw.Draw(wedges)
    x, y = 48 + rng.uniform(-14, 14), 48 + rng.uniform(-14, 14)  # where the wedges meet
    parts = 2 * int(rng.integers(3, 5))
    for i in range(parts):
        begin = 360 * i / parts
        draw.pieslice((x - 90, y - 90, x + 90, y + 90), begin, begin + 360 / parts, fill=colours[i % 2])
    _disc(draw, x, y, 6, colours[1])
    sprite.paste(wedges, mask=sprite.getchannel("A"))


def _draw_mushroom(sprite: Image.Image, rng: Rng, *, hue: float = 0.0, spots: bool = False) -> None:
    draw = ImageDraw.Draw(sprite)
    stem = _colour(rng, 0.1, (0.05, 0.25))
    width = rng.uniform(9, 15)
    draw.polygon([(48 - width, 46), (48 + width, 46), (48 + 1.25 * width, 90), (48 - 1.25 * width, 90)], fill=stem)
    cap = _colour(rng, _near(rng, hue), (0.5, 0.95))
    top = rng.uniform(6, 18)
    draw.chord((6, top, 90, 112 - top), 180, 360, fill=cap)
    draw.ellipse((8, 50, 88, 64), fill=tuple(round(0.72 * c) for c in cap))
    if spots:
        light = _other_colour(rng, cap)
        for x, y, r in ((48, 24, 8), (27, 36, 7), (69, 37, 7), (47, 45, 6), (15, 49, 4), (81, 49, 4)):
            _disc(draw, x + rng.uniform(-3, 3), y + rng.uniform(-2, 2), r * rng.uniform(0.8, 1.15), light)


def _draw_cup(sprite: Image.Image, rng: Rng, *, hue: float = 0.57, handle: bool = False) -> None:
    draw = ImageDraw.Draw(sprite)
    body = _colour(rng, _near(rng, hue), (0.5, 0.95))
    foot = rng.uniform(16, 26)
    if handle:
        draw.ellipse((48, 26, 95, 74), outline=body, width=10)
    draw.polygon([(14, 16), (74, 16), (44 + foot, 88), (44 - foot, 88)], fill=body)
    draw.ellipse((44 - foot, 82, 44 + foot, 93), fill=body)
    if rng.random() < 0.5:  # a band, on both kinds alike
        draw.line([(18, 48), (70, 48)], fill=_other_colour(rng, body), width=int(rng.integers(6, 14)))
    draw.ellipse((14, 8, 74, 25), fill=body)
    draw.ellipse((19, 11, 69, 23), fill=tuple(round(0.4 * c) for c in body))


def _draw_fish(sprite: Image.Image, rng: Rng, *, hue: float = 0.47, stripes: bool = False) -> None:
    draw = ImageDraw.Draw(sprite)
    body = _colour(rng, _near(rng, hue))
    fin = tuple(round(0.8 * c) for c in body)
    belly = rng.uniform(19, 27)
    draw.polygon([(66, 48), (93, 26), (86, 48), (93, 70)], fill=fin)
    draw.polygon([(34, 48 - belly + 5), (60, 48 - belly - 10), (64, 48 - belly + 12)], fill=fin)
    shape = Image.new("L", sprite.size)
    ImageDraw.Draw(shape).ellipse((5, 48 - belly, 76, 48 + belly), fill=255)
    skin = Image.new("RGB", sprite.size, body)
    if stripes:
        light = _other_colour(rng, body)
        for x in (30, 45, 60):
            ends = [(x + rng.uniform(-3, 3), y) for y in (10, 86)]
            ImageDraw.Draw(skin).line(ends, fill=light, width=9)
    sprite.paste(skin, mask=shape)
    _disc(draw, 19, 43, 5, (250, 250, 250))
    _disc(draw, 18, 43, 2.6, _INK)


def _draw_flower(sprite: Image.Image, rng: Rng) -> None:
    draw = ImageDraw.Draw(sprite)
    petal = _colour(rng, _near(rng, 0.86))
    petals = int(rng.integers(5, 9))
    ring, radius = rng.uniform(24, 28), 80 / petals + 3
    for x, y in _ring(petals, ring, rng.uniform(0, 6.28)):
        _disc(draw, x, y, radius, petal)
    _disc(draw, 48, 48, ring - 4, petal)
    _disc(draw, 48, 48, rng.uniform(10, 14), _other_colour(rng, petal))


def _draw_starfish(sprite: Image.Image, rng: Rng) -> None:
    draw = ImageDraw.Draw(sprite)
    colour = _colour(rng, _near(rng, 0.07))
    start, inner = rng.uniform(0, 6.28), rng.uniform(17, 21)
    tips, notches = _ring(5, 40, start), _ring(5, inner, start + math.pi / 5)
    draw.polygon([point for pair in zip(tips, notches, strict=True) for point in pair], fill=colour)
    for x, y in tips:
        _disc(draw, x, y, 5, colour)
    light = _other_colour(rng, colour)
    for reach in (14, 25):
        for x, y in _ring(5, reach, start):
            _disc(draw, x, y, 2.6, light)


def _draw_butterfly(sprite: Image.Image, rng: Rng) -> None:
    draw = ImageDraw.Draw(sprite)
    upper, lower = _colour(rng, _near(rng, 0.22)), _colour(rng, _near(rng, 0.22))
    light = _other_colour(rng, upper)
    spread = rng.uniform(0.85, 1.0)
    for side in (-1, 1):
        for (x, y, rx, ry), colour in (((22, 64, 17, 19), lower), ((24, 34, 21, 24), upper)):
            cx = 48 + side * x * spread
            draw.ellipse((cx - rx, y - ry, cx + rx, y + ry), fill=colour)
        _disc(draw, 48 + side * 27 * spread, 30, 7, light)
        _disc(draw, 48 + side * 24 * spread, 66, 5, light)
        draw.line([(48, 26), (48 + side * 12, 6)], fill=_INK, width=3)
    draw.ellipse((43, 20, 53, 82), fill=_INK)


def _draw_umbrella(sprite: Image.Image, rng: Rng) -> None:
    draw = ImageDraw.Draw(sprite)
    first = _colour(rng, _near(rng, 0.75))
    second = _other_colour(rng, first) if rng.random() < 0.6 else first
    draw.line([(48, 8), (48, 82)], fill=_INK, width=5)
    draw.arc((34, 72, 51, 92), 0, 180, fill=_INK, width=5)
    for i, half in enumerate((43, 26, 9)):
        draw.chord((48 - half, 8, 48 + half, 104), 180, 360, fill=(first, second)[i % 2])
    for i in range(5):  # the scalloped hem, cut out of the canopy
        draw.ellipse((5 + 17.2 * i, 49, 5 + 17.2 * (i + 1), 63), fill=(0, 0, 0, 0))
    draw.line([(48, 48), (48, 82)], fill=_INK, width=5)


@dataclass(frozen=True)
class _ObjectClass:
    """One class: how often it is drawn, where it belongs, how far it may be turned (degrees), and its drawing."""

    name: str
    supercategory: str
    weight: float
    themes: tuple[str, ...]
    tilt: float
    draw: Callable[[Image.Image, Rng], None]


# Weights are relative; they were set so that the training positives fall from about 590 to about 90.
_CLASSES = (
    _ObjectClass("ball", "toy", 440, ("grass", "sand", "wood"), 180, _draw_ball),
    _ObjectClass("mushroom", "plant", 400, ("grass",), 25, _draw_mushroom),
    _ObjectClass("cup", "crockery", 340, ("tiles", "wood"), 25, _draw_cup),
    _ObjectClass("fish", "animal", 290, ("water", "sand"), 40, _draw_fish),
    _ObjectClass("flower", "plant", 250, ("grass", "tiles"), 180, _draw_flower),
    _ObjectClass("beach ball", "toy", 210, ("sand", "water"), 180, _draw_beach_ball),
    _ObjectClass("mug", "crockery", 180, ("tiles", "wood"), 25, partial(_draw_cup, hue=0.65, handle=True)),
    _ObjectClass("toadstool", "plant", 150, ("grass",), 25, partial(_draw_mushroom, hue=0.94, spots=True)),
    _ObjectClass("butterfly", "animal", 120, ("grass", "water"), 60, _draw_butterfly),
    _ObjectClass("striped fish", "animal", 100, ("water",), 40, partial(_draw_fish, hue=0.38, stripes=True)),
    _ObjectClass("umbrella", "thing", 80, ("sand", "wood"), 35, _draw_umbrella),
    _ObjectClass("starfish", "animal", 66, ("sand", "water"), 180, _draw_starfish),
)

_Y, _X = np.mgrid[0:_SPRITE, 0:_SPRITE] / _SPRITE
# Light from the upper left: (96, 96, 1) float32 factors around 1.
_LIGHT = (1.2 - 0.62 * np.hypot(_X - 0.32, _Y - 0.28) ** 1.5)[..., None].astype(np.float32)
_SHADOW = [round(0.4 * opacity) for opacity in range(256)]


def _noise(rng: Rng, cells: int, size: int) -> np.ndarray:
    """Smooth noise `(size, size, 1)` float32, about standard normal at the grid points."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))[..., None]


def _image(pixels: np.ndarray) -> Image.Image:
    """Of `(H, W, 3)` values, which are clipped to 0..255."""
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _sprite(kind: _ObjectClass, rng: Rng, size: int) -> Image.Image:
    """One object, turned and scaled, as an RGBA image of about `size` pixels."""
    sprite = Image.new("RGBA", (_SPRITE, _SPRITE))
    kind.draw(sprite, rng)
    alpha = sprite.getchannel("A")
    shade = _LIGHT * (1 + rng.uniform(0.03, 0.1) * _noise(rng, int(rng.integers(8, 33)), _SPRITE))
    pixels = np.asarray(sprite.convert("RGB"), dtype=np.float32) * shade * rng.uniform(0.8, 1.12)
    # A thin dark rim: the drawing over its own silhouette, grown by two pixels.
    outlined = Image.new("RGBA", alpha.size, (*_INK, 0))
    outlined.putalpha(Image.fromarray(maximum_filter(np.asarray(alpha), size=5, mode="constant")))
    outlined.paste(_image(pixels), mask=alpha)
    if rng.random() < 0.5:
        outlined = outlined.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle, stretch = rng.uniform(-kind.tilt, kind.tilt), rng.uniform(0.94, 1.06)
    turned = outlined.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    scale = size / _SPRITE
    shape = (max(1, round(turned.width * scale * stretch)), max(1, round(turned.height * scale / stretch)))
    return turned.resize(shape, Image.Resampling.BICUBIC)


_GROUND_COLOURS = {
    "grass": (0.24, 0.34, 0.2, 0.4),  # hue from, hue to, saturation from, to
    "sand": (0.09, 0.13, 0.12, 0.3),
    "wood": (0.05, 0.09, 0.2, 0.42),
    "tiles": (0.0, 1.0, 0.04, 0.22),
    "water": (0.5, 0.6, 0.15, 0.35),
}
_THEMES = tuple(_GROUND_COLOURS)


def _ground(theme: str, rng: Rng, size: int) -> Image.Image:
    """The textured, cluttered background of one theme, RGB `size` x `size`."""
    low, high, pale, rich = _GROUND_COLOURS[theme]
    base = np.array(colorsys.hsv_to_rgb(rng.uniform(low, high), rng.uniform(pale, rich), rng.uniform(0.5, 0.88)))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, math.pi) if theme in ("sand", "water", "tiles") else rng.choice([0.0, math.pi / 2])
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    shade = 1 + 0.08 * _noise(rng, 5, size)[..., 0] + 0.05 * rng.standard_normal((size, size), dtype=np.float32)
    if theme in ("sand", "water"):  # ripples
        bend = 0.12 * _noise(rng, 4, size)[..., 0]
        shade += rng.uniform(0.04, 0.12) * np.sin(2 * math.pi * (rng.uniform(4, 9) * (v + bend)))
    elif theme == "wood":  # planks and grain
        planks = rng.uniform(3, 5.5)
        shade += 0.07 * np.sin(40 * v + 9 * _noise(rng, 4, size)[..., 0])
        shade -= 0.3 * (np.abs((v * planks) % 1 - 0.5) > 0.46)
        shade += 0.12 * np.take(rng.standard_normal(64), np.floor(v * planks).astype(int) % 64)
    elif theme == "tiles":
        tiles = rng.uniform(3, 6)
        checks = (np.floor(u * tiles) + np.floor(v * tiles)) % 2
        shade += rng.uniform(0.06, 0.25) * (checks - 0.5)
    else:  # grass
        shade += 0.13 * _noise(rng, max(2, size // 3), size)[..., 0]
    tilt = rng.uniform(-0.25, 0.25) * (x - 0.5) + rng.uniform(-0.25, 0.25) * (y - 0.5)
    image = _image(255 * base * (shade + tilt)[..., None])
    _scatter_marks(image, theme, rng)
    return image


def _scatter_marks(image: Image.Image, theme: str, rng: Rng) -> None:
    """Marks that belong to no class: blades, twigs, pebbles, crumbs, rings and crosses."""
    draw = ImageDraw.Draw(image, "RGBA")
    size = image.width
    for _ in range(int(rng.integers(4, 11))):
        x, y = rng.uniform(0, size, 2)
        colour = (*_colour(rng, saturation=(0.1, 0.5)), int(rng.integers(90, 220)))
        reach = size * rng.uniform(0.03, 0.09)
        a = rng.uniform(0, 2 * math.pi)
        dx, dy = reach * math.cos(a), reach * math.sin(a)
        kind = rng.integers(0, 5)
        if kind == 0:
            draw.ellipse((x - reach / 2, y - reach / 3, x + reach / 2, y + reach / 3), fill=colour)
        elif kind == 1:
            draw.line([(x - dx, y - dy), (x + dx, y + dy)], fill=colour, width=max(1, size // 48))
        elif kind == 2:
            draw.polygon([(x + dx, y + dy), (x - dy, y + dx), (x - dx, y - dy)], fill=colour)
        elif kind == 3:
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=max(1, size // 64))
        else:
            draw.line([(x - dx, y - dy), (x + dx, y + dy)], fill=colour)
            draw.line([(x + dy, y - dx), (x - dy, y + dx)], fill=colour)
    for _ in range(size // 2 if theme == "grass" else 0):  # blades
        x, y = rng.uniform(0, size, 2)
        green = (*_colour(rng, rng.uniform(0.2, 0.36), (0.2, 0.5)), 110)
        draw.line([(x, y), (x + rng.uniform(-3, 3), y - size * rng.uniform(0.04, 0.1))], fill=green)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene."""

    category_id: int
    """1-based id of its class."""
    mask: np.ndarray
    """`(image_size, image_size)` bool, where it is visible."""

    @property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.mask.sum())

    @property
    def bbox(self) -> list[int]:
        """`[x, y, width, height]` of what is visible, in pixels."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return [int(v) for v in (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)]


def draw_scene(seed: int, split: str, index: int, image_size: int) -> tuple[Image.Image, list[SceneObject]]:
    """Draw one scene: a pure function of its arguments, so that no image depends on another.

    An object that would leave less than 65 % of itself or of another one visible is moved, and after thirty tries is
    left out altogether: whatever is drawn is also annotated.

    Args:
        seed: Seed of the whole set, at least 0.
        split: `"train"` or `"val"` (other images of the same world).
        index: Index of the image in its split, from 0.
        image_size: Pixels a side.

    Returns:
        The RGB image and its objects, from the lowest to the topmost; at least one.
    """
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    theme = _THEMES[rng.integers(len(_THEMES))]
    image = _ground(theme, rng, image_size)
    weights = [kind.weight * (_THEME_BOOST if theme in kind.themes else 1.0) for kind in _CLASSES]
    count = 1 + rng.choice(len(_OBJECTS_PER_IMAGE), p=_OBJECTS_PER_IMAGE)
    masks: list[np.ndarray] = []
    full_areas: list[int] = []  # of the objects, had nothing been drawn over them
    categories: list[int] = []
    for which in rng.choice(len(_CLASSES), size=count, p=np.array(weights) / sum(weights)):
        sprite = _sprite(_CLASSES[which], rng, round(image_size * rng.uniform(0.36, 0.6)))
        alpha = sprite.getchannel("A")
        full = [*full_areas, (np.asarray(alpha) > 127).sum()]
        for _ in range(_PLACEMENT_TRIES):
            x, y = rng.integers(-image_size // 8, image_size - np.array(sprite.size) + image_size // 8 + 1)
            layer = Image.new("L", image.size)
            layer.paste(alpha, (int(x), int(y)))
            mask = np.asarray(layer) > 127
            visible = [old & ~mask for old in masks] + [mask]
            if all(part.sum() >= _MIN_VISIBLE * area for part, area in zip(visible, full, strict=True)):
                break
        else:
            continue
        shift = max(1, image_size // 32)
        image.paste((15, 12, 25), (int(x) + shift, int(y) + shift), mask=alpha.point(_SHADOW))
        image.paste(sprite.convert("RGB"), (int(x), int(y)), mask=alpha)
        masks, full_areas = visible, full
        categories.append(int(which) + 1)
    pixels = np.asarray(image, dtype=np.float32) * rng.uniform(0.96, 1.04, 3) * rng.uniform(0.85, 1.15)
    pixels += rng.uniform(1, 5) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return _image(pixels), [SceneObject(category, mask) for category, mask in zip(categories, masks, strict=True)]


def make_scenes(
    root: str | Path | None = None, *, num_train: int = 1500, num_val: int = 500, image_size: int = 64, seed: int = 0
) -> Path:
    """Make the built-in sample where it is not there yet, and return its folder.

    The folder has the official COCO layout and loads with `load_coco(root, split, year=2017)`:

        root/train2017/*.jpg, root/annotations/instances_train2017.json
        root/val2017/*.jpg, root/annotations/instances_val2017.json

    Every image is a pure function of (seed, split, index, image_size). The set is built in a temporary folder beside
    `root` and renamed when whole; of two processes that build at the same time one wins, the other discards its own. A
    whole set made with the same settings is used again.

    Args:
        root: Folder to make; by default `scenes-<hash of the settings>` in :func:`hf_balancemix.files.cache_folder`.
        num_train, num_val: Training and validation images, at least 1 each.
        image_size: Pixels a side, at least 32.
        seed: Seed of all drawing, at least 0.

    Raises:
        ValueError: A number is out of range, or `root` holds something else than a whole set made with these settings.
        TypeError: A number is not an int.
    """
    settings = {"num_train": num_train, "num_val": num_val, "image_size": image_size, "seed": seed}
    _check_settings(settings)
    settings["version"] = SCENES_VERSION
    if root is None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        root = cache_folder() / f"scenes-{digest}"
    root = Path(root).expanduser().absolute()
    if _is_whole(root, settings):
        return root
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        problem = f"root is {root}, which exists and is not a whole scene set made with these settings"
        raise ValueError(f"{problem}; it must be a new or empty folder; delete it or pass another root.")
    check_writable(root.parent, "the folder of the built-in sample (HF_BALANCEMIX_CACHE)")
    logger.info("Drawing the built-in sample into %s", root)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        build = Path(scratch) / root.name
        _build(build, settings)
        try:
            os.rename(build, root)
        except OSError:
            # Another process was quicker: its set is the same, ours goes with the temporary folder.
            if not _is_whole(root, settings):
                raise
    return root


def _check_settings(settings: dict[str, int]) -> None:
    for name, minimum in (("num_train", 1), ("num_val", 1), ("image_size", 32), ("seed", 0)):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an int; pass for instance {minimum}.")
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}; pass a larger number.")
    if settings["num_train"] >= _VAL_FIRST_ID:
        needed = f"it must be below {_VAL_FIRST_ID}, where the ids of the validation images begin"
        raise ValueError(f"num_train is {settings['num_train']}; {needed}; pass a smaller number.")


def _is_whole(root: Path, settings: dict[str, int]) -> bool:
    """True for a set made with these settings that nobody has taken files from."""
    try:
        if json.loads((root / SCENES_FILE).read_text()) != settings:
            return False
        return all(
            (root / "annotations" / f"instances_{split}2017.json").is_file()
            and sum(name.endswith(".jpg") for name in os.listdir(root / f"{split}2017")) == settings[f"num_{split}"]
            for split in ("train", "val")
        )
    except (OSError, ValueError):
        return False


def _build(root: Path, settings: dict[str, int]) -> None:
    """Write the whole set in COCO's format into the new folder `root`; the marker comes last."""
    (root / "annotations").mkdir(parents=True)
    size, total = settings["image_size"], settings["num_train"] + settings["num_val"]
    categories = [{"id": i, "name": c.name, "supercategory": c.supercategory} for i, c in enumerate(_CLASSES, start=1)]
    info = {"description": "hf_balancemix built-in scenes", "version": str(settings["version"]), "year": 2017}
    bar = tqdm(total=total, desc="Drawing the built-in sample", unit="image")
    for split, first_id in (("train", 1), ("val", _VAL_FIRST_ID + 1)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        folder = root / f"{split}2017"
        folder.mkdir()
        for index in range(settings[f"num_{split}"]):
            image, objects = draw_scene(settings["seed"], split, index, size)
            image_id, file_name = first_id + index, f"{first_id + index:012d}.jpg"
            image.save(folder / file_name, quality=92, subsampling=0)
            images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
            for drawn in objects:
                ids = {"id": first_id * 10 + len(annotations), "image_id": image_id, "category_id": drawn.category_id}
                annotations.append(ids | {"bbox": drawn.bbox, "area": drawn.area, "iscrowd": 0})
            bar.update()
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    bar.close()
    (root / SCENES_FILE).write_text(json.dumps(settings))
