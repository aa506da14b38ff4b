"""What a genome costs: sums over its sub-layers, relative to the dense model.

Sizes are counted on models without weights at each level, not by formulas of our own; latencies
come from `latency.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import meta_model
from hf_compress.model.families import family_of
from hf_compress.model.parameters import block_sizes, count_parameters, kv_bytes_per_token
from hf_compress.model.surgery import Dimensions
from hf_compress.plan import Plan
from hf_compress.pruning.templates import planned_config
from hf_compress.search.latency import Latencies
from hf_compress.search.space import Choice, Genome, Kind, Space, layer_at, stack

BYTES_AND_COUNTS = (
    "parameters",
    "non_embedding_parameters",
    "weight_bytes",
    "kv_bytes_per_token",
    "flops_per_token",
)
LATENCIES = ("prefill_latency", "decode_latency")


@dataclass(frozen=True)
class Costs:
    """Costs of every level.

    Attributes:
        space: whose levels they are.
        dense: by name, what the dense model costs.
        changes: by name, for each choice of the space, what each of its levels costs more than
            the dense one (mostly less than 0).
        layer: by name, what one whole layer costs.
    """

    space: Space
    dense: Mapping[str, float]
    changes: Mapping[str, Sequence[np.ndarray]]
    layer: Mapping[str, float]

    def total(self, name: str, genome: Genome) -> float:
        """What a genome costs."""
        changes = zip(self.changes[name], genome, strict=True)
        return self.dense[name] + float(sum(of[level] for of, level in changes))

    def within(self, genome: Genome, limits: Mapping[str, float]) -> bool:
        """Whether a genome keeps all limits."""
        return all(self.total(name, genome) <= limit for name, limit in limits.items())

    def check(self, limits: Mapping[str, float]) -> None:
        """Raise RecipeError, with how far one can go, for a limit that no genome keeps."""
        for name, limit in limits.items():
            least = self.dense[name] + float(sum(of.min() for of in self.changes[name]))
            if least > limit:
                raise RecipeError(
                    f"budget {name} of {limit:,.6g} ({limit / self.dense[name]:.3f} of the dense "
                    f"model's {self.dense[name]:,.6g}) is out of reach: with these structures at "
                    f"least {least:,.6g} ({least / self.dense[name]:.3f}) remain. Raise it, or "
                    "allow more structures or a smaller round_to"
                )


def count_costs(config: PretrainedConfig, space: Space, dtype: torch.dtype, context: int) -> Costs:
    """Sizes, KV cache and arithmetic of every level.

    Args:
        context: tokens that a token attends to, for `flops_per_token`.
    """
    counter = _Counter(config, dtype, context)
    dense = counter.dense
    changes: dict[str, list[np.ndarray]] = {name: [] for name in BYTES_AND_COUNTS}
    for choice in space.choices:
        found = [counter.change(choice, level) for level in choice.levels]
        for name in BYTES_AND_COUNTS:
            changes[name].append(np.array([each[name] for each in found], dtype=float))
    return Costs(space, dense, changes, counter.layer)


def with_latencies(costs: Costs, found: Latencies) -> Costs:
    """The same with what was timed."""
    changes, dense, layer = dict(costs.changes), dict(costs.dense), dict(costs.layer)
    for name in LATENCIES:
        dense[name], layer[name] = found.dense[name], found.layer[name]
        changes[name] = [
            np.array([found.change(name, choice.kind, level) for level in choice.levels])
            for choice in costs.space.choices
        ]
    return Costs(costs.space, dense, changes, layer)


class _Counter:
    """Counts on models without weights, one a level."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, context: int) -> None:
        self._config, self._dtype, self._context = config, dtype, context
        self._family = family_of(config)
        model = meta_model(config, dtype)
        count = count_parameters(model)
        self._sizes = block_sizes(model, self._family)
        self._found: dict[tuple[Kind, int], int] = {}
        dims = Dimensions.of(config)
        head = config.vocab_size * config.hidden_size
        self.dense = {
            "parameters": float(count.total),
            "non_embedding_parameters": float(count.non_embedding),
            "weight_bytes": float(count.total * dtype.itemsize),
            "kv_bytes_per_token": float(kv_bytes_per_token(config, dtype.itemsize)),
            "flops_per_token": 2.0 * (sum(self._sizes) + head)
            + config.num_hidden_layers * dims.num_key_value_heads * self._attending,
        }

    @property
    def layer(self) -> dict[str, float]:
        """What one whole layer costs."""
        groups = Dimensions.of(self._config).num_key_value_heads
        return self._costs(float(min(self._sizes)), groups)

    @property
    def _attending(self) -> float:
        """FLOPs of one KV group: scores and weighted sum over the context."""
        return 4.0 * self._context * Dimensions.of(self._config).group_width

    def change(self, choice: Choice, level: int) -> dict[str, float]:
        """What one sub-layer at a level costs more than the dense one."""
        dims = Dimensions.of(self._config)
        parameters = float(self._size_at(choice.kind, level) - self._sizes[-1])
        groups = level - dims.num_key_value_heads if choice.kind == "attention" else 0
        return self._costs(parameters, groups)

    def _costs(self, parameters: float, groups: int) -> dict[str, float]:
        """Of so many parameters in blocks, and of KV groups."""
        head_dim, itemsize = Dimensions.of(self._config).head_dim, self._dtype.itemsize
        return {
            "parameters": parameters,
            "non_embedding_parameters": parameters,
            "weight_bytes": parameters * itemsize,
            "kv_bytes_per_token": 2.0 * groups * head_dim * itemsize,
            "flops_per_token": 2 * parameters + groups * self._attending,
        }

    def _size_at(self, kind: Kind, level: int) -> int:
        """Parameters of the last layer with one sub-layer at a level, the layers being alike."""
        if (kind, level) not in self._found:
            last = self._config.num_hidden_layers - 1
            layers = stack(self._config, layer_at(self._config, kind, level), 2)
            plan = Plan(model_type=self._config.model_type, layers=layers, kept_layers=[0, last])
            model = meta_model(planned_config(self._config, plan), self._dtype)
            self._found[kind, level] = block_sizes(model, self._family)[-1]
        return self._found[kind, level]
