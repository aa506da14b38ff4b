"""Which stages of a recipe may follow which; what the schema of one alone cannot see."""

from __future__ import annotations

from hf_compress.errors import RecipeError
from hf_compress.pruning import narrows
from hf_compress.recipe import Calibrate, Distill, Prune, Recipe, Search, Sparsify
from hf_compress.stages import STAGES


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError for what the schema alone cannot see."""
    kinds = [stage.stage for stage in recipe.stages]
    if kinds[-1] == "calibrate":
        raise RecipeError(
            f"the stages are {', '.join(kinds)}; `calibrate` says how the stages after it collect "
            f"statistics, so one of them has to follow: {', '.join(STAGES)}"
        )
    changes = [kind for kind in kinds if kind != "calibrate"]
    if changes[0] == "refit":
        raise RecipeError(
            "the first stage is `refit`, and the dense model needs none; put it after a stage that "
            "changes the model, such as `prune`"
        )
    _check_searches(recipe)
    _check_distillations(recipe)
    narrowed = [isinstance(stage, Prune) and narrows(stage) for stage in recipe.stages]
    if "refit" in kinds and any(narrowed[: len(kinds) - kinds[::-1].index("refit")]):
        raise RecipeError(
            f"the stages are {', '.join(kinds)}, one with structures: [residual_channels]; `refit` "
            "trains toward the dense model's residual stream, and that is then wider. Leave "
            "`refit` out, or put it before the cut of the stream"
        )
    if "quantize" in kinds[:-1]:
        raise RecipeError(
            f"the stages are {', '.join(kinds)}; `quantize` has to be the last: what changes "
            "weights after it would have to store them in full again"
        )
    if "sparsify" in kinds and "prune" in kinds[kinds.index("sparsify") :]:
        raise RecipeError(
            f"the stages are {', '.join(kinds)}; a fold would fill the zeros that `sparsify` has "
            "made, so put `prune` before it"
        )


def _check_searches(recipe: Recipe) -> None:
    """Raise RecipeError unless every `search` has its `prune`, and each `prune` its widths."""
    stages = [stage for stage in recipe.stages if not isinstance(stage, Calibrate)]
    for before, stage in zip([None, *stages], [*stages, None], strict=True):
        unsaid = isinstance(stage, Prune) and stage.sparsity is None and stage.plan is None
        if isinstance(before, Search) and not unsaid:
            raise RecipeError(
                "behind `search` has to come a `prune` that says neither sparsity nor plan; it "
                "cuts to the widths that were found"
            )
        if unsaid and not isinstance(before, Search):
            raise RecipeError(
                "a `prune` stage says neither sparsity nor plan; give one of them, or put a "
                "`search` with a budget right before it"
            )


def _check_distillations(recipe: Recipe) -> None:
    """Raise RecipeError for a `distill` that has nothing to learn, or would fill zeros."""
    stages = [stage for stage in recipe.stages if not isinstance(stage, Calibrate)]
    first = stages[0]
    if isinstance(first, Distill) and first.teacher is None:
        raise RecipeError(
            "the first stage is `distill`, and the dense model cannot learn from itself; put it "
            "after a stage that changes the model, such as `prune`, or name another teacher"
        )
    zeroed = False
    for stage in stages:
        zeroed = zeroed or isinstance(stage, Sparsify)
        if not isinstance(stage, Distill):
            continue
        if stage.completion_only and not recipe.data.calibration.chat_template:
            raise RecipeError(
                "`distill` with completion_only: true, and data.calibration is plain text; set "
                "its chat_template: true, with a source of conversations, or leave it out"
            )
        if stage.method == "lora" and zeroed:
            raise RecipeError(
                "`distill` with method: lora behind `sparsify`: adapters would fill its zeros "
                "when they are merged; use method: full, which leaves zeros alone"
            )
