"""DeepFashion's Category and Attribute Prediction benchmark with its 26 fine-grained attributes."""

from __future__ import annotations

import os
from pathlib import Path

import datasets

from hf_balancemix.data.files import (
    absolute,
    check_choice,
    check_layout,
    check_line,
    check_lines_differ,
    image_dataset,
    name_of_folder,
    plain_path,
    read_lines,
)
from hf_balancemix.files import check_inside, quote

_OFFICIAL_IMAGES = {"train": 14_000, "val": 2_000, "test": 4_000}


def load_deepfashion(
    root: str | os.PathLike[str], split: str = "train", on_bad_image: str = "error", follow_links: bool = False
) -> datasets.Dataset:
    """Load one split of DeepFashion's fine-grained attributes as a multi-label data set, from the official layout.

    The classes are the attributes in `Anno_fine/list_attr_cloth.txt`, in its order. `Anno_fine/{split}.txt` lists the
    images (`img/.../img_00000001.jpg`), and `Anno_fine/{split}_attr.txt` has one row of zeros and ones for each. The
    images lie under `Img/` (where `img.zip` was unpacked) or under the root.

    The official splits have 14,000 / 2,000 / 4,000 images; "train+val" is the paper's training set of 16,000, the
    rows of train first. The licence allows non-commercial research only and forbids passing the data on.

    Args:
        root: The folder that holds `Anno_fine/` and `Img/`.
        split: "train", "val", "test" or "train+val".
        on_bad_image: "error", or "skip" to leave out images that are listed but absent, with a warning.
        follow_links: Read files where links or '..' lead out of the root.

    Returns:
        A `datasets.Dataset` with `image` (RGB, a path until it is accessed), `labels` (List(ClassLabel), the present
        attributes in ascending order) and `image_id` (string, the path as it is listed, unique in all splits).

    Raises:
        ValueError: An argument is none of its choices, a file is malformed or contradicts another, or a link leads out
            of the root.
        FileNotFoundError: A folder, a file of the split or an image is absent.
    """
    check_choice("split", split, ("train", "val", "test", "train+val"))
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    root = absolute(root)
    annotations = root / "Anno_fine"
    image_dir = root / "Img" if (root / "Img" / "img").is_dir() else root
    parts = split.split("+")
    needed = ["list_attr_cloth.txt"] + [name for part in parts for name in (f"{part}.txt", f"{part}_attr.txt")]
    check_layout(
        (
            ("folder", root, root.is_dir()),
            ("folder", annotations, annotations.is_dir()),
            *(("file", annotations / name, (annotations / name).is_file()) for name in needed),
            ("image folder", root / "Img" / "img", (image_dir / "img").is_dir()),
        ),
        f"The layout of DeepFashion's Category and Attribute Prediction benchmark is expected:\n"
        f"  {root}/\n"
        f"    Anno_fine/list_attr_cloth.txt  (the attributes)\n"
        + "".join(f"    Anno_fine/{part}.txt, Anno_fine/{part}_attr.txt  (images, attributes)\n" for part in parts)
        + "    Img/img/  (the images: unpack img.zip inside Img)\n"
        "Point to the folder that holds Anno_fine and Img.",
    )
    for name in needed:
        check_inside(annotations / name, root, follow_links)

    names = _read_attributes(annotations / "list_attr_cloth.txt")
    image_ids: list[str] = []
    labels: list[list[int]] = []
    sources: list[tuple[Path, list[str], Path]] = []
    listed: dict[str, str] = {}
    for part in parts:
        file = annotations / f"{part}.txt"
        lines = enumerate(read_lines(file), start=1)
        paths = [plain_path(path, f"{file}, line {number}: the image", follow_links) for number, path in lines]
        check_lines_differ(paths, file, "image", listed=listed)
        image_ids += paths
        labels += _read_rows(annotations / f"{part}_attr.txt", names, len(paths), file)
        sources.append((image_dir, paths, file))
    return image_dataset(
        sources,
        labels,
        image_ids,
        names,
        on_bad_image=on_bad_image,
        root=root,
        follow_links=follow_links,
        name="deepfashion"
        if len(image_ids) == sum(map(_OFFICIAL_IMAGES.__getitem__, parts))
        else name_of_folder(root),
        split=split,
        source=f"DeepFashion {split}, fine-grained attributes, for non-commercial research only, not to be passed on",
    )


def _read_attributes(file: Path) -> list[str]:
    """The attribute names: a line with their number, a heading, then lines with a name and the number of its type."""
    lines = read_lines(file) or [""]
    heading = "the number of attributes, followed by the heading 'attribute_name  attribute_type' and one a line"
    check_line(lines[0].isdecimal() and len(lines[0]) < 10, file, 1, lines[0], heading)
    names = []
    for number, line in enumerate(lines[2:], start=3):
        name, *kind = line.rsplit(maxsplit=1) or [""]
        needed = "a name and the number of its type, such as 'floral 1'"
        check_line(len(kind) == 1 and kind[0].isdecimal(), file, number, line, needed)
        names.append(name)
    if len(names) != int(lines[0]) or not names:
        problem = f"line 1 announces {lines[0]} attributes, {len(names)} follow from line 3 on"
        raise ValueError(f"{file}: {problem}; it may be cut off; copy it again.")
    check_lines_differ(names, file, "attribute", first_line=3)
    return names


def _read_rows(file: Path, names: list[str], num_images: int, images_file: Path) -> list[list[int]]:
    """The present attributes of each image."""
    lines = read_lines(file)
    if len(lines) != num_images:
        both = f"{file} has {len(lines)} rows and {images_file.name} {num_images} images"
        raise ValueError(f"{both}; there must be one row an image, in the same order; copy both again.")
    rows = []
    for number, line in enumerate(lines, start=1):
        values = line.split()
        if len(values) != len(names):
            needed = f"there must be one for each of the {len(names)} attributes"
            raise ValueError(f"{file}, line {number} has {len(values)} values; {needed}; correct the row.")
        for k, value in enumerate(values):
            if value not in ("0", "1"):
                found = f"{file}, line {number} has {quote(value)} for the attribute {quote(names[k])} (value {k + 1})"
                raise ValueError(f"{found}; it must be 0 or 1; correct it.")
        rows.append([k for k, value in enumerate(values) if value == "1"])
    return rows
