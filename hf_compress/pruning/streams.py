"""Text on its way through a model that is being pruned, and what is gathered from it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from hf_compress.model.walk import Walk
from hf_compress.pruning.layer import OutputLayer
from hf_compress.statistics import ExpertMoments, Moments, NeuronMoments


class Collect(Protocol):
    """Moments of half a block of the dense model on the pruned stream; a walk that follows
    the dense model goes through it. Takes the inputs of its output layer, if `keep` is given."""

    def __call__(
        self, half: nn.Module, index: int, output: str, *, keep: list[torch.Tensor] | None = None
    ) -> Moments: ...


class CollectExperts(Protocol):
    """What the experts in the MLP half of a block do on the pruned stream; no walk moves."""

    def __call__(self, half: nn.Module, index: int) -> ExpertMoments: ...


class CollectNeurons(Protocol):
    """What the neurons inside the experts of the MLP half of a block do, expert by expert; the
    half may have lost experts, and no walk moves."""

    def __call__(self, half: nn.Module, index: int) -> Iterator[NeuronMoments]: ...


Reorder = Callable[[int, str, OutputLayer], OutputLayer]
"""`(block, output layer, as the criterion orders it) -> with the order that it is cut by`."""


@dataclass(frozen=True)
class Streams:
    """Windows of text on their way through a model, and what is gathered from them.

    Attributes:
        pruned: a walk that follows the pruned model.
        dense: one that follows the dense model beside it, or None without correction.
        collect: gathers moments on them.
        collect_experts: gathers what experts do on them.
        collect_neurons: gathers what the neurons of experts do on them.
    """

    pruned: Walk
    dense: Walk | None
    collect: Collect
    collect_experts: CollectExperts
    collect_neurons: CollectNeurons

    @property
    def walks(self) -> list[Walk]:
        return [self.pruned, self.dense] if self.dense else [self.pruned]
