"""Pushes during and after training to the stand-in for the Hub, in other processes, with huggingface_hub unpatched."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from conftest import arguments, make_dataset, tiny_vit
from hub_standin import TOKEN, Commit, File, HubStandin, Repository
from huggingface_hub.errors import HfHubHTTPError

from hf_balancemix import MultiLabelTrainer
from hf_balancemix.trainer import checkpoints
from hf_balancemix.trainer import hub as hub_module
from hf_balancemix.trainer.hub import HubRepository, explain, set_aside, stale_files

WORKER = Path(__file__).parent / "push_worker.py"
WRONG = "hf_" + "w" * 34
BROKEN = "secret of mine\nand more"  # no header can hold it, and httpx2 would quote it
MODEL_FILES = {
    ".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    "training_args.json",
}  # fmt: skip
EPOCHS = ["Training in progress, epoch 2", "Training in progress, epoch 1"]

FAILING = {  # run: what its messages say
    "m401": "HTTP 401 (Invalid credentials in Authorization header). The token is missing or not valid",
    "m403": "HTTP 403 (a fault that the test asked for). The token may not write there",
    "m429": "HTTP 429 (a fault that the test asked for). The Hub's rate limit is reached",
    "m500": "HTTP 500 (a fault that the test asked for)",
    "dropped": "RemoteProtocolError: Server disconnected",
    "broken": "ValueError: the token holds a blank, a line break or another character",
}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"push_to_hub": False},
    "every": {"hub_always_push": True, "report_to": "tensorboard", "_push": {}},
    "end": {"hub_strategy": "end", "_push": {"commit_message": "Done", "blocking": False}},
    "checkpoint": {
        "hub_strategy": "checkpoint", "hub_always_push": True, "hub_token": TOKEN, "save_total_limit": 1,
        "hub_private_repo": True,
    },
    "all": {"hub_strategy": "all_checkpoints", "hub_always_push": True},
    "resumed": {"push_to_hub": False, "_resume": "user/checkpoint"},
    "code": {"hub_strategy": "end", "_ours": True, "_push": {"include_code": True}},
    "start": {"hub_always_push": True},  # the repository cannot be created at the start
    "start_end": {"hub_strategy": "end", "_push": {}},  # nor here
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
    output: str

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


def command(folder: Path, runs: dict[str, dict[str, Any]], ranks: int = 1) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
        start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max_restarts", "0"]
    listed = [{"name": f"user/{name}", **options} for name, options in runs.items()]
    return [*start, str(WORKER), str(folder), json.dumps(listed)]


def push(hub: HubStandin, folder: Path, runs: dict[str, dict[str, Any]], ranks: int = 1, **changes: str) -> World:
    environment = hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"} | changes
    done = subprocess.run(
        command(folder, runs, ranks), env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return World(hub, folder, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with HubStandin() as hub:
        hub.fail(None, 403, "/user/m403/")
        hub.fail(None, 403, "/repos/create", body="m403")
        hub.fail(None, 429, "/user/m429/commit/", headers={"Retry-After": "300"})
        hub.fail(None, 500, "/user/m500/commit/")
        hub.fail(None, None, "/user/dropped/commit/")
        hub.fail(1, None, "/repos/create", body='"start"')
        hub.fail(1, None, "/repos/create", body='"start_end"')
        hub.fail(1, 500, "/user/once/commit/")
        hub.fail(1, 500, "/user/late/commit/", skip=1)
        pushed = push_and_kill(hub, tmp_path_factory.mktemp("push"))
        hub.mend()
        yield pushed
        assert hub.unknown == []


def push_and_kill(hub: HubStandin, folder: Path) -> World:
    """All runs; the process dies in the middle of uploading the last run's second push."""
    first_commit = hub.hold("/user/killed/commit/")
    environment = hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
    with open(folder / "output", "w+") as output:
        worker = subprocess.Popen(command(folder, RUNS), env=environment, stdout=output, stderr=output)
        try:
            wait_for(lambda: first_commit.reached.is_set() or worker.poll() is not None)
            output.seek(0)
            assert worker.poll() is None, output.read()[-3000:]
            # Training does not wait for the Hub: the next save comes, and its push is left for the end.
            wait_for(lambda: checkpoints.check(folder / "killed" / "checkpoint-4") is None)
            upload = hub.hold("PUT /lfs/")
            first_commit.go_on()
            assert upload.reached.wait(60)
        finally:
            worker.kill()
            worker.wait()
        upload.drop()
        output.seek(0)
        return World(hub, folder, output.read())


