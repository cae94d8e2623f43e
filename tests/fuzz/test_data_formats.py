"""Ten thousand damaged and hostile files of each format of data: right results or one sentence, and nothing else.

What is read from a mutated file is compared with a second, plain reading of the same bytes, written here. The ordinary
suite tries a hundred of each format; `make test-slow` all. `HF_BALANCEMIX_FUZZ` is the seed, 0 by default.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mutate import as_json, mutated_bytes, mutated_tree, outcome, watch

from hf_balancemix import BalanceMixTrainingArguments, apply_corrections
from hf_balancemix.data import from_csv, load_coco, load_deepfashion, load_noise_map, load_voc
from hf_balancemix.data.labels import class_names
from hf_balancemix.data.noise_map import NoiseMap
from hf_balancemix.scripts import parser
from hf_balancemix.scripts.data import AnyData

SEED = os.environ.get("HF_BALANCEMIX_FUZZ", "0")
IN_FULL = pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])
NAMES = ["ant", "bee", "cat"]
Found = dict[str, set[str]]  # of each image_id, as text, the classes


class Format:
    """A good data set in a folder, how it is loaded, and how its files are read here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outside = root.parent / "outside"
        self.outside.mkdir(parents=True)
        (self.outside / "secret.jpg").write_bytes(b"secret")
        (self.outside / "secret.txt").write_text("secret")
        self.files: dict[str, bytes] = {}
        root.mkdir()
        self.make()
        (root / self.images).mkdir(parents=True, exist_ok=True)
        for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
            (root / self.images / name).write_bytes(b"x")
        (root / self.images / "link").symlink_to(self.outside)
        (root / self.images / "outside.jpg").symlink_to(self.outside / "secret.jpg")
        for name, content in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)

    images = "images"
    has_root = True  # else it is one file, which may be a link

    def make(self) -> None:
        raise NotImplementedError

    def mutated(self, name: str, rng: random.Random) -> bytes:
        return mutated_bytes(self.files[name], rng)

    def load(self, **options):
        raise NotImplementedError

    def check(self, result, inside: bool = True) -> None:
        found = {}
        names = class_names(result)
        rows = result.select_columns(["image_id", "labels"])[:]
        for image_id, labels in zip(rows["image_id"], rows["labels"], strict=True):
            found[str(image_id)] = {names[k] for k in labels}
        assert len(found) == len(result)
        assert found == self.expected()
        images = result.cast_column("image", datasets.Image(decode=False))["image"]
        for image in images:
            assert os.path.realpath(image["path"]).startswith(f"{self.root}/") or not inside

    def expected(self) -> Found:
        raise NotImplementedError


