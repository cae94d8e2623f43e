"""Pushes during and after training to the stand-in for the Hub, in other processes, with huggingface_hub unpatched."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, make_dataset, tiny_vit
from hub_standin import TOKEN, Commit, File, HubStandin, Repository
from huggingface_hub.errors import HfHubHTTPError

from hf_balancemix import MultiLabelTrainer
from hf_balancemix.trainer import checkpoints
from hf_balancemix.trainer.hub import describe, set_aside, stale_files

try:
    import httpx2 as httpx
except ImportError:  # huggingface_hub 1
    import httpx

WORKER = Path(__file__).parent / "push_worker.py"
WRONG = "hf_" + "w" * 34
BROKEN = "secret of mine\nand more"  # no header can hold it, and httpx quotes it
MODEL_FILES = {
    ".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    "training_args.json",
}  # fmt: skip
EPOCHS = ["Training in progress, epoch 2", "Training in progress, epoch 1"]
END = "End of training"

FAILING = {  # run: what its messages say
    "m401": "401 Unauthorized",
    "m403": "HfHubHTTPError: 403 Forbidden: a fault that the test asked for",
    "dropped": "RemoteProtocolError: Server disconnected",
    "broken": "ValueError: hub_token holds a blank or the like; it must not",
}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"push_to_hub": False},
    "every": {"hub_always_push": True, "report_to": "tensorboard", "_push": {}},
    "checkpoint": {
        "hub_strategy": "checkpoint", "hub_always_push": True, "hub_token": TOKEN, "save_total_limit": 1,
        "hub_private_repo": True,
    },
    "all": {"hub_strategy": "all_checkpoints", "hub_always_push": True},
    "resumed": {"push_to_hub": False, "_resume": "user/checkpoint"},
    "end": {"hub_strategy": "end", "_ours": True, "_push": {"commit_message": "Done", "include_code": True}},
    "mine": {"_card": "# My words\n", "hub_always_push": True},
    "edited": {"hub_always_push": True},  # its README.md on the Hub is somebody's own
    "breaks": {"hub_always_push": True, "_breaks": True},
    "start": {"hub_always_push": True},  # the repository cannot be created at the start
    "once": {"hub_always_push": True},  # the first save's push fails
    "late": {"hub_always_push": True},  # the last save's push fails
    **{name: {"_push": {}} for name in FAILING},
    "alive": {"push_to_hub": False, "learning_rate": 0.04},
    "killed": {"learning_rate": 0.04},  # at the end; weights that are not on the Hub yet
}  # fmt: skip
RUNS["m401"]["hub_token"], RUNS["broken"]["hub_token"] = WRONG, BROKEN


@dataclass
class World:
    """What a process that pushed has left behind."""

    hub: HubStandin
    folder: Path
    output: str = ""

    def repository(self, run: str) -> Repository:
        return self.hub.repositories["model", f"user/{run}"]

    def titles(self, run: str) -> list[str]:
        return [commit.title for commit in self.repository(run).log()[:-1]]  # but the initial one

    def result(self, run: str) -> dict[str, Any]:
        return torch.load(self.folder / f"{run}.pt", weights_only=True)

    def messages(self, run: str, level: str) -> list[str]:
        """What we logged."""
        start = f"{level} hf_balancemix.trainer.hub: "
        lines = (self.folder / f"{run}.log").read_text().splitlines()
        return [line.removeprefix(start) for line in lines if line.startswith(start)]


@contextmanager
def running(world: World, runs: dict[str, dict[str, Any]], ranks: int = 1, **changes: str) -> Iterator[Callable]:
    """The process that makes these runs, which the block may kill; gives a function that waits for a condition."""
    listed = json.dumps([{"name": f"user/{name}", **options} for name, options in runs.items()])
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(WORKER), str(world.folder), listed]
    environment = world.hub.environment(world.folder / "home") | {"OMP_NUM_THREADS": "1"} | changes
    with open(world.folder / "output", "w+") as output:
        worker = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

        def until(condition: Callable[[], bool]) -> None:
            end = time.monotonic() + 400
            while not condition():
                assert worker.poll() is None, (world.folder / "output").read_text()[-3000:]
                assert time.monotonic() < end, "it did not happen"
                time.sleep(0.05)

        until.kill = worker.kill
        try:
            yield until
            code = worker.wait(200)
        finally:
            worker.kill()
            worker.wait()
        world.output = (world.folder / "output").read_text()
        assert code in (0, -9), world.output[-3000:]


def push(hub: HubStandin, folder: Path, runs: dict[str, dict[str, Any]], ranks: int = 1, **changes: str) -> World:
    world = World(hub, folder)
    with running(world, runs, ranks, **changes):
        pass
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """All runs; the process dies in the middle of uploading the last run's second push."""
    with HubStandin() as hub:
        hub.fail(None, 403, "/user/m403/")
        hub.fail(None, 403, "/repos/create", body="m403")
        hub.fail(None, None, "/user/dropped/commit/")
        hub.fail(1, None, "/repos/create", body='"start"')
        hub.fail(1, 500, "/user/once/commit/")
        hub.fail(1, 500, "/user/late/commit/", skip=1)
        hub.repositories["model", "user/edited"] = there = Repository("model", "user/edited", private=False)
        there.add("main", "by hand", {"README.md": File(b"# Edited there\n", lfs=False)})
        first_commit = hub.hold("/user/killed/commit/")
        world = World(hub, tmp_path_factory.mktemp("push"))
        with running(world, RUNS) as until:
            until(first_commit.reached.is_set)
            # Training does not wait for the Hub: the next save comes, and its push waits for its turn.
            until(lambda: checkpoints.check(world.folder / "killed" / "checkpoint-4") is None)
            upload = hub.hold("PUT /lfs/")
            first_commit.go_on()
            until(upload.reached.is_set)
            until.kill()
        upload.drop()
        hub.mend()
        yield world
        assert hub.unknown == []


