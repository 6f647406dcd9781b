"""The report of a run: one self-contained HTML file, and the same figures for print. It reads a run folder only."""

from ggjac.report.figures import write_figures
from ggjac.report.page import write_report

__all__ = ["write_figures", "write_report"]
