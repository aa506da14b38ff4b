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

TOKENS_AT_A_TIME = 64
"""Rows of logits that are in memory at once; with a large vocabulary they are what counts."""


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
    totals = torch.zeros(len(others), len(ids_NL), 3, dtype=torch.float64)
    for window, ids_L in enumerate(ids_NL):
        totals[:, window] = _window(reference, others, window, ids_L[1:])
    if not totals.isfinite().all():
        raise ModelError("the logits hold NaN or infinity; the model cannot be evaluated")
    return [Divergence(*total.T) for total in totals]


def _window(
    reference: Walk, others: Sequence[Walk], window: int, targets_L: torch.Tensor
) -> torch.Tensor:
    """Means over one window, a row for each other model: NLL under the reference, NLL under
    the other, KL."""
    totals = torch.zeros(len(others), 3, dtype=torch.float64)
    for start in range(0, len(targets_L), TOKENS_AT_A_TIME):
        chunk = slice(start, min(start + TOKENS_AT_A_TIME, len(targets_L)))
        log_p = torch.log_softmax(reference.logits(window, chunk).float(), -1)
        targets_L1 = targets_L[chunk, None].to(log_p.device)
        p, nll_p = log_p.exp(), _nll(log_p, targets_L1)
        for total, other in zip(totals, others, strict=True):
            logits_LV = other.logits(window, chunk).to(log_p.device)
            log_q = torch.log_softmax(logits_LV.float(), -1)
            kl = torch.linalg.vecdot(p, log_p - log_q).sum().item()
            total += torch.tensor([nll_p, _nll(log_q, targets_L1), kl], dtype=torch.float64)
    return totals / len(targets_L)


def _nll(log_LV: torch.Tensor, targets_L1: torch.Tensor) -> float:
    return -log_LV.gather(-1, targets_L1).sum().item()
