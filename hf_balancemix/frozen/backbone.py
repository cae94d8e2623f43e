"""A backbone that is not trained, from its images to whole models with a trained head."""

from __future__ import annotations

import copy
import os
from typing import Any

import datasets
from torch import nn
from transformers import PreTrainedModel, set_seed

from hf_balancemix.data import ViewMaker, class_names
from hf_balancemix.frozen.cache import CachedViews, cache_features
from hf_balancemix.frozen.head import (
    FeatureClassifier,
    FeatureClassifierConfig,
    backbone_digest,
    pooled_features,
    with_head,
)
from hf_balancemix.models.loading import label_settings
from hf_balancemix.trainer.training_args import MultiLabelTrainingArguments


class FrozenBackbone:
    """An image classifier of which a new head alone is trained, on features that are computed once and kept.

    Several processes may make one at a time: one computes the features, the others wait.

    Args:
        model: As :func:`~hf_balancemix.frozen.head.pooled_features` takes it. Its own head is not used.
        processor: Its image processor.
        train, evaluation: Data sets with `image` and `labels`.
        args: Device, worker processes, and the settings of the views.
        folder: Where features are kept.
        num_views: V, cached views of a training instance.
        hidden_size: Hidden units of the heads; 0 for linear ones.

    Attributes:
        train, evaluation: The data sets, with a column that says where an instance's features are.

    Raises:
        ValueError: The model has no pooled features, or an image cannot be decoded.
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
        self._processor, self._num_views, self._hidden_size = processor, num_views, hidden_size
        self._features, self.train, self.evaluation = cache_features(
            folder,
            pooled_features(model.to(args.device)),
            backbone_digest(model),
            train,
            evaluation,
            # The views are the same for all seeds, which differ in what they pick of them.
            ViewMaker.from_arguments(args, processor, 0),
            processor.image_mean,
            processor.image_std,
            num_views=num_views,
            num_workers=args.dataloader_num_workers,
            device=args.device,
        )
        self._model = model.cpu()

    def draw(self, args: MultiLabelTrainingArguments) -> dict[str, Any]:
        """A trainer's arguments `model` (a head), `processing_class` and `views`, drawn with the seeds of `args`."""
        set_seed(args.seed)
        labels = label_settings(class_names(self.train))
        config = FeatureClassifierConfig(self._features.shape[1], self._hidden_size, **labels)
        seed = args.seed if args.data_seed is None else args.data_seed
        views = CachedViews(self._features, self._num_views, seed, self._processor.size["height"])
        return {"model": FeatureClassifier(config), "processing_class": self._processor, "views": views}

    def image_model(self, trained: nn.Module) -> nn.Module:
        """A model that takes images: the backbone with a trained head, or where `trained` holds several heads, such as
        co-teaching's two, a copy of it with the backbone under each; errors as of :func:`with_head`."""
        if isinstance(trained, FeatureClassifier):
            return with_head(self._model, trained)
        whole = copy.deepcopy(trained)
        for name, head in trained.named_children():
            setattr(whole, name, with_head(self._model, head))
        return whole
