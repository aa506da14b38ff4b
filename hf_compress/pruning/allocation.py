"""Which uniform widths reach a sparsity: every split between layers, KV groups, query heads,
experts and MLP neurons."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import meta_model
from hf_compress.model.experts import expert_parameters
from hf_compress.model.families import family_of, has_experts, native_config
from hf_compress.model.parameters import block_sizes, count_parameters
from hf_compress.model.surgery import Dimensions, unit_parameters
from hf_compress.plan import Plan
from hf_compress.pruning.channels import narrow_plan, narrows
from hf_compress.pruning.ignore import allowed_structures
from hf_compress.recipe import Prune, Structure

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 6
"""Splits that are compared by KL; more are thinned out."""
OF_HEADS = ("kv_groups", "query_heads")
"""Structures that only families have whose heads can be cut."""


class Shape(NamedTuple):
    """What is kept: layers, and in each of them KV groups, query heads of a group, experts (1
    in a model without) and neurons of the MLP or of an expert."""

    layers: int
    groups: int
    heads: int
    experts: int
    neurons: int


def candidate_plans(config: PretrainedConfig, settings: Prune) -> list[Plan]:
    """Uniform plans that remove at least `settings.sparsity` of the non-embedding
    parameters, neurons only first. Which layers stay is left open where some go.

    Raises:
        RecipeError: the sparsity is out of reach (the message says how far it goes), or the
            model has not the structures that may go, or cannot be cut along them.
    """
    if narrows(settings):
        return [narrow_plan(config, settings)]
    _check_structures(config, settings)
    budget = _Budget.of(config, _possible(config, settings))
    shapes = _worthwhile(list(budget.shapes()))
    if not shapes:
        raise RecipeError(budget.out_of_reach())
    return [
        Plan.uniform(
            config.model_type,
            shape.layers,
            shape.neurons,
            shape.groups,
            shape.heads if shape.heads < budget.dense.heads else None,
            shape.experts if any(budget.mixed) else None,
        )
        for shape in _thin(shapes, budget.dense)
    ]


def _check_structures(config: PretrainedConfig, settings: Prune) -> None:
    """Raise RecipeError for what such a model has not, or cannot lose."""
    family, kind = family_of(config), config.model_type
    layers = range(config.num_hidden_layers)
    if "experts" in settings.structures and not any(has_experts(config, at) for at in layers):
        raise RecipeError(f"structures names experts, and a {kind} has none; leave them out")
    if "mlp_neurons" in settings.structures and family.experts is not None:
        raise RecipeError(
            f"structures names mlp_neurons, but those of a {kind} lie inside its experts, where "
            "single neurons cannot be removed yet; say structures: [experts, kv_groups]"
        )
    for name, harmless in family.tied_to_index.items():
        if "layers" in settings.structures and getattr(config, name) != harmless:
            raise RecipeError(
                f"structures names layers, but with {name}: {getattr(config, name)} the index of a "
                f"layer of this {kind} says what it computes, and those behind a dropped one "
                "would become others; leave layers out"
            )


def _possible(config: PretrainedConfig, settings: Prune) -> Prune:
    """The settings without the structures that this family has not."""
    refused = [name for name in settings.structures if name in OF_HEADS]
    if family_of(config).cuts_heads or not refused:
        return settings
    reason = (
        f"the heads of {config.model_type} cannot be cut: its class takes their number times their "
        "width for hidden_size"
    )
    left: list[Structure] = [name for name in settings.structures if name not in OF_HEADS]
    if not left:
        raise RecipeError(f"{reason}; set structures to [mlp_neurons]")
    logger.warning("%s; pruned without %s", reason, ", ".join(refused))
    return settings.model_copy(update={"structures": left})


@dataclass(frozen=True)
class _Budget:
    """What a model has and what of it may go; sizes in parameters."""

    config: PretrainedConfig
    settings: Prune
    structures: frozenset[Structure]
    dense: Shape
    fewest: Shape
    """As far as the structures allow, native widths or not."""
    sizes: list[int]
    """Of each block."""
    neuron: int
    group: dict[int, int]
    """Of one KV group, by its number of query heads."""
    mixed: list[bool]
    """Whether each block has experts."""
    expert: int
    must_go: float

    @classmethod
    def of(cls, config: PretrainedConfig, settings: Prune) -> _Budget:
        dims = Dimensions.of(config)
        model = meta_model(config, torch.float32)
        family = family_of(config)
        block = model.get_submodule(f"{family.layers}.0")
        structures, protected = allowed_structures(model, settings)
        mixed = [has_experts(config, index) for index in range(config.num_hidden_layers)]
        expert = 0
        if family.experts and any(mixed):
            of_experts = model.get_submodule(f"{family.layers}.{mixed.index(True)}")
            expert = expert_parameters(of_experts, family.experts)
        dense = Shape(
            config.num_hidden_layers,
            dims.num_key_value_heads,
            dims.heads_per_group,
            config.num_experts if expert else 1,
            dims.intermediate_size,
        )
        fewest = Shape(
            max(1, len(protected)) if "layers" in structures else dense.layers,
            1 if "kv_groups" in structures else dense.groups,
            1 if "query_heads" in structures else dense.heads,
            # The router gives each token so many.
            config.num_experts_per_tok if "experts" in structures else dense.experts,
            min(settings.round_to, dense.neurons) if "mlp_neurons" in structures else dense.neurons,
        )
        return cls(
            config,
            settings,
            structures,
            dense,
            fewest,
            sizes=block_sizes(model, family),
            neuron=unit_parameters(block, family, dims)[0],
            group={
                heads: unit_parameters(block, family, replace(dims, heads_per_group=heads))[1]
                for heads in range(fewest.heads, dense.heads + 1)
            },
            mixed=mixed,
            expert=expert,
            must_go=settings.sparsity * count_parameters(model).non_embedding,
        )

    def shapes(self) -> Iterator[Shape]:
        """Everything that is native and reaches the sparsity, cheap changes first."""
        dense, fewest = self.dense, self.fewest
        enough = dense.layers - math.ceil(self.must_go / min(self.sizes))
        experts = range(dense.experts, fewest.experts - 1, -1)
        heads = [
            (groups, heads)
            for groups, heads in product(
                range(dense.groups, fewest.groups - 1, -1),
                range(dense.heads, fewest.heads - 1, -1),
            )
            if native_config(self.config, dense.neurons, groups, heads) is not None
        ]
        for layers in range(dense.layers, max(fewest.layers, enough) - 1, -1):
            for (groups, per_group), count in product(heads, experts):
                must_go = (self.must_go - self._whole_gone(layers, count)) / layers
                width = self._width(must_go - self._attention_gone(groups, per_group))
                if width is not None:
                    yield Shape(layers, groups, per_group, count, width)

    def out_of_reach(self) -> str:
        dense, fewest = self.dense, self.fewest
        most = self._whole_gone(fewest.layers, fewest.experts) + fewest.layers * (
            (dense.neurons - fewest.neurons) * self.neuron
            + self._attention_gone(fewest.groups, fewest.heads)
        )
        share = most / (self.must_go / self.settings.sparsity)
        kept = f", ignore {', '.join(self.settings.ignore)}" if self.settings.ignore else ""
        least = f" (a token takes {fewest.experts} experts)" if "experts" in self.structures else ""
        return (
            f"sparsity {self.settings.sparsity:g} would leave 0 units in a layer: with structures "
            f"{', '.join(self.settings.structures)}{kept} and round_to {self.settings.round_to}, "
            f"at most {share:.3f} of the non-embedding parameters of this "
            f"{self.config.model_type} can go{least}. Lower the sparsity or round_to, or allow "
            "more structures"
        )

    def _whole_gone(self, layers: int, experts: int) -> int:
        """Parameters that go with dropped layers, whichever they turn out to be, and with
        the experts of those that stay."""
        lost = [(self.dense.experts - experts) * self.expert * mixed for mixed in self.mixed]
        more = sorted(size - of_experts for size, of_experts in zip(self.sizes, lost, strict=True))
        return sum(lost) + sum(more[: self.dense.layers - layers])

    def _attention_gone(self, groups: int, heads: int) -> int:
        """Parameters of one layer that go with its KV groups and query heads."""
        return self.dense.groups * self.group[self.dense.heads] - groups * self.group[heads]

    def _width(self, must_go: float) -> int | None:
        """Widest legal MLP that still removes `must_go` parameters of a layer, or None."""
        dense, round_to = self.dense.neurons, self.settings.round_to
        if must_go <= 0:
            return dense
        if "mlp_neurons" not in self.structures:
            return None
        width = int((dense - must_go / self.neuron) // round_to) * round_to
        return width if width >= 1 else None


def _worthwhile(shapes: list[Shape]) -> list[Shape]:
    """Without those that keep no more of anything than another one does."""
    return [
        shape
        for shape in shapes
        if not any(
            other != shape and all(more >= have for more, have in zip(other, shape, strict=True))
            for other in shapes
        )
    ]


def _thin(shapes: list[Shape], dense: Shape) -> list[Shape]:
    """At most `MAX_CANDIDATES`: neurons only, then what takes from one other structure, in
    turns (layers, KV groups, query heads, experts), the cheapest first; mixtures where there
    is room."""
    if len(shapes) <= MAX_CANDIDATES:
        return shapes
    rays: dict[tuple[bool, ...], list[Shape]] = {}
    for shape in shapes:
        cut = tuple(have < all_ for have, all_ in zip(shape[:4], dense[:4], strict=True))
        rays.setdefault(cut, []).append(shape)
    chosen = rays.pop((False,) * 4, [])
    single = [rays[cut] for cut in sorted(rays, reverse=True) if sum(cut) == 1]
    places = MAX_CANDIDATES - len(chosen)
    turns = sorted((turn, ray) for ray, of in enumerate(single) for turn in range(len(of)))
    room = Counter(ray for _, ray in turns[:places])
    for ray, shapes_of_ray in enumerate(single):
        chosen += _spread(shapes_of_ray, room[ray])
    mixed = [shape for cut, ray in rays.items() if sum(cut) > 1 for shape in ray]
    mixed.sort(key=lambda shape: -sum(have / all_ for have, all_ in zip(shape, dense, strict=True)))
    chosen += _spread(mixed, min(MAX_CANDIDATES - len(chosen), len(mixed)))
    return [shape for shape in shapes if shape in chosen]


def _spread(items: Sequence[Shape], count: int) -> list[Shape]:
    """`count` of the items, evenly, from the first on."""
    return [items[index * len(items) // count] for index in range(count)]
