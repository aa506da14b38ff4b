"""The table of model families: how each names the parts that can be cut.

A family is data. Nothing here looks at a module to guess what it is: a `model_type` that
is not in `FAMILIES` is refused, and adding one means adding an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import MistralConfig, PretrainedConfig

from hf_compress.errors import ModelError

Segments = tuple[str, ...]
"""What the output rows of a linear layer hold, in order: `query` (query heads), `kv` (key
or value heads) or `neurons`. A fused projection has several segments."""


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
    """Parameters that stack all experts along their first dimension; None where neurons own
    no part of one."""
    width: str = "moe_intermediate_size"
    """Field of the configuration: neurons of one expert."""
    in_layer: Callable[[PretrainedConfig, int], bool] = _every_layer
    """Whether the layer of an index has experts; the others have an ordinary MLP."""


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder block, relative to the block."""

    layers: str = "model.layers"
    """The list of decoder blocks, relative to the causal LM."""
    attention_inputs: dict[str, Segments] = field(
        default_factory=lambda: {
            "self_attn.q_proj": ("query",),
            "self_attn.k_proj": ("kv",),
            "self_attn.v_proj": ("kv",),
        }
    )
    """Linear layers whose output rows belong to heads."""
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
    the second seeing the sum that the first has made."""
    mlp_gives_weights: bool = False
    """Whether the second gives the router's weights beside its output."""
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    """The norms through which these two modules read the residual stream."""
    experts: Experts | None = None
    """For a mixture of experts; the names of the MLP above are then those of a layer that
    has none."""
    fallback: Callable[[PretrainedConfig], PretrainedConfig | None] | None = None
    """For widths that the configuration class refuses (Llama wants heads that divide
    `hidden_size`): the same function under another native class, or None."""


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
    "llama": Family(fallback=_llama_as_mistral),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma3_text": Family(mlp_norm="pre_feedforward_layernorm"),
    "phi3": Family(
        attention_inputs={"self_attn.qkv_proj": ("query", "kv", "kv")},
        mlp_inputs={"mlp.gate_up_proj": ("neurons", "neurons")},
    ),
    "mixtral": Family(experts=Experts(width="intermediate_size")),
    "qwen2_moe": Family(experts=Experts(in_layer=_qwen_layer_has_experts)),
    "qwen3_moe": Family(experts=Experts(in_layer=_qwen_layer_has_experts)),
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
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model_type {config.model_type!r} is not a family that hf_compress knows; the known "
            f"ones are {', '.join(sorted(FAMILIES))}. To add one, write an entry in FAMILIES "
            "(hf_compress/model/families.py); tests/ then covers it by itself"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the model is already quantized, and codes cannot be pruned; "
            "give the unquantized checkpoint"
        )
    return family


def head_dim_of(config: PretrainedConfig) -> int:
    """Width of one head; not every configuration class has the field."""
    explicit = getattr(config, "head_dim", None)
    return explicit or config.hidden_size // config.num_attention_heads


def mlp_width(config: PretrainedConfig) -> int:
    """Neurons of the MLP of a layer; of a mixture of experts, those of one expert."""
    experts = family_of(config).experts
    return getattr(config, experts.width if experts else "intermediate_size")


def has_experts(config: PretrainedConfig, index: int) -> bool:
    """Whether the layer of an index is a mixture of experts."""
    experts = family_of(config).experts
    return experts is not None and experts.in_layer(config, index)


def native_config(
    config: PretrainedConfig,
    intermediate_size: int,
    num_key_value_heads: int,
    num_experts: int | None = None,
) -> PretrainedConfig | None:
    """`config` at other uniform widths, in a class that transformers loads natively.

    `head_dim` is always written: without it a class would derive a wider head from fewer
    heads.

    Args:
        intermediate_size: as `mlp_width` counts it.
        num_experts: None keeps their number.

    Returns:
        The configuration, or None where no native class can express these widths.
    """
    family = family_of(config)
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    widths = {
        family.experts.width if family.experts else "intermediate_size": intermediate_size,
        "num_key_value_heads": num_key_value_heads,
        "num_attention_heads": num_key_value_heads * heads_per_group,
        "head_dim": head_dim_of(config),
    }
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
