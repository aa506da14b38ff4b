"""Folding: removed columns live on in the kept ones.

A layer's output may be any linear target of its inputs X, known by its moments. The fold is
the least-squares optimum on the kept inputs X_S, damped toward the original weight W_S and
not toward zero:

    W_hat = W_S + (T X_S^T - W_S G_SS) (G_SS + lam mean(diag G) I)^-1,    G = X X^T.

With the layer's own output as target, T = W X, this is W_S + W_R G_RS (G_SS + ...)^-1, and
merging two identical neurons is the special case G_RS = G_SS.

Legend: O outputs, I inputs, S kept input columns, R removed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Shares of the mean diagonal that `choose_damping` considers, in order. The weakest are for
neurons that do the same as others to the last digit."""
START = 8
"""Index of the damping from which the search goes downhill; its neighbours win most often."""
EXACT_BELOW = 1e-2
"""Damping under which a system may be too ill-conditioned for float32."""


@dataclass(frozen=True)
class Regression:
    """min ||T - W_hat X_S||^2 over W_hat, in terms of moments of one dtype.

    Attributes:
        weight_OI: the original weight W.
        gram_II: X X^T.
        target_OI: T X^T.
        energy: ||T||^2.
    """

    weight_OI: torch.Tensor
    gram_II: torch.Tensor
    target_OI: torch.Tensor
    energy: float

    @classmethod
    def of_own_output(cls, weight_OI: torch.Tensor, gram_II: torch.Tensor) -> Regression:
        """The target is what the whole layer makes of the inputs."""
        target_OI = weight_OI @ gram_II
        return cls(weight_OI, gram_II, target_OI, (target_OI * weight_OI).sum().item())

    def toward(self, cross_OI: torch.Tensor, energy: float, share: float) -> Regression:
        """The same with a target that lies `share` of the way to another one.

        Args:
            cross_OI: T' X^T of the other target T'.
            energy: ||T'||^2.
            share: from 0 (this target) to 1 (the other).
        """
        # ||(1-s) W X + s T'||^2, where <W X, T'> = sum(W * (T' X^T)).
        inner = (self.weight_OI * cross_OI).sum().item()
        mixed = (1 - share) ** 2 * self.energy
        mixed += 2 * share * (1 - share) * inner + share**2 * energy
        target_OI = torch.lerp(self.target_OI, cross_OI, share)
        return Regression(self.weight_OI, self.gram_II, target_OI, mixed)

    def on(self, kept_S: torch.Tensor) -> KeptRegression:
        """The problem of the kept inputs, to be solved with one damping or several."""
        return KeptRegression(
            self.weight_OI[:, kept_S],
            self.gram_II[kept_S][:, kept_S],
            self.target_OI[:, kept_S],
            self.energy,
            self.gram_II.diagonal().mean().item(),
        )


@dataclass(frozen=True)
class KeptRegression:
    """A `Regression` on the kept inputs alone.

    Attributes:
        weight_OS: the original weight of the kept inputs.
        gram_SS: X_S X_S^T.
        target_OS: T X_S^T.
        energy: ||T||^2.
        mean_diagonal: of the whole X X^T, which damping is a share of.
    """

    weight_OS: torch.Tensor
    gram_SS: torch.Tensor
    target_OS: torch.Tensor
    energy: float
    mean_diagonal: float

    def to(self, dtype: torch.dtype) -> KeptRegression:
        """The same in another dtype."""
        return KeptRegression(
            self.weight_OS.to(dtype),
            self.gram_SS.to(dtype),
            self.target_OS.to(dtype),
            self.energy,
            self.mean_diagonal,
        )

    def fold(self, damping: float) -> torch.Tensor:
        """W_hat [O, S]."""
        residual_OS = self.target_OS - self.weight_OS @ self.gram_SS
        system_SS = self.gram_SS.clone()
        system_SS.diagonal().add_(damping * self.mean_diagonal)
        factor_SS = torch.linalg.cholesky(system_SS)
        return self.weight_OS + torch.cholesky_solve(residual_OS.T, factor_SS).T

    def error(self, weight_OS: torch.Tensor) -> float:
        """||T - W_hat X_S||^2 for W_hat = `weight_OS`."""
        through_OS = weight_OS @ self.gram_SS
        through_OS -= 2 * self.target_OS
        return self.energy + (through_OS * weight_OS).sum().item()


@dataclass(frozen=True)
class Validated:
    """What one half of the text says of a fold on the other.

    Attributes:
        damping: with the least error there.
        pays: whether that error is less than that of merely dropping.
    """

    damping: float
    pays: bool


def choose_damping(halves: tuple[Regression, Regression], kept_S: torch.Tensor) -> float:
    """The damping with the least error on one half of the text when folded on the other."""
    return cross_validate(halves, kept_S).damping


def cross_validate(halves: tuple[Regression, Regression], kept_S: torch.Tensor) -> Validated:
    """The best damping, and whether a fold with it tells more than it makes up.

    The error falls and then rises with the damping, so walking downhill from the usual
    winner finds the least after two or three trials.

    Args:
        halves: in float32 or float64. Errors that are compared differ by far more than
            float32 rounds off; only weak damping is solved in float64 all the same.
    """
    errors: dict[int, float] = {}
    first, second = (half.on(kept_S) for half in halves)

    def error(position: int) -> float:
        if position not in errors:
            damping = DAMPINGS[position]
            dtype = first.gram_SS.dtype
            exact = torch.float64 if damping < EXACT_BELOW else dtype
            errors[position] = sum(
                held_out.error(fitted.to(exact).fold(damping).to(dtype))
                for fitted, held_out in ((first, second), (second, first))
            )
        return errors[position]

    best = START
    # Errors so small that they are all rounding speak for the weaker damping.
    rounding = torch.finfo(first.gram_SS.dtype).eps * (first.energy + second.energy)
    for step, slack in ((-1, rounding), (1, 0.0)):
        while 0 <= best + step < len(DAMPINGS) and error(best + step) < error(best) + slack:
            best += step
    dropped = sum(half.error(half.weight_OS) for half in (first, second))
    return Validated(DAMPINGS[best], error(best) < dropped)
