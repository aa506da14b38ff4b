"""Gram matrices of the inputs of `o_proj` and `down_proj`, block by block.

Legend: B windows, L tokens, T = B * L tokens, D hidden size, I inputs of an output layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.calibration.experts import collect_experts
from hf_compress.calibration.weighting import Weighting, weighted
from hf_compress.model.blocks import BlockSource, parts, tapped
from hf_compress.model.families import has_experts
from hf_compress.model.memory import return_freed_memory
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, captured_input, check_weights, require_finite
from hf_compress.statistics import (
    BlockStatistics,
    CrossPair,
    GramPair,
    Moments,
    write_block,
    write_summary,
)

logger = logging.getLogger(__name__)

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
    for index in tqdm(range(count), desc="calibrate", unit="block"):
        with source.block(index) as block:
            check_weights(block, f"{family.layers}.{index}")
            statistics = BlockStatistics()
            for name, (part, output) in parts(block, family).items():
                if name == "mlp" and has_experts(source.config, index):
                    statistics.experts = collect_experts(
                        walk, part, index, weighting=weighting, advance=True
                    )
                else:
                    moments = collect(walk, part, index, output, weighting, advance=True)
                    setattr(statistics, name, moments.gram)
        write_block(folder, index, statistics)
    write_summary(folder, ids_NL.numel(), count)


def collect(
    walk: Walk,
    half: nn.Module,
    index: int,
    output: str,
    weighting: Weighting,
    *,
    advance: bool = False,
    keep: list[torch.Tensor] | None = None,
) -> Moments:
    """Moments of what one half of a block feeds into its output layer.

    Args:
        half: the attention or the MLP half of block `index`, or the whole block.
        output: name of its output layer, relative to the block.
        advance: overwrite the walk's hidden states with what the half gives.
        keep: takes the inputs [B, L, I] of every batch, on the CPU.
    """
    sums = _Sums.of(half, output, walk, index, cross=False)
    batches = list(walk.batches())
    with captured_input(half, output) as captured:
        for number, hidden_BLD in enumerate(batches):
            stream_BLD = walk.run(half, index, hidden_BLD)
            require_finite(stream_BLD, f"the residual stream after {sums.where}")
            sums.part = int(number >= (len(batches) + 1) // 2)
            sums.add_inputs(weighted(captured[0], stream_BLD, weighting)[0])
            if keep is not None:
                keep.append(captured[0].cpu())
            if advance:
                hidden_BLD.copy_(stream_BLD)
    return sums.moments()


def collect_beside(
    walk: Walk,
    dense: Walk,
    half: nn.Module,
    index: int,
    output: str,
    weighting: Weighting,
    *,
    pruned_half: nn.Module | None = None,
    keep: list[torch.Tensor] | None = None,
    channels_S: torch.Tensor | None = None,
) -> Moments:
    """The same on the pruned stream, and where the dense stream goes beside it.

    Args:
        walk: follows the pruned model; it stays where it is.
        dense: follows the dense model; it goes through `half`.
        half: half of block `index` of the dense model.
        pruned_half: what the pruned model has become of it before its output layer, where
            that is something else.
        keep: takes the inputs [B, L, I] of every batch of the pruned stream, on the CPU.
        channels_S: of the dense stream, those that the pruned one has; None for all.
    """
    sums = _Sums.of(pruned_half or half, output, walk, index, cross=True)
    silent_half, tap = tapped(pruned_half or half, output)
    batches = list(zip(walk.batches(), dense.batches(), strict=True))
    for number, (hidden_BLD, beside_BLD) in enumerate(batches):
        # With the output layer's bias, which is added whatever its weights become.
        stream_BLD = walk.run(silent_half, index, hidden_BLD)
        inputs_BLI = tap.take()
        dense_BLD = dense.run(half, index, beside_BLD)
        require_finite(dense_BLD, f"the residual stream after {sums.where}")
        beside_BLD.copy_(dense_BLD)
        if channels_S is not None:
            dense_BLD = dense_BLD[..., channels_S]
        require_finite(stream_BLD, f"the pruned model's residual stream before {sums.where}")
        sums.part = int(number >= (len(batches) + 1) // 2)
        inputs_TI, scale_T1 = weighted(inputs_BLI, stream_BLD, weighting, dense_BLD)
        sums.add_inputs(inputs_TI)
        sums.add_target((dense_BLD - stream_BLD).flatten(0, -2) * scale_T1, inputs_TI)
        if keep is not None:
            keep.append(inputs_BLI.cpu())
    return sums.moments()


@dataclass
class _Sums:
    """Sums over tokens in float32, for the two halves of the text."""

    where: str
    grams: list[torch.Tensor]
    crosses: list[torch.Tensor]
    energies: list[float]
    part: int = 0
    """Which half is being summed."""

    @classmethod
    def of(cls, half: nn.Module, output: str, walk: Walk, index: int, *, cross: bool) -> _Sums:
        outputs, inputs = weight_of(half, output, walk.source.family).shape
        where = f"{walk.source.family.layers}.{index}.{output}"
        return cls.zeros(where, inputs, outputs if cross else 0, walk.source.device)

    @classmethod
    def zeros(cls, where: str, inputs: int, outputs: int, device: torch.device) -> _Sums:
        """With the products of a target [T, outputs], unless that is 0."""
        return cls(
            where,
            [torch.zeros(inputs, inputs, device=device) for _ in range(2)],
            [torch.zeros(outputs, inputs, device=device) for _ in range(2)] if outputs else [],
            [0.0, 0.0],
        )

    def add_inputs(self, inputs_TI: torch.Tensor) -> None:
        accumulate_gram(self.grams[self.part], inputs_TI)

    def add_target(self, target_TD: torch.Tensor, inputs_TI: torch.Tensor) -> None:
        in_bfloat16 = inputs_TI.dtype == torch.bfloat16
        target_TD = _factor(target_TD)
        _add_product(self.crosses[self.part], target_TD, _factor(inputs_TI), in_bfloat16)
        self.energies[self.part] += torch.linalg.vector_norm(target_TD.float()).item() ** 2

    def moments(self) -> Moments:
        return_freed_memory()
        for gram_II in self.grams:
            gram_II.triu_().add_(gram_II.triu(1).T)  # the part below the diagonal
        gram = GramPair(self.grams[0], self.grams[1])
        if not self.crosses:
            return Moments(gram)
        first, second = self.energies
        return Moments(gram, CrossPair(self.crosses[0], self.crosses[1], first, second))


def accumulate_gram(gram_II: torch.Tensor, inputs_TI: torch.Tensor) -> None:
    """Add X^T X to the tiles of a float32 matrix on and above the diagonal.

    bfloat16 inputs are multiplied as such and summed in float32; all others are float32
    throughout.
    """
    in_bfloat16 = inputs_TI.dtype == torch.bfloat16
    inputs_TI = _factor(inputs_TI)
    for start in range(0, gram_II.shape[0], TILE):
        stop = start + TILE
        left_TA, right_TB = inputs_TI[:, start:stop], inputs_TI[:, start:]
        _add_product(gram_II[start:stop, start:], left_TA, right_TB, in_bfloat16)


def _factor(inputs_TI: torch.Tensor) -> torch.Tensor:
    """As `_add_product` takes it: only CUDA sums products of bfloat16 in float32."""
    keep = inputs_TI.is_cuda and inputs_TI.dtype == torch.bfloat16
    return inputs_TI if keep else inputs_TI.float()


def _add_product(
    out_AB: torch.Tensor, left_TA: torch.Tensor, right_TB: torch.Tensor, in_bfloat16: bool
) -> None:
    if right_TB.dtype == torch.bfloat16:
        out_AB += torch.mm(left_TA.T, right_TB, out_dtype=torch.float32)
        return
    with _bfloat16_products(in_bfloat16):
        out_AB.addmm_(left_TA.T, right_TB)


@contextmanager
def _bfloat16_products(enabled: bool) -> Iterator[None]:
    """While inside, float32 products on the CPU may round their factors to bfloat16; the
    sums stay float32. What was bfloat16 loses nothing, and it is twice as fast."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def warn_if_few_tokens(
    num_samples: int,
    max_seq_length: int,
    width: int,
    share: float = 1.0,
    of: str = "the widest output layer",
) -> None:
    """Log a warning under 20 tokens for each of `width` inputs of an output layer.

    Args:
        share: of all tokens, those that the layer gets.
        of: what the layer is called.
    """
    num_tokens = share * num_samples * max_seq_length
    per_dimension = num_tokens / width
    if per_dimension < 20:
        logger.warning(
            "%d calibration tokens are %.1f for each of the %d inputs of %s; under 20 the fold "
            "begins to fit the text instead of the model. Raise data.calibration.num_samples to "
            "%d or more",
            num_tokens,
            per_dimension,
            width,
            of,
            math.ceil(20 * width / share / max_seq_length),
        )
