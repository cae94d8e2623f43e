"""The built-in sample: layout, long tail, purity, and a folder that is whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_balancemix.data import sample as scenes
from hf_balancemix.data.sample import draw_scene, make_scenes

SMALL = {"num_train": 12, "num_val": 6}

# Loads sample.py by itself in another process: the package's other imports take seconds and play no part here.
LOAD = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("scenes", {scenes.__file__!r})
scenes = sys.modules["scenes"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scenes)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "small", **SMALL)


def annotations(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def default_counts() -> dict[str, np.ndarray]:
    """Multi-hot labels of the whole default set, without writing it."""
    labels = {}
    for split, size in (("train", 1500), ("val", 500)):
        labels[split] = np.zeros((size, len(scenes._CLASSES)), dtype=bool)
        for index in range(size):
            for scene_object in draw_scene(0, split, index, 64)[1]:
                labels[split][index, scene_object.category_id - 1] = True
    return labels


def test_layout_is_the_official_one(small: Path) -> None:
    assert {path.name for path in small.iterdir()} >= {"train2017", "val2017", "annotations"}
    for split, size in (("train", 12), ("val", 6)):
        data = annotations(small, split)
        assert {"images", "annotations", "categories"} <= data.keys()
        assert len(data["images"]) == size
        on_disk = {path.name for path in (small / f"{split}2017").iterdir()}
        assert on_disk == {image["file_name"] for image in data["images"]}
        for image in data["images"]:
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            with Image.open(small / f"{split}2017" / image["file_name"]) as opened:
                assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (64, 64))
                assert opened.size == (image["width"], image["height"])


def test_ids_are_unique_and_refer_to_what_exists(small: Path) -> None:
    both = [annotations(small, split) for split in ("train", "val")]
    assert both[0]["categories"] == both[1]["categories"]
    categories = [category["id"] for category in both[0]["categories"]]
    assert len(set(categories)) == len(categories)
    image_ids = [image["id"] for data in both for image in data["images"]]
    annotation_ids = [annotation["id"] for data in both for annotation in data["annotations"]]
    assert len(set(image_ids)) == len(image_ids)
    assert len(set(annotation_ids)) == len(annotation_ids)
    for data in both:
        own_ids = {image["id"] for image in data["images"]}
        assert {annotation["image_id"] for annotation in data["annotations"]} == own_ids  # none without a label
        assert {annotation["category_id"] for annotation in data["annotations"]} <= set(categories)


def test_boxes_lie_inside_their_images_and_hold_the_area(small: Path) -> None:
    for annotation in annotations(small, "train")["annotations"] + annotations(small, "val")["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= 64
        assert 0 <= y < y + height <= 64
        assert 0 < annotation["area"] <= width * height
        assert annotation["iscrowd"] == 0


def test_annotations_are_what_was_drawn(small: Path) -> None:
    for split, first_id in (("train", 1), ("val", scenes._VAL_FIRST_ID + 1)):
        written = annotations(small, split)["annotations"]
        for index in range(6):
            _, objects = draw_scene(0, split, index, 64)
            drawn = [(o.category_id, o.area, o.bbox) for o in objects]
            found = [(a["category_id"], a["area"], a["bbox"]) for a in written if a["image_id"] == first_id + index]
            assert found == drawn


def test_every_object_is_visible_and_none_is_drawn_without_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the objects that reach the canvas, and measure each one's full size, independently of the annotations."""
    sizes: list[int] = []
    sprite = scenes._sprite

    def spy(*args: object) -> Image.Image:
        drawn = sprite(*args)  # type: ignore[arg-type]
        sizes.append(int((np.asarray(drawn.getchannel("A")) > 127).sum()))
        return drawn

    monkeypatch.setattr(scenes, "_sprite", spy)
    for index in range(60):
        sizes.clear()
        image, objects = draw_scene(0, "train", index, 64)
        assert 1 <= len(objects) <= len(sizes) <= 5
        covered = np.sum([o.mask for o in objects], axis=0)
        assert covered.max() == 1, "visible parts do not overlap"
        assert all(o.area >= scenes._MIN_VISIBLE * min(sizes) for o in objects)
        if len(objects) == len(sizes):  # nothing left out: the sizes belong to the objects, in order
            assert all(o.area >= scenes._MIN_VISIBLE * full for o, full in zip(objects, sizes, strict=True))
        assert image.size == (64, 64)


