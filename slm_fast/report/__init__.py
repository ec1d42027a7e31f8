"""Self-contained HTML reports on a store or on benchmark runs, with their figures and numbers as files."""

from slm_fast.report.figures import Report
from slm_fast.report.page import html
from slm_fast.report.run import run_report
from slm_fast.report.store import report_on, store_report
from slm_fast.report.writing import check_output, save

__all__ = ["Report", "check_output", "html", "report_on", "run_report", "save", "store_report"]
