"""Gram matrices of the inputs of `o_proj` and `down_proj`, block by block.

Legend: B windows, L tokens, T = B * L tokens, D hidden size, I inputs of an output layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import BlockSource, attention_half, mlp_half
from hf_compress.model.walk import Walk, captured_input, check_weights, require_finite
from hf_compress.statistics import BlockStatistics, GramPair, write_block, write_summary

logger = logging.getLogger(__name__)

Weighting = Literal["inverse_norm", "none"]
TILE = 192
"""Columns of a Gram matrix computed at a time; only tiles on or above the diagonal are."""


def calibrate(
    source: BlockSource,
    ids_NL: torch.Tensor,
    folder: Path,
    *,
    weighting: Weighting = "inverse_norm",
    batch_size: int = 8,
) -> None:
    """Run the calibration windows through the dense model; write statistics to `folder`.

    Args:
        source: the model, in memory or streamed.
        ids_NL: token ids, N windows of L tokens.
        folder: existing folder for the statistics.
        weighting: weight of a token, see `recipe.Calibrate`.
        batch_size: windows in one forward pass of a block.

    Raises:
        ModelError: a weight or an activation is not finite; the message names the layer.
    """
    walk = Walk(source, ids_NL, batch_size)
    family, count = source.family, source.config.num_hidden_layers
    _warn_if_few_tokens(len(ids_NL), ids_NL.shape[1], source.config.intermediate_size)
    for index in tqdm(range(count), desc="calibrate", unit="block"):
        with source.block(index) as block:
            check_weights(block, f"{family.layers}.{index}")
            halves = (
                (attention_half(block, family), family.attention_output),
                (mlp_half(block, family), family.mlp_output),
            )
            pairs = [
                collect(walk, half, index, output, weighting, advance=True)
                for half, output in halves
            ]
        write_block(folder, index, BlockStatistics(*pairs))
    write_summary(folder, ids_NL.numel(), count)


def collect(
    walk: Walk,
    half: nn.Module,
    index: int,
    output: str,
    weighting: Weighting,
    *,
    advance: bool,
) -> GramPair:
    """Gram matrices of what one half of a block feeds into its output layer.

    Args:
        half: the attention or the MLP half of block `index`.
        output: name of its output layer, relative to the block.
        advance: overwrite the walk's hidden states with what the half gives.
    """
    where = f"{walk.source.family.layers}.{index}.{output}"
    width = half.get_submodule(output).weight.shape[1]  # type: ignore[index,union-attr]
    pair = GramPair.zeros(int(width), walk.source.device)
    batches = list(walk.batches())
    with captured_input(half, output) as captured:
        for number, hidden_BLD in enumerate(batches):
            stream_BLD = walk.run(half, index, hidden_BLD)
            require_finite(stream_BLD, f"the residual stream after {where}")
            gram_II = pair.first_II if number < (len(batches) + 1) // 2 else pair.second_II
            accumulate_gram(gram_II, captured[0], stream_BLD, weighting)
            if advance:
                hidden_BLD.copy_(stream_BLD)
    _mirror(pair.first_II)
    _mirror(pair.second_II)
    return pair


def accumulate_gram(
    gram_II: torch.Tensor,
    inputs_BLI: torch.Tensor,
    stream_BLD: torch.Tensor,
    weighting: Weighting,
) -> None:
    """Add sum_t w_t x_t x_t^T to the tiles of `gram_II` on and above the diagonal.

    `inverse_norm`: w_t = 1 / mean(h_t^2) of the residual stream h that the layer's output
    has been added to, which is what the next RMSNorm divides by. Inputs in bfloat16 are
    multiplied as bfloat16 and summed in float32; all others are float32 throughout.
    """
    inputs_TI = inputs_BLI.flatten(0, -2)
    dtype = inputs_TI.dtype
    if weighting == "inverse_norm":
        power_T1 = stream_BLD.flatten(0, -2).float().pow(2).mean(-1, keepdim=True)
        inputs_TI = inputs_TI * power_T1.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    in_bfloat16 = dtype == torch.bfloat16
    if in_bfloat16 and gram_II.device.type == "cuda":
        inputs_TI = inputs_TI.to(dtype)
        for start, stop in _tiles(gram_II):
            left_TI, right_TI = inputs_TI[:, start:stop], inputs_TI[:, start:]
            gram_II[start:stop, start:] += torch.mm(left_TI.T, right_TI, out_dtype=torch.float32)
        return
    inputs_TI = inputs_TI.float()
    with _bfloat16_products(in_bfloat16):
        for start, stop in _tiles(gram_II):
            left_TI, right_TI = inputs_TI[:, start:stop], inputs_TI[:, start:]
            gram_II[start:stop, start:].addmm_(left_TI.T, right_TI)


def _tiles(gram_II: torch.Tensor) -> Iterator[tuple[int, int]]:
    return ((start, start + TILE) for start in range(0, gram_II.shape[0], TILE))


@contextmanager
def _bfloat16_products(enabled: bool) -> Iterator[None]:
    """While inside, float32 products on the CPU may round their factors to bfloat16; the
    sums stay float32. What was bfloat16 loses next to nothing, and it is twice as fast."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _mirror(gram_II: torch.Tensor) -> None:
    """Copy the part above the diagonal below it, in place."""
    gram_II.triu_().add_(gram_II.triu(1).T)


def _warn_if_few_tokens(num_samples: int, max_seq_length: int, width: int) -> None:
    num_tokens = num_samples * max_seq_length
    per_dimension = num_tokens / width
    if per_dimension < 20:
        logger.warning(
            "%d calibration tokens are %.1f for each of the %d inputs of the widest output layer; "
            "under 20 the fold begins to fit the text instead of the model. Raise "
            "data.calibration.num_samples to %d or more",
            num_tokens,
            per_dimension,
            width,
            -(-20 * width // max_seq_length),
        )
