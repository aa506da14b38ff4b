"""What a token counts for in the statistics.

Legend: B windows, L tokens, T = B * L tokens, D hidden size, I inputs of an output layer.
"""

from __future__ import annotations

from typing import Literal

import torch

from hf_compress.model.walk import mean_square

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
    power_T1 = mean_square(stream_BLD.flatten(0, -2))
    if weighting == "none":
        return inputs_TI, torch.ones_like(power_T1, dtype=inputs_TI.dtype)
    if dense_BLD is not None:
        power_T1 = torch.maximum(power_T1, mean_square(dense_BLD.flatten(0, -2)))
    # In the inputs' dtype: a weight may be rounded, as long as it is one for the token.
    scale_T1 = power_T1.clamp_min(torch.finfo(torch.float32).tiny).rsqrt().to(inputs_TI.dtype)
    return inputs_TI * scale_T1, scale_T1
