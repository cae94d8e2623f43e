"""Plots for the experiment trackers, beside the figures that `Trainer.log` sends them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from hf_balancemix.report.figures import figure_pixels, mixture_figure, per_class_ap_figure, training_curves_figure
from hf_balancemix.report.model_card import PER_CLASS_AP, chosen_mixtures, good_and_bad_class, newest_line

logger = logging.getLogger(__name__)

_TRACKERS = (TensorBoardCallback, TrackioCallback, WandbCallback)


class FigureCallback(TrainerCallback):
    """Sends plots to TensorBoard, trackio and Weights & Biases, whichever of them `args.report_to` names.

    After an evaluation: `plots/per_class_ap` and `plots/curves` (losses, mAP, label quality over the epochs); after a
    scan: `plots/mixtures`, the losses and mixtures of a good and a bad class. The figures as numbers are sent by
    Trainer itself. Add it to `trainer` after Trainer's own callbacks, as `trainer.add_callback` does. Only the first
    process sends; a plot that fails is a warning and nothing more.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._send(self._evaluation_plots)

    def on_log(self, args, state, control, logs: Mapping[str, Any] | None = None, **kwargs) -> None:
        if logs is not None and "p_clean_mean" in logs:  # what BalanceMixTrainer logs after a scan
            self._send(self._mixture_plot)

    def _evaluation_plots(self) -> dict[str, Figure | None]:
        trainer, per_class_ap = self.trainer, self._per_class_ap()
        plots = {"plots/curves": training_curves_figure(trainer.state.log_history)}
        if per_class_ap is not None and trainer.class_names is not None:
            figure = per_class_ap_figure(trainer.class_names, per_class_ap, trainer.class_groups)
            plots["plots/per_class_ap"] = figure
        return plots

    def _mixture_plot(self) -> dict[str, Figure | None]:
        classes = good_and_bad_class(self.trainer.balance_mix, self._per_class_ap())
        shown = chosen_mixtures(self.trainer.balance_mix, self.trainer.class_names, classes)
        return {"plots/mixtures": mixture_figure(shown)}

    def _per_class_ap(self) -> Sequence[float | None] | None:
        return (newest_line(self.trainer.state.log_history, "eval_runtime") or {}).get(f"eval_{PER_CLASS_AP}")

    def _send(self, plots: Callable[[], Mapping[str, Figure | None]]) -> None:
        state = self.trainer.state
        trackers = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, _TRACKERS)]
        if not trackers or not state.is_world_process_zero:
            return
        try:
            images = {name: figure_pixels(figure) for name, figure in plots().items() if figure is not None}
            for tracker in trackers:
                _send_images(tracker, images, state.global_step)
        except Exception:
            logger.warning("The plots of step %d could not be sent.", state.global_step, exc_info=True)


def _send_images(tracker: TrainerCallback, images: Mapping[str, np.ndarray], step: int) -> None:
    """`images` are `(height, width, 3)` uint8."""
    if isinstance(tracker, TensorBoardCallback):
        # Not add_figure, which imports pyplot and so chooses a backend for the whole process.
        for name, image in images.items():
            tracker.tb_writer.add_image(name, image, step, dataformats="HWC")
        tracker.tb_writer.flush()
    else:  # both have the same functions, and Trainer logs to their current run with the step as a figure
        library = importlib.import_module("trackio" if isinstance(tracker, TrackioCallback) else "wandb")
        logs = {name: library.Image(image) for name, image in images.items()}
        library.log({**logs, "train/global_step": step})
