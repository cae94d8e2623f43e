"""A backbone that is not trained, or not in its first stages, from its images to whole models that are."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import datasets
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from hf_balancemix.data import ViewMaker, class_names
from hf_balancemix.frozen.cache import CachedViews, cache_features
from hf_balancemix.frozen.head import (
    FeatureClassifier,
    FeatureClassifierConfig,
    backbone_digest,
    digest_of,
    pooled_features,
    with_head,
)
from hf_balancemix.frozen.stages import activations_of, cut_behind, stages_of
from hf_balancemix.models.loading import label_settings
from hf_balancemix.trainer.training_args import MultiLabelTrainingArguments


class _Frozen:
    """What does not change in training, run once over the data sets.

    Several processes may make one at a time: one computes the features, the others wait.

    Attributes:
        train, evaluation: The data sets, with a column that says where an instance's features are.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        digest: str,
        processor: Any,
        train: datasets.Dataset,
        evaluation: datasets.Dataset,
        args: MultiLabelTrainingArguments,
        folder: str | os.PathLike[str],
        num_views: int,
        frozen: str | None = None,
    ) -> None:
        self._processor, self._num_views, self._what = processor, num_views, frozen
        self._features, self.train, self.evaluation = cache_features(
            folder,
            run,
            digest,
            train,
            evaluation,
            # The views are the same for all seeds, which differ in what they pick of them.
            ViewMaker.from_arguments(args, processor, 0),
            processor.image_mean,
            processor.image_std,
            num_views=num_views,
            # On a CPU larger batches do not fit in what the allocator keeps: 64 views of 128 pixels took three times
            # the time, most of it for page faults.
            batch_size=8 if args.device.type == "cpu" else 64,
            num_workers=args.dataloader_num_workers,
            device=args.device,
        )

    def _parts(self, model: nn.Module, args: MultiLabelTrainingArguments) -> dict[str, Any]:
        seed = args.seed if args.data_seed is None else args.data_seed
        views = CachedViews(self._features, self._num_views, seed, self._processor.size["height"], self._what)
        return {"model": model, "processing_class": self._processor, "views": views}


class FrozenBackbone(_Frozen):
    """An image classifier of which a new head alone is trained, on features that are computed once and kept.

    Args:
        model: As :func:`~hf_balancemix.frozen.head.pooled_features` takes it. Its own head is not used.
        processor: Its image processor.
        train, evaluation: Data sets with `image` and `labels`.
        args: Device, worker processes, and the settings of the views.
        folder: Where features are kept.
        num_views: V, cached views of a training instance.
        hidden_size: Hidden units of the heads; 0 for linear ones.

    Raises:
        ValueError: The model has no pooled features, an image cannot be decoded, or the disk has no room.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        train: datasets.Dataset,
        evaluation: datasets.Dataset,
        args: MultiLabelTrainingArguments,
        folder: str | os.PathLike[str],
        *,
        num_views: int,
        hidden_size: int,
    ) -> None:
        run = pooled_features(model.to(args.device))
        super().__init__(run, backbone_digest(model), processor, train, evaluation, args, folder, num_views)
        self._model, self._hidden_size = model.cpu(), hidden_size

    def draw(self, args: MultiLabelTrainingArguments) -> dict[str, Any]:
        """A trainer's arguments `model` (a head), `processing_class` and `views`, drawn with the seeds of `args`."""
        set_seed(args.seed)
        labels = label_settings(class_names(self.train))
        config = FeatureClassifierConfig(self._features.shape[1], self._hidden_size, **labels)
        return self._parts(FeatureClassifier(config), args)

    def image_model(self, trained: nn.Module) -> nn.Module:
        """A model that takes images: the backbone with a trained head, or where `trained` holds several heads, such as
        co-teaching's two, a copy of it with the backbone under each; errors as of :func:`with_head`."""
        if isinstance(trained, FeatureClassifier):
            return with_head(self._model, trained)
        whole = copy.deepcopy(trained)
        for name, head in trained.named_children():
            setattr(whole, name, with_head(self._model, head))
        return whole


class FrozenStages(_Frozen):
    """An image classifier that is trained but for its first stages, on their activations, computed once and kept.

    The activations are kept in half precision; methods that mix images mix these.

    Args:
        load: Gives the classifier, whose weights that are no pretrained ones it draws from torch's generator, and its
            image processor.
        train, evaluation, args, folder, num_views: As of :class:`FrozenBackbone`.
        num_stages: N, the stages that are frozen; what lies before them is, too.

    Raises:
        ValueError: The model cannot be cut there (see :func:`~hf_balancemix.frozen.stages.cut_behind`), an image
            cannot be decoded, or the disk has no room.
    """

    def __init__(
        self,
        load: Callable[[], tuple[PreTrainedModel, Any]],
        train: datasets.Dataset,
        evaluation: datasets.Dataset,
        args: MultiLabelTrainingArguments,
        folder: str | os.PathLike[str],
        *,
        num_views: int,
        num_stages: int,
    ) -> None:
        model, processor = load()
        cut = cut_behind(model, num_stages, processor.size["height"])
        self._load, self._cut = load, cut
        self._state = {name: value for name, value in model.state_dict().items() if name in cut.frozen}
        digest = f"{cut.stage} of {digest_of(model, lambda name, _: name in cut.frozen)}"
        run, frozen = activations_of(model.to(args.device), cut.stage), f"{num_stages} of {len(stages_of(model))}"
        super().__init__(run, digest, processor, train, evaluation, args, folder, num_views, frozen)

    def draw(self, args: MultiLabelTrainingArguments) -> dict[str, Any]:
        """A trainer's arguments `model`, `processing_class` and `views`, drawn with the seeds of `args`.

        The model is the whole one, which takes activations for images until :meth:`image_model`.
        """
        set_seed(args.seed)
        model, _ = self._load()
        model.load_state_dict(self._state, strict=False)  # one from scratch is another at each draw
        self._cut.open(model)
        return self._parts(model, args)

    def image_model(self, trained: nn.Module) -> nn.Module:
        """`trained` itself, or the networks that it holds, such as co-teaching's two, taking images again."""
        for network in [trained] if isinstance(trained, PreTrainedModel) else trained.children():
            self._cut.close(network)
        return trained
