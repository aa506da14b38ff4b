"""What a recipe says of the stages that change a model: one class each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hf_compress.errors import RecipeError
from hf_compress.recipe.strict import Strict

Structure = Literal[
    "mlp_neurons",
    "kv_groups",
    "query_heads",
    "layers",
    "attention_sublayers",
    "mlp_sublayers",
    "experts",
    "expert_neurons",
    "residual_channels",
]
SUBLAYERS: dict[Structure, str] = {"attention_sublayers": "attention", "mlp_sublayers": "mlp"}
"""Structures that are one half of a decoder block, and which half."""


class Calibrate(Strict):
    """One pass over the decoder blocks: Gram matrices of what prunable units feed."""

    stage: Literal["calibrate"] = "calibrate"
    token_weighting: Literal["inverse_norm", "none"] = "inverse_norm"
    """Weight of a token in the Gram matrices. `inverse_norm` divides by the squared norm
    of the residual stream, as the next RMSNorm does: massive activations then count as
    one token and not as a thousand."""
    batch_size: int = Field(4, ge=1)
    """Windows in one forward pass of a block."""


class Prune(Strict):
    """Structured pruning at a uniform sparsity, with folding."""

    stage: Literal["prune"] = "prune"
    sparsity: float | None = Field(None, gt=0, lt=1)
    """Share of the non-embedding parameters to remove. Left out behind a `search`, which has
    found the widths, and where `plan` says them."""
    plan: Path | None = None
    """A plan.json with the widths to cut to, such as one that a run wrote and you have edited."""
    criterion: str = "obs"
    """How units are ranked; one of `hf_compress.pruning.criteria.CRITERIA`."""
    fold: bool = True
    """Fold what is removed into what is kept, by least squares; otherwise just drop it."""
    structures: list[Structure] = Field(["mlp_neurons", "kv_groups"], min_length=1)
    """What may be removed. `query_heads`: as many from every KV group that stays; `layers`:
    whole decoder blocks. Families whose heads cannot be cut keep them. `experts`: as many from
    every layer that has some. `expert_neurons`: as many from every expert, each its own; an
    expert that is always on beside the others stays as it is. `attention_sublayers`,
    `mlp_sublayers`: the whole attention or MLP of a layer; the checkpoint then brings its
    modelling file, and loads with trust_remote_code=True. `residual_channels`: a narrower
    residual stream (`hidden_size`), the harshest cut of all and only by itself."""
    expert_criterion: str = "reap"
    """How experts are ranked; one of `hf_compress.pruning.experts.EXPERT_CRITERIA`."""
    experts: Literal["drop", "merge"] = "drop"
    """What becomes of experts that are removed: nothing, or they are merged into the kept
    ones whose outputs are nearest to theirs."""
    channel_criterion: str = "wanda"
    """How channels of the residual stream are ranked, over all that reads it; one of the same
    as `criterion`. `obs` counts on more folding than the readers, each with its own damping and
    a tied head with none, can do (SmolLM2-135M at 11 %, 8 windows: KL .89 against .80)."""
    ignore: list[str] = Field([])
    """Modules to leave alone, by globs or `re:` patterns over their names in the model that
    the stage finds. A decoder block's own name (`model.layers.0`) keeps it from being dropped;
    `model.layers.0.*` also keeps its widths, as `*.self_attn` keeps those of all attention,
    and each of these from being dropped."""
    round_to: int = Field(64, ge=1)
    """MLP widths, and that of the residual stream, are multiples of this; never less is removed
    than asked."""
    recollect: bool = True
    """Collect the statistics anew on the pruned stream, block by block, so that every
    block is pruned for the inputs it will really see."""
    rounds: int = Field(1, ge=1)
    """Prune and recalibrate this many times, each time the same share of what is left. A round
    compares splits and corrects toward the model that the one before has left."""
    correction: float = Field(0.5, ge=0, le=1)
    """With `recollect` and `fold`: how far each fold also makes up for what earlier cuts did
    to the residual stream. 0 aims at the layer's own output, 1 at the dense model's stream;
    between them, the fold neither follows the drift nor chases what it cannot reach. Where a
    norm stands between a layer and the stream (gemma, bert), and of experts, each of which gives
    a part of what is added to it, it is always 0."""

    @model_validator(mode="after")
    def _widths_from_one_place(self) -> Prune:
        if self.sparsity is not None and self.plan is not None:
            raise ValueError("says both sparsity and plan; leave one out")
        if self.sparsity is None and self.rounds > 1:
            raise ValueError("rounds share out a sparsity; say it, or leave rounds out")
        return self

    @model_validator(mode="after")
    def _sublayers_in_one_round(self) -> Prune:
        if self.rounds > 1 and SUBLAYERS.keys() & set(self.structures):
            raise ValueError(
                f"rounds: {self.rounds} prunes a model that was pruned, which one whose layers "
                "differ cannot be; set rounds to 1, or take attention_sublayers and mlp_sublayers "
                "out of structures"
            )
        return self

    @model_validator(mode="after")
    def _expert_neurons_on_the_pruned_stream(self) -> Prune:
        if "expert_neurons" in self.structures and not self.recollect:
            raise ValueError(
                "expert_neurons are chosen on the tokens that the pruned model routes to each "
                "expert; set recollect to true, or leave it out"
            )
        return self

    @property
    def share(self) -> float:
        """`sparsity`; RecipeError where a plan has its place."""
        if self.sparsity is None:
            raise RecipeError("`prune` says no sparsity, and nothing else tells how much is to go")
        return self.sparsity

    @property
    def corrects(self) -> bool:
        """Whether the dense model runs beside the pruned one."""
        return self.recollect and self.fold and self.correction > 0


class Refit(Strict):
    """Train every block of a compressed model on its own output error, one after the other.

    No gradient crosses a block, so one block is in memory at a time. What comes out is kept
    only if it lowers KL to the dense model on the fitness windows.
    """

    stage: Literal["refit"] = "refit"
    epochs: int = Field(2, ge=1)
    """Times that each block sees the calibration text."""
    learning_rate: float = Field(5e-3, gt=0)
    """Largest step of Adam, as a share of a tensor's root mean square."""
    batch_size: int = Field(1, ge=1)
    """Windows in a step."""
    correction: float = Field(0.5, ge=0, le=1)
    """How far the target lies from what the dense block makes of the compressed model's
    stream (0) to the dense model's own stream (1)."""