class Coco(Format):
    images = "train2017"
    file = "annotations/instances_train2017.json"

    def make(self) -> None:
        content = {
            "info": {"year": 2017},
            "images": [{"id": i, "file_name": f"{name}.jpg", "width": 8} for i, name in enumerate("abcd", start=5)],
            "annotations": [
                {"id": i, "image_id": image, "category_id": category, "bbox": [1, 2.5, 3, 4], "segmentation": [[1, 2]]}
                for i, (image, category) in enumerate([(5, 1), (5, 3), (6, 1), (7, 7), (8, 3), (8, 3)])
            ],
            "categories": [
                {"id": i, "name": name, "supercategory": "x"} for i, name in zip((1, 3, 7), NAMES, strict=True)
            ],
        }
        self.tree = content
        self.files = {self.file: json.dumps(content).encode()}

    def mutated(self, name, rng):
        return as_json(mutated_tree(self.tree, rng)) if rng.random() < 0.5 else super().mutated(name, rng)

    def load(self, **options):
        return load_coco(self.root, keep_unlabelled=True, **options)

    def expected(self) -> Found:
        content = json.loads((self.root / self.file).read_bytes())
        found = {str(image["id"]): set() for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        for annotation in content["annotations"]:
            found[str(annotation["image_id"])].add(names[annotation["category_id"]])
        return found


class VocClassFiles(Format):
    images = "VOC2007/JPEGImages"
    main = "VOC2007/ImageSets/Main"

    def make(self) -> None:
        self.files = {f"{self.main}/trainval.txt": b"a\nb\nc\nd\n"}
        for k, name in enumerate(NAMES):
            lines = [f"{image} {'1' if (i + k) % 2 else '-1'}\n" for i, image in enumerate("abcd")]
            self.files[f"{self.main}/{name}_trainval.txt"] = "".join(lines).encode()

    def load(self, **options):
        return load_voc(self.root, names=NAMES, **options)

    def expected(self) -> Found:
        def lines(name: str) -> list[list[str]]:
            text = (self.root / self.main / f"{name}.txt").read_bytes().decode("utf-8-sig")
            return [line.split() for line in text.rstrip().split("\n")]

        found = {line[0]: set() for line in lines("trainval")}
        for name in NAMES:
            for image, value in lines(f"{name}_trainval"):
                if value != "-1":
                    found[image].add(name)
        return found


class VocXml(VocClassFiles):
    def make(self) -> None:
        self.files = {f"{self.main}/trainval.txt": b"a\nb\nc\nd\n"}
        for i, image in enumerate("abcd"):
            objects = "".join(
                f"<object><name>{name}</name><difficult>{j % 2}</difficult><part><name>head</name></part></object>"
                for j, name in enumerate(NAMES[: i % 3 + 1])
            )
            text = f"<annotation><filename>{image}.jpg</filename>{objects}</annotation>"
            self.files[f"VOC2007/Annotations/{image}.xml"] = f"<?xml version='1.0' encoding='utf-8'?>\n{text}".encode()

    def expected(self) -> Found:
        text = (self.root / self.main / "trainval.txt").read_bytes().decode("utf-8-sig")
        found = {}
        for image in (line.strip() for line in text.rstrip().split("\n")):
            content = (self.root / f"VOC2007/Annotations/{image}.xml").read_bytes()
            root = ElementTree.fromstring(content)
            found[image] = {element.findtext("name").strip() for element in root.findall("object")}
        return found


class DeepFashion(Format):
    images = "Img/img"

    def make(self) -> None:
        self.files = {
            "Anno_fine/list_attr_cloth.txt": "\n".join(
                ["3", "attribute_name  attribute_type", *(f"{name} {k}" for k, name in enumerate(NAMES))]
            ).encode(),
            "Anno_fine/train.txt": b"img/a.jpg\nimg/b.jpg\nimg/c.jpg\nimg/d.jpg\n",
            "Anno_fine/train_attr.txt": b"1 0 1\n0 1 0\n0 0 0\n1 1 1\n",
        }

    def load(self, **options):
        return load_deepfashion(self.root, **options)

    def expected(self) -> Found:
        texts = [(self.root / name).read_bytes().decode("utf-8-sig").rstrip().split("\n") for name in self.files]
        names = [line.strip().rsplit(maxsplit=1)[0] for line in texts[0][2:]]
        paths = [path.strip().replace("\\", "/").removeprefix("./") for path in texts[1]]
        bits = [zip(names, row.split(), strict=True) for row in texts[2]]
        return {path: {name for name, bit in row if bit == "1"} for path, row in zip(paths, bits, strict=True)}


class CsvColumns(Format):
    def make(self) -> None:
        self.files = {"labels.csv": b"file_name,ant,bee,cat\na.jpg,1,0,1\nb.jpg,0,1,0\nc.jpg,0,0,?\nd.jpg,1,,0\n"}

    def load(self, **options):
        return from_csv(self.root / "labels.csv", self.root / "images", **options)

    def rows(self) -> list[list[str]]:
        text = (self.root / "labels.csv").read_bytes().decode("utf-8-sig")
        return [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline="")) if row]

    def expected(self) -> Found:
        header, *rows = self.rows()
        others = {header.index(name) for name in ("file_name", "image_id") if name in header}
        place = header.index("image_id" if "image_id" in header else "file_name")
        return {
            row[place]: {name for k, name in enumerate(header) if k not in others and _is_one(row[k])} for row in rows
        }


