"""Data sets as `datasets.Dataset` with `image`, `labels` and `image_id`; noise maps; views and collators."""

from hf_balancemix.data.adapters import from_detection, from_tags
from hf_balancemix.data.coco import load_coco
from hf_balancemix.data.csv_file import from_csv
from hf_balancemix.data.deepfashion import load_deepfashion
from hf_balancemix.data.describe import Description, RealisedNoise
from hf_balancemix.data.images import decode
from hf_balancemix.data.labels import class_names, given_labels, label_matrix, multi_hot, sparse_labels
from hf_balancemix.data.noise import ClassConditional, Compose, Mislabel, RandomFlip, SinglePositive
from hf_balancemix.data.noise_map import NoiseMap, load_noise_map
from hf_balancemix.data.sample import make_scenes
from hf_balancemix.data.split import iterative_split
from hf_balancemix.data.training_data import PlainInstances, TrainingPairs, collate, drop_bad_images
from hf_balancemix.data.views import ViewMaker, normalise
from hf_balancemix.data.voc import load_voc

__all__ = [
    "ClassConditional",
    "Compose",
    "Description",
    "Mislabel",
    "NoiseMap",
    "PlainInstances",
    "RandomFlip",
    "RealisedNoise",
    "SinglePositive",
    "TrainingPairs",
    "ViewMaker",
    "class_names",
    "collate",
    "decode",
    "drop_bad_images",
    "from_csv",
    "from_detection",
    "from_tags",
    "given_labels",
    "iterative_split",
    "label_matrix",
    "load_coco",
    "load_deepfashion",
    "load_noise_map",
    "load_voc",
    "make_scenes",
    "multi_hot",
    "normalise",
    "sparse_labels",
]