def names(commit: Commit) -> set[str]:
    """Files of a commit but the card's pictures."""
    return {path for path in commit.files if not path.endswith(".png")}


# ---- what is pushed ----


def test_every_save_pushes_a_whole_repository(world):
    assert world.titles("every") == [END, *EPOCHS]
    end, second, first, _ = world.repository("every").log()
    assert names(first) == names(second) == MODEL_FILES
    events = names(end) - MODEL_FILES  # they grow during training, so they come at the end
    assert len(events) == 2
    assert all(fnmatch.fnmatch(path, "runs/*/events.out.tfevents.*") for path in events)
    for commit, step in ((first, 2), (second, 4)):
        saved = world.folder / "every" / f"checkpoint-{step}" / "model.safetensors"
        assert commit.files["model.safetensors"].content == saved.read_bytes()
    assert first.files["model.safetensors"] != second.files["model.safetensors"]
    assert json.loads(first.files["training_args.json"].content)["learning_rate"] == 0.05
    assert first.files["README.md"].content.startswith(b"---\n")
    assert world.result("every")["commit"] == end.oid
    assert list((world.folder / "every" / "_push").iterdir()) == []


def test_strategy_end_pushes_once_and_code_is_pushed_beside_our_model(world):
    assert world.titles("end") == ["Done"]
    assert (world.folder / "end" / "label_audit.parquet").is_file()  # it names files, and is not among those pushed
    commit = world.repository("end").log()[0]
    assert names(commit) >= MODEL_FILES | {"modeling_balancemix.py", "configuration_balancemix.py"}
    assert {Path(path).suffix for path in names(commit) - MODEL_FILES} == {".py"}
    assert world.result("end")["commit"] == commit.oid


@pytest.mark.parametrize("run", ["checkpoint", "all"])
def test_checkpoint_strategies_push_whole_checkpoints_in_the_same_commit(world, run, tmp_path):
    assert world.titles(run) == EPOCHS
    assert world.repository(run).private == (run == "checkpoint")
    second, first, _ = world.repository(run).log()
    expected = {
        "checkpoint": [(first, "last-checkpoint", 2), (second, "last-checkpoint", 4)],
        "all": [(first, "checkpoint-2", 2), (second, "checkpoint-2", 2), (second, "checkpoint-4", 4)],
    }[run]
    for i, (commit, name, step) in enumerate(expected):
        for path, file in commit.files.items():
            (tmp_path / str(i) / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(i) / path).write_bytes(file.content)
        checkpoint = tmp_path / str(i) / name
        assert checkpoints.check(checkpoint) is None
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
        assert (checkpoint / "balancemix_state.safetensors").is_file()
        assert {path for path in names(commit) if "/" not in path} == MODEL_FILES
    for commit in (first, second):
        folders = {path.split("/")[0] for path in names(commit) if "/" in path}
        assert folders == {name for other, name, _ in expected if other is commit}


