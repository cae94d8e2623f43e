from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from hf_balancemix.files import is_temporary
from hf_balancemix.trainer import checkpoints
from hf_balancemix.trainer.checkpoints import (
    MANIFEST,
    check,
    last_whole_checkpoint,
    list_checkpoints,
    remove_manifest,
    rotate,
    write_manifest,
)


def _save(output_dir: Path, step: int | str, *, manifest: bool = True) -> Path:
    directory = output_dir / f"checkpoint-{step}"
    (directory / "sub").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 20 + str(step).encode())
    (directory / "trainer_state.json").write_text(f'{{"global_step": "{step}"}}')
    (directory / "sub" / "empty").touch()
    if manifest:
        write_manifest(directory)
    return directory


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


# ------------------------------------------------------------------------------------------------ manifest and check


def test_a_finished_checkpoint_is_whole(tmp_path):
    directory = _save(tmp_path, 1)
    assert check(directory) is None
    assert check(str(directory), content=False) is None
    listed = json.loads((directory / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["model.safetensors", "sub/empty", "trainer_state.json"]
    assert listed["sub/empty"] == {
        "size": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",  # of nothing, well known
    }


def test_without_manifest_it_is_not_whole(tmp_path):
    assert "no manifest.json" in check(_save(tmp_path, 1, manifest=False))


def test_a_folder_with_one_garbage_byte_is_not_whole(tmp_path):
    directory = tmp_path / "checkpoint-7"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"\x00")
    assert "no manifest.json" in check(directory)
    assert last_whole_checkpoint(tmp_path) is None


def test_neither_is_a_missing_folder_or_a_file(tmp_path):
    (tmp_path / "checkpoint-1").write_text("x")
    assert "not a folder" in check(tmp_path / "checkpoint-1")
    assert "not a folder" in check(tmp_path / "checkpoint-2")


def test_every_truncation_of_a_file_is_noticed_by_its_size(tmp_path):
    directory = _save(tmp_path, 1)
    file = directory / "trainer_state.json"
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        for content in (True, False):
            fault = check(directory, content=content)
            assert f"'trainer_state.json' has {length} bytes instead of {len(data)}" in fault


def test_every_truncation_of_the_manifest_is_noticed(tmp_path):
    directory = _save(tmp_path, 1)
    data = (directory / MANIFEST).read_bytes()
    for length in range(len(data)):
        (directory / MANIFEST).write_bytes(data[:length])
        assert "damaged" in check(directory)


def test_a_missing_file_is_noticed(tmp_path):
    directory = _save(tmp_path, 1)
    (directory / "sub" / "empty").unlink()
    assert check(directory) == "Its file 'sub/empty' is missing."
    (directory / "sub" / "empty").mkdir()
    assert "is missing" in check(directory)


def test_other_content_of_the_same_size_is_noticed_by_its_checksum(tmp_path):
    directory = _save(tmp_path, 1)
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[1000] ^= 1
    (directory / "model.safetensors").write_bytes(data)
    assert "'model.safetensors' differs" in check(directory)
    assert check(directory, content=False) is None


def test_files_added_later_do_not_matter(tmp_path):
    directory = _save(tmp_path, 1)
    (directory / "README.md").write_text("pushed")
    (directory / "sub" / "more").write_text("x")
    assert check(directory) is None


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"files": {}}',
        b'{"files": []}',
        b'{"files": {"model.safetensors": 5}}',
        b'{"files": {"model.safetensors": {"size": 5}}}',
        b'{"files": {"../outside": {"size": 1, "sha256": "0"}}}',
        b'{"files": {"/etc/hostname": {"size": 1, "sha256": "0"}}}',
        b"[" * 100_000,
    ],
)
def test_a_garbage_manifest_is_a_fault_not_an_exception(tmp_path, manifest):
    directory = _save(tmp_path, 1, manifest=False)
    (directory / MANIFEST).write_bytes(manifest)
    assert check(directory) == "Its manifest.json is damaged."


@pytest.mark.parametrize("name", ["a\\u0000b", "\\ud800", "x" * 5000])
def test_a_manifest_with_impossible_names_is_a_fault(tmp_path, name):
    directory = _save(tmp_path, 1, manifest=False)
    (directory / MANIFEST).write_text(f'{{"files": {{"{name}": {{"size": 1, "sha256": "0"}}}}}}')
    assert "missing" in check(directory) or "cannot be read" in check(directory)


def test_a_manifest_that_is_a_folder_is_a_fault(tmp_path):
    directory = _save(tmp_path, 1, manifest=False)
    (directory / MANIFEST).mkdir()
    assert "cannot be read" in check(directory)