def wait_for(condition: Callable[[], bool], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def names(commit: Commit) -> set[str]:
    """Files of a commit but the card's pictures."""
    return {path for path in commit.files if not path.endswith(".png")}


def materialise(commit: Commit, folder: Path, below: str = "") -> Path:
    for path, file in commit.files.items():
        if path.startswith(below):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(file.content)
    return folder / below


# ---- what is pushed ----


def test_every_save_pushes_a_whole_repository(world):
    assert world.titles("every") == ["End of training", *EPOCHS]
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


def test_strategy_end_pushes_once(world):
    assert world.titles("end") == ["Done"]
    commit = world.repository("end").log()[0]
    assert names(commit) == MODEL_FILES
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
        checkpoint = materialise(commit, tmp_path / str(i), f"{name}/")
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
    kwargs = {"revision": revision, "trust_remote_code": True} if name == "user/code" else {"revision": revision}
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
    runs = ["every", "end", "checkpoint", "all", "start", "once", "late", "code", "killed"]
    asked = [[f"user/{run}", commit.oid] for run in runs for commit in world.repository(run).log()[:-1]]
    assert len(asked) >= 3 + 1 + 2 + 2 + 2 + 1 + 2 + 1 + 1
    found = json.loads(world.hub.run(LOAD, json.dumps(asked), home=world.folder / "another-home"))
    last = {name: row for (name, _), row in reversed(list(zip(asked, found, strict=True)))}
    for row in found:
        assert row[1:] == [[], ["ant", "bee", "cat", "dog", "elk"], "multi_label_classification", [1, 5], 16]
    del last["user/killed"]
    for name, row in last.items():
        parameters = world.result(name.split("/")[1])["parameters"]
        assert row[0] == hashlib.sha256(parameters.numpy().tobytes()).hexdigest(), name


def test_code_is_pushed_beside_our_model(world):
    assert {path for path in world.repository("code").log()[0].files if path.endswith(".py")} >= {
        "modeling_balancemix.py", "configuration_balancemix.py",
    }  # fmt: skip


# ---- failures ----


@pytest.mark.parametrize("run", FAILING)
def test_a_failing_hub_harms_nothing_and_is_reported_once(world, run):
    assert torch.equal(world.result(run)["parameters"], world.result("plain")["parameters"])
    kept = {name: value for name, value in world.result("plain")["metrics"].items() if "_per_" not in name}
    same = {name: world.result(run)["metrics"][name] for name in kept}
    assert {n: v for n, v in same.items() if "time" not in n} == {n: v for n, v in kept.items() if "time" not in n}
    assert world.result(run)["commit"] is None
    assert checkpoints.check(world.folder / run / "checkpoint-4") is None

    (warning,) = world.messages(run, "WARNING")
    assert FAILING[run] in warning
    assert "tried again at the next save and at the end" in warning
    errors = world.messages(run, "ERROR")  # at the end of training, and of push_to_hub
    assert [("epoch 2" in error, "End of training" in error) for error in errors] == [(True, False), (False, True)]
    for error in errors:
        assert FAILING[run] in error
        assert f"hf upload user/{run} " in error
    if ("model", f"user/{run}") in world.hub.repositories:
        assert world.titles(run) == []


def test_failed_pushes_are_tried_again_at_the_next_save_and_at_the_end(world):
    tried = [status for _, path, status in world.hub.requests if path.startswith("/api/models/user/m429/commit/")]
    assert tried == [429] * 4  # two saves, the end of training, push_to_hub
    for run, titles, failed in (
        ("start", EPOCHS, "creating the repository"),
        ("start_end", ["End of training"], "creating the repository"),
        ("once", EPOCHS[:1], "epoch 1"),
        ("late", EPOCHS, "epoch 2"),
    ):
        assert world.titles(run) == titles
        assert world.messages(run, "ERROR") == []
        (warning,) = world.messages(run, "WARNING")
        assert failed in warning
        assert ("when push_to_hub or save_model is called" in warning) == (run == "start_end")
        assert list((world.folder / run / "_push").iterdir()) == []


def test_the_command_of_the_last_message_pushes_the_last_state(world):
    line = world.messages("m403", "ERROR")[-1].partition("later: ")[2]
    words = shlex.split(line)
    assert words[0] == "hf"
    environment = world.hub.environment(world.folder / "home")
    subprocess.run(
        [str(Path(sys.executable).parent / "hf"), *words[1:]],
        env=environment, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
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


# ---- killed, and several ranks ----


def test_a_push_killed_half_way_leaves_the_last_whole_commit_and_the_next_succeeds(world):
    def newest_weights() -> bytes:
        return world.repository("killed").log()[0].files["model.safetensors"].content

    output_dir = world.folder / "killed"
    assert world.titles("killed") == EPOCHS[1:]
    assert newest_weights() == (output_dir / "checkpoint-2" / "model.safetensors").read_bytes()
    assert len(list((output_dir / "_push").iterdir())) == 1

    push(world.hub, world.folder, {"killed": RUNS["killed"] | {"_resume": True, "_push": {}}})
    assert world.titles("killed") == ["End of training", *EPOCHS[1:]]
    assert newest_weights() == (output_dir / "model.safetensors").read_bytes()
    assert torch.equal(world.result("killed")["parameters"], world.result("alive")["parameters"])
    assert list((output_dir / "_push").iterdir()) == []


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
        assert sum(path == "/api/repos/create" for _, path, _ in hub.requests) == 1 + 5
        assert ("model", "user/bad") not in hub.repositories
        assert torch.equal(pushed.result("two")["parameters"], pushed.result("bad")["parameters"])
        assert len(pushed.messages("bad", "WARNING")) == 1
        for run in runs:
            assert "hf_balancemix.trainer.hub" not in (tmp_path / f"{run}.log-1").read_text()


# ---- a Hub that does not answer ----


@pytest.mark.parametrize("silent", ["/repos/create", "/commit/"])
def test_a_hub_that_takes_a_request_and_never_answers_holds_nothing_up(tmp_path, silent):
    quick = {"_hub": {"SILENCE": 0.5, "CREATION": 0.2}, "_push": {}, "num_train_epochs": 1}
    with HubStandin() as hub:
        held = [hub.hold(silent) for _ in range(9)]
        pushed = push(hub, tmp_path, {"silent": quick})
        assert held[0].reached.is_set()
        assert all("silent" not in id or len(found.log()) == 1 for (_, id), found in hub.repositories.items())
    (warning,) = pushed.messages("silent", "WARNING")
    assert "Timeout: timed out" in warning
    errors = pushed.messages("silent", "ERROR")
    assert len(errors) == 2
    assert all("hf upload user/silent " in error for error in errors)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "OfflineModeIsEnabled: Cannot reach"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "ConnectError: [Errno 111] Connection refused"),
    ],
)
def test_no_hub_at_all_is_a_warning(tmp_path, changes, said):
    with HubStandin() as hub:
        pushed = push(hub, tmp_path, {"nowhere": {"_push": {}, "num_train_epochs": 1}}, **changes)
        assert hub.requests == []
    (warning,) = pushed.messages("nowhere", "WARNING")
    assert said in warning
    assert pushed.result("nowhere")["commit"] is None
    assert len(pushed.messages("nowhere", "ERROR")) == 2