def test_a_run_resumed_from_a_downloaded_checkpoint_is_bit_equal(world):
    assert torch.equal(world.result("resumed")["parameters"], world.result("plain")["parameters"])
    assert re.search(r"Resuming from .*resumed-download.last-checkpoint\.", (world.folder / "resumed.log").read_text())
    assert not (world.folder / "resumed" / "checkpoint-2").exists()  # done before the download


LOAD = """
import hashlib, json, sys
sys.modules["hf_balancemix"] = None  # not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

found = []
for name, revision in json.loads(sys.argv[1]):
    kwargs = {"revision": revision, "trust_remote_code": True} if name == "user/end" else {"revision": revision}
    model, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True, **kwargs)
    processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    logits = model(**processor(Image.new("RGB", (30, 20)), return_tensors="pt")).logits
    flat = torch.cat([t.detach().float().flatten() for t in (*model.parameters(), *model.buffers())])
    found.append([
        hashlib.sha256(flat.numpy().tobytes()).hexdigest(), [*info["missing_keys"], *info["unexpected_keys"]],
        list(model.config.id2label.values()), model.config.problem_type, list(logits.shape), processor.size["height"],
    ])
print(json.dumps(found))
"""


def test_every_commit_loads_in_a_fresh_process_without_the_package(world):
    runs = ["every", "end", "checkpoint", "all", "start", "once", "late", "killed"]
    asked = [[f"user/{run}", commit.oid] for run in runs for commit in world.repository(run).log()[:-1]]
    assert len(asked) >= 3 + 1 + 2 + 2 + 2 + 1 + 2 + 1
    found = json.loads(world.hub.run(LOAD, json.dumps(asked), home=world.folder / "another-home"))
    last = {name: row for (name, _), row in reversed(list(zip(asked, found, strict=True)))}
    for row in found:
        assert row[1:] == [[], ["ant", "bee", "cat", "dog", "elk"], "multi_label_classification", [1, 5], 16]
    del last["user/killed"]
    for name, row in last.items():
        parameters = world.result(name.split("/")[1])["parameters"]
        assert row[0] == hashlib.sha256(parameters.numpy().tobytes()).hexdigest(), name


def test_a_readme_of_somebodys_own_is_pushed_and_never_replaced(world):
    for run, own in (("mine", b"# My words\n"), ("edited", b"# Edited there\n")):
        assert world.titles(run) == EPOCHS
        assert {commit.files["README.md"].content for commit in world.repository(run).log()[:2]} == {own}
    assert names(world.repository("edited").log()[0]) == MODEL_FILES - {".gitattributes"}
    said = "README.md of user/edited is somebody's own and stays"
    assert sum(said in warning for warning in world.messages("edited", "WARNING")) == 1
    assert world.messages("mine", "WARNING") == []


def test_a_card_and_a_tracker_that_fail_do_not_stop_a_push(world):
    assert world.titles("breaks") == EPOCHS
    assert names(world.repository("breaks").log()[0]) == MODEL_FILES - {"README.md"}
    warnings = world.messages("breaks", "WARNING")
    assert len(warnings) == 4
    assert all("RuntimeError: it is broken" in warning for warning in warnings)


# ---- failures ----


@pytest.mark.parametrize("run", FAILING)
def test_a_failing_hub_harms_nothing_and_is_reported(world, run):
    assert torch.equal(world.result(run)["parameters"], world.result("plain")["parameters"])
    kept = {name: value for name, value in world.result("plain")["metrics"].items() if "_per_" not in name}
    same = {name: world.result(run)["metrics"][name] for name in kept}
    assert {n: v for n, v in same.items() if "time" not in n} == {n: v for n, v in kept.items() if "time" not in n}
    assert world.result(run)["commit"] is None
    assert checkpoints.check(world.folder / run / "checkpoint-4") is None

    warnings = world.messages(run, "WARNING")  # the repository, two saves, the end of training, push_to_hub twice
    assert len(warnings) == (6 if "Creating" in warnings[0] else 5)
    assert [title for warning in warnings for title in (*EPOCHS, END) if title in warning] == [
        EPOCHS[1], EPOCHS[0], EPOCHS[0], END, END,
    ]  # fmt: skip
    assert all(FAILING[run] in warning and f"user/{run}" in warning for warning in warnings)
    errors = world.messages(run, "ERROR")  # at the end of training, and of push_to_hub
    assert [("epoch 2" in error, END in error) for error in errors] == [(True, False), (False, True)]
    assert all(f"hf upload user/{run} " in error for error in errors)
    if ("model", f"user/{run}") in world.hub.repositories:
        assert world.titles(run) == []


