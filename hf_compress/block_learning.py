"""Train one decoder block on its own output error: gradient descent, nothing global.

All weights of a block learn one target: on the stream that the compressed model gives it, part
of the way from what the dense block would make of it to where the dense model's own stream
goes. One block is in memory at a time and no gradient crosses a block.

Legend: N windows, B windows in a batch, L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from hf_compress.errors import ModelError
from hf_compress.model.walk import Walk, mean_square

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; after it, it falls as a cosine."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class LearningReport:
    """Mean squared error of one block on the calibration text, each token's over the mean square
    of its residual stream, in the first and in the last epoch (while it is being trained)."""

    error_first: float
    error_last: float


class Learning(Protocol):
    """How long and how fast; fields of a recipe's stage."""

    @property
    def epochs(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def correction(self) -> float: ...


def learn_block(
    learner: nn.Module, dense: nn.Module, index: int, walk: Walk, beside: Walk, settings: Learning
) -> LearningReport:
    """Train a block in place, all its parameters; both walks stay where they are.

    Args:
        learner: a copy of the compressed model's block, float32, of which weights that are zero
            stay so.
        dense: the dense model's block at the same place.
        index: of the compressed block in its model.
        walk: follows the compressed model; it stays before the block.
        beside: follows the dense model; it stands behind `dense`.
        settings: how long and how fast.

    Raises:
        ModelError: the error is not finite, where the learning rate is too high.
    """
    own_NLD = torch.cat([walk.run(dense, index, batch).cpu() for batch in walk.batches()])
    target_NLD = own_NLD.lerp_(beside.hidden_NLD, settings.correction)
    zeros = [(weight, weight == 0) for weight in learner.parameters() if weight.dim() > 1]
    optimizer = _optimizer(learner, settings.learning_rate)
    num_steps = settings.epochs * -(-len(own_NLD) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=max(2, num_steps),
        pct_start=WARM_UP,
        cycle_momentum=False,
    )
    errors = []
    for batch in _order(len(own_NLD), settings):
        hidden_BLD, target_BLD = walk.hidden_NLD[batch], target_NLD[batch]
        optimizer.zero_grad()
        error = _error(learner, index, walk, hidden_BLD, target_BLD, beside.hidden_NLD[batch])
        error.backward()
        for weight, gone in zeros:
            if weight.grad is not None:
                weight.grad.masked_fill_(gone, 0)
        optimizer.step()
        schedule.step()
        errors.append(error.item())
    per_epoch = len(errors) // settings.epochs
    report = LearningReport(_mean(errors[:per_epoch]), _mean(errors[-per_epoch:]))
    if not torch.isfinite(torch.tensor(report.error_last)):
        raise ModelError(
            f"training block {index} diverged (error {report.error_last}); lower learning_rate, "
            f"which is {settings.learning_rate:g}"
        )
    learner.requires_grad_(False)
    return report


def _optimizer(learner: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Adam whose step is a share of each tensor's root mean square, so that one rate serves
    models whose weights differ in scale."""
    groups = []
    for weight in learner.parameters():
        weight.requires_grad_(True)
        size = weight.detach().square().mean().sqrt().item()
        groups.append({"params": [weight], "lr": learning_rate * max(size, 1e-8)})
    return torch.optim.Adam(groups, betas=BETAS)


def _order(num: int, settings: Learning) -> Iterator[torch.Tensor]:
    """Indices of the windows of every step, all of them once an epoch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.epochs):
        yield from torch.randperm(num, generator=generator).split(settings.batch_size)


def _error(
    learner: nn.Module,
    index: int,
    walk: Walk,
    hidden_BLD: torch.Tensor,
    target_BLD: torch.Tensor,
    dense_BLD: torch.Tensor,
) -> torch.Tensor:
    """Squared error, each token weighed as calibration does it (`weighted` in weighting.py)."""
    device = walk.source.device
    hidden_BLD = hidden_BLD.to(device).float()
    with torch.enable_grad(), _mixed_precision(walk):
        output_BLD = walk.forward(learner, index, hidden_BLD)
    power_BL1 = torch.maximum(mean_square(hidden_BLD), mean_square(dense_BLD.to(device)))
    power_BL1.clamp_min_(torch.finfo(torch.float32).tiny)
    missing_BLD = output_BLD.float() - target_BLD.to(device).float()
    return (missing_BLD.square() / power_BL1).mean()


def _mixed_precision(walk: Walk) -> AbstractContextManager[object]:
    """bfloat16 products for a bfloat16 model; the weights that learn are float32."""
    if walk.source.dtype == torch.bfloat16:
        return torch.autocast(walk.source.device.type, torch.bfloat16)
    return nullcontext()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
