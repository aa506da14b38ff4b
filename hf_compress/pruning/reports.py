"""What cutting a block did, as the report keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OutputReport:
    """What cutting one output layer did; errors relative to the energy of the target."""

    error: float
    error_without_fold: float
    damping: float | None
    """None where nothing was folded: not asked for, or held-out text was against it."""


@dataclass(frozen=True)
class ExpertReport:
    """What losing experts took from the router: their share of all gates, 0 to 1."""

    routed_share: float


@dataclass(frozen=True)
class ExpertNeuronReport:
    """How well the text knew the experts of one layer whose neurons went.

    Attributes:
        few_tokens: experts that were given fewer tokens than they had neurons.
        not_folded: experts whose removed neurons were dropped, as held-out text was against
            the fold, or there was none.
    """

    few_tokens: int
    not_folded: int


@dataclass(frozen=True)
class BlockReport:
    """What cutting one block did; None where nothing was removed."""

    mlp: OutputReport | None
    """Where neurons of experts went, of all experts together."""
    attention: OutputReport | None
    experts: ExpertReport | None = None
    attention_input: OutputReport | None = None
    """Of what reads the residual stream there, where channels of that were removed."""
    mlp_input: OutputReport | None = None
    expert_neurons: ExpertNeuronReport | None = None
