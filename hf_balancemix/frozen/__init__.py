"""A backbone that is not trained: its features are computed once, a small head is trained on them.

Importing this package lets `AutoModelForImageClassification` load such heads, which checkpoints of these runs hold.
"""

from hf_balancemix.frozen.head import FeatureClassifier, FeatureClassifierConfig

__all__ = ["FeatureClassifier", "FeatureClassifierConfig"]
