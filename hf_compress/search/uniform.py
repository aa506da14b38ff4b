"""Plans whose layers are all alike, under any budgets: the widest MLP for each split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.families import native_config
from hf_compress.model.surgery import Dimensions
from hf_compress.plan import Plan
from hf_compress.search.costs import Costs
from hf_compress.search.space import Genome

MAX_CANDIDATES = 6


def uniform_plans(
    config: PretrainedConfig, costs: Costs, limits: Mapping[str, float], *, layers: bool
) -> list[Plan]:
    """Native plans within the limits, the ones that keep the most of everything first.

    Args:
        layers: whether whole layers may go too; which, is left open.

    Raises:
        RecipeError: there is none.
    """
    found: list[tuple[int, int, int]] = []
    for shape in _shapes(config, costs, limits, layers):
        dominated = any(all(a >= b for a, b in zip(o, shape, strict=True)) for o in found)
        if not dominated:
            found.append(shape)
    if not found:
        costs.check(limits)
        raise RecipeError(
            "no widths that all layers share meet the budgets; set uniform: false, raise one, or "
            "allow more structures"
        )
    count = len(found)
    some = [found[at * count // MAX_CANDIDATES] for at in range(min(count, MAX_CANDIDATES))]
    if count <= MAX_CANDIDATES:
        some = found
    return [Plan.uniform(config.model_type, kept, width, groups) for kept, groups, width in some]


def genome_of(costs: Costs, plan: Plan) -> Genome:
    """A plan that keeps all layers, all alike."""
    widths = plan.widths
    return costs.space.nearest(widths.num_key_value_heads, widths.intermediate_size)


def _shapes(
    config: PretrainedConfig, costs: Costs, limits: Mapping[str, float], layers: bool
) -> Iterator[tuple[int, int, int]]:
    """Layers, KV groups and the widest MLP, from all layers and groups downwards."""
    space, dims = costs.space, Dimensions.of(config)
    attention = sorted({g for c in space.choices if c.kind == "attention" for g in c.levels} - {0})
    mlp = sorted({w for c in space.choices if c.kind == "mlp" for w in c.levels} - {0})
    fewest = 1 if layers else config.num_hidden_layers
    for kept in range(config.num_hidden_layers, fewest - 1, -1):
        for groups in reversed(attention):
            if native_config(config, dims.intermediate_size, groups) is None:
                continue
            for width in reversed(mlp):
                genome = space.nearest(groups, width)
                if all(
                    _total(costs, name, genome, kept) <= limit for name, limit in limits.items()
                ):
                    yield kept, groups, width
                    break


def _total(costs: Costs, name: str, genome: Genome, kept: int) -> float:
    """What so many layers of these widths cost, on the average of the layers."""
    every = costs.space.num_layers
    change = costs.total(name, genome) - costs.dense[name]
    return costs.dense[name] - (every - kept) * costs.layer[name] + kept / every * change