def _is_one(cell: str) -> bool:
    try:
        return cell.lower() in ("true", "yes") or float(cell) == 1
    except ValueError:
        return False


class CsvTags(CsvColumns):
    def make(self) -> None:
        self.files = {"labels.csv": b"file_name,tags\na.jpg,ant|cat\nb.jpg,bee\nc.jpg,\"['ant', 'bee']\"\nd.jpg,\n"}

    def load(self, **options):
        return super().load(label_column="tags", separator="|", **options)

    def expected(self) -> Found:
        header, *rows = self.rows()
        place = header.index("image_id" if "image_id" in header else "file_name")
        found = {}
        for row in rows:
            cell = row[header.index("tags")]
            if cell[:1] in ("[", "{", "("):  # lists have tests of their own
                tags = set(self.result_of[row[place]])
            else:
                tags = {tag.strip() for tag in cell.split("|")} - {""}
            found[row[place]] = tags if cell.lower() not in ("nan", "<na>", "set()") else set()
        return found

    def check(self, result, inside: bool = True) -> None:
        names = class_names(result)
        rows = result.select_columns(["image_id", "labels"])[:]
        self.result_of = {i: {names[k] for k in v} for i, v in zip(rows["image_id"], rows["labels"], strict=True)}
        super().check(result, inside)


class CsvConfidences(CsvColumns):
    def make(self) -> None:
        rows = ["a.jpg,ant,1", "a.jpg,bee,0", "b.jpg,bee,0.7", "c.jpg,cat,0.2", "d.jpg,ant,1.0", "d.jpg,cat,1"]
        self.files = {"labels.csv": "\n".join(["file_name,name,confidence", *rows]).encode()}

    def load(self, **options):
        return super().load(label_column="name", confidence_column="confidence", **options)

    def expected(self) -> Found:
        header, *rows = self.rows()
        image, name, confidence = (header.index(column) for column in ("file_name", "name", "confidence"))
        found: Found = {row[image]: set() for row in rows}
        for row in rows:
            if float(row[confidence]) >= 0.5:
                found[row[image]].add(row[name])
        return found


class Decisions(Format):
    """What a reviewer decided about labels, applied to a data set."""

    has_root = False

    def make(self) -> None:
        kind = datasets.List(datasets.ClassLabel(names=NAMES))
        features = datasets.Features({"image_id": datasets.Value("int64"), "labels": kind})
        self.given = datasets.Dataset.from_dict({"image_id": [1, 2, 3], "labels": [[0, 2], [1], []]}, features)
        rows = ["1,ant,1,wrong,ann,2026-01-01", "1,bee,0,right,,", "2,cat,0,wrong,bob,", "3,bee,0,unsure,ann,"]
        header = "image_id,class,given,decision,reviewer,time"
        self.files = {"decisions.csv": "\n".join([header, *rows]).encode()}

    def load(self, **options):
        return apply_corrections(self.given, self.root / "decisions.csv")

    def check(self, result, inside: bool = True) -> None:
        text = (self.root / "decisions.csv").read_bytes().decode("utf-8-sig")
        delimiter = max(",;\t", key=text.split("\n")[0].count)
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
        header = [name.strip() for name in header]
        labels = {str(i): set(row) for i, row in zip(self.given["image_id"], self.given["labels"], strict=True)}
        for row in {tuple(cell.strip() for cell in row[:4]) for row in rows}:
            cells = dict(zip(header, row, strict=False))
            if cells["decision"] == "wrong":
                labels[cells["image_id"]] ^= {NAMES.index(cells["class"])}
        assert {str(i): set(row) for i, row in zip(result["image_id"], result["labels"], strict=True)} == labels


