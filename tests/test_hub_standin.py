"""Unpatched clients against the stand-in for the Hub: noise maps, data sets and models, pushed and loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from hub_standin import HubStandin
from PIL import Image as PILImage

from hf_balancemix.data.labels import label_matrix
from hf_balancemix.data.noise import Mislabel
from hf_balancemix.data.noise_map import NoiseMap


@pytest.fixture
def hub() -> Iterator[HubStandin]:
    with HubStandin() as hub:
        yield hub
    assert hub.unknown == []


def titles(hub: HubStandin, kind: str, repo_id: str) -> list[str]:
    return [commit.title for commit in hub.repositories[kind, repo_id].log()]


# Noise maps


PUSH_NOISE_MAP = """
import sys
from huggingface_hub import HfApi
from hf_balancemix.data.noise_map import load_noise_map

noise_map, other = map(load_noise_map, sys.argv[1:])
print(noise_map.push_to_hub("user/noise", private=True))
print(noise_map.push_to_hub("user/noise"))
other.push_to_hub("user/noise", commit_message="Another")
api = HfApi()
api.create_repo("user/empty", repo_type="dataset")
api.create_repo("user/images", repo_type="dataset")
api.upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="user/images", repo_type="dataset")
noise_map.push_to_hub("user/images")
"""

LOAD_NOISE_MAP = """
import json, sys
from datasets import load_dataset, load_from_disk
from hf_balancemix.data.noise_map import load_noise_map

noise_map = load_noise_map("user/noise", revision=sys.argv[2])
noisy = noise_map.apply(load_from_disk(sys.argv[1]))
columns = noisy.select_columns(["image_id", "labels", "clean_labels"]).to_dict()
errors = []
for name, arguments in (("user/nothing", {}), ("user/empty", {}), ("user/noise", {"token": False})):
    try:
        load_noise_map(name, **arguments)
    except FileNotFoundError as error:
        errors.append(str(error))
rows = load_dataset("user/noise", revision=sys.argv[2], split="train").to_list()  # as others see it
print(json.dumps([columns, errors, repr(load_noise_map("user/noise")), rows]))
"""


def test_a_noise_map_pushed_and_applied_in_another_process(hub, tmp_path):
    labels = np.random.default_rng(0).random((60, 4)) < 0.4
    kind = List(ClassLabel(names=["ant", "bee", "cat", "dog"]))
    clean = Dataset.from_dict(
        {"labels": [np.flatnonzero(row).tolist() for row in labels], "image_id": [f"{i:03}.jpg" for i in range(60)]},
        features=Features(labels=kind, image_id=Value("string")),
    )
    noise = Mislabel(0.4).fit(clean)
    noisy = clean.map(noise, batched=True, features=noise.features)
    noise_map = NoiseMap.from_datasets(clean, noisy, noise=noise)
    noise_map.save(tmp_path / "map.parquet")
    clean.shuffle(seed=1).save_to_disk(tmp_path / "clean")

    NoiseMap.from_datasets(clean, clean).save(tmp_path / "other.parquet")

    addresses = hub.run(PUSH_NOISE_MAP, tmp_path / "map.parquet", tmp_path / "other.parquet", home=tmp_path / "one")
    repository = hub.repositories["dataset", "user/noise"]
    assert repository.private
    assert titles(hub, "dataset", "user/noise") == ["Another", "Upload noise map", "initial commit"]
    second, first, _ = repository.log()
    assert [address.rpartition("/")[2] for address in addresses.split()] == [first.oid] * 2  # nothing new to commit
    assert b"| Labels removed (1 to 0) | 0 |" in second.files["README.md"].content
    assert set(first.files) == {".gitattributes", "README.md", "noise_map.parquet"}  # in one commit
    assert first.files["noise_map.parquet"].content == (tmp_path / "map.parquet").read_bytes()
    readme = first.files["README.md"].content.decode()
    assert readme.startswith("---\ntags:\n- label-noise\n")
    for text in (
        'load_noise_map("user/noise").apply(dataset)',
        json.dumps(noise.parameters),
        "| Images | 60 |",
        f"| Labels removed (1 to 0) | {int((label_matrix(noisy) < label_matrix(clean)).sum())} |",
        noise_map.clean_digest,
    ):
        assert text in readme
    images = hub.repositories["dataset", "user/images"].log()[0]
    assert images.files["README.md"].content == b"# Mine"
    assert "noise_map.parquet" in images.files

    found = hub.run(LOAD_NOISE_MAP, tmp_path / "clean", first.oid, home=tmp_path / "two")
    columns, errors, loaded, rows = json.loads(found)
    expected = {row["image_id"]: row for row in noisy.to_list()}
    for image_id, given, kept in zip(columns["image_id"], columns["labels"], columns["clean_labels"], strict=True):
        assert {"image_id": image_id, "labels": given, "clean_labels": kept} == expected[image_id]
    assert len(columns["image_id"]) == 60
    assert loaded == "NoiseMap(unnamed: 0 labels removed and 0 added in 60 images, 4 classes)"
    assert rows == noise_map.table.to_pylist()
    assert len(errors) == 3
    for error, name in zip(errors, ("user/nothing", "user/empty", "user/noise"), strict=True):
        assert f"'{name}' is neither a file here nor a data set repository on the Hub" in error


# Data sets


PUSH_DATASET = """
import sys
from datasets import load_from_disk
load_from_disk(sys.argv[1]).push_to_hub("user/pictures", commit_message="Five pictures")
"""

LOAD_DATASET = """
import hashlib, json
from datasets import load_dataset

