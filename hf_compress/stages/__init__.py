"""What a recipe's stages do: each wires the rooms together and knows nothing of the others.

A stage takes the model as the stage before left it and gives back the folder of a workspace
step: an ordinary checkpoint (`search`: only a plan), `report.json` (what the stage decided and
measured) and `note.json` (the seconds that its parts took). To add one: its class in `recipe/`,
its function here, one line in `STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_compress.pruning import round_sparsities
from hf_compress.pruning.ratios import check_sparsify
from hf_compress.recipe import Prune
from hf_compress.stages.context import Context, read_note
from hf_compress.stages.distill import (
    check_distill,
    describe_distill,
    passes_of_distill,
    run_distill,
)
from hf_compress.stages.prune import check_prune, describe_prune, run_prune
from hf_compress.stages.quantize import (
    check_quantize,
    describe_quantize,
    passes_of_quantize,
    run_quantize,
)
from hf_compress.stages.refit import describe_refit, run_refit
from hf_compress.stages.search import (
    check_search,
    describe_search,
    passes_of_search,
    run_search,
)
from hf_compress.stages.sparsify import describe_sparsify, run_sparsify

__all__ = ["STAGES", "Context", "StageKind", "in_rounds", "read_note"]


def in_rounds(stages: Sequence[Any]) -> list[Any]:
    """The stages as they are carried out: one that prunes in several rounds is so many stages,
    each of which removes its share of what the one before has left."""
    carried_out = []
    for stage in stages:
        if isinstance(stage, Prune) and stage.rounds > 1:
            carried_out += [
                stage.model_copy(update={"sparsity": sparsity, "rounds": 1})
                for sparsity in round_sparsities(stage.sparsity or 0, stage.rounds)
            ]
        else:
            carried_out.append(stage)
    return carried_out


@dataclass(frozen=True)
class StageKind:
    """What the pipeline asks of a kind of stage.

    Attributes:
        check: raises RecipeError for settings that cannot be met on a model of this
            configuration; needs no weights.
        describe: lines for `hf-compress plan`, and the configuration that the next stage finds.
        run: carries the stage out.
        passes: about how many plain forward passes over the calibration text it costs; also
            given the number of tokens in that text.
    """

    check: Callable[[PretrainedConfig, Any], object]
    describe: Callable[[PretrainedConfig, Any, torch.dtype], tuple[list[str], PretrainedConfig]]
    run: Callable[[Context, Any], Path]
    passes: Callable[[Any, int], float]


STAGES: dict[str, StageKind] = {
    "distill": StageKind(check_distill, describe_distill, run_distill, passes_of_distill),
    "prune": StageKind(check_prune, describe_prune, run_prune, lambda settings, tokens: 4.0),
    "quantize": StageKind(
        check_quantize,
        describe_quantize,
        run_quantize,
        passes_of_quantize,
    ),
    "refit": StageKind(
        lambda config, settings: None,  # any compressed model will do
        describe_refit,
        run_refit,
        lambda settings, tokens: 4 + 4.0 * settings.epochs,
    ),
    "search": StageKind(check_search, describe_search, run_search, passes_of_search),
    "sparsify": StageKind(
        check_sparsify, describe_sparsify, run_sparsify, lambda settings, tokens: 6.0
    ),
}
