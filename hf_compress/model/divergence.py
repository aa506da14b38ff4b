"""How far one model's distributions over tokens are from another's, window by window.

Legend: N windows, L tokens, P positions that are looked at, V vocabulary.
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


UNASKED = -100
"""Stands where no token is to be predicted."""


@dataclass(frozen=True)
class Questions:
    """What is asked of a language model on windows of text.

    Attributes:
        ids_NL: what it reads.
        targets_NP: the token to be predicted at each of the first P positions, or `UNASKED`.
    """

    ids_NL: torch.Tensor
    targets_NP: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens to be predicted."""
        return int((self.targets_NP != UNASKED).sum())


def next_tokens(ids_NL: torch.Tensor) -> Questions:
    """At every position but the last, the token that follows."""
    return Questions(ids_NL, ids_NL[:, 1:])


@dataclass(frozen=True)
class Divergence:
    """Per-window means in nats, float64.

    Attributes:
        reference_nll_N: negative log-likelihood, under the reference, of the tokens to be
            predicted.
        nll_N: the same under the other model.
        kl_N: KL(reference || other) of the distributions at the P positions.
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


def compare(reference: Walk, others: Sequence[Walk], targets_NP: torch.Tensor) -> list[Divergence]:
    """Compare walks with a reference; all have passed all blocks on the same windows.

    Args:
        targets_NP: see `Questions`.

    Raises:
        ModelError: the logits of one are not finite.
    """
    totals = torch.zeros(len(others), len(targets_NP), 3, dtype=torch.float64)
    for window, targets_P in enumerate(targets_NP):
        totals[:, window] = _window(reference, others, window, targets_P)
    if not totals.isfinite().all():
        raise ModelError("the logits hold NaN or infinity; the model cannot be evaluated")
    return [Divergence(*total.T) for total in totals]


def _window(
    reference: Walk, others: Sequence[Walk], window: int, targets_P: torch.Tensor
) -> torch.Tensor:
    """Means over one window, a row for each other model: NLL under the reference, NLL under
    the other, KL."""
    totals = torch.zeros(len(others), 3, dtype=torch.float64)
    for start in range(0, len(targets_P), TOKENS_AT_A_TIME):
        chunk = slice(start, min(start + TOKENS_AT_A_TIME, len(targets_P)))
        log_p = torch.log_softmax(reference.logits(window, chunk).float(), -1)
        targets_L1 = targets_P[chunk, None].to(log_p.device)
        p, nll_p = log_p.exp(), _nll(log_p, targets_L1)
        for total, other in zip(totals, others, strict=True):
            logits_LV = other.logits(window, chunk).to(log_p.device)
            log_q = torch.log_softmax(logits_LV.float(), -1)
            kl = torch.linalg.vecdot(p, log_p - log_q).sum().item()
            total += torch.tensor([nll_p, _nll(log_q, targets_L1), kl], dtype=torch.float64)
    asked = int((targets_P != UNASKED).sum())
    return totals / torch.tensor([asked, asked, len(targets_P)])


def _nll(log_LV: torch.Tensor, targets_L1: torch.Tensor) -> float:
    asked_L1 = targets_L1 != UNASKED
    return -(log_LV.gather(-1, targets_L1.where(asked_L1, 0)) * asked_L1).sum().item()