dataset = load_dataset("user/pictures", split="train")
rows = [[*row.values(), list(image.size), hashlib.sha256(image.tobytes()).hexdigest()]
        for image, row in zip(dataset["image"], dataset.remove_columns("image"), strict=True)]
print(json.dumps([dataset.features.to_dict(), rows]))
"""


def test_a_data_set_with_its_images_pushed_and_loaded_elsewhere(hub, tmp_path):
    features = Features(
        image=Image(mode="RGB"), labels=List(ClassLabel(names=["ant", "bee", "cat"])), image_id=Value("int64")
    )
    rng, expected, paths, labels = np.random.default_rng(0), [], [], [[0], [], [1, 2], [2], [0, 1, 2]]
    for i in range(5):
        paths.append(str(tmp_path / f"{i}.png"))
        image = PILImage.fromarray(rng.integers(0, 256, (6 + i, 9, 3), dtype=np.uint8))
        image.save(paths[-1])
        expected.append([labels[i], 10 + i, list(image.size), hashlib.sha256(image.tobytes()).hexdigest()])
    columns = {"image": paths, "labels": labels, "image_id": range(10, 15)}
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "pictures")

    hub.run(PUSH_DATASET, tmp_path / "pictures", home=tmp_path / "one")
    assert titles(hub, "dataset", "user/pictures") == ["Five pictures", "initial commit"]
    found_features, rows = json.loads(hub.run(LOAD_DATASET, home=tmp_path / "two"))
    assert Features.from_dict(found_features) == features
    assert rows == expected


# Models, and the repository itself


PUSH_MODEL = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

api, folder = HfApi(), Path(sys.argv[1])
api.create_repo("user/model")
api.create_repo("user/model", exist_ok=True)
first = api.upload_folder(folder_path=folder, repo_id="user/model", commit_message="One").oid
(folder / "config.json").write_text("{}")
second = api.upload_folder(folder_path=folder, repo_id="user/model", commit_message="Two").oid
try:
    api.upload_file(path_or_fileobj=b"", path_in_repo="late", repo_id="user/model", parent_commit=first)
except HfHubHTTPError as error:
    conflict = error.response.status_code
api.create_branch("user/model", branch="slim")
api.create_commit("user/model", [CommitOperationDelete("logs/")], commit_message="Three", revision="slim")


def files(revision):
    root = Path(snapshot_download("user/model", revision=revision))
    return {path.relative_to(root).as_posix(): path.read_bytes().hex() for path in root.rglob("*") if path.is_file()}


print(json.dumps({
    "conflict": conflict, "first": files(first), "main": files(None), "slim": files("slim"),
    "refs": {ref.name: ref.target_commit for ref in api.list_repo_refs("user/model").branches},
    "sizes": {file.rfilename: file.size for file in api.model_info("user/model", files_metadata=True).siblings},
    "tree": sorted(entry.path for entry in api.list_repo_tree("user/model")),
    "commits": [commit.title for commit in api.list_repo_commits("user/model")],
    "exists": [api.file_exists("user/model", "config.json"), api.file_exists("user/model", "other")],
}))
"""