class Sparsify(Strict):
    """Single weights of the linear layers in the decoder blocks become zero. The shapes stay,
    and so does the memory that the model takes in stock runtimes."""

    stage: Literal["sparsify"] = "sparsify"
    sparsity: float | None = Field(None, gt=0, lt=1)
    """Share of these layers' weights that become zero; a pattern N:M says it by itself."""
    pattern: str = "unstructured"
    """Where zeros may lie: `unstructured`, or N:M for at most N weights that are not zero
    among every M consecutive ones of a row, such as 2:4, which some GPUs multiply faster."""
    criterion: str = "splitting"
    """Which weights go; one of `hf_compress.pruning.weights.WEIGHT_CRITERIA`."""
    refit: bool = True
    """Fit what is left by least squares; otherwise the criterion has the last word."""
    correction: float = Field(0.5, ge=0, le=1)
    """How far each layer also makes up for what earlier zeros did to its inputs and to the
    residual stream: 0 aims at what the layer would give on the inputs that it now gets, 1 at
    what it gave in the model as it was found."""
    allocation: Literal["uniform", "owl", "global"] = "uniform"
    """Share of zeros of each layer: `uniform`; `owl`, fewer in blocks with many outliers (Yin
    et al. 2024); `global`, the smallest weights of the whole model (criterion magnitude)."""
    outlier_threshold: float = Field(5.0, gt=1)
    """With `owl`: an outlier is this many times the mean of |w| ||x|| in its block."""
    max_deviation: float = Field(0.08, gt=0, lt=1)
    """With `owl`: how far a block's share may lie from `sparsity`."""

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError('YAML reads 2:4 as a number; quote it, as in pattern: "2:4"')
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Sparsify:
        if self.pattern == "unstructured":
            if self.sparsity is None:
                raise ValueError("sparsity is required where the pattern is unstructured")
            if self.allocation == "global" and self.criterion != "magnitude":
                raise ValueError(
                    f"allocation global compares weights of all layers, which only criterion "
                    f"magnitude can, not {self.criterion}; use allocation owl"
                )
            return self
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(
                f"pattern {self.pattern!r} is neither unstructured nor N:M with 0 < N < M, such "
                "as 2:4 or 4:8"
            )
        if self.sparsity is not None and abs(self.sparsity - self.share) > 1e-6:
            raise ValueError(
                f"pattern {self.pattern} makes a share of {self.share:g} zero, not "
                f"{self.sparsity:g}; leave sparsity out"
            )
        if self.allocation != "uniform":
            raise ValueError(
                f"pattern {self.pattern} fixes the share of every layer, so allocation "
                f"{self.allocation} has nothing to decide; use uniform"
            )
        return self

    @property
    def share(self) -> float:
        """Of the weights that become zero."""
        if ":" in self.pattern:
            keep, group = map(int, self.pattern.split(":"))
            return 1 - keep / group
        assert self.sparsity is not None  # or the pattern would say it
        return self.sparsity

    @property
    def needs_text(self) -> bool:
        """Whether the inputs of the layers matter."""
        return self.criterion != "magnitude" or self.refit or self.correction > 0

    @property
    def corrects(self) -> bool:
        """Whether the model as it was found runs beside."""
        return self.correction > 0
