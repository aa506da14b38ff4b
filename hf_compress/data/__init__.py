"""Text -> windows of token ids, for calibration, for choices and for evaluation.

sources.py        documents from a file, a folder, the Hub, or the Python documentation
windows.py        documents -> packed windows; calibration and evaluation never overlap
overlap.py        whether windows share text
chat.py           documents as text, conversations through a chat template
self_sampling.py  windows that the model writes itself
"""

from hf_compress.data.chat import answers
from hf_compress.data.self_sampling import sample_windows
from hf_compress.data.sources import Document, read_documents
from hf_compress.data.windows import Windows, load_training_windows, load_windows

__all__ = [
    "Document",
    "Windows",
    "answers",
    "load_training_windows",
    "load_windows",
    "read_documents",
    "sample_windows",
]