class NoiseMaps(Format):
    """With its digest, which must find every change; and without, where what is applied must be what the rows say."""

    has_root = False

    def make(self) -> None:
        kind = datasets.List(datasets.ClassLabel(names=NAMES))
        features = datasets.Features({"image_id": datasets.Value("string"), "labels": kind})
        ids = ["a", "b", "c", "d"]
        self.clean = datasets.Dataset.from_dict({"image_id": ids, "labels": [[0, 2], [1], [], [0, 1, 2]]}, features)
        noisy = datasets.Dataset.from_dict({"image_id": ids, "labels": [[0], [1, 2], [], [0, 1]]}, features)
        self.good = NoiseMap.from_datasets(self.clean, noisy, noise={"name": "flip", "rate": 0.1})
        self.good.save(self.root / "map.parquet")
        self.files = {"map.parquet": (self.root / "map.parquet").read_bytes()}
        self.table = pq.read_table(self.root / "map.parquet")

    def mutated(self, name, rng):
        if rng.random() < 0.4:
            return super().mutated(name, rng)
        metadata = dict(self.table.schema.metadata)
        columns = {column: self.table[column].to_pylist() for column in self.table.column_names}
        if rng.random() < 0.5:
            metadata[b"noise_map"] = as_json(mutated_tree(json.loads(metadata[b"noise_map"]), rng))
        else:
            columns = mutated_tree(columns, rng)
        if rng.random() < 0.7:
            metadata.pop(b"noise_map_digest")
        sink = pa.BufferOutputStream()
        try:
            table = pa.table(columns)
            pq.write_table(table.replace_schema_metadata(metadata), sink)
        except Exception:  # no table: try others
            return self.mutated(name, rng)
        return sink.getvalue().to_pybytes()

    def load(self):
        found = load_noise_map(self.root / "map.parquet")
        return found, found.apply(self.clean)

    def check(self, result) -> None:
        found, applied = result
        metadata = pq.read_schema(self.root / "map.parquet").metadata
        if b"noise_map_digest" in metadata:
            assert found == self.good
        labels = {i: set(row) for i, row in zip(self.clean["image_id"], self.clean["labels"], strict=True)}
        for row in pq.read_table(self.root / "map.parquet").to_pylist():
            row = {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}
            if row["class"] is not None:
                k = NAMES.index(row["class"])
                assert (k in labels[row["image_id"]]) == row["clean"] != row["given"]
                labels[row["image_id"]] ^= {k}
        assert {i: set(row) for i, row in zip(applied["image_id"], applied["labels"], strict=True)} == labels


class Yaml(Format):
    """The config file of a command line, with values for data and training."""

    has_root = False

    def make(self) -> None:
        self.tree = {
            "train_dir": "photos", "class_names": NAMES, "label_column": "tags", "separator": ",", "held_out": 0.2,
            "learning_rate": 0.01, "num_train_epochs": 3, "seed": 7, "lr_scheduler_kwargs": {"num_cycles": 0.5},
            "output_dir": str(self.outside / "out"), "use_cpu": True, "mixup_alpha": 4.0, "run_name": "first",
        }  # fmt: skip
        self.files = {"config.yaml": yaml.safe_dump(self.tree, sort_keys=False).encode()}

    def mutated(self, name, rng):
        if rng.random() < 0.4:
            return super().mutated(name, rng)
        tree = mutated_tree(self.tree, rng)
        if rng.random() < 0.5:
            return as_json(tree)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")

    def load(self):
        flags = ["--config", str(self.root / "config.yaml")]
        return parser.parse_arguments((AnyData, BalanceMixTrainingArguments), flags)

    def check(self, result) -> None:
        data, args = result
        values = yaml.load((self.root / "config.yaml").read_bytes().decode("utf-8-sig"), yaml.CSafeLoader)
        for name, value in values.items():
            got = getattr(data if hasattr(data, name) else args, name)
            texts = isinstance(value, str) and name in ("train_dir", "label_column", "separator")
            numbers = type(value) in (int, float) and name in ("seed", "held_out", "learning_rate", "mixup_alpha")
            if texts or numbers:
                assert got == (value if texts or name == "seed" else float(value))


FORMATS = [Coco, VocClassFiles, VocXml, DeepFashion, CsvColumns, CsvTags, CsvConfidences, Decisions, NoiseMaps, Yaml]


