"""What is computed once from a Gram matrix for all layers that read the same inputs.

H = G + lam mean(diag G) I is the curvature of ||(W - W_hat) X||^2 + lam mean ||W - W_hat||^2.

Legend: O outputs (rows) of a linear layer, I inputs (columns).
"""

from __future__ import annotations

import logging
from functools import cached_property

import torch

from hf_compress.errors import ModelError

logger = logging.getLogger(__name__)

DAMPING = 1e-2
"""Share of the mean diagonal, as SparseGPT published it."""
MAX_DAMPING = 10.0
DEAD = 1e-6
"""Instead of damping, for inputs that are always zero: their weights, which do nothing, then
are the first to go."""


class Curvature:
    """H and its inverse.

    Args:
        gram_II: G.
        damping: lam. One that does not suffice is raised tenfold, and the log says so.

    Attributes:
        damped_II: H, float32.
        inverse_II: H^-1, float64.
        damping: lam, as it came to be.

    Raises:
        ModelError: G is zero, or not positive definite even at the strongest damping.
    """

    def __init__(self, gram_II: torch.Tensor, damping: float = DAMPING) -> None:
        mean = gram_II.diagonal().double().mean()
        while mean > 0 and damping <= MAX_DAMPING:
            damped_II = gram_II.to(torch.float64, copy=True)
            dead_I = damped_II.diagonal() == 0
            damped_II.diagonal().add_(torch.where(dead_I, DEAD, damping) * mean)
            factor_II, info = torch.linalg.cholesky_ex(damped_II)
            if not info.item():
                self.damping = damping
                self.damped_II = damped_II.float()
                self.inverse_II = torch.cholesky_inverse(factor_II, out=factor_II)
                return
            logger.warning(
                "a Gram matrix of %d inputs is not positive definite at damping %g; trying %g",
                len(gram_II),
                damping,
                10 * damping,
            )
            damping *= 10
        raise ModelError(
            f"a Gram matrix of {len(gram_II)} inputs with mean diagonal {mean.item():.3g} is not "
            f"positive definite at any damping up to {MAX_DAMPING:g}; the calibration text gives "
            "this layer nothing to learn from. Use more or other text"
        )

    @cached_property
    def factor_II(self) -> torch.Tensor:
        """U, upper triangular, with H^-1 = U^T U; float32."""
        return torch.linalg.cholesky(self.inverse_II, upper=True).float()

    @cached_property
    def scale_I(self) -> torch.Tensor:
        """1 / sqrt((H^-1)_jj); squared and times w^2, what zeroing a single weight costs."""
        return self.inverse_II.diagonal().rsqrt().float()

    @cached_property
    def split_II(self) -> torch.Tensor:
        """(H' + mean(diag H') I)^-1 with H' = H in units of `scale_I`; float32."""
        shifted_II = self.damped_II.double() / self.scale_I / self.scale_I[:, None]
        shifted_II.diagonal().add_(shifted_II.diagonal().mean())
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted_II)).float()

    def error(self, difference_OI: torch.Tensor) -> float:
        """||(W - W_hat) X||^2, damping included."""
        return ((difference_OI @ self.damped_II) * difference_OI).sum().item()
