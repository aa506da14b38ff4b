"""The inspection: how redundant a dense model is, layer by layer, before anything is cut.

results.py     what was found, as pydantic classes; the JSON file; which neurons may go
redundancy.py  the definitions: dead, near-duplicate, effective rank, removable
moments.py     what they need, collected block by block: moments, massive activations
inspector.py   one walk through the model
table.py       lines for the terminal
plot.py        one picture to share (PNG)
command.py     `hf-compress inspect`

This room changes nothing in a model: it reads it, on a text, and says what it saw.
"""

from hf_compress.inspection.command import check_targets, inspect_checkpoint, write_outputs
from hf_compress.inspection.inspector import inspect_model
from hf_compress.inspection.plot import plot_inspection
from hf_compress.inspection.results import Inspection, LayerInspection, kept_neurons
from hf_compress.inspection.table import table_lines

__all__ = [
    "Inspection",
    "LayerInspection",
    "check_targets",
    "inspect_checkpoint",
    "inspect_model",
    "kept_neurons",
    "plot_inspection",
    "table_lines",
    "write_outputs",
]