def test_odd_names_links_and_pipes(tmp_path):
    directory = _save(tmp_path, 1, manifest=False)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights").write_text("shared")
    for name in ["with space", "new\nline", "żółw", '"quoted"', ".hidden", "-rf", MANIFEST + ".old"]:
        (directory / name).write_text(name)
    with open(os.path.join(os.fsencode(directory), b"latin-\xe9"), "wb") as file:
        file.write(b"not UTF-8")
    (directory / "sub" / MANIFEST).write_text("another folder's file of that name")
    (directory / "link").symlink_to(tmp_path / "outside" / "weights")
    (directory / "linked folder").symlink_to(tmp_path / "outside")
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "up").symlink_to(directory)
    os.mkfifo(directory / "pipe")
    write_manifest(directory)
    listed = json.loads((directory / MANIFEST).read_text())["files"]
    assert {"new\nline", "żółw", ".hidden", "link", f"sub/{MANIFEST}", os.fsdecode(b"latin-\xe9")} < set(listed)
    assert not {"pipe", "loop", "up", "linked folder", "linked folder/weights", MANIFEST} & set(listed)
    assert check(directory) == "It has a link that leads out of the folder, which is not followed."
    (directory / "linked folder").unlink()
    (directory / "link").unlink()
    (directory / "link").symlink_to(".hidden")
    write_manifest(directory)
    assert check(directory) is None
    (directory / ".hidden").write_text(".Hidden")
    assert "'.hidden' differs" in check(directory)


def test_files_larger_than_a_chunk(tmp_path):
    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    data = bytearray(3 * 2**20 + 17)
    (directory / "large").write_bytes(data)
    write_manifest(directory)
    assert check(directory) is None
    data[-1] = 1
    (directory / "large").write_bytes(data)
    assert "differs" in check(directory)


