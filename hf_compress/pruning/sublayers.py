"""Which attention and MLP sub-layers go, where the plans only say how many of each.

A plan with fewer of them says so by `skip` in any layers that may lack one; `settle_sublayers`
moves these to the layers where the loss is least (see depth.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from hf_compress.model.blocks import BlockSource
from hf_compress.plan import LayerPlan, Plan
from hf_compress.pruning.depth import Drop, Part, choose_layers

PARTS: tuple[Part, Part] = ("attention", "mlp")


def lacking(plan: Plan, gone: Mapping[str, Collection[int]]) -> Plan:
    """A plan of all layers, without the `attention` and the `mlp` of those in `gone`; a layer
    that loses both is dropped."""
    layers: dict[int, LayerPlan] = {}
    for index, layer in enumerate(plan.layers):
        skip = tuple(part for part in PARTS if index in gone[part])
        if len(skip) < len(PARTS):
            layers[index] = layer.model_copy(update={"skip": skip})
    kept = list(layers) if len(layers) < len(plan.layers) else None
    return plan.model_copy(update={"layers": list(layers.values()), "kept_layers": kept})


def lacking_any(
    plan: Plan, counts: Mapping[str, int], protected: Mapping[str, Collection[int]]
) -> Plan:
    """The same with only the number of each said: the last ones that may go."""
    gone: dict[str, list[int]] = {}
    for part in PARTS:
        free = [index for index in range(len(plan.layers)) if index not in protected[part]]
        gone[part] = free[len(free) - counts[part] :]
    return lacking(plan, gone)


def num_lacking(plan: Plan, part: str, num_layers: int) -> int:
    """How many of the dense model's `attention` or `mlp` sub-layers a plan leaves out."""
    return num_layers - sum(part not in layer.skip for layer in plan.layers)


def settle_sublayers(
    source: BlockSource,
    plans: list[Plan],
    fitness_NL: torch.Tensor,
    protected: Mapping[str, frozenset[int]],
) -> tuple[list[Plan], list[Drop]]:
    """The plans with each `skip` where it costs the least, and how these were chosen.

    Each kind is chosen once, for the plan that lacks the most, and without regard to the other
    kind; the other plans lack the first ones. Plans that only drop layers are left as they are.

    Args:
        protected: layers whose `attention` and whose `mlp` stay.
    """
    count = source.config.num_hidden_layers
    open_plans = [plan for plan in plans if _lacks_any(plan)]
    drops: dict[str, list[Drop]] = {}
    for part in PARTS:
        most = max((num_lacking(plan, part, count) for plan in open_plans), default=0)
        drops[part] = []
        if most:
            drops[part] = choose_layers(source, fitness_NL, most, protected[part], part)
    settled = []
    for plan in plans:
        if _lacks_any(plan):
            gone: dict[str, set[int]] = {
                part: {drop.layer for drop in drops[part][: num_lacking(plan, part, count)]}
                for part in PARTS
            }
            plan = lacking(_all_layers(plan, count), gone)
        settled.append(plan)
    return settled, [drop for part in PARTS for drop in drops[part]]


def _lacks_any(plan: Plan) -> bool:
    """A layer that lost both its sub-layers is dropped, and its place known."""
    return plan.kept_layers is not None or any(layer.skip for layer in plan.layers)


def _all_layers(plan: Plan, count: int) -> Plan:
    return plan.model_copy(update={"layers": [plan.widths] * count, "kept_layers": None})
