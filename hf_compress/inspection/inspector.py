"""One walk through a model that says what is redundant in every layer."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from hf_compress import __version__
from hf_compress.errors import ModelError, RecipeError
from hf_compress.inspection.moments import InputMoments, Outliers, pass_through
from hf_compress.inspection.redundancy import (
    ERROR_LEVELS,
    dead_neurons,
    duplicate_groups,
    effective_rank,
    output_energy,
    removable_neurons,
)
from hf_compress.inspection.results import Inspection, LayerInspection
from hf_compress.model.blocks import BlockSource, attention_half, mlp_half
from hf_compress.model.families import Family
from hf_compress.model.layers import skipped
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, check_weights
from hf_compress.pruning.obs import obs_order

DEAD_SHARE = 1e-6
DUPLICATE_COSINE = 0.95


def inspect_model(
    source: BlockSource,
    ids_NL: torch.Tensor,
    *,
    batch_size: int = 8,
    dead_share: float = DEAD_SHARE,
    duplicate_cosine: float = DUPLICATE_COSINE,
    name: str | None = None,
    text: str = "the text given",
) -> Inspection:
    """Say how redundant every layer of a model is on a text; the model is only read.

    One block is in memory at a time; the hidden states of all windows are kept.

    Args:
        source: the model, in memory or streamed.
        ids_NL: token ids, N windows of L tokens, at least two windows.
        batch_size: windows in one forward pass of a block.
        dead_share: a neuron is dead when its output energy is at most this share of the
            mean over the layer's neurons.
        duplicate_cosine: neurons are near-duplicates from this |cosine| of their centred
            activations on.
        name: what to call the model; its model type unless given.
        text: what to call the text.

    Raises:
        RecipeError: fewer than two windows, or a threshold that cannot be.
        ModelError: a weight or an activation is not finite (the message names the layer), or
            the model is a mixture of experts.
    """
    _check(ids_NL, dead_share, duplicate_cosine)
    if source.family.experts:
        raise ModelError(
            f"a {source.config.model_type} is a mixture of experts, and inspect looks at the "
            "neurons of ordinary MLPs; `hf-compress run` with structures: [experts] ranks experts"
        )
    for index in range(source.config.num_hidden_layers):
        if gone := skipped(source.config, index):
            raise ModelError(
                f"layer {index} of this model has no {' and no '.join(sorted(gone))}, and inspect "
                "looks at both; inspect the dense model"
            )
    walk = Walk(source, ids_NL, batch_size)
    layers = []
    for index in tqdm(range(source.config.num_hidden_layers), desc="inspect", unit="block"):
        with source.block(index) as block:
            check_weights(block, f"{source.family.layers}.{index}")
            layers.append(_inspect_block(walk, block, index, dead_share, duplicate_cosine))
    return Inspection(
        hf_compress_version=__version__,
        model=name or source.config.model_type,
        text=text,
        num_windows=ids_NL.shape[0],
        max_seq_length=ids_NL.shape[1],
        hidden_size=source.config.hidden_size,
        dead_share=dead_share,
        duplicate_cosine=duplicate_cosine,
        layers=layers,
    )


def _check(ids_NL: torch.Tensor, dead_share: float, duplicate_cosine: float) -> None:
    if len(ids_NL) < 2:
        raise RecipeError(
            f"{len(ids_NL)} window cannot be split in two halves, one to fold on and one to "
            "measure on; give 2 or more (--num-samples)"
        )
    if not 0 < duplicate_cosine <= 1:
        raise RecipeError(
            f"duplicate_cosine {duplicate_cosine:g} is not a |cosine| that two neurons could "
            "have; give one above 0 and up to 1, such as 0.95"
        )
    if not 0 < dead_share < 1:
        raise RecipeError(
            f"dead_share {dead_share:g} is not a share of the mean energy; give one between 0 "
            "and 1, such as 1e-6"
        )


def _inspect_block(
    walk: Walk, block: nn.Module, index: int, dead_share: float, duplicate_cosine: float
) -> LayerInspection:
    """Both halves of a block, one after the other, or twice the whole block where it has no
    halves; the walk ends after it."""
    family, outliers = walk.source.family, Outliers()
    half = attention_half(block, family) if family.cuts_heads else block
    attention = pass_through(walk, half, index, family.attention_output, advance=family.cuts_heads)
    attention_rank = _output_rank(_weight(block, family.attention_output, family), attention)
    del attention
    half = mlp_half(block, family)
    mlp = pass_through(walk, half, index, family.mlp_output, outliers)
    weight_OI = _weight(block, family.mlp_output, family)
    energy_I = output_energy(weight_OI, mlp.grams.total_II)
    dead = dead_neurons(energy_I, dead_share)
    groups = duplicate_groups(
        mlp.covariance_II, mlp.second_moment_II.diagonal(), energy_I, dead, duplicate_cosine
    )
    return LayerInspection(
        layer=index,
        intermediate_size=weight_OI.shape[1],
        dead_neurons=dead,
        duplicate_groups=groups,
        removable_neurons=_removable(weight_OI, mlp, index),
        mlp_effective_rank=_output_rank(weight_OI, mlp),
        attention_effective_rank=attention_rank,
        massive_activations=outliers.found(),
    )


def _weight(block: nn.Module, name: str, family: Family) -> torch.Tensor:
    return weight_of(block, name, family).detach().double()


def _output_rank(weight_OI: torch.Tensor, inputs: InputMoments) -> float:
    """Effective rank of W x, whose covariance is W C W^T; a bias does not vary."""
    return effective_rank(weight_OI @ inputs.covariance_II @ weight_OI.T)


def _removable(weight_OI: torch.Tensor, mlp: InputMoments, index: int) -> dict[float, int]:
    halves = mlp.grams.first_II, mlp.grams.second_II
    speaks = [output_energy(weight_OI, gram_II).sum().item() > 0 for gram_II in halves]
    if not any(speaks):
        return dict.fromkeys(ERROR_LEVELS, weight_OI.shape[1])
    if not all(speaks):
        raise ModelError(
            f"the MLP of layer {index} gives nothing on one half of the text, so nothing can be "
            "said of its neurons; use more or other text"
        )
    return removable_neurons(weight_OI, halves, obs_order(weight_OI, mlp.grams.total_II, 1))