def test_a_model_repository_with_history_and_branches(hub, tmp_path):
    content = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 50, "logs/a.txt": b"a"}
    for path, data in content.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(data)
    found = json.loads(hub.run(PUSH_MODEL, tmp_path / "model", home=tmp_path / "home"))
    expected = {path: data.hex() for path, data in content.items()}
    expected[".gitattributes"] = found["main"][".gitattributes"]
    assert found["first"] == expected
    assert found["main"] == expected | {"config.json": b"{}".hex()}
    assert found["slim"] == {path: data for path, data in found["main"].items() if path != "logs/a.txt"}
    assert found["sizes"]["model.safetensors"] == 256 * 50
    assert found["tree"] == [".gitattributes", "config.json", "logs", "model.safetensors"]
    assert found["commits"] == ["Two", "One", "initial commit"]
    assert found["exists"] == [True, False]
    assert found["conflict"] == 412

    repository = hub.repositories["model", "user/model"]
    assert found["refs"] == {"main": repository.log()[0].oid, "slim": repository.log("slim")[0].oid}
    assert [commit.title for commit in repository.log("slim")] == ["Three", "Two", "One", "initial commit"]
    assert repository.log()[0].files["model.safetensors"].lfs
    assert not repository.log()[0].files["config.json"].lfs
    puts = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(puts) == 1  # the second upload sent what had changed


UPLOADS = """
from huggingface_hub import HfApi, hf_hub_download

api, done = HfApi(), []
api.create_repo("user/model", private=True)
for i in range(4):
    try:
        api.upload_file(path_or_fileobj=b"%d" % i, path_in_repo=f"{i}.safetensors", repo_id="user/model", commit_message=f"{i}")
        done.append(i)
    except Exception as error:
        print(type(error).__name__)
print(done, hf_hub_download("user/model", "3.safetensors").endswith("3.safetensors"))
"""  # noqa: E501


def test_faults_leave_whole_commits_only(hub, tmp_path):
    hub.fail(path="/commit/")
    hub.fail(path="/commit/", status=None)
    hub.fail(path="/lfs/", status=502)  # repeated by the client
    printed = hub.run(UPLOADS, home=tmp_path).splitlines()
    assert printed == ["HfHubHTTPError", "RemoteProtocolError", "[2, 3] True"]
    assert titles(hub, "model", "user/model") == ["3", "2", "initial commit"]
    newest = hub.repositories["model", "user/model"].log()[0]
    assert set(newest.files) == {".gitattributes", "2.safetensors", "3.safetensors"}
    assert sorted(status for *_, status in hub.requests if status != 200) == [0, 502, 503]
    assert hashlib.sha256(b"0").hexdigest() in hub.uploads  # arrived, but no commit names it


STRANGERS = """
import io
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

api = HfApi()
for ask in (
    lambda: api.model_info("user/model"),
    lambda: api.create_repo("user/other"),
    lambda: api.model_info("user/public", revision="no-such-branch"),
    lambda: api.super_squash_history("user/public"),
):
    try:
        ask()
    except HfHubHTTPError as error:
        print(type(error).__name__, error.response.status_code)
"""


def test_who_may_not_and_what_is_not_known(tmp_path):
    with HubStandin() as hub:
        create = "from huggingface_hub import create_repo\ncreate_repo('user/model', private=True)\n"
        hub.run(create + "create_repo('user/public')", home=tmp_path / "owner")
        printed = hub.run(STRANGERS, home=tmp_path / "stranger", token=None).splitlines()
        assert printed[:3] == ["RepositoryNotFoundError 401", "HfHubHTTPError 401", "RevisionNotFoundError 404"]
        assert printed[3] == "HfHubHTTPError 501"
        assert hub.unknown == [("POST", "/api/models/user/public/super-squash/main")]
        with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*Invalid credentials"):
            hub.run("from huggingface_hub import whoami; whoami()", home=tmp_path, token="hf_wrong")
