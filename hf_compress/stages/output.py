"""The checkpoint that a stage writes, block by block, and checks in a fresh process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_compress.checkpoint import ShardWriter, verify
from hf_compress.checkpoint.verify import VerificationResult
from hf_compress.formats.layout import Stored
from hf_compress.model.blocks import BlockSource
from hf_compress.model.divergence import mean_and_error
from hf_compress.model.walk import Walk
from hf_compress.stages.context import Context
from hf_compress.workspace import MANIFEST, NOTE, PLAN, REPORT

PROBE_SHAPE = (2, 64)
"""Windows and tokens of the ids on which a saved checkpoint is compared."""


class Output:
    """A checkpoint in the making.

    Attributes:
        folder: where it goes.
        probe: a walk that has to follow the new model, for the check after saving.
    """

    def __init__(
        self,
        folder: Path,
        context: Context,
        model: PreTrainedModel,
        source: BlockSource | None = None,
        packed: Mapping[str, Stored] | None = None,
    ) -> None:
        """
        Args:
            folder: where the checkpoint goes.
            model: the new model without weights, at its new widths.
            source: has the new model's skeleton, where that is not the one that was found.
            packed: what weights that are stored in few bits become; see `ShardWriter`.
        """
        self.folder = folder
        self._context = context
        self._ids_NL = context.windows["fitness"][: PROBE_SHAPE[0], : PROBE_SHAPE[1]]
        self.probe = Walk(source or context.source, self._ids_NL)
        model.config.save_pretrained(folder)
        self._writer = ShardWriter(folder, model, packed=packed)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor under its name in the checkpoint."""
        self._writer.add(name, tensor)

    def write_packed(self, name: str, stored: Stored) -> None:
        """Store what a weight has become in few bits."""
        self._writer.add_packed(name, stored)

    def close(self) -> None:
        """Write what is not in a block, which is final by now, and complete the files; the
        tokenizer and its companions come along."""
        for name, value in self.probe.skeleton.state_dict().items():
            self.write(name, value)
        self._writer.close()
        self._context.subject.save_companions(self.folder)

    def verify(self, tolerance: float | None = None) -> VerificationResult:
        """Load the checkpoint afresh; `probe` stands behind the last block by now. See
        `checkpoint.verify` for `tolerance`."""
        probe = self.probe
        logits_NLV = torch.stack([probe.logits(index) for index in range(len(self._ids_NL))])
        source = self._context.source
        auto_class = source.family.auto_class.__name__
        return verify(self.folder, self._ids_NL, logits_NLV, source.device, auto_class, tolerance)


def restore(context: Context, folder: Path) -> dict[str, Any]:
    """Put the checkpoint that was found in the place of a new one; how it was verified."""
    assert context.found is not None  # `check_recipe`: some stage came before
    shutil.rmtree(folder)
    aside = shutil.ignore_patterns(MANIFEST, NOTE, REPORT, PLAN)
    shutil.copytree(context.found, folder, ignore=aside)
    return json.loads((context.found / REPORT).read_text("utf-8"))["verification"]


def is_lower(after_N: torch.Tensor, before_N: torch.Tensor) -> bool:
    """Whether KL fell by two standard errors of the paired difference over windows or more."""
    fall, error = mean_and_error(before_N - after_N)
    return fall > 0 and fall >= 2 * error