def test_failed_pushes_are_made_up_for_by_the_next_save_and_at_the_end(world):
    for run, titles, failed in (
        ("start", EPOCHS, "Creating the repository"),
        ("once", EPOCHS[:1], "epoch 1"),
        ("late", EPOCHS, "epoch 2"),
    ):
        assert world.titles(run) == titles
        assert world.messages(run, "ERROR") == []
        (warning,) = world.messages(run, "WARNING")
        assert failed in warning


def test_the_command_of_the_last_message_pushes_the_last_state(world):
    words = shlex.split(world.messages("m403", "ERROR")[-1].partition("later: ")[2])
    assert words[0] == "hf"
    environment = world.hub.environment(world.folder / "home")
    command = [str(Path(sys.executable).parent / "hf"), *words[1:]]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    newest = world.repository("m403").log()[0]
    assert names(newest) == MODEL_FILES
    saved = world.folder / "m403" / "model.safetensors"
    assert newest.files["model.safetensors"].content == saved.read_bytes()


def test_no_token_is_written_anywhere(world):
    secrets = [TOKEN.encode(), WRONG.encode(), b"secret of mine", b"and more"]
    contents = {"output": world.output.encode()}
    contents |= {str(path): path.read_bytes() for path in world.folder.rglob("*") if path.is_file()}
    for repository in world.hub.repositories.values():
        for commit in repository.log():
            contents |= {f"{repository.id} {path}": file.content for path, file in commit.files.items()}
    contents |= dict(world.hub.uploads)
    assert len(contents) > 200
    leaks = [(name, secret) for name, content in contents.items() for secret in secrets if secret in content]
    assert leaks == []
    saved = json.loads((world.folder / "checkpoint" / "checkpoint-4" / "training_args.json").read_text())
    assert saved["hub_token"] == "<HUB_TOKEN>"


def test_a_push_killed_half_way_leaves_the_last_whole_commit_and_the_next_succeeds(world):
    def newest_weights() -> bytes:
        return world.repository("killed").log()[0].files["model.safetensors"].content

    output_dir = world.folder / "killed"
    assert world.titles("killed") == EPOCHS[1:]
    assert newest_weights() == (output_dir / "checkpoint-2" / "model.safetensors").read_bytes()
    assert len(list((output_dir / "_push").iterdir())) == 1
    (output_dir / "_push" / ".DS_Store").touch()  # what others put there disturbs nothing

    push(world.hub, world.folder, {"killed": RUNS["killed"] | {"_resume": True, "_push": {}}})
    assert world.titles("killed") == [END, *EPOCHS[1:]]
    assert newest_weights() == (output_dir / "model.safetensors").read_bytes()
    assert torch.equal(world.result("killed")["parameters"], world.result("alive")["parameters"])
    assert [path.name for path in (output_dir / "_push").iterdir()] == [".DS_Store"]


@pytest.mark.dist
def test_of_two_ranks_one_pushes_and_none_hangs_when_it_fails(tmp_path):
    runs = {name: {"hub_always_push": True, "per_device_train_batch_size": 2, "_push": {}} for name in ("two", "bad")}
    with HubStandin() as hub:
        hub.fail(None, 403, "/user/bad/")
        hub.fail(None, 403, "/repos/create", body='"bad"')
        pushed = push(hub, tmp_path, runs, ranks=2)
        assert pushed.titles("two")[-2:] == EPOCHS  # the last push may have nothing new to bring
        assert pushed.result("two")["commit"] == pushed.repository("two").log()[0].oid
        assert sum("/user/two/preupload/" in path for _, path, _ in hub.requests) == 3
        assert ("model", "user/bad") not in hub.repositories
        assert torch.equal(pushed.result("two")["parameters"], pushed.result("bad")["parameters"])
        assert len(pushed.messages("bad", "ERROR")) == 2
        for run in runs:
            assert "hf_balancemix.trainer.hub" not in (tmp_path / f"{run}.log-1").read_text()


# ---- a Hub that is slow, or does not answer ----


