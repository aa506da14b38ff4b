"""Folding of what is read from the residual stream, where channels of it are gone.

A norm gives a [D] in the model as it was found and x [S] in the narrower one. What reads it,
W [O, D], becomes W B, where B is the least-squares optimum for W a, damped toward the plain
selection P of the kept channels (fold.py, with P for the weight):

    B = P + (A_ax - P G_xx) (G_xx + lam mean(diag G) I)^-1.

It is the same for all that reads there; the damping is cross-validated for all of it together.
A head that is tied to the embedding cannot change: there, only the norm's gains are fitted.

Legend: D channels of the stream, S kept ones, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_compress.errors import ModelError
from hf_compress.pruning.reports import OutputReport
from hf_compress.regression.fold import Regression, choose_damping
from hf_compress.statistics import GramPair

LEAST = 1e-6
"""Share of the mean energy under which a channel counts as having that."""
JITTER = 1e-9
"""Share of the mean diagonal that makes a matrix of readers, which may lack rank, definite."""


@dataclass(frozen=True)
class Reads:
    """What a norm gives before and after the cut, over the calibration text.

    Attributes:
        gram: Gram matrices of [a, x], float32.
        kept_S: sorted indices of the kept channels.
    """

    gram: GramPair
    kept_S: torch.Tensor

    @property
    def width(self) -> int:
        """D."""
        return self.gram.first_II.shape[0] - len(self.kept_S)

    def scale(self) -> float:
        """The factor on x that brings it nearest to the kept part of a: a norm over fewer
        channels divides by another mean square."""
        columns_IS = self.gram.total_II[:, self.width :]
        toward, energy = columns_IS[self.kept_S].trace(), columns_IS[self.width :].trace()
        if not energy > 0:
            raise ModelError(
                "a norm gives only zeros on the calibration text; there is nothing to fit by. Use "
                "other text, or check the checkpoint"
            )
        return (toward / energy).item()

    def scaled(self, factors_S: torch.Tensor) -> Reads:
        """The same with each channel of x multiplied by a factor."""
        ones_D = torch.ones(self.width, device=factors_S.device)
        factors_I = torch.cat([ones_D, factors_S.float()])
        grams = (
            gram_II * factors_I * factors_I[:, None]
            for gram_II in (self.gram.first_II, self.gram.second_II)
        )
        return Reads(GramPair(*grams), self.kept_S)

    def fold(self, readers_DD: torch.Tensor) -> tuple[torch.Tensor, OutputReport]:
        """B [D, S] for weights with the given W^T W, float64."""
        root_DD = square_root(readers_DD)
        factors_I, columns = self._even(self.gram.total_II), self._columns(readers_DD)
        first, second = (
            _in_units(self._problem(root_DD.float(), gram_II), factors_I.float())
            for gram_II in (self.gram.first_II, self.gram.second_II)
        )
        damping = choose_damping((first, second), columns)
        eye_DD = torch.eye(self.width, dtype=torch.float64, device=root_DD.device)
        problem = _in_units(self._problem(eye_DD, self.gram.total_II), factors_I)
        fold_DS = problem.on(columns).fold(damping) * factors_I[self.width :]
        return fold_DS, self.errors(readers_DD, fold_DS, damping)

    def errors(
        self, readers_DD: torch.Tensor, fold_DS: torch.Tensor | None, damping: float | None
    ) -> OutputReport:
        """Of what weights with the given W^T W make of it; without B, of the selection."""
        root_DD = square_root(readers_DD)
        problem = self._problem(root_DD, self.gram.total_II).on(self._columns(readers_DD))
        dropped = max(0.0, problem.error(problem.weight_OS) / problem.energy)
        if fold_DS is None:
            return OutputReport(dropped, dropped, None)
        folded = max(0.0, problem.error(root_DD @ fold_DS) / problem.energy)
        return OutputReport(folded, dropped, damping)

    def fit_gains(self, readers_DD: torch.Tensor) -> tuple[torch.Tensor, OutputReport]:
        """Factors [S] on x for weights that only lose the columns of their removed channels:
        least squares over one number a channel, damped toward 1."""
        total = self._gain_problem(readers_DD, self.gram.total_II)
        factors_S = _even(total.gram_II.diagonal())
        first, second = (
            _in_units(self._gain_problem(readers_DD.float(), gram_II), factors_S.float())
            for gram_II in (self.gram.first_II, self.gram.second_II)
        )
        everything = torch.arange(len(self.kept_S), device=readers_DD.device)
        damping = choose_damping((first, second), everything)
        fitted_1S = _in_units(total, factors_S).on(everything).fold(damping) * factors_S
        problem = total.on(everything)
        dropped, fitted = (
            max(0.0, problem.error(each) / problem.energy)
            for each in (problem.weight_OS, fitted_1S)
        )
        return fitted_1S[0], OutputReport(fitted, dropped, damping)

    def _columns(self, like: torch.Tensor) -> torch.Tensor:
        """Where x stands in [a, x]."""
        return torch.arange(self.width, len(self.gram.first_II), device=like.device)

    def _even(self, gram_II: torch.Tensor) -> torch.Tensor:
        """Factors on [a, x] that give all of x the same energy."""
        even_S = _even(gram_II.diagonal()[self.width :])
        return torch.cat([even_S.new_ones(self.width), even_S])

    def _problem(self, weight_OD: torch.Tensor, gram_II: torch.Tensor) -> Regression:
        """Target W a. Only x is to be kept, and its columns start from those of W."""
        target_OI = weight_OD @ gram_II[: self.width]
        energy = (target_OI[:, : self.width] * weight_OD).sum().item()
        weight_OI = torch.cat([weight_OD, weight_OD[:, self.kept_S]], dim=1)
        return Regression(weight_OI, gram_II, target_OI, energy)

    def _gain_problem(self, readers_DD: torch.Tensor, gram_II: torch.Tensor) -> Regression:
        """||W a - W_S diag(u) x||^2 as a problem of u, whose Gram matrix is W_S^T W_S times
        that of x, element by element."""
        among_DS = readers_DD[:, self.kept_S]
        gram_SS = among_DS[self.kept_S] * gram_II[self.width :, self.width :]
        target_S = (among_DS * gram_II[: self.width, self.width :]).sum(0)
        energy = (readers_DD * gram_II[: self.width, : self.width]).sum().item()
        return Regression(torch.ones_like(target_S)[None], gram_SS, target_S[None], energy)


def _even(energy_I: torch.Tensor) -> torch.Tensor:
    """Factors on inputs that give each the mean energy, which damping is a share of: few channels
    hold most of a stream's energy, and for the others a share of the mean would be all."""
    mean = energy_I.mean()
    return (mean / energy_I.clamp_min(LEAST * mean)).sqrt()


def _in_units(problem: Regression, factors_I: torch.Tensor) -> Regression:
    """The same problem for inputs that are multiplied by factors; its solution has to be
    multiplied by them too."""
    return Regression(
        problem.weight_OI / factors_I,
        problem.gram_II * factors_I * factors_I[:, None],
        problem.target_OI * factors_I,
        problem.energy,
    )


def square_root(readers_DD: torch.Tensor) -> torch.Tensor:
    """R with R^T R = W^T W."""
    damped_DD = readers_DD.clone()
    damped_DD.diagonal().add_(JITTER * readers_DD.diagonal().mean())
    return torch.linalg.cholesky(damped_DD, upper=True)
