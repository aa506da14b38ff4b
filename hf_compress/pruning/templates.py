"""What a plan leaves of a model, without weights."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.heterogeneous.config import heterogeneous_config
from hf_compress.model.blocks import BlockSource, meta_model
from hf_compress.model.families import native_config
from hf_compress.model.surgery import Dimensions
from hf_compress.plan import LayerPlan, Plan


def planned_config(config: PretrainedConfig, plan: Plan) -> PretrainedConfig:
    """The configuration of what a plan leaves of a model: of the model's own kind where all
    layers are alike and whole, else of one whose modelling file goes with the weights.

    Raises:
        RecipeError: no native class can express the widths that all layers have.
        PlanError: layers differ, and the plan does not fit or the family has no such file.
    """
    if not plan.is_uniform:
        return heterogeneous_config(config, plan)
    widths: LayerPlan = plan.widths
    planned = native_config(
        config,
        widths.intermediate_size,
        widths.num_key_value_heads,
        widths.heads_per_group,
        list(plan.positions),
        widths.num_experts,
        plan.hidden_size,
    )
    if planned is None:
        raise RecipeError(
            f"{config.model_type} cannot express {widths.num_key_value_heads} KV groups of "
            f"{widths.heads_per_group or 'all'} query heads natively; keep a number of heads that "
            "divides hidden_size"
        )
    return planned


class Templates:
    """Blocks without weights at the widths of a plan, one for each that it keeps."""

    def __init__(self, source: BlockSource, plan: Plan) -> None:
        config = planned_config(source.config, plan)
        config._attn_implementation = source.config._attn_implementation
        config._experts_implementation = source.config._experts_implementation
        self.config = config
        self.model = meta_model(config, source.dtype)
        # The model has a copy of the configuration, and is what gets saved.
        for each in (config, self.model.config):
            each.architectures = [type(self.model).__name__]
        self._layers = source.family.layers
        self._source, self._plan = source, plan
        self._with_experts: dict[int, Templates] = {}

    def block(self, position: int) -> nn.Module:
        return self.model.get_submodule(f"{self._layers}.{position}")

    def with_experts(self, count: int) -> Templates:
        """Templates of the same layers at the widths of the dense model, but for the number of
        experts."""
        if count not in self._with_experts:
            config, dims = self._source.config, Dimensions.of(self._source.config)
            plan = Plan.uniform(
                config.model_type,
                len(self._plan.layers),
                dims.intermediate_size,
                dims.num_key_value_heads,
                num_experts=count,
            ).model_copy(update={"kept_layers": self._plan.kept_layers})
            self._with_experts[count] = Templates(self._source, plan)
        return self._with_experts[count]