def test_masks_show_where_the_objects_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ink every object vanishes; the pixels that change much are those of the masks and their shadows."""
    sprite = scenes._sprite
    for index in range(10):
        monkeypatch.setattr(scenes, "_sprite", sprite)
        image, objects = draw_scene(0, "train", index, 64)

        def black(*args: object) -> Image.Image:
            drawn = sprite(*args)  # type: ignore[arg-type]
            blank = Image.new("RGBA", drawn.size)
            blank.putalpha(drawn.getchannel("A"))
            return blank

        monkeypatch.setattr(scenes, "_sprite", black)
        blackened, same_objects = draw_scene(0, "train", index, 64)
        assert [o.category_id for o in objects] == [o.category_id for o in same_objects]
        covered = np.any([o.mask for o in objects], axis=0)
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(blackened, dtype=int)).max(-1)
        assert (difference[covered] > 10).mean() > 0.8
        assert (difference[~covered] > 10).mean() < 0.2  # the soft edge


def test_long_tail_as_documented(default_counts: dict[str, np.ndarray]) -> None:
    train, val = default_counts["train"], default_counts["val"]
    counts = train.sum(0)
    assert len(counts) == 12
    assert 550 <= counts.max() <= 650
    assert 75 <= counts.min() <= 115
    assert counts.max() / counts.min() >= 5
    assert counts[:4].min() > counts[4:8].max() * 0.9, "the classes come from the commonest to the rarest"
    assert counts[4:7].min() > counts[8:].max()
    assert 2.1 <= train.sum(1).mean() <= 2.4
    assert val.sum(0).min() >= 30, "average precision needs positives"
    # The same world: common classes are about as common in both splits.
    np.testing.assert_allclose(val.mean(0)[:5], train.mean(0)[:5], rtol=0.3)


def test_labels_co_occur(default_counts: dict[str, np.ndarray]) -> None:
    """Classes that belong on the same grounds share images more often than those that belong on different ones."""
    train = default_counts["train"].astype(float)
    together, chance = train.T @ train, np.outer(train.sum(0), train.mean(0))
    themes = [set(kind.themes) for kind in scenes._CLASSES]
    pairs = [(i, j) for i in range(12) for j in range(i)]
    alike = np.array([themes[i] == themes[j] for i, j in pairs])
    apart = np.array([not themes[i] & themes[j] for i, j in pairs])
    observed, expected = (np.array([table[pair] for pair in pairs]) for table in (together, chance))
    assert alike.sum() >= 3
    assert apart.sum() >= 3
    assert observed[alike].sum() / expected[alike].sum() > 1.2 * observed[apart].sum() / expected[apart].sum()


def test_same_bytes_again_and_another_seed_differs(small: Path, tmp_path: Path) -> None:
    assert contents(make_scenes(tmp_path / "again", **SMALL)) == contents(small)
    other = contents(make_scenes(tmp_path / "other", **SMALL, seed=1))
    same = [name for name, data in contents(small).items() if name.endswith(".jpg") and other[name] == data]
    assert not same


def test_an_image_does_not_depend_on_how_many_there_are(small: Path, tmp_path: Path) -> None:
    fewer = contents(make_scenes(tmp_path / "fewer", num_train=3, num_val=2))
    pictures = {name: data for name, data in fewer.items() if name.endswith(".jpg")}
    assert len(pictures) == 5
    assert all(contents(small)[name] == data for name, data in pictures.items())


def test_splits_differ() -> None:
    train, val = (np.asarray(draw_scene(0, split, 0, 64)[0]) for split in ("train", "val"))
    assert (train != val).any()


def test_image_size() -> None:
    image, objects = draw_scene(0, "train", 0, 96)
    assert image.size == (96, 96)
    assert objects[0].mask.shape == (96, 96)


def test_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = {"num_train": 1, "num_val": 1}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("HF_BALANCEMIX_CACHE", raising=False)
    root = make_scenes(**tiny)
    assert root.parent == tmp_path / "xdg" / "hf_balancemix"
    monkeypatch.setenv("HF_BALANCEMIX_CACHE", str(tmp_path / "own"))
    first, second = make_scenes(**tiny), make_scenes(**tiny, seed=1)
    assert first.parent == second.parent == tmp_path / "own"
    assert first != second
    monkeypatch.delenv("HF_BALANCEMIX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert make_scenes(**tiny).parent == tmp_path / "home" / ".cache" / "hf_balancemix"


def test_a_whole_set_is_used_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_build", lambda *_: pytest.fail("built again"))
    assert make_scenes(small, **SMALL) == small


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert make_scenes(tmp_path, num_train=1, num_val=1) == tmp_path
    assert (tmp_path / "train2017").is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seed: int, split: str, index: int, size: int) -> tuple:
        if split == "val":
            raise error("stop")
        return draw_scene(seed, split, index, size)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "draw_scene", stop)
        with pytest.raises(error):
            make_scenes(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert (make_scenes(tmp_path / "set", **SMALL) / "val2017").is_dir()


def test_a_killed_build_is_not_taken_for_a_whole_one(small: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    program = f"""{LOAD}
draw = scenes.draw_scene
scenes.draw_scene = lambda seed, split, index, size: os._exit(9) if index == 3 else draw(seed, split, index, size)
scenes.make_scenes({str(root)!r}, num_train=12, num_val=6)
"""
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == 9
    leftovers = list(tmp_path.iterdir())
    assert leftovers, "a killed process cannot tidy up"
    assert root not in leftovers
    assert contents(make_scenes(root, **SMALL)) == contents(small)


def test_two_processes_race(small: Path, tmp_path: Path) -> None:
    """Both meet between building and renaming, so that one of them must lose; both return the same whole set."""
    root = tmp_path / "set"
    program = f"""{LOAD}
