"""What people read: tables."""

from hf_balancemix.report.table import results_table

__all__ = ["results_table"]
