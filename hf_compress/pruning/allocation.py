"""Which uniform widths reach a sparsity: every split between KV groups, experts and neurons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import meta_model
from hf_compress.model.experts import expert_parameters
from hf_compress.model.families import family_of, has_experts, native_config
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import Dimensions, unit_parameters
from hf_compress.plan import Plan
from hf_compress.recipe import Prune

MAX_CANDIDATES = 6
"""Splits that are compared by KL; more are thinned out evenly."""


@dataclass(frozen=True)
class _Costs:
    """Parameters of one unit of each kind, as a mean over all layers of the model."""

    dims: Dimensions
    settings: Prune
    group: float
    neuron: float
    """Of an MLP; with experts, of one expert."""
    expert: float
    num_experts: int
    """0 in a model without experts, which counts as one of 1 expert that never goes."""
    fewest_experts: int
    must_go: float

    @classmethod
    def of(cls, config: PretrainedConfig, settings: Prune, model: PreTrainedModel) -> _Costs:
        dims, family, layers = Dimensions.of(config), family_of(config), config.num_hidden_layers
        must_go = settings.sparsity * count_parameters(model).non_embedding / layers
        sparse = [index for index in range(layers) if has_experts(config, index)]
        block = model.get_submodule(f"{family.layers}.{sparse[0] if sparse else 0}")
        neuron, group = unit_parameters(block, family, dims)
        if not family.experts or not sparse:
            return cls(dims, settings, group, neuron, 0, 0, 0, must_go)
        share, count = len(sparse) / layers, config.num_experts
        expert = share * expert_parameters(block, family.experts)
        may_go = "experts" in settings.structures
        fewest = config.num_experts_per_tok if may_go else count
        return cls(dims, settings, group, 0, expert, count, fewest, must_go)

    def group_counts(self) -> range:
        """KV groups that a layer may keep, the most first."""
        fewest = 1 if "kv_groups" in self.settings.structures else self.dims.num_key_value_heads
        return range(self.dims.num_key_value_heads, fewest - 1, -1)

    def expert_counts(self) -> range:
        """Experts that a layer may keep, the most first."""
        return range(self.num_experts, self.fewest_experts - 1, -1)

    def gone(self, groups: int, experts: int) -> float:
        """Parameters that a layer loses with its groups and experts."""
        lost_groups = self.dims.num_key_value_heads - groups
        return lost_groups * self.group + (self.num_experts - experts) * self.expert

    def width(self, gone: float) -> int | None:
        """Widest legal MLP when `gone` parameters of a layer are removed already, or None."""
        dense, round_to = self.dims.intermediate_size, self.settings.round_to
        if gone >= self.must_go:
            return dense
        if "mlp_neurons" not in self.settings.structures:
            return None
        width = int((dense - (self.must_go - gone) / self.neuron) // round_to) * round_to
        return width if width >= 1 else None

    def most(self) -> float:
        """Parameters that a layer can lose at most."""
        gone = self.gone(self.group_counts()[-1], self.expert_counts()[-1])
        if "mlp_neurons" in self.settings.structures:
            gone += max(0, self.dims.intermediate_size - self.settings.round_to) * self.neuron
        return gone


def candidate_plans(config: PretrainedConfig, settings: Prune) -> list[Plan]:
    """Uniform plans that remove at least `settings.sparsity` of the non-embedding
    parameters, the fewest KV groups removed first.

    Raises:
        RecipeError: the model has no such structures, or the sparsity is out of reach; the
            message says how far it goes.
    """
    _check_structures(config, settings)
    model = meta_model(config, torch.float32)
    costs = _Costs.of(config, settings, model)
    plans: list[Plan] = []
    for groups in costs.group_counts():
        for experts in costs.expert_counts():
            gone = costs.gone(groups, experts)
            width = costs.width(gone)
            # Fewer groups and nothing for it is no candidate.
            new = (width, experts or None) not in map(_mlp_of, plans)
            if width and new and native_config(config, width, groups, experts or None):
                sizes = config.num_hidden_layers, width, groups, experts or None
                plans.append(Plan.uniform(config.model_type, *sizes))
            if gone >= costs.must_go:
                break
        if costs.gone(groups, costs.num_experts) >= costs.must_go:
            break
    if not plans:
        raise RecipeError(_out_of_reach(config, costs, model))
    return _thin(plans)


def _mlp_of(plan: Plan) -> tuple[int | None, int | None]:
    return plan.widths.intermediate_size, plan.widths.num_experts


def _check_structures(config: PretrainedConfig, settings: Prune) -> None:
    experts = family_of(config).experts
    layers = range(config.num_hidden_layers)
    if "experts" in settings.structures and not any(has_experts(config, at) for at in layers):
        raise RecipeError(
            f"structures names experts, and a {config.model_type} has none; leave them out"
        )
    if "mlp_neurons" in settings.structures and experts is not None:
        raise RecipeError(
            f"structures names mlp_neurons, but those of a {config.model_type} lie inside its "
            "experts, where single neurons cannot be removed yet; say "
            "structures: [experts, kv_groups]"
        )


def _thin(plans: list[Plan]) -> list[Plan]:
    if len(plans) <= MAX_CANDIDATES:
        return plans
    step = (len(plans) - 1) / (MAX_CANDIDATES - 1)
    return [plans[round(index * step)] for index in range(MAX_CANDIDATES)]


def _out_of_reach(config: PretrainedConfig, costs: _Costs, model: PreTrainedModel) -> str:
    settings = costs.settings
    share = costs.most() * config.num_hidden_layers / count_parameters(model).non_embedding
    least = f" (a token takes {costs.fewest_experts} experts)" if costs.num_experts else ""
    return (
        f"sparsity {settings.sparsity:g} would leave 0 units in a layer: with structures "
        f"{', '.join(settings.structures)} and round_to {settings.round_to}, at most "
        f"{share:.3f} of the non-embedding parameters of this {config.model_type} can go{least}. "
        "Lower the sparsity or round_to, or allow more structures"
    )
