"""From the records of a study to one HTML page that opens offline."""

from crossways.report.page import render_report

__all__ = ["render_report"]
