"""Refit every block after the cut: what a fold does for output layers alone, in closed form, here
all weights of a block learn by gradient descent (block_learning.py)."""

from __future__ import annotations

import copy

from torch import nn

from hf_compress.block_learning import LearningReport, learn_block
from hf_compress.model.walk import Walk
from hf_compress.recipe import Refit


def refit_block(
    block: nn.Module, dense: nn.Module, index: int, walk: Walk, beside: Walk, settings: Refit
) -> tuple[nn.Module, LearningReport]:
    """A trained copy of a compressed block; see `learn_block`."""
    learner = copy.deepcopy(block).float()
    report = learn_block(learner, dense, index, walk, beside, settings)
    return learner.to(walk.hidden_NLD.dtype).eval(), report
