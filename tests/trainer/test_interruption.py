"""A run that is sent SIGTERM or SIGUSR1 saves, says how to go on, and ends as the same run uninterrupted."""

from __future__ import annotations

import os
import re
import signal
import threading

import pytest
from conftest import arguments, flat, make_dataset, tiny_resnet
from test_resume import assert_same_end, final, run
from torch.utils.data import DataLoader
from training_worker import arm
from transformers import TrainerCallback

from hf_balancemix import Mislabel, TrainingInterrupted, trainer_for
from hf_balancemix.trainer import checkpoints
from hf_balancemix.trainer.interruption import StopSignals

# 26 instances in batches of 4 are 7 steps an epoch; a scan has batches of 5, and so has an evaluation of 9 instances.
CASES = {
    # name: (arguments, method, moment, the step that is saved)
    "in a step, with accumulation": ({"gradient_accumulation_steps": 2}, "balancemix", "step:2", 3),
    "in the first step": ({"save_strategy": "no"}, "balancemix", "step:0", 1),
    "in the last step of an epoch": ({}, "balancemix", "step:6", 7),
    "in the scan before an epoch": ({}, "balancemix", "scan:8", 14),
    "in that of a checkpoint that is there": ({"save_strategy": "epoch"}, "balancemix", "scan:8", 14),
    "in an evaluation, with an average": ({"ema_decay": 0.9}, "balancemix", "eval:1", 7),
    "in an evaluation after some steps": ({"eval_strategy": "steps", "eval_steps": 3}, "bce", "eval:3", 6),
    "in the evaluation that finds the best model": (
        {"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": "mAP"},
        "bce", "eval:3", 14,
    ),
    "while a checkpoint is saved": ({"save_strategy": "steps", "save_steps": 2}, "balancemix", "save:2", 5),
    "with two networks": ({}, "co-teaching", "step:9", 10),
    "in the last step": ({"max_steps": 9}, "balancemix", "step:8", 9),
    "in the last scan": ({}, "balancemix", "scan:14", 21),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    clean = make_dataset(tmp_path_factory.mktemp("images"), 26)
    noise = Mislabel(rate=0.4, seed=0).fit(clean)
    return clean.map(noise, batched=True, features=noise.features), clean.select(range(9))


def a_trainer(folder, data, method="balancemix", **changes):
    values = {"num_train_epochs": 3, "eval_strategy": "epoch", "judge": "network", "per_device_eval_batch_size": 5}
    args = arguments(folder, **values | {"max_grad_norm": 1.0, "logging_strategy": "epoch"} | changes)
    return trainer_for(method, args, model=tiny_resnet(), train_dataset=data[0], eval_dataset=data[1])


def end_of(trainer):
    """What a run leaves."""
    return {"parameters": flat(trainer.model), "state": trainer._run_state(), "steps": trainer.state.global_step} | {
        "audit": trainer.label_audit().remove_columns("image").to_pandas().to_csv()
        if trainer.method_name == "balancemix"
        else None
    }


def figures(trainer):
    """The evaluations and label qualities of a log; those of one step in any order."""
    names = ("eval_CF1", "eval_mAP", "eval_loss", "label_clean_precision")
    lines = [(line["step"], n, line[n]) for line in trainer.state.log_history for n in names if n in line]
    return sorted(lines)


@pytest.mark.parametrize("case", CASES)
def test_a_signal_saves_and_the_resumed_run_is_bit_equal(tmp_path, monkeypatch, data, case):
    changes, method, moment, step = CASES[case]
    whole = a_trainer(tmp_path / "whole", data, method, **changes)
    whole.train()
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)]
    ended = a_trainer(tmp_path / "ended", data, method, **changes)
    with monkeypatch.context() as patch:
        arm(ended, moment, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(TrainingInterrupted) as caught:
            ended.train()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert caught.value.code == 143
    assert caught.value.checkpoint == tmp_path / "ended" / f"checkpoint-{step}"
    assert checkpoints.last_whole_checkpoint(tmp_path / "ended") == caught.value.checkpoint
    assert f"SIGTERM stopped the run after step {step}; " in str(caught.value)
    # As a notebook does it, or a new process.
    resumed = ended if moment.startswith("scan") else a_trainer(tmp_path / "ended", data, method, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(end_of(whole), end_of(resumed))
    assert figures(whole) == figures(resumed)
    assert whole.state.best_metric == resumed.state.best_metric


@pytest.mark.dist
@pytest.mark.parametrize(
    ("flags", "moment", "rank", "step", "name"),
    [
        # 26 instances in batches of 4 on two ranks are 4 steps an epoch; a scan has 3 batches a rank.
        (("--workers", "2"), "step:2", 1, 3, "USR1"),
        pytest.param(("--accumulation", "2"), "step:3", -1, 4, "TERM", marks=pytest.mark.slow),
        pytest.param((), "scan:5", 1, 8, "TERM", marks=pytest.mark.slow),
        pytest.param((), "eval:1", 1, 4, "TERM", marks=pytest.mark.slow),
    ],
)
def test_both_ranks_stop_at_the_same_step_where_one_was_told(tmp_path, flags, moment, rank, step, name):
    flags = (*flags, "--save_steps", "1000", "--judge", "network", "--clip", "1.0")
    run(tmp_path / "whole", *flags, ranks=2)
    kill = ("--kill", moment, "--kill_rank", str(rank), "--by", name)
    done = run(tmp_path / "ended", *flags, *kill, ranks=2, fails=True)
    checkpoint = tmp_path / "ended" / f"checkpoint-{step}"
    assert checkpoints.last_whole_checkpoint(tmp_path / "ended") == checkpoint
    assert done.stderr.count(f"SIG{name} stopped the run after step {step}; {checkpoint} is whole") == 1
    assert re.search(rf"exitcode *: {128 + getattr(signal, f'SIG{name}')} ", done.stderr)
    run(tmp_path / "ended", "--resume", *flags, ranks=2)
    for one in (0, 1):
        assert_same_end(final(tmp_path / "whole", one), final(tmp_path / "ended", one))


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_process_whose_group_gets_the_signal_keeps_its_workers_and_ends_with_its_status(tmp_path, name):
    flags = ("--workers", "2", "--save_steps", "1000", "--judge", "network")
    kill = ("--kill", "step:2", "--by", name, "--kill_rank", "-2")
    done = run(tmp_path / "ended", *flags, *kill, fails=True, start_new_session=True)
    assert done.returncode == 128 + getattr(signal, f"SIG{name}")
    assert "Traceback" not in done.stderr
    assert "--resume_from_checkpoint last" in done.stderr
    assert checkpoints.last_whole_checkpoint(tmp_path / "ended").name == "checkpoint-3"


class Strike(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, function, step=2):
        self.function, self.step = function, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


def test_a_handler_of_somebody_else_stays_and_can_ask(tmp_path, data, caplog):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer = a_trainer(tmp_path / "o", data, "bce")
        trainer.add_callback(Strike(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        trainer.train()
        assert seen == [signal.SIGTERM]
        assert trainer.state.global_step == 21
        assert "SIGTERM has a handler already, which stays: have it call trainer.request_stop()" in caplog.text
        signal.signal(signal.SIGTERM, lambda number, frame: trainer.request_stop(number))
        with pytest.raises(TrainingInterrupted, match="after step 3;"):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_off_the_main_thread_no_handler_is_set_and_another_thread_can_ask(tmp_path, data):
    trainer, ends = a_trainer(tmp_path / "o", data, "bce"), []
    handlers = []

    def strike():
        handlers.append(signal.getsignal(signal.SIGTERM))
        trainer.request_stop()

    def train():
        try:
            trainer.train()
        except TrainingInterrupted as end:
            ends.append(end)

    trainer.add_callback(Strike(strike))
    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    assert handlers == [signal.getsignal(signal.SIGTERM)]
    assert ends[0].code == 143
    assert ends[0].checkpoint.name == "checkpoint-3"


def test_before_a_step_there_is_nothing_to_save_and_a_late_signal_does_no_harm(tmp_path, data, caplog):
    trainer = a_trainer(tmp_path / "o", data, judge="cross_fit", eval_on_start=True)
    evaluate = trainer._evaluate
    trainer._evaluate = lambda *a, **k: (trainer.request_stop(), evaluate(*a, **k))[1]
    judged = trainer.balance_mix.judge
    trainer.balance_mix.judge = lambda *a, **k: pytest.fail("the scan before it is given up")
    with pytest.raises(TrainingInterrupted, match="there is no checkpoint: start it again") as caught:
        trainer.train()
    assert caught.value.checkpoint is None
    trainer._evaluate, trainer.balance_mix.judge = evaluate, judged
    finish = trainer._finish_current_push
    trainer._finish_current_push = lambda: (trainer.request_stop(), finish())[1]
    trainer.train()
    assert "SIGTERM came when the training was over" in caplog.text


def test_weights_of_the_best_model_are_not_saved_as_those_of_the_last_step(tmp_path, monkeypatch, data):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mAP", "eval_strategy": "steps", "eval_steps": 2}
    trainer = a_trainer(tmp_path / "o", data, save_strategy="best", **best)
    arm(trainer, "scan:14", trainer.request_stop, monkeypatch)
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.train()
    assert trainer.state.global_step == 21
    assert caught.value.checkpoint == checkpoints.list_checkpoints(tmp_path / "o")[-1]
    assert caught.value.checkpoint.name == f"checkpoint-{trainer.state.best_global_step}" < "checkpoint-21"


def test_a_worker_ends_when_its_process_wants_it_to(tmp_path):
    signals = StopSignals()
    loader = DataLoader(range(8), num_workers=1, worker_init_fn=signals.in_worker(), persistent_workers=True)
    with signals:
        batches = iter(loader)
        next(batches)
        worker = batches._workers[0]
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
        assert len(list(batches)) == 7
        worker.join(0.2)
        assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()


def test_the_flag_of_transformers_is_refused_with_a_reason(tmp_path, data):
    with pytest.raises(ValueError, match="enable_jit_checkpoint is True; it must be False, as a checkpoint"):
        a_trainer(tmp_path / "o", data, "bce", enable_jit_checkpoint=True)


def test_a_run_that_is_over_is_not_trained_by_one_more_step(tmp_path, data):
    args = {"max_steps": 9, "save_strategy": "steps", "save_steps": 9}
    first = a_trainer(tmp_path / "o", data, **args)
    first.train()
    again = a_trainer(tmp_path / "o", data, **args)
    again.train(resume_from_checkpoint=True)
    assert_same_end(end_of(first), end_of(again))
