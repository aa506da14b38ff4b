"""What a token counts for in the statistics.

Legend: B windows, L tokens, T = B * L tokens, D hidden size, I inputs of an output layer.
"""

from __future__ import annotations

from typing import Literal

import torch

Weighting = Literal["inverse_norm", "none"]


def weighted(
    inputs_BLI: torch.Tensor,
    stream_BLD: torch.Tensor,
    weighting: Weighting,
    dense_BLD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [T, I] in their own dtype, and the factors [T, 1] they were multiplied with.

    `inverse_norm`: a token weighs 1 / mean(h^2) of the residual stream h that the layer's
    output has been added to, which is what the next RMSNorm divides by; its inputs are
    multiplied by the root of that. With a dense stream beside, that is the dense one, and the
    pruned one is known before the addition only; the larger of the two norms counts: a massive
    activation in either would else be worth a thousand tokens.
    """
    inputs_TI = inputs_BLI.flatten(0, -2)
    power_T1 = _power(stream_BLD)
    if weighting == "none":
        return inputs_TI, torch.ones_like(power_T1, dtype=inputs_TI.dtype)
    if dense_BLD is not None:
        power_T1 = torch.maximum(power_T1, _power(dense_BLD))
    # In the inputs' dtype: a weight may be rounded, as long as it is one for the token.
    scale_T1 = power_T1.clamp_min(torch.finfo(torch.float32).tiny).rsqrt().to(inputs_TI.dtype)
    return inputs_TI * scale_T1, scale_T1


def _power(stream_BLD: torch.Tensor) -> torch.Tensor:
    """Mean square of each token, [T, 1] float32."""
    stream_TD = stream_BLD.flatten(0, -2)
    norm_T1 = torch.linalg.vector_norm(stream_TD, dim=-1, keepdim=True, dtype=torch.float32)
    return norm_T1.square() / stream_TD.shape[-1]
