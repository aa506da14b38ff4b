"""Compress Hugging Face language models: prune, fold, verify, report, push.

from hf_compress import Compressor

compressor = Compressor(model, tokenizer)
compressor.prune(sparsity=0.3)
compressor.save_pretrained("smaller")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_compress.heterogeneous.auto import register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_compress.compressor import Compressor, compress
    from hf_compress.errors import CompressionError
    from hf_compress.pipeline import run
    from hf_compress.recipe import Recipe, load_recipe

_HOME = {
    "Compressor": "hf_compress.compressor",
    "compress": "hf_compress.compressor",
    "CompressionError": "hf_compress.errors",
    "run": "hf_compress.pipeline",
    "Recipe": "hf_compress.recipe",
    "load_recipe": "hf_compress.recipe",
}

__all__ = [
    "CompressionError",
    "Compressor",
    "Recipe",
    "__version__",
    "compress",
    "load_recipe",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import hf_compress` then costs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


register()  # checkpoints whose layers differ then load without trust_remote_code
