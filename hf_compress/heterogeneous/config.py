"""The configuration of a checkpoint whose layers differ, as a plan asks for it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from hf_compress.errors import PlanError
from hf_compress.heterogeneous.auto import STEMS, auto_map
from hf_compress.model.experts import WIDTH_MULTIPLE
from hf_compress.model.families import family_of, head_dim_of, native_config
from hf_compress.model.layers import PREFIX
from hf_compress.model.surgery import Dimensions
from hf_compress.plan import LayerPlan, Plan

OURS = ("model_type", "architectures", "auto_map")
"""Fields that are not the dense model's."""


def check_plan(config: PretrainedConfig, plan: Plan) -> None:
    """Raise PlanError unless a dense model of this configuration can be cut to the plan.

    Layers that are alike are left to `planned_config`.
    """
    if config.model_type.startswith(PREFIX):
        raise PlanError(
            f"the layers of this {config.model_type} differ already, and it cannot be cut to "
            "another plan; make one for the dense model that says all that is to go"
        )
    if plan.hidden_size is not None:
        raise PlanError(
            f"the plan says hidden_size={plan.hidden_size}, and which channels of the residual "
            "stream go is chosen by structures: [residual_channels] alone; take it out of the plan"
        )
    dims, cuts_heads = Dimensions.of(config), family_of(config).cuts_heads
    plan.check(
        config.model_type,
        config.num_hidden_layers,
        dims.intermediate_size,
        dims.num_key_value_heads,
        dims.heads_per_group if cuts_heads else None,
        getattr(config, "layer_types", None),
        (config.num_experts_per_tok, config.num_experts) if family_of(config).experts else None,
    )
    if family_of(config).experts:
        _check_expert_widths(plan, dims.intermediate_size)
    if not plan.is_uniform and config.model_type not in STEMS:
        raise PlanError(
            f"the plan's layers differ, which no native {config.model_type} can express, and "
            f"hf_compress has modelling files for {', '.join(sorted(STEMS))} only; give every "
            "layer the same widths and no skip"
        )


def _check_expert_widths(plan: Plan, whole: int) -> None:
    for index, layer in enumerate(plan.layers):
        width = layer.intermediate_size
        if width < whole and width % WIDTH_MULTIPLE:
            raise PlanError(
                f"layer {index} of the plan has experts of {width} neurons, which the kernel that "
                f"multiplies all experts at once does not take; name a multiple of {WIDTH_MULTIPLE}"
            )


def heterogeneous_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """`config` with the plan's widths under `per_layer_config`; its own fields stay the dense
    model's.

    Raises:
        PlanError: see `check_plan`.
    """
    check_plan(config, plan)
    dims = Dimensions.of(config)
    kept = native_config(
        config, dims.intermediate_size, dims.num_key_value_heads, kept_layers=list(plan.positions)
    )
    assert kept is not None  # it has the dense widths
    values = {name: value for name, value in kept.to_dict().items() if name not in OURS}
    return AutoConfig.for_model(
        PREFIX + config.model_type,
        **{**values, "head_dim": head_dim_of(config)},
        auto_map=auto_map(config.model_type),
        per_layer_config={
            index: _overrides(layer, dims) for index, layer in enumerate(plan.layers)
        },
    )


def _overrides(layer: LayerPlan, dims: Dimensions) -> dict[str, Any]:
    """Fields of one layer; transformers drops those in which it is like the dense model."""
    found: dict[str, Any] = {"skip": list(layer.skip)}
    if "attention" not in layer.skip:
        heads = layer.heads_per_group or dims.heads_per_group
        found["num_key_value_heads"] = layer.num_key_value_heads
        found["num_attention_heads"] = layer.num_key_value_heads * heads
    if "mlp" not in layer.skip:
        found["intermediate_size"] = layer.intermediate_size
    return found
