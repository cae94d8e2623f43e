"""Multi-label mAP with class groups as an `evaluate` metric: a thin shell over `hf_balancemix.metrics`."""

import datasets
import evaluate
import numpy as np

from hf_balancemix.core.citation import CITATION
from hf_balancemix.metrics import evaluation_figures

_DESCRIPTION = """\
Mean average precision of multi-label predictions over all classes and, where the classes' numbers of positive training
labels are given, over many-, medium- and few-shot classes; CF1 and OF1 at a threshold. Classes without a positive
label have no average precision and are left out of every mean.
"""

_INPUTS = """\
Args:
    predictions: N lists of K logits. Only their order within a class matters for mAP; CF1 and OF1 apply a sigmoid.
    references: N lists of K labels: 1 present, 0 absent, -1 unknown (counts nowhere).
    class_counts: K numbers of positive (clean) training labels; gives the group figures.
    many, few: A class with more than `many` is many-shot, one with fewer than `few` few-shot.
    threshold: A class is predicted where its probability is above, for CF1 and OF1.
    class_names: K names, for the skipped classes.
Returns:
    mAP, mAP_many, mAP_medium, mAP_few (a mean over no class is left out), CF1, OF1, all fractions; per_class_ap, K
    fractions, None for a skipped class; skipped, those classes.
Examples:
    >>> metric = evaluate.load("multilabel_map.py")
    >>> metric.compute(predictions=[[2.0, -1.0], [-2.0, 3.0]], references=[[1, 0], [0, 1]])
    {'mAP': 1.0, 'CF1': 1.0, 'OF1': 1.0, 'per_class_ap': [1.0, 1.0], 'skipped': []}
"""


class MultilabelMAP(evaluate.Metric):
    """`predictions` and `references` are `(N, K)`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add a batch of predictions and references, `(B, K)` each."""
        if predictions is None or references is None or len(predictions) == 0:
            raise ValueError("no predictions or no references are given; both must be N >= 1 rows of K values.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(
        self, predictions, references, class_counts=None, many=10_000, few=1_000, threshold=0.5, class_names=None
    ):
        for name, rows in (("predictions", predictions), ("references", references)):
            if len({len(row) for row in rows}) != 1:
                raise ValueError(f"{name} has rows of unequal length; each must be of K values.")
        means, ap = evaluation_figures(predictions, references, class_counts, many, few, threshold, class_names)
        names = range(len(ap)) if class_names is None else class_names
        skipped = [name for name, is_skipped in zip(names, np.isnan(ap), strict=True) if is_skipped]
        return means | {"per_class_ap": np.where(np.isnan(ap), None, ap).tolist(), "skipped": skipped}
