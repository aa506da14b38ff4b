"""The report: measurements as data, two plots, and the model card.

metrics.py  what a run measured, as pydantic classes; metrics.json
plots.py    kept widths, and output errors with and without folding, layer by layer (PNG)
card.py     README.md of the compressed checkpoint, and the lines for the terminal
wording.py  what the card calls what a kind of model predicts
lineage.py  licence and base model, read from the dense checkpoint's own card

This room computes nothing on models: it only puts into words what the run measured.
"""

from hf_compress.report.card import summary_lines, write_card
from hf_compress.report.lineage import base_model_of, license_of
from hf_compress.report.metrics import Metrics, load_metrics, parse_metrics, save_metrics
from hf_compress.report.plots import plot_errors, plot_widths

__all__ = [
    "Metrics",
    "base_model_of",
    "license_of",
    "load_metrics",
    "parse_metrics",
    "plot_errors",
    "plot_widths",
    "save_metrics",
    "summary_lines",
    "write_card",
]
