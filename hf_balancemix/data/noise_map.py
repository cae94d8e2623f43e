"""Noise maps as files: the labels that noise changed, saved, shared and applied again without the images.

    noise_map = NoiseMap.from_datasets(clean, noisy, noise=noise)
    noise_map.save("mislabel_0.4.parquet")
    noise_map.push_to_hub("user/coco-mislabel-0.4")
    noisy = load_noise_map("user/coco-mislabel-0.4").apply(clean)  # somewhere else, on the same data set
    clean = noise_map.correct(noisy)  # the other way

The parquet has one row for each changed label, with the columns

- `image_id` (int64 or string), `class` (the name), `given` and `clean` (uint8: the noisy and the clean value);
- `check` (uint32), a checksum of the clean labels of the image, the same in all of its rows.

An image without a changed label has one row in which `class`, `given` and `clean` are null, so that the map knows all
N images. Its metadata (key `noise_map`, JSON; `datasets.Dataset.to_parquet` has no place for it) hold the name and the
parameters of the noise, its seed, N, K, the class names and a digest of all clean labels, whatever the rows' order. A
digest of all rows and of these metadata (key `noise_map_digest`) tells whether anything in the file is another.

A map that was written by hand has no such digest, which is warned of; nor need it have `check`, and of the metadata
more than `class_names`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hf_balancemix.data.files import parse_json
from hf_balancemix.data.labels import check_unknown_column, class_names, given_labels, with_changed_labels
from hf_balancemix.data.noise import LabelNoise, read_ids, record_noise, recorded_noise, without_recorded_noise
from hf_balancemix.files import check_inside, one_line, quote, whole_file

logger = logging.getLogger(__name__)

FILE_NAME = "noise_map.parquet"
_KEY, _DIGEST_KEY = b"noise_map", b"noise_map_digest"
_COLUMNS = {"class": pa.string(), "given": pa.uint8(), "clean": pa.uint8(), "check": pa.uint32()}
_CARD = Path(__file__).parent / "templates" / "noise_map.md"


@dataclass(frozen=True, repr=False)
class NoiseMap:
    """The labels of a data set that noise changed. Make one with `from_datasets` or `load_noise_map`."""

    table: pa.Table
    """The rows of the parquet, ordered by image_id and class (see the module)."""
    class_names: list[str]
    """The K names."""
    parameters: dict[str, Any]
    """Name and arguments of the noise, `{}` where it is not known."""
    clean_digest: str | None
    """SHA-256 (hexadecimal) of the clean labels of all N images; None where it is not known."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(f"table is no noise map: {problem}; make it anew with NoiseMap.from_datasets.")
        ids, image, classes = self._index
        changed = classes >= 0
        labels = np.stack([image, classes])[:, changed]
        values = self.table["given"].to_numpy()[changed] + 2 * self.table["clean"].to_numpy()[changed]
        for right, problem in (
            (len(set(map(str, ids))) == len(ids), "an image_id occurs in two places"),
            (np.unique(labels, axis=1).shape == labels.shape, "a label is listed twice"),
            (np.isin(values, (1, 2)).all(), "'given' and 'clean' of a row are not 0 and 1, or 1 and 0"),
            ((np.bincount(image)[image[~changed]] == 1).all(), "an image has a row without a class beside others"),
        ):
            if not right:
                raise ValueError(f"table is no noise map: {problem}; make it anew with NoiseMap.from_datasets.")

    def _problems(self) -> Iterator[str]:
        """What is wrong with the class names, the parameters, the digest and each column by itself.

        Each but the first may rest on those before: stop at the first.
        """
        names = self.class_names
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            yield f"class_names is {quote(names)}, no list of names"
        elif len(set(names)) < len(names):
            yield "class_names has a name twice"
        if not isinstance(self.parameters, dict):
            yield f"parameters is {quote(self.parameters)}, no mapping"
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (ValueError, RecursionError) as error:
            yield f"JSON cannot hold its parameters ({one_line(error)})"
        digest = self.clean_digest
        if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            yield f"clean_digest is {quote(digest)}, no SHA-256"
        if self.table.column_names != ["image_id", *_COLUMNS]:
            yield f"its columns are {quote(self.table.column_names)} instead of image_id, {', '.join(_COLUMNS)}"
        self.table.validate(full=True)  # also that texts are UTF-8
        none = self.table["class"].is_null().to_numpy()
        for name, column in zip(self.table.column_names, self.table.columns, strict=True):
            kinds = [_COLUMNS[name]] if name in _COLUMNS else [pa.int64(), pa.string()]
            if column.type not in kinds:
                yield f"column '{name}' is of the type {column.type} instead of {' or '.join(map(str, kinds))}"
            null, bad = column.is_null().to_numpy(), np.zeros(len(none), dtype=bool)
            if name in ("image_id", "given", "clean"):
                bad = null != (none & (name != "image_id"))
            if name in ("given", "clean"):
                bad |= ~null & ~np.isin(column.fill_null(0).to_numpy(), (0, 1))
            if name == "class":
                bad = ~null & ~pc.is_in(column, value_set=pa.array(names, pa.string())).to_numpy()
            for row in np.flatnonzero(bad)[:1]:
                needed = "a value" if name == "image_id" else "among the class names"
                needed = "0 or 1, or null in a row without a class" if name in ("given", "clean") else needed
                yield f"column '{name}', row {row} is {quote(column[int(row)].as_py())}; it must be {needed}"

    @classmethod
    def from_datasets(
        cls,
        clean: datasets.Dataset | None = None,
        noisy: datasets.Dataset | None = None,
        *,
        noise: LabelNoise | Mapping[str, Any] | None = None,
    ) -> Self:
        """Compare the labels of two data sets by image_id.

        Args:
            clean: The data set before the noise, with `labels` and `image_id`. By default `noisy`, with its
                `clean_labels`.
            noisy: The same images in any order, with noisy `labels`.
            noise: The noise that was applied, or its name and parameters, which JSON can hold; kept with the map.

        Raises:
            ValueError: The images, the class names or the unknown labels of the two differ, an image_id occurs twice,
                or a column is absent or not valid (see `data.labels.given_labels`).
            TypeError: `noisy` is None, one is not a `datasets.Dataset`, or JSON cannot hold the parameters.
        """
        if noisy is None:
            raise TypeError("noisy is None; it must be the data set with noise; NoiseMap.from_datasets(clean, noisy).")
        if clean is None:
            if "clean_labels" not in getattr(noisy, "features", {}):
                needed = "noisy must have the column 'clean_labels' then; pass the clean data set, too"
                raise ValueError(f"clean is None; {needed}.")
            clean = noisy.remove_columns("labels").rename_column("clean_labels", "labels")
        parameters = noise.parameters if isinstance(noise, LabelNoise) else dict(noise or {})
        json.dumps(parameters)  # TypeError where it cannot be saved

        names, ids = class_names(clean), read_ids(clean, unique=True, dataset_name="the clean data set")
        order = sorted(range(len(ids)), key=lambda row: ids[row])
        ids = [ids[row] for row in order]
        before = given_labels(clean).numpy()[order]
        after = given_labels(noisy).numpy()[_cells_of(noisy, ids, names, "the noisy data set", "the clean one")]
        for row, k in np.argwhere((before < 0) != (after < 0)):
            found = (
                f"the label {quote(names[k])} of image_id {quote(ids[row])} is unknown in one of the data sets only"
            )
            raise ValueError(f"{found}; it must be in both or in none; give both the same 'unknown_labels'.")
        changed = before != after
        # One column more, true for an image without a changed label: it has a row of its own, without a class.
        image, classes = np.nonzero(np.hstack([changed, ~changed.any(axis=1, keepdims=True)]))
        none = classes == len(names)
        classes[none] = 0
        digest, checks = _fingerprints(ids, before)
        columns = {
            "image_id": pa.array(ids, pa.int64() if ids and isinstance(ids[0], int) else pa.string()).take(image),
            "class": pa.array(names, pa.string()).take(pa.array(classes, mask=none)),
            "given": pa.array(after[image, classes].astype(np.uint8), mask=none),
            "clean": pa.array(before[image, classes].astype(np.uint8), mask=none),
            "check": pa.array(checks[image]),
        }
        return cls(pa.table(columns), names, parameters, digest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a noise map from a parquet file that `save` has written.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or not a noise map, or a value in it was changed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; it must be what NoiseMap.save wrote; check the path.")
        try:
            file = pq.ParquetFile(path)
            if file.metadata.num_rows > 1000 + 64 * path.stat().st_size:  # repeats without end: `check` has 4 bytes
                raise ValueError(f"{file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes")
            table = file.read()
            metadata = table.schema.metadata[_KEY]
            digest = table.schema.metadata.get(_DIGEST_KEY)
            content = parse_json(metadata, "its metadata")
            if content.get("format", 1) != 1:
                raise ValueError(f"its format is {quote(content['format'])}; it must be 1; update hf_balancemix")
            if digest is None:
                content = {"parameters": {}, "clean_digest": None} | content
                if "check" not in table.column_names:
                    table = table.append_column("check", pa.nulls(len(table), pa.uint32()))
            kind = pa.int64() if pa.types.is_integer(table.schema.field("image_id").type) else pa.string()
            columns = [pa.field("image_id", kind), *(pa.field(name, kind) for name, kind in _COLUMNS.items())]
            table = table.select([column.name for column in columns]).cast(pa.schema(columns))
            found = cls(table, content["class_names"], content["parameters"], content["clean_digest"])
            if found.num_instances != content.get("num_instances", found.num_instances):
                raise ValueError(f"{found.num_instances} images instead of {quote(content['num_instances'])}")
            if digest is not None and digest.decode() != _digest(metadata, table):
                raise ValueError("its digest is that of other rows: some value was changed after it was written")
        except (pa.ArrowException, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{path} is damaged or not a noise map ({type(error).__name__}: {one_line(error, 160)})"
            raise ValueError(f"{problem}; it must be what NoiseMap.save wrote; copy it again.") from error
        if digest is None:
            logger.warning("%s has no digest of its rows: nobody can tell whether one was changed since.", path)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the noise map to a parquet file, which appears under its name only when whole, or replace one.

        The bytes depend on the noise map alone, not on the order of the rows that it was made from.

        Raises:
            OSError: The file cannot be written.
        """
        with whole_file(path) as temporary:
            temporary.write_bytes(self._parquet())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload noise map",
        token: str | None = None,
    ) -> str:
        """Upload `noise_map.parquet` and a README.md to a data set repository on the Hub, new or not, in one commit.

        A README.md that is there already without a noise map beside it stays as it is.

        Args:
            repo_id: "user/name".
            private: Make a new repository private.
            commit_message: Title of the commit.
            token: Access token; by default the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        files = set(api.list_repo_files(repo_id, repo_type="dataset"))
        operations = [CommitOperationAdd(FILE_NAME, self._parquet())]
        if "README.md" not in files or FILE_NAME in files:
            text, parameters = _CARD.read_text(encoding="utf-8"), json.dumps(self.parameters)[:2000]
            card = text.format(
                map=self, file=FILE_NAME, repo_id=repo_id, parameters=parameters, num_classes=len(self.class_names)
            )
            operations.append(CommitOperationAdd("README.md", card.encode()))
        return api.create_commit(repo_id, operations, commit_message=commit_message, repo_type="dataset").commit_url

    def apply(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Give a data set the noisy labels of this map.

        Args:
            dataset: The images and labels that the map was made from, rows and classes in any order.

        Returns:
            The data set with noisy `labels`, and the clean ones as `clean_labels`; those stay where they exist.

        Raises:
            ValueError: The data set is another than the one that the map was made from; the message says in what.
            TypeError: `dataset` is not a `datasets.Dataset`, or its labels are of an unknown type.
        """
        cells = _cells_of(dataset, self._index[0], self.class_names, "the data set", "the noise map")
        labels = given_labels(dataset).numpy()[cells]
        check_unknown_column(dataset)
        self._check_clean(labels, "clean_labels" in dataset.features)
        return record_noise(self._changed(dataset, cells, "given", beside="clean_labels"), self.parameters)

    def correct(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Give a data set that has the noisy labels of this map the clean ones: `apply` the other way round.

        Args:
            dataset: The images and their noisy labels, rows and classes in any order.

        Returns:
            The data set with clean `labels`, and the noisy ones as `given_labels`; those stay where they exist.

        Raises:
            ValueError, TypeError: As `apply`.
        """
        ids, image, classes = self._index
        cells = _cells_of(dataset, ids, self.class_names, "the data set", "the noise map")
        labels = given_labels(dataset).numpy()[cells]
        changed = classes >= 0
        at = image[changed], classes[changed]
        noisy = self.table["given"].to_numpy()[changed]
        for row in np.flatnonzero(labels[at] != noisy)[:1]:
            name, image_id = self.class_names[at[1][row]], ids[at[0][row]]
            found = (
                f"the label {quote(name)} of image_id {quote(image_id)} is {labels[at][row]} instead of {noisy[row]:g}"
            )
            needed = "the labels must be the noisy ones of the map; pass the data set as it was given"
            raise ValueError(f"{found} ({np.sum(labels[at] != noisy)} of {len(noisy)} differ); {needed}.")
        labels[at] = self.table["clean"].to_numpy()[changed]
        self._check_clean(labels, has_clean_labels=False)
        result = self._changed(dataset, cells, "clean", beside="given_labels")
        if recorded_noise(result) == self.parameters:
            result.info.description = without_recorded_noise(result.info.description)
        return result

    def _changed(
        self, dataset: datasets.Dataset, cells: tuple[np.ndarray, ...], values: str, beside: str
    ) -> datasets.Dataset:
        """The data set with this column's values of the changed labels; the old ones are kept in `beside`."""
        _, image, classes = self._index
        changed = classes >= 0
        rows, columns = cells[0].ravel()[image[changed]], cells[1].ravel()[classes[changed]]
        return with_changed_labels(dataset, rows, columns, self.table[values].to_numpy()[changed], beside)

    @property
    def name(self) -> str:
        """Name of the noise."""
        return str(self.parameters.get("name", "unnamed"))

    @property
    def seed(self) -> int | None:
        """Seed of the noise; None where it is not known, or the parts of a composition have their own."""
        return self.parameters.get("seed")

    @property
    def num_instances(self) -> int:
        """N, the number of images that the map was made from."""
        return len(self._index[0])

    @property
    def num_removed(self) -> int:
        """Number of labels that the noise changed from 1 to 0."""
        return int(np.sum(self.table["clean"].to_numpy() == 1))

    @property
    def num_added(self) -> int:
        """Number of labels that the noise changed from 0 to 1."""
        return int(np.sum(self.table["given"].to_numpy() == 1))

    def __repr__(self) -> str:
        return (
            f"NoiseMap({self.name}: {self.num_removed:,} labels removed and {self.num_added:,} added "
            f"in {self.num_instances:,} images, {len(self.class_names)} classes)"
        )

    @cached_property
    def _index(self) -> tuple[list[int | str], np.ndarray, np.ndarray]:
        """The N ids in the order of the table, and for each row its position among them and its class (-1: none)."""
        column = self.table["image_id"].to_pylist()
        first = np.fromiter((i == 0 or column[i - 1] != value for i, value in enumerate(column)), bool, len(column))
        position = {name: k for k, name in enumerate(self.class_names)} | {None: -1}
        classes = np.array([position[name] for name in self.table["class"].to_pylist()], dtype=np.int64)
        return [column[i] for i in np.flatnonzero(first)], first.cumsum() - 1, classes

    def _check_clean(self, labels: np.ndarray, has_clean_labels: bool) -> None:
        """Raises ValueError where (N, K) labels are not those that the map was made from, or says that it changed."""
        ids, image, classes = self._index
        digest, checks = _fingerprints(ids, labels)
        check, clean = self.table["check"], self.table["clean"].to_numpy()
        differs = ~check.is_null().to_numpy() & (check.fill_null(0).to_numpy() != checks[image])
        other_label = (classes >= 0) & (labels[image, classes] != clean)
        rows = np.flatnonzero(differs | other_label)
        if not len(rows) and self.clean_digest in (None, digest):
            return
        other = np.unique(image[rows])
        message = f"the labels of {len(other)} of {len(ids)} images differ from those that the noise map was made from"
        if len(other):  # in theory a check may be the same by chance
            message += f", such as image_id {quote(ids[other[0]])}"
        for row in rows[(image[rows] == other[:1]) & other_label[rows]][:1]:
            label = labels[image[row], classes[row]]
            found = "unknown" if label < 0 else label
            message += f", whose label {quote(self.class_names[classes[row]])} is {found} instead of {clean[row]:g}"
        if has_clean_labels:
            message += " (the data set has 'clean_labels', so its labels may be noisy already)"
        raise ValueError(f"{message}; they must be the same; apply the map to that data set, loaded in the same way.")

    def _parquet(self) -> bytes:
        content = {
            "format": 1,
            "name": self.name,
            "parameters": self.parameters,
            "seed": self.seed,
            "num_instances": self.num_instances,
            "num_classes": len(self.class_names),
            "class_names": self.class_names,
            "clean_digest": self.clean_digest,
        }
        sink = pa.BufferOutputStream()
        metadata = json.dumps(content).encode()
        table = self.table.replace_schema_metadata({_KEY: metadata, _DIGEST_KEY: _digest(metadata, self.table)})
        pq.write_table(table, sink, compression="zstd", use_dictionary=["class"])
        return sink.getvalue().to_pybytes()


def load_noise_map(
    path_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    follow_links: bool = False,
) -> NoiseMap:
    """Load a noise map from a file, a folder or the Hub.

    Args:
        path_or_repo_id: A parquet file that `NoiseMap.save` has written, a folder with a `noise_map.parquet`, or a
            data set repository "user/name" on the Hub.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub; by default the one that is logged in.
        follow_links: Read the file of a folder where it is a link that leads out of the folder.

    Raises:
        FileNotFoundError: It is none of these.
        ValueError: The file is damaged or not a noise map, or leads out of the folder.
        huggingface_hub.errors.HfHubHTTPError, ConnectionError: The Hub refuses, or cannot be reached.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        check_inside(path / FILE_NAME, path, follow_links)
        path /= FILE_NAME
    if path.is_file():
        return NoiseMap.load(path)
    repo_id = str(path_or_repo_id)
    try:
        return NoiseMap.load(hf_hub_download(repo_id, FILE_NAME, repo_type="dataset", revision=revision, token=token))
    except LocalEntryNotFoundError:
        raise  # not reachable, and not in the cache
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{quote(repo_id)} is neither a file here nor a data set repository on the Hub with a {FILE_NAME} "
            f"({type(error).__name__}); it must be one of them; check the name, and your access if it is private."
        ) from error


def _cells_of(
    dataset: datasets.Dataset, ids: list[int | str], names: list[str], this: str, other: str
) -> tuple[np.ndarray, ...]:
    """What indexes the data set's label matrix so that it has the N ids as its rows and the K names as its columns.

    Raises ValueError where these differ; `this` and `other` say what is compared.
    """
    column_of = {name: k for k, name in enumerate(class_names(dataset))}
    row_of = {str(value): i for i, value in enumerate(read_ids(dataset, unique=True, dataset_name=this))}
    rows = list(map(str, ids))
    for kind, what, found, expected in (("classes", "class", column_of, names), ("images", "image_id", row_of, rows)):
        differences = []
        for verb, some, rest in (("lacks", expected, found), ("also has", found, set(expected))):
            if missing := [value for value in some if value not in rest]:
                differences.append(f"it {verb} {len(missing)}, first {what} {quote(missing[0])}")
        if differences:
            problem = f"{this} has other {kind} than {other} ({' and '.join(differences)})"
            raise ValueError(
                f"{problem}; they must be the same; use the same data set and split, loaded in the same way."
            )
    return np.ix_([row_of[row] for row in rows], [column_of[name] for name in names])


def _digest(metadata: bytes, table: pa.Table) -> str:
    """SHA-256 (hexadecimal) of a noise map's metadata and of all values of its rows, however the file stores them."""
    digest = hashlib.sha256(metadata)
    for name in table.column_names:
        digest.update(json.dumps([name, table[name].to_pylist()]).encode())
    return digest.hexdigest()


def _fingerprints(ids: Sequence[int | str], labels: np.ndarray) -> tuple[str, np.ndarray]:
    """A digest of the ids and (N, K) labels of all images in any order, and N checksums (uint32), one for each."""
    prints = [
        hashlib.blake2b(f"{image_id}\0".encode() + row.tobytes(), digest_size=16).digest()
        for image_id, row in zip(ids, np.ascontiguousarray(labels, dtype=np.int8), strict=True)
    ]
    checks = np.frombuffer(b"".join(value[:4] for value in prints), dtype="<u4").astype(np.uint32)
    return hashlib.sha256(b"".join(sorted(prints))).hexdigest(), checks
