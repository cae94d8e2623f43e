"""Where the `evaluate` modules lie in the installed package."""

from __future__ import annotations

from pathlib import Path

EVALUATE_MODULES = Path(__file__).parent / "evaluate_modules"


def evaluate_path(name: str) -> str:
    """The folder of an `evaluate` module, for `evaluate.load` (offline) or for upload as a Space.

    Args:
        name: `"multilabel_map"` or `"label_quality"`.

    Returns:
        Its path.

    Raises:
        ValueError: There is no such module.

    Example:
        >>> import evaluate
        >>> metric = evaluate.load(evaluate_path("multilabel_map"))
        >>> metric.compute(predictions=[[2.0, -1.0], [-2.0, 3.0]], references=[[1, 0], [0, 1]])["mAP"]
        1.0
    """
    names = sorted(folder.parent.name for folder in EVALUATE_MODULES.glob("*/app.py"))
    if name not in names:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(names)}.")
    return str(EVALUATE_MODULES / name)