def test_writing_again_describes_the_new_files(tmp_path):
    directory = _save(tmp_path, 1)
    (directory / "model.safetensors").write_bytes(b"new")
    (directory / "sub" / ".empty.1.tmp").write_text("left by a crash")
    write_manifest(directory)
    assert check(directory) is None
    listed = json.loads((directory / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["model.safetensors", "sub/empty", "trainer_state.json"]
    assert {path.name for path in directory.iterdir()} == {MANIFEST, "model.safetensors", "sub", "trainer_state.json"}


def test_nothing_to_declare_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1; it must be the folder of a checkpoint"):
        write_manifest(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "sub").mkdir(parents=True)
    with pytest.raises(ValueError, match="an empty folder; it must hold a checkpoint"):
        write_manifest(tmp_path / "checkpoint-1")
    assert "no manifest.json" in check(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_manifest_that_cannot_be_written_leaves_none(tmp_path, monkeypatch, step, error):
    directory = _save(tmp_path, 1)  # with an earlier manifest

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(error)):
            write_manifest(directory)
    assert "no manifest.json" in check(directory)
    assert not any(is_temporary(path.name) for path in directory.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(tmp_path):
    directory = _save(tmp_path, 1, manifest=False)
    directory.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_manifest(directory)
        assert "no manifest.json" in check(directory)
    finally:
        directory.chmod(0o700)


def test_files_are_on_disk_before_the_manifest_appears(tmp_path, monkeypatch):
    directory = _save(tmp_path, 1, manifest=False)
    events = []
    sync, replace = os.fsync, os.replace

    def recording_sync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("temporary" if is_temporary(path.name) else str(path).removeprefix(f"{directory}"))
        sync(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", recording_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_manifest(directory)
    data = ["/model.safetensors", "/sub/empty", "/trainer_state.json"]
    assert events == [*data, "temporary", "replace", ""]


def test_remove_manifest(tmp_path):
    directory = _save(tmp_path, 1)
    remove_manifest(directory)
    remove_manifest(directory)
    assert "no manifest.json" in check(directory)
    assert (directory / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ list and choose


def test_checkpoints_are_listed_by_number(tmp_path):
    for step in (10, 9, 100, 1):
        _save(tmp_path, step, manifest=step != 100)
    for suffix in ("-abc", "-", "-5-tmp", "--1", "-²", "-5\n", "5"):
        (tmp_path / f"checkpoint{suffix}").mkdir()
    (tmp_path / "my-checkpoint-3").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert _names(list_checkpoints(tmp_path)) == ["checkpoint-1", "checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_no_run_yet(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    assert last_whole_checkpoint(tmp_path / "none") is None
    assert last_whole_checkpoint(tmp_path) is None
    assert rotate(tmp_path / "none", 1) == []


def test_the_last_whole_checkpoint_and_what_was_passed_over(tmp_path, caplog):
    for step in (8, 9, 10, 11, 12):
        _save(tmp_path, step, manifest=step != 11)
    (tmp_path / "checkpoint-8" / "model.safetensors").unlink()  # older: not looked at
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"\x00")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": "1_"}')  # same size
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-9"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    for message, step, reason in zip(messages, (12, 11, 10), ("checksum", "no manifest.json", "1 bytes"), strict=True):
        assert f"checkpoint-{step}:" in message
        assert reason in message


def test_a_checkpoint_cut_off_after_any_file_is_passed_over(tmp_path):
    whole = _save(tmp_path, 1)
    files = [path for path in sorted(whole.rglob("*")) if path.is_file() and path.name != MANIFEST]
    for number in range(len(files) + 1):  # all files but no manifest is the last moment before it is whole
        (tmp_path / "checkpoint-2" / "sub").mkdir(parents=True, exist_ok=True)
        for file in files[:number]:
            shutil.copy(file, tmp_path / "checkpoint-2" / file.relative_to(whole))
        assert last_whole_checkpoint(tmp_path) == whole
    write_manifest(tmp_path / "checkpoint-2")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


# ------------------------------------------------------------------------------------------------ rotate


def test_rotation_keeps_the_newest_whole_ones(tmp_path):
    for step in (1, 2, 9, 10, 11):
        _save(tmp_path, step)
    assert _names(rotate(tmp_path, 2)) == ["checkpoint-1", "checkpoint-2", "checkpoint-9"]
    assert _names(list_checkpoints(tmp_path)) == ["checkpoint-10", "checkpoint-11"]
    assert all(check(path) is None for path in list_checkpoints(tmp_path))
    assert rotate(tmp_path, 2) == []


@pytest.mark.parametrize("limit", [None, 0, -1, 3, 50])
def test_rotation_without_a_limit_or_within_it_deletes_nothing(tmp_path, limit):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert rotate(tmp_path, limit) == []
    assert len(list_checkpoints(tmp_path)) == 3


def test_kept_checkpoints_stay_and_count(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step)
    monkeypatch.chdir(tmp_path)
    assert _names(rotate(tmp_path, 2, keep=["checkpoint-1"])) == ["checkpoint-2", "checkpoint-3"]
    _save(tmp_path, 5)
    assert _names(rotate(tmp_path, 1, keep=[tmp_path / "checkpoint-1"])) == ["checkpoint-4"]
    assert _names(list_checkpoints(tmp_path)) == ["checkpoint-1", "checkpoint-5"]


def test_remains_older_than_the_newest_whole_one_go_newer_ones_stay(tmp_path):
    for step in (1, 2, 3, 4, 5, 6):
        _save(tmp_path, step, manifest=step in (2, 4))
    assert _names(rotate(tmp_path, 2, keep=[tmp_path / "checkpoint-3"])) == ["checkpoint-1"]
    assert _names(list_checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)]


def test_nothing_is_deleted_without_a_whole_one(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step, manifest=False)
    assert rotate(tmp_path, 1) == []
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_newest_one_with_wrong_content_does_not_cost_the_good_one(tmp_path):
    good, damaged = _save(tmp_path, 1), _save(tmp_path, 2)
    (damaged / "trainer_state.json").write_text('{"global_step": "!"}')  # same size
    assert rotate(tmp_path, 1) == []
    assert last_whole_checkpoint(tmp_path) == good


def test_rotation_reads_the_content_of_the_newest_one_only(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    read = []
    checksum = checkpoints._checksum
    monkeypatch.setattr(checkpoints, "_checksum", lambda path: (read.append(path), checksum(path))[1])
    rotate(tmp_path, 2)
    assert {tmp_path / path.relative_to(tmp_path).parts[0] for path in read} == {tmp_path / "checkpoint-3"}


def test_other_folders_are_never_deleted(tmp_path):
    for step in (1, 2):
        _save(tmp_path, step)
    _save(tmp_path, "abc", manifest=False)
    (tmp_path / "runs").mkdir()
    rotate(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-abc", "runs"]


def test_a_linked_checkpoint_loses_the_link_only(tmp_path):
    elsewhere = _save(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(elsewhere)
    _save(tmp_path / "run", 2)
    assert _names(rotate(tmp_path / "run", 1)) == ["checkpoint-1"]
    assert not (tmp_path / "run" / "checkpoint-1").is_symlink()
    assert check(elsewhere) is None


@pytest.mark.parametrize("files_deleted_before", [0, 1, 2, 3])
def test_a_crash_within_a_deletion_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, files_deleted_before):
    for step in (1, 2, 3):
        _save(tmp_path, step)

    def dies(path, *args, **kwargs):
        files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
        for file in files[:files_deleted_before]:
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            rotate(tmp_path, 1)
    assert "no manifest.json" in check(tmp_path / "checkpoint-1")
    assert check(tmp_path / "checkpoint-2") is None
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert _names(rotate(tmp_path, 1)) == ["checkpoint-1", "checkpoint-2"]  # the next rotation clears up


def test_a_deletion_that_fails_is_logged_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    rmtree = shutil.rmtree

    def busy(path, *args, **kwargs):
        if path.name == "checkpoint-1":
            raise OSError("device or resource busy")
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", busy)
    with caplog.at_level(logging.WARNING):
        assert _names(rotate(tmp_path, 1)) == ["checkpoint-2"]
    assert "checkpoint-1: device or resource busy" in caplog.text
    assert check(tmp_path / "checkpoint-1") is not None
