"""Where the `evaluate` modules lie in the installed package."""

from __future__ import annotations

from pathlib import Path


def evaluate_path(name: str) -> str:
    """The folder of an `evaluate` module, for `evaluate.load` (offline) or for upload as a Space.

    Args:
        name: `"multilabel_map"` or `"label_quality"`; another name is a ValueError.

    Example:
        >>> import evaluate
        >>> metric = evaluate.load(evaluate_path("multilabel_map"))
        >>> metric.compute(predictions=[[2.0, -1.0], [-2.0, 3.0]], references=[[1, 0], [0, 1]])["mAP"]
        1.0
    """
    modules = {app.parent.name: str(app.parent) for app in Path(__file__).parent.glob("evaluate_modules/*/app.py")}
    if name not in modules:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(sorted(modules))}; choose one of these.")
    return modules[name]
