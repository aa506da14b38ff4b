"""The table of model families: how each names the parts that can be cut.

A family is data. Nothing here looks at a module to guess what it is: a `model_type` that
is not in `FAMILIES` is refused, and adding one means adding an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    MistralConfig,
    PretrainedConfig,
)

from hf_compress.errors import DataError, ModelError
from hf_compress.model.layers import dense_type

Segments = tuple[str, ...]
"""What the output rows of a linear layer hold, in order: `query` (query heads), `kv` (key
or value heads) or `neurons`. A fused projection has several segments."""


def _always(config: PretrainedConfig) -> bool:
    return True


def _never(config: PretrainedConfig) -> bool:
    return False


class Sublayer(NamedTuple):
    """Linear layers of a block that read one tensor, and so share its Gram matrix."""

    linears: tuple[str, ...]
    """Their names, relative to the block."""
    in_attention: bool
    """Whether they are in the attention half of the block, or in the MLP half."""
    norm: str | None
    """The norm whose output they read where a block is walked by halves, or None for an output
    layer."""


@dataclass(frozen=True)
class NeuronAxis:
    """Where the neurons of the experts lie in a parameter that stacks all experts."""

    dim: int
    """The dimension that counts neurons; dimension 0 counts experts."""
    parts: int = 1
    """Entries of a neuron: 2 where the rows of gate and up are in one parameter."""
    interleaved: bool = False
    """Whether they stand side by side, and not all of the first part before the second."""


def _every_layer(config: PretrainedConfig, index: int) -> bool:
    return True


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP; names relative to the block."""

    router: tuple[str, ...] = ("mlp.gate.weight",)
    """Parameters of the router, one row an expert."""
    module: str = "mlp.experts"
    """Called with tokens [T, D], the experts of each [T, K] and their gates [T, K]."""
    parameters: dict[str, NeuronAxis | None] = field(
        default_factory=lambda: {
            "mlp.experts.gate_up_proj": NeuronAxis(1, parts=2),
            "mlp.experts.down_proj": NeuronAxis(2),
        }
    )
    """Parameters that stack all experts in dimension 0; None where neurons own no part of one."""
    output: str = "mlp.experts.down_proj"
    """Of these, the weight of the output layer."""
    width: str = "moe_intermediate_size"
    """Field of the configuration: neurons of one expert."""
    in_layer: Callable[[PretrainedConfig, int], bool] = _every_layer
    """Whether the layer of an index has experts; the others have an ordinary MLP."""


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder block, relative to the block."""

    layers: str = "model.layers"
    """The list of blocks, relative to the language model."""
    masked: bool = False
    """Whether it is an encoder that predicts masked tokens, and no causal language model."""
    attention_inputs: dict[str, Segments] = field(
        default_factory=lambda: {
            "self_attn.q_proj": ("query",),
            "self_attn.k_proj": ("kv",),
            "self_attn.v_proj": ("kv",),
        }
    )
    """Linear layers whose output rows belong to heads; needed only where heads are cut."""
    attention_reads: tuple[str, ...] = ()
    """Where those are not named: the linear layers that read what the attention reads."""
    attention_output: str = "self_attn.o_proj"
    """Linear layer whose input columns belong to query heads."""
    head_parameters: tuple[str, ...] = ()
    """Parameters with one entry for each query head."""
    mlp_inputs: dict[str, Segments] = field(
        default_factory=lambda: {"mlp.gate_proj": ("neurons",), "mlp.up_proj": ("neurons",)}
    )
    mlp_output: str = "mlp.down_proj"
    attention: str = "self_attn"
    mlp: str = "mlp"
    """The two modules whose outputs a block adds to the residual stream, in this order,
    the second seeing the sum that the first has made. Where no heads are cut, blocks are not
    walked by halves, and nobody asks for these two nor for their norms."""
    mlp_gives_weights: bool = False
    """Whether the second gives the router's weights beside its output."""
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    """The norms through which these two modules read the residual stream."""
    cuts_heads: bool = True
    """Whether the native class can have fewer heads of the same width. Where it takes their
    number times their width for `hidden_size`, only neurons can go."""
    transposed: bool = False
    """Whether these linear layers store their weights [in, out] (`Conv1D`)."""
    width: str = "intermediate_size"
    """Field of the configuration: MLP neurons of a layer. None says 4 * `hidden_size`."""
    experts: Experts | None = None
    """For a mixture of experts; the names of the MLP above, and its width, are then those of a
    layer that has none."""
    key_value_heads: str = "num_key_value_heads"
    """Field of the configuration: KV groups of a layer."""
    learned_positions: bool = False
    """Whether there is an embedding for `max_position_embeddings` positions and no more."""
    refuses: tuple[str, ...] = ()
    """Fields of the configuration that make another kind of model of it when they are true."""
    tied_to_index: dict[str, object] = field(default_factory=dict)
    """Fields of the configuration by which a layer's index says what it computes, and the
    value at which they do not: else none can move up where a layer is dropped."""
    adds_outputs: Callable[[PretrainedConfig], bool] = _always
    """Whether what the output layers make is added to the residual stream as it is. Where a
    norm comes in between, no linear layer can lead the stream back to the dense model's, and
    a fold aims at the layer's own output, whatever `correction` says."""
    narrows_stream: bool = False
    """Whether its channels can go: RMSNorms alone read it, linear layers write to it."""
    fallback: Callable[[PretrainedConfig], PretrainedConfig | None] | None = None
    """For widths that the configuration class refuses (Llama wants heads that divide
    `hidden_size`): the same function under another native class, or None."""

    @property
    def width_field(self) -> str:
        """Field of the configuration: neurons of an MLP, or of one expert."""
        return self.experts.width if self.experts else self.width

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads such a model with its head."""
        return AutoModelForMaskedLM if self.masked else AutoModelForCausalLM

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All linear layers of a block, in the order in which a block runs them."""
        return (
            Sublayer(
                tuple(self.attention_inputs) or self.attention_reads, True, self.attention_norm
            ),
            Sublayer((self.attention_output,), True, None),
            Sublayer(tuple(self.mlp_inputs), False, self.mlp_norm),
            Sublayer((self.mlp_output,), False, None),
        )


