"""A narrower residual stream: which channels go, and what becomes of everything beside it.

Two passes over the blocks. The first pools how the stream is read at all places into two
D x D matrices, by which a criterion ranks channels as it ranks the inputs of one layer. The
second cuts block after block: what reads the stream is folded onto the kept channels
(reads.py), and with `correction` what writes to it is led back toward the dense stream.

Legend: B windows, L tokens, D channels of the stream, S kept ones, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.model.blocks import BlockSource, attention_half, mlp_half
from hf_compress.model.channels import (
    FINAL_NORM,
    ROWS,
    NarrowSource,
    cut_channels,
    gram_of_rows,
    readers_of,
)
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, finite_state
from hf_compress.pruning.layer import _halves, _whole
from hf_compress.pruning.reads import Reads
from hf_compress.pruning.reports import BlockReport, OutputReport
from hf_compress.pruning.templates import Templates
from hf_compress.recipe import Prune
from hf_compress.regression.fold import choose_damping
from hf_compress.statistics import GramPair, Moments


class CollectReads(Protocol):
    """Gram matrices of [a, x]: what a norm gives in the model as it was found, and in the
    narrower one; no walk moves."""

    def __call__(
        self,
        dense: Walk,
        narrow: Walk | None,
        norms: tuple[nn.Module, nn.Module],
        kept_S: torch.Tensor,
        where: str,
    ) -> GramPair: ...


class CollectWrites(Protocol):
    """Moments of an output layer on the narrower stream; the dense walk goes through `half`."""

    def __call__(
        self,
        walk: Walk,
        dense: Walk,
        half: nn.Module,
        index: int,
        output: str,
        *,
        pruned_half: nn.Module,
        keep: list[torch.Tensor],
        channels_S: torch.Tensor,
    ) -> Moments: ...


@dataclass(frozen=True)
class ChannelStreams:
    """The calibration windows on their way.

    Attributes:
        dense: a walk that follows the model as it was found.
        narrow: one that follows the narrower model beside it, or None without correction.
        collect_reads: gathers what is read.
        collect_writes: gathers what output layers read and where the dense stream goes.
    """

    dense: Walk
    narrow: Walk | None
    collect_reads: CollectReads
    collect_writes: CollectWrites


def narrow_blocks(
    source: BlockSource,
    narrow: NarrowSource,
    kept_S: torch.Tensor,
    templates: Templates,
    settings: Prune,
    *,
    streams: ChannelStreams,
    probe: Walk,
    write: Callable[[str, torch.Tensor], None],
) -> tuple[list[BlockReport], OutputReport]:
    """Cut every block to the kept channels and hand its tensors to `write`; then fit the final
    norm and the head, in the skeleton of `narrow`.

    Args:
        probe: a walk that follows the narrower model, for the check after saving.
        write: takes a tensor's name in the checkpoint, and the tensor.

    Returns:
        What it did to each block, and to what the head reads.
    """
    reports = []
    for index in tqdm(range(source.config.num_hidden_layers), desc="prune", unit="block"):
        name = f"{source.family.layers}.{index}"
        with source.block(index) as block, torch.no_grad():
            cut = cut_channels(block, templates.block(index), source.family, kept_S)
            reports.append(_Narrower(block, cut, index, source, kept_S, settings, streams).run())
        for key, value in finite_state(cut, name, "pruned"):
            write(key, value)
        probe.advance(cut, index)
    with torch.no_grad():
        return reports, _fit_head(source, narrow, kept_S, settings, streams)


@dataclass(frozen=True)
class _Narrower:
    """Fits one block that is cut already, part after part; the walks end behind it."""

    block: nn.Module
    cut: nn.Module
    index: int
    source: BlockSource
    kept_S: torch.Tensor
    settings: Prune
    streams: ChannelStreams

    def run(self) -> BlockReport:
        family = self.source.family
        attention = self._fit_reads(family.attention_norm, list(family.attention_inputs))
        self._fit_writes("attention", family.attention_output)
        mlp = self._fit_reads(family.mlp_norm, list(family.mlp_inputs))
        self._fit_writes("mlp", family.mlp_output)
        return BlockReport(None, None, None, attention, mlp)

    def _fit_reads(self, norm: str, linears: list[str]) -> OutputReport:
        norms = self.block.get_submodule(norm), self.cut.get_submodule(norm)
        where = f"{self.source.family.layers}.{self.index}.{norm}"
        reads = _rescaled(norms, self.kept_S, where, self.streams)
        weights = [weight_of(self.block, name, self.source.family) for name in linears]
        readers_DD = gram_of_rows(weights)
        if not self.settings.fold:
            return reads.errors(readers_DD, None, None)
        fold_DS, report = reads.fold(readers_DD)
        for name, weight_OD in zip(linears, weights, strict=True):
            _fill(weight_of(self.cut, name, self.source.family), weight_OD, fold_DS)
        return report

    def _fit_writes(self, of: str, output: str) -> None:
        """Lead the stream back, where it is followed, and carry the walks on."""
        half_of = attention_half if of == "attention" else mlp_half
        family, streams = self.source.family, self.streams
        half = half_of(self.block, family)
        if streams.narrow is None:
            streams.dense.advance(half, self.index)
            return
        inputs: list[torch.Tensor] = []
        moments = streams.collect_writes(
            streams.narrow,
            streams.dense,
            half,
            self.index,
            output,
            pruned_half=half_of(self.cut, family),
            keep=inputs,
            channels_S=self.kept_S,
        )
        weight_SI = weight_of(self.cut, output, family)
        weight_SI.copy_(_led_back(weight_SI, moments, self.settings.correction))
        streams.narrow.advance_replayed(self.cut, self.index, inputs, of=of)


def _led_back(weight_OI: torch.Tensor, moments: Moments, correction: float) -> torch.Tensor:
    """The weight of an output layer that loses no inputs, fitted between its own output and
    what leads the stream back to the dense one."""
    halves = _halves(weight_OI, moments, correction)
    everything = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    damping = choose_damping(halves, everything)
    return _whole(weight_OI.double(), moments, correction).on(everything).fold(damping)


def _rescaled(
    norms: tuple[nn.Module, nn.Module], kept_S: torch.Tensor, where: str, streams: ChannelStreams
) -> Reads:
    """What a norm gives, after its gains in the narrower model have been brought to scale."""
    gram = streams.collect_reads(streams.dense, streams.narrow, norms, kept_S, where)
    reads = Reads(gram, kept_S)
    gain_S: torch.Tensor = norms[1].weight  # type: ignore[assignment]
    scale_S = torch.full_like(gain_S, reads.scale(), dtype=torch.float64)
    return reads.scaled(_multiplied(gain_S, scale_S))


def _multiplied(gain_S: torch.Tensor, factors_S: torch.Tensor) -> torch.Tensor:
    """Multiply gains in place; returns by what they really changed, in their own dtype."""
    before_S = gain_S.double()
    gain_S.copy_(before_S * factors_S)
    return torch.where(before_S == 0, 1.0, gain_S.double() / before_S)


def _fit_head(
    source: BlockSource,
    narrow: NarrowSource,
    kept_S: torch.Tensor,
    settings: Prune,
    streams: ChannelStreams,
) -> OutputReport:
    head, norm = readers_of(source.skeleton())
    narrow_head, narrow_norm = readers_of(narrow.skeleton())
    reads = _rescaled((norm, narrow_norm), kept_S, FINAL_NORM, streams)
    weight_VD: torch.Tensor = head.weight  # type: ignore[assignment]
    readers_DD = gram_of_rows([weight_VD])
    if not settings.fold:
        return reads.errors(readers_DD, None, None)
    if source.config.tie_word_embeddings:
        factors_S, report = reads.fit_gains(readers_DD)
        _multiplied(narrow_norm.weight, factors_S)  # type: ignore[arg-type]
        return report
    fold_DS, report = reads.fold(readers_DD)
    _fill(narrow_head.weight, weight_VD, fold_DS)  # type: ignore[arg-type]
    return report


def _fill(narrow_OS: torch.Tensor, weight_OD: torch.Tensor, fold_DS: torch.Tensor) -> None:
    """W B in the place of a narrower weight, a part of its rows after the other."""
    parts = zip(narrow_OS.split(ROWS), weight_OD.split(ROWS), strict=True)
    for part_OS, part_OD in parts:
        part_OS.copy_(part_OD.double() @ fold_DS)
