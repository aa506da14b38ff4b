"""How narrow the residual stream becomes, and which of its channels stay.

Legend: D channels of the stream.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from hf_compress.errors import RecipeError
from hf_compress.model.blocks import meta_model
from hf_compress.model.channels import channel_parameters
from hf_compress.model.families import FAMILIES, family_of, native_config
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import Dimensions
from hf_compress.plan import Plan
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.reads import square_root
from hf_compress.recipe import Prune
from hf_compress.statistics import StreamStatistics

MASSIVE = 100.0
"""Times the median activation that a channel has to reach, somewhere, to be kept in any case: a
tenth of what makes an activation massive (Sun et al. 2024), and models break without those."""


def narrows(settings: Prune) -> bool:
    """Whether the stage makes the residual stream narrower."""
    return "residual_channels" in settings.structures


def narrow_plan(config: PretrainedConfig, settings: Prune) -> Plan:
    """The widest residual stream that a native class can express and that removes at least
    `settings.sparsity` of the non-embedding parameters.

    Raises:
        RecipeError: other structures beside, `ignore`, a family whose stream cannot be cut, or
            a sparsity out of reach.
    """
    _check_alone(config, settings)
    model, dims = meta_model(config, torch.float32), Dimensions.of(config)
    each = channel_parameters(model, family_of(config))
    must_go = settings.share * count_parameters(model).non_embedding
    dense, step = config.hidden_size, settings.round_to
    widest = int((dense - must_go / each) // step) * step
    for width in range(widest, 0, -step):
        widths = (dims.intermediate_size, dims.num_key_value_heads)
        if native_config(config, *widths, hidden_size=width) is not None:
            plan = Plan.uniform(config.model_type, config.num_hidden_layers, *widths)
            return plan.model_copy(update={"hidden_size": width})
    raise RecipeError(
        f"sparsity {settings.sparsity:g} with round_to {step} leaves no width of the residual "
        f"stream, of {dense}, that a {config.model_type} with {config.num_attention_heads} heads "
        "can have; lower one of them"
    )


def _check_alone(config: PretrainedConfig, settings: Prune) -> None:
    """Raise RecipeError for what cannot be said together with residual_channels."""
    others = [name for name in settings.structures if name != "residual_channels"]
    if others:
        raise RecipeError(
            f"structures names residual_channels beside {', '.join(others)}, and a stage cuts "
            "the residual stream by itself only; put two prune stages in a row, one with "
            f"structures: [{', '.join(others)}] and one with structures: [residual_channels]"
        )
    if settings.ignore:
        raise RecipeError(
            f"ignore ({', '.join(settings.ignore)}) cannot keep a module as it is where "
            "structures names residual_channels: a channel goes through all of them; leave "
            "ignore out"
        )
    if not family_of(config).narrows_stream:
        able = ", ".join(sorted(name for name, one in FAMILIES.items() if one.narrows_stream))
        raise RecipeError(
            f"structures names residual_channels, and the residual stream of a "
            f"{config.model_type} cannot be cut: that needs RMSNorms that read the stream, with "
            f"nothing but linear layers behind and before them ({able}); leave it out"
        )


def choose_channels(seen: StreamStatistics, settings: Prune, count: int) -> torch.Tensor:
    """Sorted indices of the `count` channels that stay.

    Raises:
        RecipeError: more than that carry massive activations.
    """
    massive_D = seen.peak_D >= MASSIVE
    if massive_D.sum() > count:
        raise RecipeError(
            f"{int(massive_D.sum())} channels of the residual stream carry massive activations, "
            f"and the sparsity leaves {count}; lower it"
        )
    order_D = CRITERIA[settings.channel_criterion](
        square_root(seen.readers_DD), seen.gram_DD, 1, 0, 1
    )
    free_D = order_D[~massive_D[order_D]]
    gone = free_D[: len(order_D) - count]
    kept_D = torch.ones_like(massive_D)
    kept_D[gone] = False
    return kept_D.nonzero().flatten()