def _llama_as_mistral(config: PretrainedConfig) -> PretrainedConfig | None:
    """A Llama without biases is a Mistral without a sliding window."""
    if config.attention_bias or config.mlp_bias:
        return None
    values = config.to_dict()
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(key, None)
    return MistralConfig(**values, sliding_window=None, architectures=["MistralForCausalLM"])


def _qwen_layer_has_experts(config: PretrainedConfig, index: int) -> bool:
    every = (index + 1) % config.decoder_sparse_step == 0
    return config.num_experts > 0 and every and index not in config.mlp_only_layers


FAMILIES: dict[str, Family] = {
    "llama": Family(narrows_stream=True, fallback=_llama_as_mistral),
    "mistral": Family(narrows_stream=True),
    "qwen2": Family(narrows_stream=True),
    "qwen3": Family(narrows_stream=True),
    "gemma2": Family(mlp_norm="pre_feedforward_layernorm", adds_outputs=_never),
    "gpt2": Family(
        layers="transformer.h",
        attention_inputs={},
        attention_reads=("attn.c_attn",),
        attention_output="attn.c_proj",
        mlp_inputs={"mlp.c_fc": ("neurons",)},
        mlp_output="mlp.c_proj",
        cuts_heads=False,
        transposed=True,
        width="n_inner",
        key_value_heads="num_attention_heads",
        learned_positions=True,
        refuses=("add_cross_attention",),
        tied_to_index={"scale_attn_by_inverse_layer_idx": False},
    ),
    "opt": Family(
        layers="model.decoder.layers",
        attention_inputs={},
        attention_reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.out_proj",
        mlp_inputs={"fc1": ("neurons",)},
        mlp_output="fc2",
        cuts_heads=False,
        width="ffn_dim",
        key_value_heads="num_attention_heads",
        learned_positions=True,
        # Without, as in opt-350m, a norm stands behind both output layers.
        adds_outputs=lambda config: config.do_layer_norm_before,
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        attention_inputs={},
        attention_reads=("attention.query_key_value",),
        attention_output="attention.dense",
        mlp_inputs={"mlp.dense_h_to_4h": ("neurons",)},
        mlp_output="mlp.dense_4h_to_h",
        cuts_heads=False,
        key_value_heads="num_attention_heads",
    ),
    "bert": Family(
        layers="bert.encoder.layer",
        masked=True,
        attention_inputs={},
        attention_reads=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_output="attention.output.dense",
        mlp_inputs={"intermediate.dense": ("neurons",)},
        mlp_output="output.dense",
        cuts_heads=False,
        key_value_heads="num_attention_heads",
        learned_positions=True,
        adds_outputs=_never,
        refuses=("is_decoder", "add_cross_attention", "chunk_size_feed_forward"),
    ),
    "gemma3_text": Family(mlp_norm="pre_feedforward_layernorm", adds_outputs=_never),
    "phi3": Family(
        attention_inputs={"self_attn.qkv_proj": ("query", "kv", "kv")},
        mlp_inputs={"mlp.gate_up_proj": ("neurons", "neurons")},
        narrows_stream=True,
    ),
    "mixtral": Family(experts=Experts(width="intermediate_size")),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe"),
        Family(
            experts=Experts(in_layer=_qwen_layer_has_experts),
            tied_to_index={"decoder_sparse_step": 1},
        ),
    ),
    "gpt_oss": Family(
        head_parameters=("self_attn.sinks",),
        mlp_gives_weights=True,
        experts=Experts(
            router=("mlp.router.weight", "mlp.router.bias"),
            parameters={
                "mlp.experts.gate_up_proj": NeuronAxis(2, parts=2, interleaved=True),
                "mlp.experts.gate_up_proj_bias": NeuronAxis(1, parts=2, interleaved=True),
                "mlp.experts.down_proj": NeuronAxis(1),
                "mlp.experts.down_proj_bias": None,
            },
            width="intermediate_size",
        ),
    ),
}