import time
from pathlib import Path
build, here = scenes._build, Path({str(tmp_path)!r})
def build_and_meet(*args):
    build(*args)
    (here / ("ready-" + sys.argv[1])).touch()
    while len(list(here.glob("ready-*"))) < 2:
        time.sleep(0.01)
scenes._build = build_and_meet
print(scenes.make_scenes({str(root)!r}, num_train=12, num_val=6))
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    for racer in racers:
        out, err = racer.communicate(timeout=120)
        assert racer.returncode == 0, err
        assert out.strip() == str(root)
    assert contents(root) == contents(small)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "ready-a", "ready-b"}, "the loser's set is gone"


def test_foreign_or_damaged_folders_are_refused(tmp_path: Path) -> None:
    tiny = {"num_train": 2, "num_val": 1}
    root = make_scenes(tmp_path / "set", **tiny)
    with pytest.raises(ValueError, match="not a whole scene set made with these settings"):
        make_scenes(root, **tiny, seed=1)
    next((root / "train2017").iterdir()).unlink()
    with pytest.raises(ValueError, match="delete it or pass another root"):
        make_scenes(root, **tiny)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="mine, which exists"):
        make_scenes(tmp_path / "mine", **tiny)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_train": 0}, ValueError, "num_train is 0; it must be at least 1"),
        ({"num_val": 0}, ValueError, "num_val is 0"),
        ({"image_size": 16}, ValueError, "image_size is 16; it must be at least 32"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"num_train": 500_000}, ValueError, "must be below 500000"),
        ({"seed": 0.5}, TypeError, r"seed is 0\.5; it must be an int"),
        ({"num_val": True}, TypeError, "num_val is True"),
    ],
)
def test_bad_settings(settings: dict, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        make_scenes(tmp_path / "set", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_BALANCEMIX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"\(HF_BALANCEMIX_CACHE\) is .*/file, where nothing can be written"):
        make_scenes(num_train=1, num_val=1)
