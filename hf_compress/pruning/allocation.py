"""Which uniform widths reach a sparsity: every split between KV groups and MLP neurons."""

from __future__ import annotations

import logging

import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import meta_model
from hf_compress.model.families import family_of, native_config
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import Dimensions, unit_parameters
from hf_compress.plan import Plan
from hf_compress.recipe import Prune

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 6
"""Splits that are compared by KL; more are thinned out evenly."""


def candidate_plans(config: PretrainedConfig, settings: Prune) -> list[Plan]:
    """Uniform plans that remove at least `settings.sparsity` of the non-embedding
    parameters, the fewest KV groups removed first.

    Raises:
        RecipeError: the sparsity is out of reach (the message says how far it goes), or only
            KV groups may go, in a family whose heads cannot be cut.
    """
    settings = _possible(config, settings)
    dims = Dimensions.of(config)
    model = meta_model(config, torch.float32)
    family = family_of(config)
    block = model.get_submodule(f"{family.layers}.0")
    neuron, group = unit_parameters(block, family, dims)
    layers = config.num_hidden_layers
    must_go = settings.sparsity * count_parameters(model).non_embedding / layers
    plans = []
    for groups in _group_counts(dims, settings):
        gone = (dims.num_key_value_heads - groups) * group
        width = _width(must_go - gone, neuron, dims.intermediate_size, settings)
        if width is None or native_config(config, width, groups) is None:
            continue
        plans.append(Plan.uniform(config.model_type, layers, width, groups))
        if gone >= must_go:
            break
    if not plans:
        raise RecipeError(_out_of_reach(config, settings, dims, neuron, group, layers, model))
    return _thin(plans)


def _possible(config: PretrainedConfig, settings: Prune) -> Prune:
    """The settings without the structures that this family has not."""
    if family_of(config).cuts_heads or "kv_groups" not in settings.structures:
        return settings
    reason = (
        f"the heads of {config.model_type} cannot be cut: its class takes their number times their "
        "width for hidden_size"
    )
    if "mlp_neurons" not in settings.structures:
        raise RecipeError(f"{reason}; set structures to [mlp_neurons]")
    logger.warning("%s; only MLP neurons are pruned", reason)
    return settings.model_copy(update={"structures": ["mlp_neurons"]})


def _group_counts(dims: Dimensions, settings: Prune) -> range:
    fewest = 1 if "kv_groups" in settings.structures else dims.num_key_value_heads
    return range(dims.num_key_value_heads, fewest - 1, -1)


def _width(must_go: float, neuron: int, dense: int, settings: Prune) -> int | None:
    """Widest legal MLP that still removes `must_go` parameters of a layer, or None."""
    if must_go <= 0:
        return dense
    if "mlp_neurons" not in settings.structures:
        return None
    width = int((dense - must_go / neuron) // settings.round_to) * settings.round_to
    return width if width >= 1 else None


def _thin(plans: list[Plan]) -> list[Plan]:
    if len(plans) <= MAX_CANDIDATES:
        return plans
    step = (len(plans) - 1) / (MAX_CANDIDATES - 1)
    return [plans[round(index * step)] for index in range(MAX_CANDIDATES)]


def _out_of_reach(
    config: PretrainedConfig,
    settings: Prune,
    dims: Dimensions,
    neuron: int,
    group: int,
    layers: int,
    model: object,
) -> str:
    neurons = groups = 0
    if "mlp_neurons" in settings.structures:
        neurons = max(0, dims.intermediate_size - settings.round_to)
    if "kv_groups" in settings.structures:
        groups = dims.num_key_value_heads - 1
    most = (neurons * neuron + groups * group) * layers
    share = most / count_parameters(model).non_embedding  # type: ignore[arg-type]
    return (
        f"sparsity {settings.sparsity:g} would leave 0 units in a layer: with structures "
        f"{', '.join(settings.structures)} and round_to {settings.round_to}, at most "
        f"{share:.3f} of the non-embedding parameters of this {config.model_type} can go. "
        "Lower the sparsity or round_to, or allow more structures"
    )