def test_a_slow_hub_gets_the_newest_save_and_the_process_waits_for_the_last_push(tmp_path):
    with HubStandin() as hub:
        world = World(hub, tmp_path)
        first = hub.hold("/commit/")
        runs = {"slow": {"num_train_epochs": 3}, "late": {"hub_always_push": True, "_push": {"blocking": False}}}
        with running(world, runs) as until:
            until(first.reached.is_set)
            until(lambda: "Waiting for the push to user/slow" in (tmp_path / "slow.log").read_text())
            last = hub.hold("/user/late/commit/", skip=2)
            first.go_on()
            until((tmp_path / "late.pt").exists)
            time.sleep(1)  # the process has nothing more to do
            last.go_on()
        assert world.titles("slow") == ["Training in progress, epoch 3", "Training in progress, epoch 1"]
        assert world.titles("late")[0] == END
        assert (tmp_path / "late.oid").read_text() == world.repository("late").log()[0].oid
        for run in ("slow", "late"):
            assert list((tmp_path / run / "_push").iterdir()) == []


@pytest.mark.parametrize("silent", ["/repos/create", "/commit/"])
def test_a_hub_that_never_answers_holds_neither_the_run_nor_the_process_for_ever(tmp_path, silent):
    with HubStandin() as hub:
        held = [hub.hold(silent) for _ in range(9)]
        pushed = push(hub, tmp_path, {"silent": {"_push": {}, "num_train_epochs": 2, "ddp_timeout": 2}})
        assert held[0].reached.is_set()
        assert all(len(found.log()) == 1 for found in hub.repositories.values())
    assert pushed.result("silent")["commit"] is None
    errors = pushed.messages("silent", "ERROR")
    assert len(errors) == 2
    assert all("hf upload user/silent " in error and "given up when this process ends" in error for error in errors)


def test_no_hub_at_all_is_a_warning(tmp_path):
    with HubStandin() as hub:
        pushed = push(hub, tmp_path, {"nowhere": {"_push": {}, "num_train_epochs": 2}}, HF_HUB_OFFLINE="1")
        assert hub.requests == []
    assert all("OfflineModeIsEnabled" in warning for warning in pushed.messages("nowhere", "WARNING"))
    assert pushed.result("nowhere")["commit"] is None
    assert len(pushed.messages("nowhere", "ERROR")) == 2


# ---- parts ----


@pytest.mark.parametrize("name", ["a/b/c", "user/with space", "user/.git", "x" * 200])
def test_a_name_that_the_hub_cannot_take_is_said_before_training(tmp_path, name):
    args = arguments(tmp_path / "out", push_to_hub=True, hub_model_id=name)
    with pytest.raises(ValueError, match=re.escape(f"hub_model_id is {name!r}")):
        MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=make_dataset(tmp_path / "images", 8))


def test_errors_are_one_line_without_tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "found-by-itself")
    response = httpx.Response(403, request=httpx.Request("POST", "https://hub.example/api"))
    assert describe(HfHubHTTPError("a\nb", response=response), None) == "HfHubHTTPError: a b."
    error = OSError(f"given1 found-by-itself {TOKEN}\n  {b'two%clines' % 10} end.")
    assert describe(error, "given1") == r"OSError: <token> <token> <token> b'two\nlines' end."
    assert describe(error, "two\nlines") == "OSError: given1 <token> <token> b'<token>' end."


def test_stale_files():
    theirs = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md",
              "other.safetensors", "last-checkpoint/scaler.pt", "last-checkpoint/run.json"]  # fmt: skip
    assert stale_files(theirs, ["model.safetensors"]) == theirs[:3]
    ours = ["model.safetensors", "last-checkpoint/run.json"]
    assert stale_files(theirs, ours) == [*theirs[:3], "last-checkpoint/scaler.pt"]
    assert stale_files(theirs, theirs) == []
    adapters = ["adapter_config.json", "adapter_model.safetensors"]
    assert stale_files(adapters, ["model.safetensors"]) == adapters


@pytest.mark.parametrize("link", [True, False])
def test_set_aside_keeps_what_is_changed_and_removed_afterwards(tmp_path, link):
    source, target = tmp_path / "source", tmp_path / "target"
    files = {"small": b"a", "large": b"b" * 2**20, "runs/x/events": b"c"}
    left_out = {"optimizer.pt": b"d", "runs/y.pt": b"e", ".config.1.tmp.json": b"{"}
    for name, content in (files | left_out).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (source / "dangling").symlink_to(tmp_path / "nowhere")
    (source / "around").symlink_to(source)
    set_aside(source, target, skip=("*.pt",), link=link)
    assert (target / "large").samefile(source / "large") == link
    with open(source / "runs/x/events", "ab") as file:
        file.write(b"more")
    (source / "small").write_bytes(b"other")
    (source / "large").unlink()
    paths = [path for path in target.rglob("*") if path.is_file()]
    assert {path.relative_to(target).as_posix(): path.read_bytes() for path in paths} == files
