"""Image backbones with a multi-label head, and the image processors saved with them.

Importing this package lets `AutoModelForImageClassification` load BalanceMix models.
"""

from transformers import AutoConfig, AutoModelForImageClassification

from hf_balancemix.models.configuration_balancemix import BalanceMixConfig
from hf_balancemix.models.export import export_onnx
from hf_balancemix.models.heads import MLDecoderHead, MSCMAHead, Query2LabelHead
from hf_balancemix.models.label_graph import label_graph_embeddings
from hf_balancemix.models.loading import check_image_size, load_model, load_trained, model_from_backbone
from hf_balancemix.models.modeling_balancemix import BalanceMixForImageClassification
from hf_balancemix.models.processing import squash_processor
from hf_balancemix.models.thresholds import (
    class_thresholds,
    iter_probabilities,
    pipeline_labels,
    predict_labels,
    predict_probabilities,
    tune_thresholds,
)

AutoConfig.register(BalanceMixConfig.model_type, BalanceMixConfig, exist_ok=True)
AutoModelForImageClassification.register(BalanceMixConfig, BalanceMixForImageClassification, exist_ok=True)

__all__ = [
    "BalanceMixConfig",
    "BalanceMixForImageClassification",
    "MLDecoderHead",
    "MSCMAHead",
    "Query2LabelHead",
    "check_image_size",
    "class_thresholds",
    "export_onnx",
    "iter_probabilities",
    "label_graph_embeddings",
    "load_model",
    "load_trained",
    "model_from_backbone",
    "pipeline_labels",
    "predict_labels",
    "predict_probabilities",
    "squash_processor",
    "tune_thresholds",
]
