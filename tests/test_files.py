"""Files that are whole or not there, locks, the cache folder, and values in messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from hf_balancemix.files import (
    cache_folder,
    check_inside,
    check_links,
    is_temporary,
    process_lock,
    quote,
    whole_file,
)


def test_a_file_appears_whole_and_replaces_the_one_before(tmp_path):
    file = tmp_path / "new" / "table.csv"
    for text in ("first", "second"):
        with whole_file(file) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".csv"  # as writers that look at it need
            assert is_temporary(temporary.name)
            assert (file.read_text() if file.exists() else "first") == "first"
        assert file.read_text() == text
        assert [path.name for path in file.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("written", ["half", None])
def test_after_an_error_the_file_is_as_it_was(tmp_path, written):
    file = tmp_path / "table.csv"
    file.write_text("before")
    with pytest.raises(KeyboardInterrupt), whole_file(file) as temporary:  # noqa: PT012
        if written is not None:
            temporary.write_text(written)
        raise KeyboardInterrupt
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_file(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("before")
    with pytest.raises(FileNotFoundError), whole_file(file):
        pass
    assert file.read_text() == "before"


def test_only_unfinished_files_are_temporary():
    assert is_temporary(".manifest.123.tmp.json")
    assert not any(is_temporary(name) for name in ("manifest.json", "a.tmp.json", ".hidden.json", "README.md"))


def test_one_process_at_a_time_and_a_dead_one_lets_go(tmp_path):
    file = tmp_path / "cell" / "cell.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from hf_balancemix.files import process_lock\n"
         "with process_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)", str(file)],
        stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(filelock.Timeout), process_lock(file, wait=False):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with process_lock(file, wait=False):
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_BALANCEMIX_CACHE": "~/own", "XDG_CACHE_HOME": "/xdg"}, "/home/me/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/hf_balancemix"),
        ({}, "/home/me/.cache/hf_balancemix"),
    ],
)
def test_one_rule_says_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("HF_BALANCEMIX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


class _Broken:
    def __repr__(self) -> str:
        raise RuntimeError


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**6,
        b"x" * 10**6,
        10**6000,
        _nested(10**5),
        {i: [i] * 99 for i in range(99)},
        "two\nlines\x1b[31m",
        _Broken(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_quoted_value_is_short_and_on_one_line(value):
    quoted = quote(value)
    assert 0 < len(quoted) <= 80
    assert quoted.isprintable()


def test_a_short_value_is_quoted_as_it_is():
    for value in ("person", 7, -1.5, None, ["a", "b"], {"a": 1}):
        assert quote(value) == repr(value)


@pytest.fixture
def linked(tmp_path):
    """A folder with a file, links that stay inside and links that do not; and the file outside."""
    root, outside = tmp_path / "root", tmp_path / "root2"  # the name of one begins with that of the other
    for folder in (root / "inner", outside):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("a")
    (root / "within.txt").symlink_to("inner/a.txt")
    (root / "relative.txt").symlink_to("../root2/a.txt")
    (root / "absolute.txt").symlink_to(outside / "a.txt")
    (root / "by_two.txt").symlink_to("relative.txt")
    (root / "folder").symlink_to(outside)
    (root / "nowhere.txt").symlink_to(outside / "absent.txt")
    return root


@pytest.mark.parametrize("name", ["inner/a.txt", "within.txt", "inner/../inner/a.txt", "absent.txt", ""])
def test_what_stays_inside_is_allowed(linked, name):
    check_inside(linked / name, linked)


@pytest.mark.parametrize(
    "name",
    ["relative.txt", "absolute.txt", "by_two.txt", "folder/a.txt", "nowhere.txt", "../root2/a.txt", "folder/../a.txt"],
)
def test_what_leads_out_of_a_folder_is_refused_unless_links_are_followed(linked, name):
    with pytest.raises(ValueError, match=r"leads out .*follow_links=True") as error:
        check_inside(linked / name, linked)
    assert len(str(error.value)) < 400
    check_inside(linked / name, linked, follow_links=True)


def test_every_link_in_a_folder_is_checked(linked, tmp_path):
    with pytest.raises(ValueError, match="leads out"):
        check_links(linked)
    check_links(linked, follow_links=True)
    (tmp_path / "door").symlink_to(linked)
    check_inside(tmp_path / "door" / "within.txt", tmp_path / "door")  # the root itself may be a link
    for link in linked.iterdir():
        if link.is_symlink() and link.name != "within.txt":
            link.unlink()
    check_links(linked)
    (linked / "inner" / "deep.txt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"inner/deep\.txt"):
        check_links(linked)


def test_a_snapshot_in_the_cache_of_the_hub_may_link_to_its_blobs_only(tmp_path):
    snapshot = tmp_path / "datasets--user--name" / "snapshots" / "0123abc"
    (snapshot / "inner").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    blobs = tmp_path / "datasets--user--name" / "blobs"
    (snapshot / "inner" / "a.txt").symlink_to("../../../blobs/d1e2")
    (snapshot / "b.txt").symlink_to("../../../blobs/d1e2")
    check_links(snapshot / "inner")
    with pytest.raises(ValueError, match="leads out"):
        check_links(snapshot)
    (snapshot / "b.txt").unlink()
    check_links(snapshot)
    blobs.symlink_to("/etc")  # not a folder that huggingface_hub has made
    with pytest.raises(ValueError, match="leads out"):
        check_links(snapshot)