def test_requests_without_a_limit_end_and_others_keep_theirs(monkeypatch):
    monkeypatch.setattr(hub_module, "SILENCE", 7.0)
    seen = []

    def answer(request):
        seen.append(request.extensions["timeout"])
        return httpx2.Response(200)

    def users_own():
        hooks = {"request": [lambda request: seen.append("user's hook")]}
        return httpx2.Client(transport=httpx2.MockTransport(answer), event_hooks=hooks, timeout=None)

    with hub_module._EndingClients(users_own)() as client:
        client.get("http://hub.example")
        client.get("http://hub.example", timeout=None)  # as huggingface_hub says it in places
        client.get("http://hub.example", timeout=httpx2.Timeout(None, read=3.0))
    none = dict.fromkeys(("connect", "read", "write", "pool"), 7.0)
    assert seen == ["user's hook", none, "user's hook", none, "user's hook", none | {"read": 3.0}]


class Stuck(HubRepository):
    """Whose commits wait for `free`, and then fail."""

    free: threading.Event

    def create(self):
        pass

    def _commit(self, folder, message):
        assert self.free.wait(30)
        raise OSError("the line is dead")


def messages(caplog) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "hf_balancemix.trainer.hub"]


def test_settle_leaves_what_takes_too_long_and_says_what_is_missing(tmp_path, caplog):
    repository = Stuck("user/name", tmp_path / "_push")
    repository.free = threading.Event()
    first = repository.new_folder("First")
    job = repository.push(first, "First")
    second = repository.unpushed = repository.new_folder("Second")  # set aside while the first is under way
    start = time.monotonic()
    repository.settle(0.2)
    assert 0.2 <= time.monotonic() - start < 5
    ((level, text),) = messages(caplog)
    assert (level, "Second" in text) == ("WARNING", True)
    assert text.endswith(repository.command(second))
    repository.free.set()
    job.result(5)
    wait_for(lambda: not repository.busy, 10)  # the second is tried without a further call
    ((level, text),) = messages(caplog)[1:]  # and nobody is promised another try
    assert level == "ERROR"
    assert text.endswith(repository.command(second))