@pytest.mark.parametrize("number", [100, IN_FULL])
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_mutated_files_give_right_results_or_one_sentence(tmp_path, make: Callable[[Path], Format], number: int):
    form = make(tmp_path / "root")
    form.check(form.load())  # the good one
    counts: Counter[str] = Counter()
    for i in range(number):
        rng = random.Random(f"{SEED}/{make.__name__}/{i}")
        name = rng.choice(sorted(form.files))
        path = form.root / name
        linked = rng.random() < 0.02 and form.has_root
        if linked:
            path.unlink()
            path.symlink_to(form.outside / "secret.txt")
        else:
            path.write_bytes(form.mutated(name, rng))
        try:
            with watch(form.outside) as seen:
                kind, result = outcome(form.load)
            counts[kind if kind == "right" else type(result).__name__] += 1
            assert not seen
            if kind == "right":
                form.check(result)
        except BaseException as error:
            error.add_note(f"input {i} of {make.__name__}, seed {SEED}, file {name}: {path.read_bytes()[:2000]!r}")
            raise
        if linked:
            path.unlink()
        path.write_bytes(form.files[name])
    print(f"\n{make.__name__}: {number} inputs, {dict(counts)}")
    assert counts["right"]
    assert counts["ValueError"]


WITH_ROOT = [make for make in FORMATS if make.has_root]


def load_refused(form: Format, match: str) -> None:
    with watch(form.outside) as seen, pytest.raises(ValueError, match=match) as error:
        form.load()
    assert not seen
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("make", WITH_ROOT, ids=lambda make: make.__name__)
def test_no_file_and_no_folder_may_be_a_link_out_of_the_root(tmp_path, make: Callable[[Path], Format]):
    """Whichever it is, of all that is read or listed; and with follow_links it is read as if it were there."""
    form = make(tmp_path / "root")
    paths = [path for path in sorted(form.root.rglob("*")) if not path.is_symlink()]
    assert len(paths) > 5
    for path in paths:
        path.rename(form.outside / path.name)
        path.symlink_to(form.outside / path.name)
        load_refused(form, r"leads out of it.*; it must stay inside; .*follow_links=True \(--follow_links\)")
        form.check(form.load(follow_links=True), inside=False)
        path.unlink()
        (form.outside / path.name).rename(path)
    form.check(form.load())
    (tmp_path / "door").symlink_to(form.root)
    form.root = tmp_path / "door"  # the root itself may be a link
    form.check(form.load(), inside=False)


@pytest.mark.parametrize(
    ("make", "name", "way"),
    [
        (Coco, Coco.file, b"../../outside/secret.jpg"),
        (DeepFashion, "Anno_fine/train.txt", b"img/../../../outside/secret.jpg"),
        (CsvColumns, "labels.csv", b"../../outside/secret.jpg"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_names_with_two_dots_follow_the_same_rule(tmp_path, make, name, way):
    form = make(tmp_path / "root")
    old = b"img/a.jpg" if make is DeepFashion else b"a.jpg"
    (form.root / name).write_bytes(form.files[name].replace(old, way))
    load_refused(form, r"'(img/)?\.\./.*without '\.\.' unless follow_links allows it")
    form.check(form.load(follow_links=True), inside=False)
    (form.root / name).write_bytes(form.files[name].replace(old, b"/etc/hostname"))
    with pytest.raises(ValueError, match="'/etc/hostname'; it must be a plain path inside the image folder"):
        form.load(follow_links=True)


@pytest.mark.parametrize("make", WITH_ROOT, ids=lambda make: make.__name__)
def test_a_snapshot_of_the_hub_whose_files_are_links_to_blobs_is_read(tmp_path, make):
    form = make(tmp_path / "datasets--user--name" / "snapshots" / "root")
    blobs = tmp_path / "datasets--user--name" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(form.root.rglob("*"))):
        if path.is_file() and not path.is_symlink():
            path.rename(blobs / str(number))
            path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    form.check(form.load(), inside=False)
