"""What an inspection needs to know of a block, collected while the windows pass through it.

Legend: B windows, L tokens, T = B * L tokens, D hidden size, O outputs and I inputs of an
output layer (`o_proj`, `down_proj`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from hf_compress.calibration.collect import accumulate_gram
from hf_compress.inspection.results import MassiveActivations
from hf_compress.model.surgery import weight_of
from hf_compress.model.walk import Walk, captured_input, require_finite
from hf_compress.statistics import GramPair

MASSIVE_MAGNITUDE = 100.0
MASSIVE_TO_MEDIAN = 1000.0
"""Both from Sun et al. 2024, section 2."""


@dataclass
class InputMoments:
    """First and second moments of an output layer's inputs.

    A token weighs 1 / mean(h^2) of the residual stream h after the layer, which is what the
    next RMSNorm divides by: a massive activation then counts as one token and not as a
    million. This is calibration's weighting `inverse_norm`.

    Attributes:
        grams: sums of weight * x x^T over each half of the windows, float32.
        sum_I: sum of weight * x, float64.
        weight: sum of the weights.
    """

    grams: GramPair
    sum_I: torch.Tensor
    weight: float = 0.0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> InputMoments:
        grams = GramPair.zeros(width, device)
        return cls(grams, torch.zeros(width, dtype=torch.float64, device=device))

    def add(self, half: int, inputs_TI: torch.Tensor, stream_TD: torch.Tensor) -> None:
        """Add tokens to one half: inputs of the layer, and the stream after it."""
        power_T1 = stream_TD.float().square().mean(-1, keepdim=True)
        root_T1 = power_T1.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        scaled_TI = inputs_TI.float() * root_T1
        accumulate_gram((self.grams.first_II, self.grams.second_II)[half], scaled_TI)
        self.sum_I += (scaled_TI * root_T1).sum(0, dtype=torch.float64)
        self.weight += root_T1.square().sum(dtype=torch.float64).item()

    def complete(self) -> InputMoments:
        """Fill the parts of the Gram matrices below the diagonal."""
        for gram_II in (self.grams.first_II, self.grams.second_II):
            gram_II.triu_().add_(gram_II.triu(1).T)
        return self

    @property
    def second_moment_II(self) -> torch.Tensor:
        """Mean of x x^T, float64."""
        return self.grams.total_II / self.weight

    @property
    def covariance_II(self) -> torch.Tensor:
        """Mean of (x - mean)(x - mean)^T, float64."""
        mean_I = self.sum_I / self.weight
        return self.second_moment_II.addr_(mean_I, mean_I, alpha=-1)


@dataclass
class Outliers:
    """Massive activations of the residual stream, gathered over the windows."""

    maxima: list[torch.Tensor] = field(default_factory=list)
    medians: list[torch.Tensor] = field(default_factory=list)
    num_entries: int = 0
    channels: set[int] = field(default_factory=set)

    def add(self, stream_BLD: torch.Tensor) -> None:
        magnitude_BLD = stream_BLD.float().abs()
        median_B = magnitude_BLD.flatten(1).median(1).values
        self.maxima.append(magnitude_BLD.flatten(1).amax(1).cpu())
        self.medians.append(median_B.cpu())
        threshold_B = (MASSIVE_TO_MEDIAN * median_B).clamp_min(MASSIVE_MAGNITUDE)
        massive_BLD = magnitude_BLD > threshold_B[:, None, None]
        self.num_entries += int(massive_BLD.sum())
        self.channels.update(massive_BLD.any(0).any(0).nonzero().flatten().tolist())

    def found(self) -> MassiveActivations:
        maximum_N, median_N = torch.cat(self.maxima), torch.cat(self.medians)
        tiny = torch.finfo(torch.float32).tiny
        return MassiveActivations(
            max_magnitude=maximum_N.max().item(),
            median_magnitude=median_N.median().item(),
            max_to_median=(maximum_N / median_N.clamp_min(tiny)).max().item(),
            num_entries=self.num_entries,
            channels=sorted(self.channels),
        )


def pass_through(
    walk: Walk,
    half: nn.Module,
    index: int,
    output: str,
    outliers: Outliers | None = None,
    *,
    advance: bool = True,
) -> InputMoments:
    """Carry all windows through one half of block `index`.

    Args:
        half: the attention or the MLP half of the block, or the whole block.
        output: name of its output layer, relative to the block.
        outliers: takes note of the residual stream after the half.
        advance: overwrite the walk's hidden states with what the half gives.

    Returns:
        Moments of what enters the output layer.

    Raises:
        ModelError: an activation is not finite.
    """
    where = f"{walk.source.family.layers}.{index}.{output}"
    weight_OI = weight_of(half, output, walk.source.family)
    moments = InputMoments.zeros(weight_OI.shape[1], walk.source.device)
    batches = list(walk.batches())
    with captured_input(half, output) as captured:
        for number, hidden_BLD in enumerate(batches):
            stream_BLD = walk.run(half, index, hidden_BLD)
            require_finite(stream_BLD, f"the residual stream after {where}")
            part = int(number >= (len(batches) + 1) // 2)
            moments.add(part, captured[0].flatten(0, -2), stream_BLD.flatten(0, -2))
            if outliers is not None:
                outliers.add(stream_BLD)
            if advance:
                hidden_BLD.copy_(stream_BLD)
    return moments.complete()
