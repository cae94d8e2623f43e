"""Label noise that is a pure function of (seed, image id)."""

from hf_balancemix.data.noise.base import LabelNoise, record_noise, recorded_noise, without_recorded_noise
from hf_balancemix.data.noise.draws import id_words, read_ids, uniform
from hf_balancemix.data.noise.kinds import ClassConditional, Compose, Mislabel, RandomFlip, SinglePositive

__all__ = [
    "ClassConditional",
    "Compose",
    "LabelNoise",
    "Mislabel",
    "RandomFlip",
    "SinglePositive",
    "id_words",
    "read_ids",
    "record_noise",
    "recorded_noise",
    "uniform",
    "without_recorded_noise",
]