def test_push_to_hub_does_not_wait_longer_than_the_other_ranks(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(hub_module, "HubRepository", Stuck)
    monkeypatch.setattr(Stuck, "free", threading.Event(), raising=False)
    args = arguments(tmp_path / "out", hub_model_id="user/name", ddp_timeout=1)
    trainer = MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=make_dataset(tmp_path / "images", 8))
    start = time.monotonic()
    assert trainer.push_to_hub() is None
    assert 0.5 <= time.monotonic() - start < 10
    ((level, text),) = messages(caplog)
    assert level == "WARNING"
    assert "still under way" in text
    assert "hf upload user/name " in text
    Stuck.free.set()
    wait_for(lambda: not trainer._repository.busy, 10)


# ---- somebody's own README.md ----


def test_a_readme_of_somebodys_own_is_pushed_and_never_replaced(tmp_path):
    own = "# My words\n"
    runs = {"mine": {"_card": own, "hub_always_push": True, "_push": {}}, "edited": {"hub_always_push": True}}
    with HubStandin() as hub:
        there = Repository("model", "user/edited", private=False)
        there.add("main", "by hand", {"README.md": File(b"# Edited there\n", lfs=False)})
        hub.repositories["model", "user/edited"] = there
        pushed = push(hub, tmp_path, runs)
        assert hub.unknown == []
    assert pushed.titles("mine")[-2:] == EPOCHS
    assert {commit.files["README.md"].content for commit in pushed.repository("mine").log()[:-1]} == {own.encode()}
    assert pushed.titles("edited") == EPOCHS
    newest = pushed.repository("edited").log()[0]
    assert newest.files["README.md"].content == b"# Edited there\n"
    assert names(newest) == MODEL_FILES - {".gitattributes"}
    (warning,) = pushed.messages("edited", "WARNING")
    assert "README.md of user/edited was not written by this package" in warning
    assert pushed.messages("mine", "WARNING") == []


# ---- parts ----


