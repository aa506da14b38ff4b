"""Which experts of a mixture stay, and what becomes of the others.

An expert is dropped, or merged into the kept one whose outputs are nearest to its own. The
router loses its row either way: its tokens go to the experts that come next for them.

Legend: E experts, K kept ones, N neurons of one expert, F entries of a neuron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from hf_compress.model.experts import ExpertCut, neuron_rows, take_neurons
from hf_compress.model.families import Experts
from hf_compress.recipe import Prune
from hf_compress.statistics import ExpertMoments

ExpertCriterion = Callable[[ExpertMoments, torch.Tensor], torch.Tensor]
"""`(moments, energy_E) -> score_E`; the expert with the lowest score goes first. The energy is
the squared norm of an expert's weights."""


def reap(moments: ExpertMoments, energy_E: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens routed to an expert of gate times output norm (Lasby et al. 2025,
    eq. 9); one that no token was routed to has nothing to lose."""
    return moments.output_E / moments.tokens_E.clamp_min(1)


def frequency(moments: ExpertMoments, energy_E: torch.Tensor) -> torch.Tensor:
    """How many tokens were routed to an expert."""
    return moments.tokens_E


def magnitude(moments: ExpertMoments, energy_E: torch.Tensor) -> torch.Tensor:
    """Squared norm of the weights; the text does not matter."""
    return energy_E


EXPERT_CRITERIA: dict[str, ExpertCriterion] = {
    "reap": reap,
    "frequency": frequency,
    "magnitude": magnitude,
}


@dataclass(frozen=True)
class ExpertReport:
    """What losing experts took from the router: their share of all gates, 0 to 1."""

    routed_share: float


@dataclass(frozen=True)
class ShrunkExperts:
    """What is left of the experts of a block; no report where all are kept."""

    cut: ExpertCut
    report: ExpertReport | None = None


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one block, and the order in which they may go."""

    parameters: dict[str, torch.Tensor]
    experts: Experts
    moments: ExpertMoments
    merges: bool
    order_E: torch.Tensor

    @classmethod
    def of(
        cls, block: nn.Module, experts: Experts, moments: ExpertMoments, settings: Prune
    ) -> ExpertLayer:
        parameters = {name: block.get_parameter(name).detach() for name in experts.parameters}
        energy_E = sum(
            (value.flatten(1).double().square().sum(1) for value in parameters.values()),
            torch.zeros(()),
        )
        device = energy_E.device
        moments = ExpertMoments(**{name: one.to(device) for name, one in vars(moments).items()})
        order_E = EXPERT_CRITERIA[settings.expert_criterion](moments, energy_E).argsort(stable=True)
        return cls(parameters, experts, moments, settings.experts == "merge", order_E)

    def shrink(self, count: int) -> ShrunkExperts:
        """Keep `count` experts."""
        split = len(self.order_E) - count
        gone, kept = self.order_E[:split], self.order_E[split:].sort().values
        if not split:
            return ShrunkExperts(ExpertCut(kept))
        mass_E = self.moments.mass_E
        report = ExpertReport((mass_E[gone].sum() / mass_E.sum()).item())
        merged = self._merged(gone, kept) if self.merges else {}
        return ShrunkExperts(ExpertCut(kept, parameters=merged), report)

    def _merged(self, gone: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Stacked parameters of the kept experts, each the mean, weighted by routed mass, of
        itself and of those that are nearest to it."""
        host = nearest(self.moments.agreement_EE, gone, kept)
        merged = {name: value[kept].clone() for name, value in self.parameters.items()}
        for position, index in enumerate(kept.tolist()):
            guests = [guest for guest, of in zip(gone.tolist(), host, strict=True) if of == index]
            mass_E = self.moments.mass_E
            if not guests or mass_E[guests].sum() == 0:
                continue
            group = [index, *guests]
            share = (mass_E[group] / mass_E[group].sum()).tolist()
            aligned = [self._one(index), *(self._aligned(guest, index) for guest in guests)]
            for name, value in merged.items():
                mean = sum(
                    part * one[name].double() for part, one in zip(share, aligned, strict=True)
                )
                value[position] = mean.to(value.dtype)  # type: ignore[union-attr]
        return merged

    def _one(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.parameters.items()}

    def _aligned(self, guest: int, host: int) -> dict[str, torch.Tensor]:
        """An expert with its neurons in the order in which they are most like the host's;
        it computes the same."""
        order_N = match_neurons(*(_rows(self._one(one), self.experts) for one in (host, guest)))
        return {
            name: value if axis is None else take_neurons(value[None], axis, order_N[None])[0]
            for (name, axis), value in zip(
                self.experts.parameters.items(), self._one(guest).values(), strict=True
            )
        }


def nearest(agreement_EE: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor) -> list[int]:
    """For each expert that goes, the kept one whose outputs differ least from its own."""
    energy_E = agreement_EE.diagonal()
    distance_EE = energy_E[:, None] + energy_E - 2 * agreement_EE
    return kept[distance_EE[gone][:, kept].argmin(1)].tolist()


def match_neurons(host_NF: torch.Tensor, guest_NF: torch.Tensor) -> torch.Tensor:
    """Which neuron of the guest stands for each of the host's: the permutation under which
    their weights differ least."""
    likeness_NN = (host_NF @ guest_NF.T).cpu().numpy()
    _, order_N = linear_sum_assignment(likeness_NN, maximize=True)
    return torch.as_tensor(order_N, device=host_NF.device)


def _rows(one: dict[str, torch.Tensor], experts: Experts) -> torch.Tensor:
    """All that one expert's parameters hold of each neuron, [N, F] float32."""
    return torch.cat(
        [
            neuron_rows(one[name], axis).float()
            for name, axis in experts.parameters.items()
            if axis is not None
        ],
        1,
    )
