"""What a run measured, as data: the contents of metrics.json.

Everything else in the report is derived from one `Metrics` object, so that the card, the
plots and the terminal cannot disagree.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hf_compress.errors import CheckpointError
from hf_compress.report.stages import Distilled, Quantization, Refitted, Strict, Zeroing


class ModelMetrics(Strict):
    """One model, dense or compressed."""

    parameters: int = Field(gt=0)
    """All parameters; tied ones count once."""
    non_embedding_parameters: int = Field(gt=0)
    """Parameters without the token embedding and the language-model head."""
    weight_bytes: int = Field(gt=0)
    """Bytes of the weight files on disk."""
    kv_bytes_per_token: int = Field(ge=0)
    """Bytes that the key-value cache grows by with each token of one sequence."""
    perplexity: float = Field(gt=0)
    """exp of the mean negative log-likelihood (nats per token) on the evaluation text; of a
    masked language model that of the masked tokens, see `Comparison.predicts`."""
    prefill_tokens_per_second: float | None = Field(None, gt=0)
    """Tokens per second while reading a prompt; None where speed was not measured."""
    decode_tokens_per_second: float | None = Field(None, gt=0)
    """Tokens per second while generating; None where speed was not measured."""


class Comparison(Strict):
    """The compressed model against the dense one, on the same windows of text."""

    predicts: Literal["next", "masked"] = "next"
    """Which tokens the models were asked for: each next one, or 15 % of the tokens of a
    window, drawn at random and masked together. Of masked language models, KL is the mean
    over all positions."""
    kl: float
    """Mean KL(dense || compressed) of the distributions over tokens, nats per token."""
    kl_standard_error: float = Field(ge=0)
    """One standard error of `kl` over the windows, nats per token."""
    log_perplexity_difference: float
    """Log perplexity, compressed minus dense, nats per token."""
    log_perplexity_difference_standard_error: float = Field(ge=0)
    """One standard error of that difference, paired over the windows, nats per token."""
    num_windows: int = Field(ge=1)
    """Windows of the evaluation text."""
    num_tokens: int = Field(ge=1)
    """Predicted tokens in all windows together."""
    max_seq_length: int = Field(ge=1)
    """Tokens in a window."""
    evaluation_source: str
    """Text on which perplexity and KL were measured."""
    calibration_source: str
    """Text from which the statistics for pruning came."""
    window_nll_before: list[float] = Field([])
    window_nll: list[float] = Field([])
    window_kl: list[float] = Field([])
    """Means over each window, so that two runs on the same windows can be paired."""

    @property
    def is_significant(self) -> bool:
        """Whether perplexity differs by two standard errors or more."""
        error = self.log_perplexity_difference_standard_error
        return abs(self.log_perplexity_difference) >= 2 * error and not self.is_equal

    @property
    def is_equal(self) -> bool:
        """Whether the perplexities are the same number."""
        return self.log_perplexity_difference == 0


class Candidate(Strict):
    """One way to reach the sparsity, as compared on the fitness windows."""

    num_key_value_heads: int = Field(ge=1)
    """KV groups kept in a layer."""
    num_hidden_layers: int | None = Field(None, ge=1)
    """Layers kept; None in reports from before there was a choice."""
    attention_sublayers: int | None = Field(None, ge=1)
    """Layers that keep their attention; None likewise."""
    mlp_sublayers: int | None = Field(None, ge=1)
    """Layers that keep their MLP; None likewise."""
    heads_per_group: int | None = Field(None, ge=1)
    """Query heads kept in each KV group; None in reports from before there was a choice."""
    intermediate_size: int = Field(ge=1)
    """MLP neurons kept in a layer; in each expert, where it has experts."""
    num_experts: int | None = Field(None, ge=1)
    """Experts kept in a layer; None in a model without."""
    kl: float
    """Mean KL(dense || candidate) on the fitness windows, nats per token."""
    kl_standard_error: float = Field(ge=0)
    """One standard error of `kl` over the fitness windows, nats per token."""
    chosen: bool = False
    """Whether the compressed model was made this way."""


class SearchedWidths(Strict):
    """What a search for widths under budgets came to."""

    budget: dict[str, float]
    """By name, the share of what the dense model costs that was allowed."""
    layers_differ: bool
    """Whether the widths that were found are other ones in every layer."""
    generations: int | None = Field(None, ge=0)
    """Of the evolution; None where only widths that all layers share were compared."""
    kl: float | None = None
    """KL of the best widths by layer on held-out fitness text, nats per token; None likewise."""
    kl_of_uniform: float | None = None
    """The same of the best widths that all layers share."""
    kl_difference: float | None = None
    """The former minus the latter."""
    kl_difference_standard_error: float | None = None
    """Paired over windows."""


class Pruning(Strict):
    """How the model was pruned."""

    sparsity_requested: float = Field(ge=0, lt=1)
    """Share of the non-embedding parameters that was to be removed."""
    sparsity_achieved: float = Field(ge=0, lt=1)
    """Share of the non-embedding parameters that was removed."""
    criterion: str
    """How units were ranked."""
    fold: bool
    """Whether removed units were folded into the kept ones."""
    expert_criterion: str | None = None
    """How experts were ranked; None where they were not to be removed."""
    experts: Literal["drop", "merge"] | None = None
    """What became of the experts that were removed; None likewise."""
    hidden_size_before: int | None = Field(None, ge=1)
    """Channels of the residual stream of the dense model; None where all stay."""
    hidden_size: int | None = Field(None, ge=1)
    """Channels kept; None where all stay."""
    channel_criterion: str | None = None
    """How they were ranked; None where all stay."""
    num_calibration_tokens: int = Field(ge=0)
    """Tokens that the statistics were collected on."""
    search: SearchedWidths | None = None
    """None where the widths were not searched for."""
    candidates: list[Candidate] = Field([])
    """What was compared before the choice; empty where there was nothing to choose."""
    whole_by_kl: bool = True
    """Whether KL decided which layers and sub-layers went as a whole; a plan made elsewhere
    says so itself."""


class LayerMetrics(Strict):
    """One decoder layer of the dense model: its widths, all 0 where it was dropped, and the
    error that pruning made in it.

    Errors are the squared error of the output on the calibration text divided by the energy
    of what it was fitted to: its own dense output or, with `correction`, something between
    that and what leads the residual stream back to the dense model's (0 = exact, 1 = as bad
    as an output of zeros). They are None where nothing was removed.
    """

    layer: int = Field(ge=0)
    """Index of the decoder layer, from 0."""
    intermediate_size_before: int = Field(ge=1)
    """MLP neurons of the dense model; in each expert, where the model has experts."""
    intermediate_size: int = Field(ge=0)
    """MLP neurons kept."""
    num_key_value_heads_before: int = Field(ge=1)
    """KV groups of the dense model."""
    num_key_value_heads: int = Field(ge=0)
    """KV groups kept."""
    heads_per_group_before: int | None = Field(None, ge=1)
    """Query heads of each KV group of the dense model."""
    heads_per_group: int | None = Field(None, ge=0)
    """Query heads kept in each kept KV group."""
    num_experts_before: int | None = Field(None, ge=1)
    """Experts of the dense model; None in a layer without."""
    num_experts: int | None = Field(None, ge=0)
    """Experts kept; None in a layer without."""
    routed_share_removed: float | None = Field(None, ge=0, le=1)
    """Of all that the router gave to experts, the share of those that are gone; None where
    none is, or where the whole layer is."""
    experts_with_few_tokens: int | None = Field(None, ge=0)
    """Experts that were given fewer calibration tokens than they had neurons; None where no
    neurons of experts were removed."""
    experts_not_folded: int | None = Field(None, ge=0)
    """Experts whose removed neurons were merely dropped; None likewise."""
    mlp_error: float | None = Field(None, ge=0)
    """Relative squared error of the MLP output; of experts, of what each makes of the tokens
    routed to it times their gates, all of them together."""
    mlp_error_without_fold: float | None = Field(None, ge=0)
    """The same, had the removed neurons merely been dropped."""
    attention_error: float | None = Field(None, ge=0)
    """Relative squared error of the attention output."""
    attention_error_without_fold: float | None = Field(None, ge=0)
    """The same, had the removed KV groups merely been dropped."""
    attention_input_error: float | None = Field(None, ge=0)
    """Where channels of the residual stream were removed, relative squared error of what the
    query, key and value projections make of it, toward what they make of the dense stream."""
    attention_input_error_without_fold: float | None = Field(None, ge=0)
    """The same, had their columns of the removed channels merely been dropped."""
    mlp_input_error: float | None = Field(None, ge=0)
    """The same of the gate and up projections."""
    mlp_input_error_without_fold: float | None = Field(None, ge=0)
    """The same, had their columns of the removed channels merely been dropped."""
    mlp_damping: float | None = Field(None, ge=0)
    """Damping of the least squares for the MLP, as a share of the mean diagonal; of experts,
    the median one."""
    attention_damping: float | None = Field(None, ge=0)
    """Damping of the least squares for attention, as a share of the mean diagonal."""
    attention_input_damping: float | None = Field(None, ge=0)
    """Damping of the least squares for the query, key and value projections together."""
    mlp_input_damping: float | None = Field(None, ge=0)
    """Damping of the least squares for the gate and up projections together."""

    @property
    def is_dropped(self) -> bool:
        """Whether the compressed model lacks the whole layer."""
        return self.intermediate_size == 0 and self.num_key_value_heads == 0


class Verification(Strict):
    """The saved checkpoint, loaded in a fresh process, against the model in memory."""

    relative_logit_error: float = Field(ge=0)
    """Norm of the difference of the logits over their norm."""
    tolerance: float = Field(ge=0)
    """Largest relative error that passes."""
    generated_tokens: int = Field(ge=0)
    """Tokens that the loaded checkpoint generated as a check."""


class Metrics(Strict):
    """A whole run; what stands in metrics.json."""

    schema_version: Literal[1] = 1
    """Raised when a field changes its meaning."""
    hf_compress_version: str
    """Version of hf_compress that made the checkpoint."""
    versions: dict[str, str] = Field({})
    """Versions of other packages that took part, such as torch, by name."""
    base_model: str
    """Hub id of the dense model, or the name of its folder."""
    has_modeling_files: bool = False
    """Whether layers differ, so that the checkpoint brings its modelling files."""
    before: ModelMetrics
    """The dense model."""
    after: ModelMetrics
    """The compressed model."""
    comparison: Comparison
    pruning: Pruning | None = None
    """None where nothing was pruned."""
    refit: Refitted | None = None
    """None where nothing was refitted."""
    quantization: Quantization | None = None
    """None where weights are stored in full."""
    distillation: Distilled | None = None
    """None where nothing was distilled."""
    zeroing: Zeroing | None = None
    """None where no single weights were zeroed."""
    layers: list[LayerMetrics] = Field([])
    """One entry for every decoder layer of the dense model, in order."""
    seconds: dict[str, float] = Field({})
    """Wall-clock seconds of each stage, in the order in which they ran."""
    peak_memory_bytes: int | None = Field(None, ge=0)
    """Peak memory of the run; None where the device does not tell."""
    device: str
    """Where the run and its speed measurements took place."""
    verification: Verification | None = None
    """None where the checkpoint was not verified."""

    @property
    def removed_share(self) -> float:
        """Share of the non-embedding parameters that is gone (0 to 1)."""
        return 1 - self.after.non_embedding_parameters / self.before.non_embedding_parameters

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the compressed model over that of the dense one."""
        return self.after.perplexity / self.before.perplexity

    @property
    def perplexity_ratio_range(self) -> tuple[float, float]:
        """The ratio two standard errors down and up."""
        comparison = self.comparison
        reach = 2 * comparison.log_perplexity_difference_standard_error
        difference = comparison.log_perplexity_difference
        return math.exp(difference - reach), math.exp(difference + reach)


def parse_metrics(raw: dict[str, Any]) -> Metrics:
    """Validate metrics given as a dict.

    Raises:
        CheckpointError: an unknown or missing key, or an impossible value, with its path.
    """
    try:
        return Metrics.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"the metrics are not valid:\n{_explain(error)}") from error


def load_metrics(path: str | Path) -> Metrics:
    """Read metrics.json.

    Raises:
        CheckpointError: the file cannot be read or is not what `save_metrics` writes.
    """
    try:
        return Metrics.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read the metrics {path}: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(
            f"{path} does not hold the metrics of a run; run its recipe again to write them:\n"
            f"{_explain(error)}"
        ) from error


def save_metrics(metrics: Metrics, path: str | Path) -> None:
    """Write metrics.json, indented, every field present."""
    Path(path).write_text(metrics.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _explain(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    where = [".".join(str(part) for part in fault["loc"]) or "file" for fault in faults]
    return "\n".join(
        f"  {place}: {fault['msg']}" for place, fault in zip(where, faults, strict=True)
    )
