"""What people read: tables."""

from hf_balancemix.report.table import markdown_table, results_table

__all__ = ["markdown_table", "results_table"]
