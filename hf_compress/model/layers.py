"""Where the layers of one model differ: each one's configuration, and the sub-layers it lacks.

In most models they do not; what is asked of a layer is then what the configuration says of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hf_compress.model.families import Family, Sublayer

PREFIX = "hfc_"
"""Of the `model_type` of a checkpoint whose layers differ, before that of its dense model."""


def dense_type(config: PretrainedConfig) -> str:
    """The `model_type` of the dense models of a family."""
    return config.model_type.removeprefix(PREFIX)


def layer_config(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """The configuration of one decoder layer, with its own widths."""
    return config.per_layer_config[index]


def skipped(config: PretrainedConfig, index: int) -> frozenset[str]:
    """Which of `attention` and `mlp` a decoder layer lacks."""
    return frozenset(getattr(layer_config(config, index), "skip", ()))


def sublayers_of(family: Family, config: PretrainedConfig, index: int) -> list[Sublayer]:
    """The linear layers that a decoder layer has, in the order in which it runs them."""
    gone = skipped(config, index)
    return [
        sublayer
        for sublayer in family.sublayers
        if ("attention" if sublayer.in_attention else "mlp") not in gone
    ]
