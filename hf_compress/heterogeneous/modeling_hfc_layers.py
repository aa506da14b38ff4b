"""Decoder layers that differ in width: layer i is built from `config.per_layer_config[i]`.

`modeling_hfc_<type>.py` beside this file names the classes of one model family. Everything
but the layers is the library's own, and so is each layer: it only gets another configuration.
A sub-layer that a layer's entry lists in `skip` ("attention", "mlp") is left out, with its norms.
"""

# Mixins over classes whose attributes a type checker does not see.
# mypy: disable-error-code="attr-defined,call-arg,misc"

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

Norms = Mapping[str, tuple[str, ...]]
"""By the name of a sub-layer, its norms."""
NORMS: Norms = {"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}


class LayerConfig:
    """One layer's configuration; how attention is computed is still up to the whole model's."""

    def __init__(self, model_config: PretrainedConfig, layer_config: PretrainedConfig) -> None:
        self.model_config, self.layer_config = model_config, layer_config

    @property
    def _attn_implementation(self) -> str:
        return self.model_config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name in ("model_config", "layer_config") or name.startswith("__"):
            raise AttributeError(name)  # while it is being copied, there is nothing to ask
        return getattr(self.layer_config, name)


class Skipped(nn.Module):
    """Stands where a sub-layer was left out, and adds nothing to the residual stream."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.is_attention = name == "attention"

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.is_attention else nothing


@contextmanager
def without_layers(config: PretrainedConfig) -> Iterator[None]:
    """Inside, the library's constructors build everything but the layers."""
    count, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = count


def build_layer(config: PretrainedConfig, index: int, layer_class: Any, norms: Norms) -> nn.Module:
    """One decoder layer of the library's, at its own widths."""
    layer_config = config.per_layer_config[index]
    layer = layer_class(layer_config, index)
    layer.self_attn.config = LayerConfig(config, layer_config)
    for name in getattr(layer_config, "skip", ()):
        setattr(layer, "self_attn" if name == "attention" else "mlp", Skipped(name))
        for norm in norms[name]:
            setattr(layer, norm, nn.Identity())
    return layer


class HFCModel:
    """What the model without its head adds to the library's; the family names `layer_class`."""

    layer_class: Any
    norms: Norms = NORMS

    def __init__(self, config: PretrainedConfig) -> None:
        with without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList(
            build_layer(config, index, self.layer_class, self.norms)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()


class HFCForCausalLM:
    """The same with the language-model head; the family names `model_class`."""

    model_class: Any

    def __init__(self, config: PretrainedConfig) -> None:
        with without_layers(config):
            super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()


def attention_that_stays(layer_types: Sequence[str] | None, num_layers: int) -> list[int]:
    """Indices of layers whose attention cannot be skipped: the first of each layer type.

    The library asks the cache of that layer how many tokens it holds, and builds the masks and
    positions of all layers of the type from the answer. A layer without attention caches
    nothing: the answer would be 0, and every cached token of a padded batch silently wrong.
    """
    kinds = layer_types or ["attention"] * num_layers
    return sorted({kinds.index(kind) for kind in kinds})


class HFCConfig:
    """What the configuration adds to the library's: checks layer by layer."""

    def validate_architecture(self) -> None:
        """In the place of the library's check, which reads one width for all layers, and wants
        heads that divide hidden_size; here head_dim is always written, and need not do so."""
        kinds = getattr(self, "layer_types", None)
        stays = attention_that_stays(kinds, self.num_hidden_layers)
        for index, layer in enumerate(self.per_layer_config):
            skip, heads = getattr(layer, "skip", ()), layer.num_attention_heads
            if unknown := set(skip) - set(NORMS):
                raise ValueError(f"layer {index} skips {sorted(unknown)}; known: {list(NORMS)}")
            if "attention" in skip and index in stays:
                raise ValueError(
                    f"layer {index} skips attention, but it is the first of its layer type: the "
                    "number of cached tokens is read from its cache, so that decoding would be "
                    "silently wrong; skip the attention of another layer"
                )
            if heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index} has {heads} query heads, which "
                    f"{layer.num_key_value_heads} KV heads do not divide"
                )

    def validate_rope(self) -> None:
        """As for the dense model, whose widths the global fields still hold."""
        dense = copy.copy(self)
        dense.per_layer_config = None
        super(HFCConfig, dense).validate_rope()
