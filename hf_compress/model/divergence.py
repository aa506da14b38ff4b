"""How far one model's next-token distributions are from another's, window by window.

Legend: N windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_compress.errors import ModelError
from hf_compress.model.walk import Walk

TOKENS_AT_A_TIME = 256
"""Rows of logits that are turned into float32 at once."""


@dataclass(frozen=True)
class Divergence:
    """Per-window means over the L - 1 predicted tokens, in nats, float64.

    Attributes:
        reference_nll_N: negative log-likelihood of the text under the reference.
        nll_N: the same under the other model.
        kl_N: KL(reference || other) of the next-token distributions.
    """

    reference_nll_N: torch.Tensor
    nll_N: torch.Tensor
    kl_N: torch.Tensor

    @property
    def kl(self) -> tuple[float, float]:
        """Mean KL and its standard error over windows."""
        return mean_and_error(self.kl_N)

    @property
    def nll_difference(self) -> tuple[float, float]:
        """Mean of other minus reference, and the standard error of the paired difference."""
        return mean_and_error(self.nll_N - self.reference_nll_N)


def mean_and_error(values_N: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    error = values_N.std() / math.sqrt(len(values_N)) if len(values_N) > 1 else torch.zeros(())
    return values_N.mean().item(), error.item()


def compare(reference: Walk, others: Sequence[Walk], ids_NL: torch.Tensor) -> list[Divergence]:
    """Compare walks with a reference; all have passed all blocks on the same windows.

    Raises:
        ModelError: the logits of one are not finite.
    """
    rows: list[list[tuple[float, float, float]]] = [[] for _ in others]
    for window, ids_L in enumerate(ids_NL):
        reference_LV = reference.logits(window)
        for row, other in zip(rows, others, strict=True):
            row.append(compare_logits(reference_LV, other.logits(window), ids_L))
    return [Divergence(*torch.tensor(row, dtype=torch.float64).T) for row in rows]


def compare_logits(
    reference_LV: torch.Tensor, other_LV: torch.Tensor, ids_L: torch.Tensor
) -> tuple[float, float, float]:
    """Means over one window: NLL under the reference, NLL under the other, KL."""
    targets = ids_L[1:, None].to(reference_LV.device)
    totals = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets), TOKENS_AT_A_TIME):
        chunk = slice(start, min(start + TOKENS_AT_A_TIME, len(targets)))
        log_p = torch.log_softmax(reference_LV[chunk].float(), -1)
        log_q = torch.log_softmax(other_LV[chunk].to(reference_LV.device).float(), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        nll = [-log.gather(-1, targets[chunk]).sum() for log in (log_p, log_q)]
        totals += torch.tensor([*nll, kl], dtype=torch.float64)
    if not torch.isfinite(totals).all():
        raise ModelError("the logits hold NaN or infinity; the model cannot be evaluated")
    reference_nll, nll, kl_sum = (totals / len(targets)).tolist()
    return reference_nll, nll, kl_sum
