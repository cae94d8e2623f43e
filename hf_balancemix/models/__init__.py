"""Image backbones with a multi-label head, and the image processors saved with them."""

from hf_balancemix.models.loading import load_model
from hf_balancemix.models.processing import squash_processor

__all__ = ["load_model", "squash_processor"]
