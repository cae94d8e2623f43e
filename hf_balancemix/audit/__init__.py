"""The label audit: which given labels are probably wrong, from a run or a trained model, to corrected data."""

from hf_balancemix.audit.corrections import Corrections, apply_corrections
from hf_balancemix.audit.exchange import (
    from_cleanlab,
    from_fiftyone,
    from_label_studio,
    label_studio_config,
    save_json,
    to_cleanlab,
    to_fiftyone,
    to_label_studio,
)
from hf_balancemix.audit.figures import precision_figure, rates_figure, surest_figure
from hf_balancemix.audit.label_audit import ClassAudit, LabelAudit
from hf_balancemix.audit.report import push_report, write_report
from hf_balancemix.audit.scoring import audit_labels

__all__ = [
    "ClassAudit",
    "Corrections",
    "LabelAudit",
    "apply_corrections",
    "audit_labels",
    "from_cleanlab",
    "from_fiftyone",
    "from_label_studio",
    "label_studio_config",
    "precision_figure",
    "push_report",
    "rates_figure",
    "save_json",
    "surest_figure",
    "to_cleanlab",
    "to_fiftyone",
    "to_label_studio",
    "write_report",
]
