"""Which uniform widths reach a sparsity: every split between layers, attention and MLP
sub-layers, KV groups, query heads, experts and MLP neurons."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.heterogeneous.auto import STEMS
from hf_compress.heterogeneous.config import heterogeneous_config
from hf_compress.model.blocks import meta_model
from hf_compress.model.experts import WIDTH_MULTIPLE, expert_neuron_parameters, expert_parameters
from hf_compress.model.families import family_of, has_experts, native_config
from hf_compress.model.layers import PREFIX
from hf_compress.model.parameters import block_sizes, count_parameters
from hf_compress.model.surgery import Dimensions, unit_parameters
from hf_compress.plan import Plan
from hf_compress.pruning.channels import narrow_plan, narrows
from hf_compress.pruning.ignore import allowed_structures, kept_sublayers
from hf_compress.pruning.sublayers import lacking, lacking_any
from hf_compress.recipe import SUBLAYERS, Prune, Structure

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 6
"""Splits that are compared by KL; more are thinned out."""
OF_HEADS = ("kv_groups", "query_heads")
"""Structures that only families have whose heads can be cut."""
OF_EXPERTS = ("experts", "expert_neurons")
"""Structures that only mixtures of experts have."""
NEURONS = frozenset({"mlp_neurons", "expert_neurons"})
"""Structures that make MLPs narrower, and so may remove what others leave to be removed."""


class Shape(NamedTuple):
    """What is kept: layers, and in each of them KV groups, query heads of a group, experts (1
    in a model without) and neurons of the MLP or of an expert. Layers are dropped, or else the
    attention or the MLP of some goes, which `attentions` and `mlps` count."""

    layers: int
    attentions: int
    mlps: int
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
    settings = _possible(config, settings)
    budget = _Budget.of(config, settings)
    shapes = _worthwhile(list(budget.shapes()))
    if not shapes:
        raise RecipeError(budget.out_of_reach())
    protected = kept_sublayers(config, settings)
    return [budget.plan(shape, protected) for shape in _thin(shapes, budget.dense)]


def _check_structures(config: PretrainedConfig, settings: Prune) -> None:
    """Raise RecipeError for what such a model has not, or cannot lose."""
    family, kind = family_of(config), config.model_type
    if kind.startswith(PREFIX):
        raise RecipeError(
            f"the layers of this {kind} differ already, and it cannot be pruned again; prune the "
            "dense model once, as far as it is to go (rounds: 1)"
        )
    layers = range(config.num_hidden_layers)
    for name in set(OF_EXPERTS) & set(settings.structures):
        if not any(has_experts(config, at) for at in layers):
            raise RecipeError(
                f"structures names {name}, and this {kind} has no experts; leave {name} out"
            )
    if "mlp_neurons" in settings.structures and family.experts is not None:
        raise RecipeError(
            f"structures names mlp_neurons, but those of a {kind} lie inside its experts, each of "
            "which chooses its own; say structures: [expert_neurons, kv_groups], or remove whole "
            "experts with [experts, kv_groups]"
        )
    if "expert_neurons" in settings.structures and settings.round_to % WIDTH_MULTIPLE:
        raise RecipeError(
            f"round_to {settings.round_to} would make experts of widths that the kernel which "
            "multiplies all experts at once does not take; set it to a multiple of "
            f"{WIDTH_MULTIPLE}"
        )
    for structure in set(SUBLAYERS) & set(settings.structures):
        if kind not in STEMS:
            raise RecipeError(
                f"structures names {structure}, and hf_compress can leave them out of "
                f"{', '.join(sorted(STEMS))} only, not of a {kind}; leave them in, or say layers"
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
    """Of one expert where there are experts."""
    group: dict[int, int]
    """Of one KV group, by its number of query heads."""
    mixed: list[bool]
    """Whether each block has experts."""
    expert: int
    sublayer: dict[str, int]
    """Of one attention and of one MLP, each with its norms; 0 where they may not go."""
    must_go: float
    sparsity: float

    @classmethod
    def of(cls, config: PretrainedConfig, settings: Prune) -> _Budget:
        dims = Dimensions.of(config)
        model = meta_model(config, torch.float32)
        family = family_of(config)
        block = model.get_submodule(f"{family.layers}.0")
        structures, kept_layers = allowed_structures(model, settings)
        mixed = [has_experts(config, index) for index in range(config.num_hidden_layers)]
        expert, neuron = 0, unit_parameters(block, family, dims)[0]
        if family.experts and any(mixed):
            of_experts = model.get_submodule(f"{family.layers}.{mixed.index(True)}")
            expert = expert_parameters(of_experts, family.experts)
            neuron = expert_neuron_parameters(of_experts, family.experts) // config.num_experts
        sublayer = {"attention": 0, "mlp": 0}
        protected = kept_sublayers(config, settings)
        if structures & SUBLAYERS.keys():
            sublayer = _sublayer_sizes(config, block_sizes(model, family)[-1])
        dense = Shape(
            config.num_hidden_layers,
            config.num_hidden_layers,
            config.num_hidden_layers,
            dims.num_key_value_heads,
            dims.heads_per_group,
            config.num_experts if expert else 1,
            dims.intermediate_size,
        )
        fewest_of = {
            name: max(1, len(protected[part])) if name in structures else dense.layers
            for name, part in SUBLAYERS.items()
        }
        fewest = Shape(
            max(1, len(kept_layers)) if "layers" in structures else dense.layers,
            fewest_of["attention_sublayers"],
            fewest_of["mlp_sublayers"],
            1 if "kv_groups" in structures else dense.groups,
            1 if "query_heads" in structures else dense.heads,
            # The router gives each token so many.
            config.num_experts_per_tok if "experts" in structures else dense.experts,
            min(settings.round_to, dense.neurons) if structures & NEURONS else dense.neurons,
        )
        return cls(
            config,
            settings,
            structures,
            dense,
            fewest,
            sizes=block_sizes(model, family),
            neuron=neuron,
            group={
                heads: unit_parameters(block, family, replace(dims, heads_per_group=heads))[1]
                for heads in range(fewest.heads, dense.heads + 1)
            },
            mixed=mixed,
            expert=expert,
            sublayer=sublayer,
            must_go=settings.share * count_parameters(model).non_embedding,
            sparsity=settings.share,
        )

    def plan(self, shape: Shape, protected: dict[str, frozenset[int]]) -> Plan:
        """The plan of a shape; which layers or sub-layers are left out is still open."""
        plan = Plan.uniform(
            self.config.model_type,
            shape.layers,
            shape.neurons,
            shape.groups,
            shape.heads if shape.heads < self.dense.heads else None,
            shape.experts if any(self.mixed) else None,
        )
        gone = {
            "attention": self.dense.layers - shape.attentions,
            "mlp": self.dense.layers - shape.mlps,
        }
        return lacking_any(plan, gone, protected) if any(gone.values()) else plan

    def shapes(self) -> Iterator[Shape]:
        """Everything that is native and reaches the sparsity, cheap changes first."""
        dense, fewest = self.dense, self.fewest
        experts = range(dense.experts, fewest.experts - 1, -1)
        heads = [
            (groups, heads)
            for groups, heads in product(
                range(dense.groups, fewest.groups - 1, -1),
                range(dense.heads, fewest.heads - 1, -1),
            )
            if native_config(self.config, dense.neurons, groups, heads) is not None
        ]
        for layers, attentions, mlps in self._depths():
            for (groups, per_group), count in product(heads, experts):
                kept = Shape(layers, attentions, mlps, groups, per_group, count, dense.neurons)
                narrowed = self._narrowed(kept)
                if narrowed is not None:
                    yield narrowed

    def _depths(self) -> Iterator[tuple[int, int, int]]:
        """How many layers, attention and MLP sub-layers stay: one kind goes at a time, or both
        kinds of sub-layers where no neurons make up for the rest."""
        all_, fewest = self.dense.layers, self.fewest
        enough = all_ - math.ceil(self.must_go / min(self.sizes))
        yield from (
            (layers, all_, all_) for layers in range(all_, max(fewest.layers, enough) - 1, -1)
        )
        attentions, mlps = (
            range(all_ - 1, fewest.attentions - 1, -1),
            range(all_ - 1, fewest.mlps - 1, -1),
        )
        yield from ((all_, kept, all_) for kept in attentions)
        yield from ((all_, all_, kept) for kept in mlps)
        if not self.structures & NEURONS:
            yield from ((all_, *kept) for kept in product(attentions, mlps))

    def _gone(self, shape: Shape) -> int:
        """Parameters that go, whichever layers or sub-layers do."""
        attention = self.sublayer["attention"] * (self.dense.layers - shape.attentions)
        narrower = shape.layers - (self.dense.layers - shape.attentions)
        attention += narrower * self._attention_gone(shape.groups, shape.heads)
        mlp = self.sublayer["mlp"] * (self.dense.layers - shape.mlps)
        if not self.expert:
            mlps_left = shape.layers - (self.dense.layers - shape.mlps)
            mlp += mlps_left * (self.dense.neurons - shape.neurons) * self.neuron
        return self._whole_gone(shape) + attention + mlp

    def out_of_reach(self) -> str:
        fewest = self.fewest
        most = max(
            self._gone(fewest._replace(layers=layers, attentions=attentions, mlps=mlps))
            for layers, attentions, mlps in self._furthest()
        )
        share = most / (self.must_go / self.sparsity)
        kept = f", ignore {', '.join(self.settings.ignore)}" if self.settings.ignore else ""
        least = f" (a token takes {fewest.experts} experts)" if "experts" in self.structures else ""
        return (
            f"sparsity {self.sparsity:g} would leave 0 units in a layer: with structures "
            f"{', '.join(self.settings.structures)}{kept} and round_to {self.settings.round_to}, "
            f"at most {share:.3f} of the non-embedding parameters of this "
            f"{self.config.model_type} can go{least}. Lower the sparsity or round_to, or allow "
            "more structures"
        )

    def _furthest(self) -> list[tuple[int, int, int]]:
        """The ends of `_depths`."""
        all_, fewest = self.dense.layers, self.fewest
        ends = [(fewest.layers, all_, all_)]
        ends += [(all_, fewest.attentions, all_), (all_, all_, fewest.mlps)]
        if not self.structures & NEURONS:
            ends.append((all_, fewest.attentions, fewest.mlps))
        return ends

    def _whole_gone(self, shape: Shape) -> int:
        """Parameters that go with dropped layers, whichever they turn out to be, and with
        the experts, and neurons of experts, of those that stay."""
        of_experts = 0
        if self.expert:
            of_experts = (self.dense.experts - shape.experts) * self.expert
            of_experts += shape.experts * (self.dense.neurons - shape.neurons) * self.neuron
        lost = [of_experts * mixed for mixed in self.mixed]
        more = sorted(size - narrower for size, narrower in zip(self.sizes, lost, strict=True))
        return sum(lost) + sum(more[: self.dense.layers - shape.layers])

    def _attention_gone(self, groups: int, heads: int) -> int:
        """Parameters of one layer that go with its KV groups and query heads."""
        return self.dense.groups * self.group[self.dense.heads] - groups * self.group[heads]

    def _narrowed(self, kept: Shape) -> Shape | None:
        """The same with the widest legal MLPs that reach the sparsity, or None."""
        if self._gone(kept) >= self.must_go:
            return kept
        if not self.structures & NEURONS:
            return None
        round_to = self.settings.round_to
        widths = range((self.dense.neurons - 1) // round_to * round_to, 0, -round_to)

        def enough(width: int) -> bool:
            return self._gone(kept._replace(neurons=width)) >= self.must_go

        # The narrower, the more goes.
        widest = bisect_left(widths, True, key=enough)
        return kept._replace(neurons=widths[widest]) if widest < len(widths) else None


def _sublayer_sizes(config: PretrainedConfig, block: int) -> dict[str, int]:
    """Parameters of the attention and the MLP of a layer, which together are all of it."""
    dims, count = Dimensions.of(config), config.num_hidden_layers
    plan = Plan.uniform(config.model_type, count, dims.intermediate_size, dims.num_key_value_heads)
    without = lacking(plan, {"attention": (), "mlp": (count - 1,)})
    model = meta_model(heterogeneous_config(config, without), torch.float32)
    attention = block_sizes(model, family_of(config))[-1]
    return {"attention": attention, "mlp": block - attention}


def _worthwhile(shapes: list[Shape]) -> list[Shape]:
    """Without those that keep no more of anything than another one does."""
    kept = torch.tensor(shapes)
    # Each is one of those that keep at least as much of everything.
    return [
        shape
        for shape, mine in zip(shapes, kept, strict=True)
        if int((kept >= mine).all(-1).sum()) == 1
    ]


def _thin(shapes: list[Shape], dense: Shape) -> list[Shape]:
    """At most `MAX_CANDIDATES`: neurons only, then what takes from one other structure, in
    turns (layers, sub-layers, KV groups, query heads, experts), the cheapest first; mixtures
    where there is room."""
    if len(shapes) <= MAX_CANDIDATES:
        return shapes
    rays: dict[tuple[bool, ...], list[Shape]] = {}
    for shape in shapes:
        cut = tuple(have < all_ for have, all_ in zip(shape[:-1], dense[:-1], strict=True))
        rays.setdefault(cut, []).append(shape)
    chosen = rays.pop((False,) * len(dense[:-1]), [])
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
