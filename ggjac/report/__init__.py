"""The report of a result: one self-contained HTML file, and the same figures for print. It reads saved results only."""

from ggjac.report.figures import write_figures
from ggjac.report.page import write_report

__all__ = ["write_figures", "write_report"]
