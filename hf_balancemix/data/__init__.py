"""Data sets as `datasets.Dataset` with `image`, `labels` and `image_id`; noise maps; views and collators."""

from hf_balancemix.data.coco import load_coco
from hf_balancemix.data.labels import class_names, label_matrix, multi_hot
from hf_balancemix.data.noise import Mislabel, RandomFlip, SinglePositive
from hf_balancemix.data.scenes import make_scenes
from hf_balancemix.data.training_data import PlainInstances, TrainingPairs, collate, drop_bad_images
from hf_balancemix.data.views import ViewMaker, decode, normalise

__all__ = [
    "Mislabel",
    "PlainInstances",
    "RandomFlip",
    "SinglePositive",
    "TrainingPairs",
    "ViewMaker",
    "class_names",
    "collate",
    "decode",
    "drop_bad_images",
    "label_matrix",
    "load_coco",
    "make_scenes",
    "multi_hot",
    "normalise",
]
