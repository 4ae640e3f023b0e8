"""Pictures of what evaluation measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isdaa.lazy import lazy

if TYPE_CHECKING:
    from isdaa.report.charts.style import save_chart
    from isdaa.report.charts.win_rate_curves import final_chart, matched_kl_chart, study_chart
    from isdaa.report.page import write_report

__all__ = ["final_chart", "matched_kl_chart", "save_chart", "study_chart", "write_report"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "write_report": "report.page",
        "final_chart": "report.charts.win_rate_curves",
        "matched_kl_chart": "report.charts.win_rate_curves",
        "study_chart": "report.charts.win_rate_curves",
        "save_chart": "report.charts.style",
    },
)
