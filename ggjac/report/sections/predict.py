"""Prediction: the most likely next tokens."""

from typing import Any

from ggjac.report.numbers import fixed, percent
from ggjac.report.schema import TOKEN, Check, each
from ggjac.report.sections.common import Run, Section, length

FORM: dict[str, Check] = {
    "predictions": each(TOKEN),  # the most likely first
}


def predict(run: Run) -> dict[str, Any] | None:
    """Prepare the most likely next tokens."""
    rows = run.content["predictions"]
    return rows and {
        "rows": [
            row
            | {
                "logit": fixed(row["logit"]),
                "chance": percent(row["probability"], 2),
                "bar": length(row["probability"] or 0.0),
            }
            for row in rows
        ]
    }


SECTIONS = (
    Section("predict", "Prediction", predict, "The most likely next tokens, from the model’s own forward pass."),
)
