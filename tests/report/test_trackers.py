"""What the trackers receive, read back from what they wrote."""

from __future__ import annotations

import importlib.util
import logging

import pytest
from conftest import arguments, tiny_resnet

from hf_balancemix import BalanceMixTrainer, Mislabel, MultiLabelTrainer


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def train(trainer_class, dataset, folder, report_to, **changes):
    noisy = Mislabel(rate=0.4).add_to(dataset)
    args = arguments(
        folder, report_to=report_to, eval_strategy="epoch", logging_strategy="epoch", num_train_epochs=2, **changes
    )
    trainer = trainer_class(model=tiny_resnet(), args=args, train_dataset=noisy, eval_dataset=dataset)
    trainer.train()
    return trainer


@needs("tensorboard")
def test_tensorboard_gets_plots_and_label_quality_at_every_epoch(dataset, tmp_path, monkeypatch, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    with caplog.at_level(logging.WARNING, "hf_balancemix.report"):
        trainer = train(BalanceMixTrainer, dataset, tmp_path, "tensorboard")
    assert not [record for record in caplog.records if record.name.startswith("hf_balancemix.report")]
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    epoch = trainer.state.max_steps // 2
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps["plots/per_class_ap"] == [epoch, 2 * epoch]
    assert steps["plots/curves"] == [2 * epoch]  # from two evaluations on
    assert steps["plots/mixtures"] == [epoch, 2 * epoch]
    image = events.Images("plots/per_class_ap")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > 200
    precision = [
        line["label_clean_precision"] for line in trainer.state.log_history if "label_clean_precision" in line
    ]
    scalars = events.Scalars("train/label_clean_precision")
    assert [s.value for s in scalars] == pytest.approx(precision)
    assert len(precision) == 1  # the first epoch is the warm-up


@needs("tensorboard")
def test_a_method_without_state_sends_its_curves(dataset, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(MultiLabelTrainer, dataset, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert "plots/curves" in events.Tags()["images"]
    assert "plots/mixtures" not in events.Tags()["images"]


@needs("trackio")
def test_trackio_gets_plots(dataset, tmp_path, monkeypatch):
    import trackio

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    logged = []
    log = trackio.log
    monkeypatch.setattr(trackio, "log", lambda values, **kwargs: (logged.append(values), log(values, **kwargs)))
    train(BalanceMixTrainer, dataset, tmp_path, "trackio", project="demo", run_name="run")
    plots = [values for values in logged if "plots/curves" in values]
    assert len(plots) == 2
    assert all(isinstance(values["plots/curves"], trackio.Image) for values in plots)
    assert plots[-1]["train/global_step"] > plots[0]["train/global_step"]


@needs("tensorboard")
def test_a_plot_that_fails_is_a_warning(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.setattr("hf_balancemix.report.trackers.training_curves_figure", lambda history: 1 / 0)
    with caplog.at_level(logging.WARNING, "hf_balancemix.report"):
        trainer = train(MultiLabelTrainer, dataset, tmp_path, "tensorboard")
    assert trainer.state.global_step == trainer.state.max_steps
    assert "could not be sent" in caplog.text


def test_without_a_tracker_nothing_is_drawn(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_balancemix.report.trackers.training_curves_figure", lambda history: 1 / 0)
    with caplog.at_level(logging.WARNING, "hf_balancemix.report"):
        train(MultiLabelTrainer, dataset, tmp_path, "none")
    assert "could not be sent" not in caplog.text
