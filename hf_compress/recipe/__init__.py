"""What a recipe may say: one pydantic class a stage, unknown keys refused.

A recipe is data. Nothing in it is ever imported or executed; `trust_remote_code` is
therefore a flag of the command line and not a key here.
"""

from hf_compress.recipe.distill import Distill
from hf_compress.recipe.document import (
    Evaluate,
    Recipe,
    Stage,
    dump_recipe,
    load_recipe,
    parse_recipe,
)
from hf_compress.recipe.quantize import Quantize
from hf_compress.recipe.search import Budget, Search, Searched
from hf_compress.recipe.stages import SUBLAYERS, Calibrate, Prune, Refit, Sparsify, Structure
from hf_compress.recipe.text import Data, Evaluation, TextSource

__all__ = [
    "SUBLAYERS",
    "Budget",
    "Calibrate",
    "Data",
    "Distill",
    "Evaluate",
    "Evaluation",
    "Prune",
    "Quantize",
    "Recipe",
    "Refit",
    "Search",
    "Searched",
    "Sparsify",
    "Stage",
    "Structure",
    "TextSource",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
]
