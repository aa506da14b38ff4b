"""What is read from the residual stream: to choose its channels by, and to fold them by.

Legend: B windows, L tokens, T = B * L tokens, D channels (`hidden_size`), S kept ones, O outputs.
"""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from hf_compress.calibration.collect import _Sums, accumulate_gram
from hf_compress.model.blocks import BlockSource, attention_half, mlp_half
from hf_compress.model.channels import gram_of_rows, readers_of
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, check_weights, mean_square, require_finite
from hf_compress.statistics import GramPair, StreamStatistics

HEAD = 10.0
"""What the head counts for, beside 1 for each other place. Measured on SmolLM2-135M at 11 %,
folded only, 8 windows: KL .802 at 10, .826 at 1."""
TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def survey_stream(
    source: BlockSource, ids_NL: torch.Tensor, batch_size: int = 8
) -> StreamStatistics:
    """Statistics of the residual stream at all places where it is read, in one pass.

    Every token counts alike: at each place the stream is divided by its root mean square, as
    the norm there does, and norm gains are counted as part of the weights. What a channel has
    more of energy there than on the average of all places is counted as part of them too.

    Args:
        source: the model, in memory or streamed.
        ids_NL: token ids, N windows of L tokens.
        batch_size: windows in one forward pass of a block.
    """
    walk, family = Walk(source, ids_NL, batch_size), source.family
    pool = _Pool.of(source)
    for index in tqdm(range(source.config.num_hidden_layers), desc="calibrate", unit="block"):
        with source.block(index) as block:
            check_weights(block, f"{family.layers}.{index}")
            for norm, linears, half in (
                (family.attention_norm, family.attention_inputs, attention_half(block, family)),
                (family.mlp_norm, family.mlp_inputs, mlp_half(block, family)),
            ):
                weights = [weight_of(block, name, family) for name in linears]
                pool.add(walk, weight_of(block, norm, family), weights)
                walk.advance(half, index)
    head, final_norm = readers_of(walk.skeleton)
    pool.add(walk, final_norm.weight, [head.weight], HEAD)  # type: ignore[arg-type, list-item]
    return pool.statistics()


class _Pool:
    """Sums over the places where the stream is read."""

    def __init__(self, zeros_DD: torch.Tensor) -> None:
        self._correlation_DD = zeros_DD
        self._readers_DD = torch.zeros_like(zeros_DD)
        self._energy_D = torch.zeros_like(zeros_DD[0])
        self._peak_D = torch.zeros_like(zeros_DD[0])
        self._places = 0

    @classmethod
    def of(cls, source: BlockSource) -> _Pool:
        width = source.config.hidden_size
        return cls(torch.zeros(width, width, dtype=torch.float64, device=source.device))

    def add(
        self, walk: Walk, gain_D: torch.Tensor, weights: list[torch.Tensor], share: float = 1.0
    ) -> None:
        """One place: the norm's gains there, the weights [O, D] that read what it gives, and
        what they count for."""
        gram_DD = torch.zeros_like(self._readers_DD, dtype=torch.float32)
        tokens = 0
        for hidden_BLD in walk.batches():
            stream_TD = hidden_BLD.to(gram_DD.device).flatten(0, -2).float()
            require_finite(stream_TD, "the residual stream")
            size_TD = stream_TD.abs()
            peak_D = size_TD.amax(0) / size_TD.median().clamp_min(TINY)
            self._peak_D = torch.maximum(self._peak_D, peak_D.double())
            accumulate_gram(gram_DD, stream_TD * mean_square(stream_TD).clamp_min(TINY).rsqrt())
            tokens += len(stream_TD)
        gram_DD.triu_().add_(gram_DD.triu(1).T)
        whole_DD = gram_DD.double() / tokens
        size_D = whole_DD.diagonal().sqrt()
        gain_D = gain_D.detach().double()
        readers_DD = gram_of_rows(weights) * gain_D * gain_D[:, None]
        readers_DD *= share / (readers_DD * whole_DD).sum()
        self._correlation_DD += whole_DD / _outer(size_D).clamp_min(TINY)
        self._readers_DD += readers_DD * _outer(size_D)
        self._energy_D += whole_DD.diagonal()
        self._places += 1

    def statistics(self) -> StreamStatistics:
        sizes_DD = _outer((self._energy_D / self._places).sqrt())
        return StreamStatistics(
            self._correlation_DD / self._places * sizes_DD,
            self._readers_DD / self._places / sizes_DD.clamp_min(TINY),
            self._peak_D,
        )


def _outer(size_D: torch.Tensor) -> torch.Tensor:
    return size_D * size_D[:, None]


@torch.no_grad()
def collect_reads(
    dense: Walk,
    narrow: Walk | None,
    norms: tuple[nn.Module, nn.Module],
    kept_S: torch.Tensor,
    where: str,
) -> GramPair:
    """Gram matrices of [a, x], where a [T, D] is what a norm gives and x [T, S] what it gives
    in the narrower model; no walk moves.

    Args:
        dense: follows the model as it was found.
        narrow: follows the narrower model; without it, that has the kept channels of the
            stream of the other as they are.
        norms: of the model as it was found, and of the narrower one.
        where: names the place in messages.
    """
    device = dense.source.device
    width = dense.hidden_NLD.shape[-1] + len(kept_S)
    sums = _Sums.zeros(where, width, 0, device)
    found = list(dense.batches())
    narrower = list(narrow.batches()) if narrow else [each[..., kept_S.cpu()] for each in found]
    for number, (hidden_BLD, narrow_BLS) in enumerate(zip(found, narrower, strict=True)):
        sums.part = int(number >= (len(found) + 1) // 2)
        both = [
            norm(stream.to(device)).flatten(0, -2)
            for norm, stream in zip(norms, (hidden_BLD, narrow_BLS), strict=True)
        ]
        inputs_TI = torch.cat(both, dim=1)
        require_finite(inputs_TI, f"what is read of the residual stream in {where}")
        sums.add_inputs(inputs_TI)
    return sums.moments().gram
