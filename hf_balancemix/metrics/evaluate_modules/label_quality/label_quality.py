"""Label quality as an `evaluate` metric: a thin shell over `hf_balancemix.metrics`."""

import datasets
import evaluate
import torch

from hf_balancemix.core.citation import CITATION
from hf_balancemix.metrics import count_label_quality, label_quality

_DESCRIPTION = """\
Clean-label precision and recall, re-labelling proportion and accuracy of a method that judges noisy multi-label labels
(Eq. 14 and 15 of the BalanceMix paper), where the clean labels are known.
"""

_INPUTS = """\
Args:
    given: N lists of K labels as they were given, 0 or 1.
    clean: N lists of K clean labels, 0 or 1.
    refined: N lists of K labels after re-labelling, 0 or 1.
    reliability: N lists of K codes: 0 judged clean, 1 re-labelled, 2 ambiguous.
Returns:
    clean_precision, clean_recall, relabel_proportion, relabel_accuracy, ambiguous_proportion, noise_rate, fractions;
    each again with the suffix _positives, over the labels that were given as positive. A figure whose denominator is
    0 is left out.
Examples:
    >>> metric = evaluate.load("label_quality.py")
    >>> metric.compute(given=[[1, 0]], clean=[[0, 0]], refined=[[0, 0]], reliability=[[1, 0]])["relabel_accuracy"]
    1.0
"""

_NAMES = ("given", "clean", "refined", "reliability")


class LabelQuality(evaluate.Metric):
    """`given`, `clean`, `refined` and `reliability` are `(N, K)`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Sequence(datasets.Value("int64")) for name in _NAMES}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add a batch of given, clean, refined and reliability, `(B, K)` each."""
        if any(kwargs.get(name) is None or len(kwargs[name]) == 0 for name in _NAMES):
            raise ValueError(f"no {', no '.join(_NAMES)} is given; each must be N >= 1 rows of K values.")
        super().add_batch(**kwargs)

    def _compute(self, **matrices):
        for name in _NAMES:
            if len({len(row) for row in matrices[name]}) != 1:
                raise ValueError(f"{name} has rows of unequal length; each must be of K values.")
            if name != "reliability" and not {value for row in matrices[name] for value in row} <= {0, 1}:
                raise ValueError(f"{name} has values other than 0 and 1; it must be labels.")
        return label_quality(count_label_quality(*(torch.tensor(matrices[name]) for name in _NAMES)))
