"""Counting: parameters, bytes and KV cache of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.model.families import Family, family_of
from hf_compress.model.layers import skipped
from hf_compress.model.surgery import Dimensions


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; tied ones count once."""

    total: int
    non_embedding: int
    """Without the token embedding and the language-model head."""


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Count a model's parameters; one on the meta device will do."""
    tied = model.config.tie_word_embeddings
    head = model.get_output_embeddings()
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
    head_size = sum(p.numel() for p in head.parameters()) if isinstance(head, nn.Module) else 0
    body = sum(p.numel() for p in model.parameters()) - embedding
    # On the meta device tied weights are two tensors, in a loaded model they are one.
    shared = (
        tied and isinstance(head, nn.Module) and head.weight is model.get_input_embeddings().weight
    )
    non_embedding = body if shared else body - head_size
    total = non_embedding + embedding + (0 if tied else head_size)
    return ParameterCount(total, non_embedding)


def block_sizes(model: PreTrainedModel, family: Family) -> list[int]:
    """Parameters of each decoder block; in some mixtures of experts they differ."""
    blocks = model.get_submodule(family.layers).children()
    return [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]


def kv_bytes_per_token(config: PretrainedConfig, itemsize: int) -> int:
    """Bytes that the KV cache grows by with each token of one sequence; an encoder has none."""
    if family_of(config).masked:
        return 0
    values = 0
    for index in range(config.num_hidden_layers):
        if "attention" not in skipped(config, index):
            dims = Dimensions.of(config, index)
            values += 2 * dims.num_key_value_heads * dims.head_dim
    return values * itemsize