def test_what_others_put_where_pushes_are_made_disturbs_nothing(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    for name in (".DS_Store", "1"):
        (tmp_path / name).touch()
    repository = HubRepository("user/name", tmp_path)
    assert repository.new_folder("Title") == tmp_path / "2"
    assert {path.name for path in tmp_path.iterdir()} == {".DS_Store", "1", "2"}


@pytest.mark.parametrize("name", ["a/b/c", "user/with space", "user/.git", "x" * 200])
def test_a_name_that_the_hub_cannot_take_is_said_before_training(tmp_path, name):
    args = arguments(tmp_path / "out", push_to_hub=True, hub_model_id=name)
    with pytest.raises(ValueError, match=re.escape(f"hub_model_id is {name!r}")):
        MultiLabelTrainer(model=tiny_vit(), args=args, train_dataset=make_dataset(tmp_path / "images", 8))


def test_explain_is_one_line_without_tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "found-by-itself")
    request = httpx2.Request("POST", "https://hub.example/api")
    response = httpx2.Response(403, request=request)
    text = explain(HfHubHTTPError("a\nb", response=response, server_message="no\nway"))
    assert text == (
        "HTTP 403 (no way). The token may not write there: use one with write access, or another --hub_model_id."
    )
    assert explain(HfHubHTTPError("", response=httpx2.Response(418, request=request))) == "HTTP 418 (I'm a teapot)."
    error = OSError(f"given1 found-by-itself {TOKEN}\n  b'Bearer x.y-z' end.")
    assert explain(error, "given1\n") == "OSError: <token> <token> <token> b'Bearer <token>' end."


def test_a_card_that_fails_does_not_stop_the_push(tmp_path, caplog):
    class Trainer(MultiLabelTrainer):
        def _write_card(self, folder):
            raise RuntimeError("no card")

    args = arguments(tmp_path / "out")
    trainer = Trainer(model=tiny_vit(), args=args, train_dataset=make_dataset(tmp_path / "images", 8))
    with caplog.at_level(logging.WARNING):
        trainer._try_card(tmp_path)
    assert "could not be written" in caplog.text


def test_a_folder_that_was_removed_meanwhile_is_not_taken_for_pushed(tmp_path, caplog):
    repository = HubRepository("user/name", tmp_path / "_push")
    assert repository.push(tmp_path / "gone", "Title", final=True).result() is None
    (record,) = [record for record in caplog.records if record.name == "hf_balancemix.trainer.hub"]
    assert record.levelname == "ERROR"
    assert "gone holds no file" in record.message


def test_stale_files():
    theirs = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md",
              "other.safetensors", "last-checkpoint/scaler.pt", "last-checkpoint/run.json"]  # fmt: skip
    assert stale_files(theirs, ["model.safetensors"]) == theirs[:3]
    ours = ["model.safetensors", "last-checkpoint/run.json"]
    assert stale_files(theirs, ours) == [*theirs[:3], "last-checkpoint/scaler.pt"]
    assert stale_files(theirs, theirs) == []


def test_set_aside_keeps_what_is_changed_and_removed_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "_LINKED_FROM", 10)
    source = tmp_path / "source"
    files = {"small": b"a", "large": b"b" * 20, "runs/x/events": b"c", "optimizer.pt": b"d", "runs/y.pt": b"e"}
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (source / "dangling").symlink_to(tmp_path / "nowhere")
    (source / "around").symlink_to(source)
    for link in (True, False):
        target = tmp_path / f"target-{link}"
        set_aside(source, target, skip=("*.pt",), link=link)
        assert (target / "large").samefile(source / "large") == link
        assert not (target / "small").samefile(source / "small")
    with open(source / "runs/x/events", "ab") as file:
        file.write(b"more")
    (source / "small").write_bytes(b"other")
    (source / "large").unlink()
    for link in (True, False):
        target = tmp_path / f"target-{link}"
        paths = [path for path in target.rglob("*") if path.is_file()]
        found = {path.relative_to(target).as_posix(): path.read_bytes() for path in paths}
        assert found == {name: files[name] for name in ("small", "large", "runs/x/events")}