def family_of(config: PretrainedConfig) -> Family:
    """The entry of `FAMILIES` for a configuration.

    Raises:
        ModelError: the `model_type` is not known.
    """
    family = FAMILIES.get(dense_type(config))
    if family is None:
        raise ModelError(
            f"model_type {config.model_type!r} is not a family that hf_compress knows; the known "
            f"ones are {', '.join(sorted(FAMILIES))}. To add one, write an entry in FAMILIES "
            "(hf_compress/model/families.py); tests/ then covers it by itself"
        )
    for name in family.refuses:
        if getattr(config, name):
            raise ModelError(
                f"this {config.model_type} has {name}: {getattr(config, name)}, and hf_compress "
                "knows the family without it only; where the weights allow it, set it to 0"
            )
    return family


def mlp_width(config: PretrainedConfig) -> int:
    """MLP neurons of a layer, whatever the family calls them; of a mixture of experts, those
    of one expert."""
    width = getattr(config, family_of(config).width_field)
    return 4 * config.hidden_size if width is None else width


def require_positions(config: PretrainedConfig, length: int) -> None:
    """Raise DataError where a window is longer than the positions that a model has learned."""
    most = config.max_position_embeddings
    if family_of(config).learned_positions and length > most:
        raise DataError(
            f"windows of {length} tokens, and this {config.model_type} has learned {most} "
            f"positions; set max_seq_length to {most} or less"
        )


def head_dim_of(config: PretrainedConfig) -> int:
    """Width of one head; not every configuration class has the field."""
    explicit = getattr(config, "head_dim", None)
    return explicit or config.hidden_size // config.num_attention_heads


def has_experts(config: PretrainedConfig, index: int) -> bool:
    """Whether the layer of an index is a mixture of experts."""
    experts = family_of(config).experts
    return experts is not None and experts.in_layer(config, index)


def native_config(
    config: PretrainedConfig,
    intermediate_size: int,
    num_key_value_heads: int,
    heads_per_group: int | None = None,
    kept_layers: Sequence[int] | None = None,
    num_experts: int | None = None,
    hidden_size: int | None = None,
) -> PretrainedConfig | None:
    """`config` at other uniform widths, in a class that transformers loads natively.

    `head_dim` is always written, or a class would derive a wider head from fewer heads.
    `intermediate_size` is as `mlp_width` counts it. None keeps all query heads of a KV group,
    all decoder blocks, all experts, the whole residual stream.

    Returns:
        The configuration, or None where no native class can express these widths.
    """
    family = family_of(config)
    if not family.cuts_heads:
        if num_key_value_heads != getattr(config, family.key_value_heads):
            return None
        widths: dict[str, Any] = {family.width_field: intermediate_size}
        if kept_layers is not None:
            widths |= _depth(config, kept_layers)
        return type(config)(**{**config.to_dict(), **widths})
    if heads_per_group is None:
        heads_per_group = config.num_attention_heads // config.num_key_value_heads
    widths = {
        family.width_field: intermediate_size,
        "num_key_value_heads": num_key_value_heads,
        "num_attention_heads": num_key_value_heads * heads_per_group,
        "head_dim": head_dim_of(config),
        "hidden_size": hidden_size or config.hidden_size,
    }
    if kept_layers is not None:
        widths |= _depth(config, kept_layers)
    try:
        native = type(config)(**{**config.to_dict(), **widths})
        if num_experts is not None:
            # Set and not passed: the field has two names, and either may be the one stored.
            native.num_experts = num_experts
        return native
    except StrictDataclassClassValidationError:
        alternative = family.fallback(config) if family.fallback else None
    if alternative is None:
        return None
    return type(alternative)(**{**alternative.to_dict(), **widths})


def _depth(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Fields of `config` that count, list or index its decoder blocks, for the kept ones."""
    values = config.to_dict()
    fields: dict[str, Any] = {
        config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(kept)
    }
    if values.get("layer_types") is not None:
        fields["layer_types"] = [values["layer_types"][index] for index in kept]
    if values.get("max_window_layers") is not None:
        fields["max_window_layers"] = sum(index < values["max_window_layers"] for index in kept)
    if values.get("mlp_only_layers") is not None:
        dense = set(values["mlp_only_layers"])
        fields["mlp_only_layers"] = [new for new, index in enumerate(kept) if index in dense]
    return fields
