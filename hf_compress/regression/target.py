"""What a linear layer whose weights are about to change should imitate."""

from __future__ import annotations

import torch

from hf_compress.regression.fold import Regression
from hf_compress.statistics import Moments

CORRECTION_DAMPING = 0.1
"""Share of the mean diagonal. Cross-validating it for every layer took a third longer and gave
no less KL (.448 against .440: SmolLM2-135M, half of the weights, 16 windows)."""


def wanted(weight_OI: torch.Tensor, moments: Moments, correction: float) -> torch.Tensor:
    """The full weight that a sparse or a quantized one is to imitate, float32 [O, I].

    Without a stream beside, that is the original. With one, it is the damped regression on
    what leads back to that stream, `correction` of the way; as ||T - W_hat X||^2 and
    ||(W* - W_hat) X||^2 differ by a constant where W* is the regression, the zeros or codes and
    what adapts to them then need to know nothing of it.

    Args:
        weight_OI: float32.
        moments: of the inputs [I], with `cross` where a stream runs beside.
        correction: from 0 (the layer's own output) to 1 (the stream beside).
    """
    cross = moments.cross
    if cross is None or not correction:
        return weight_OI
    gram_II = moments.gram.first_II + moments.gram.second_II
    target_OI = cross.first_DI + cross.second_DI
    if cross.of_inputs:
        target_OI = weight_OI @ target_OI
    own = Regression(weight_OI, gram_II, weight_OI @ gram_II, energy=0.0)
    everything = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    # Energies only shift an error that nobody asks for here.
    return own.toward(target_OI, 0.0, correction).on(everything).fold(CORRECTION_DAMPING)
