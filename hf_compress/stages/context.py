"""What every stage gets: the model as it finds it, the windows, and a place for its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_compress.model.blocks import BlockSource
from hf_compress.recipe import Calibrate
from hf_compress.subject import Subject
from hf_compress.workspace import NOTE, REPORT, Workspace

COMPARING_SHARE = 1 / 8
"""Of the calibration text, where statistics only serve to compare splits or layers."""


@dataclass(frozen=True)
class Context:
    """One stage's surroundings.

    Attributes:
        name: of the stage's step in the workspace.
        subject: the dense model of the run, and its tokenizer.
        source: the model as the stage before left it; the dense one for the first.
        layers: for each block of `source`, its index in the dense model.
        windows: token ids [N, L] for `calibration` and `fitness`.
        calibration: how statistics are collected.
        workspace: keeps results.
        found: folder of the checkpoint that the stage before left, None for the first.
        made_from: keys of the steps that the stage is made from.
        seed: of the run.
        training: up to so many windows to train on, int64 [N, L]; none is for fitness.
        proposal: folder of what a `search` before this stage has found, if any.
    """

    name: str
    subject: Subject
    source: BlockSource
    layers: tuple[int, ...]
    windows: Mapping[str, torch.Tensor]
    calibration: Calibrate
    workspace: Workspace
    found: Path | None
    made_from: tuple[str, ...]
    training: Callable[[int], torch.Tensor]
    seed: int = 0
    proposal: Path | None = None

    def some_text(self) -> torch.Tensor:
        """A part of the calibration windows, for what only compares."""
        ids_NL = self.windows["calibration"]
        return ids_NL[: max(2, round(COMPARING_SHARE * len(ids_NL)))]

    def step(self, name: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """The folder of one of the stage's steps, built unless it is there already."""
        return self.workspace.step(name, self._all(inputs), build)

    def unfinished(self, inputs: dict[str, Any]) -> Path:
        """What a build of the stage's own step with these inputs leaves if it is cut off."""
        return self.workspace.unfinished(self.name, self._all(inputs))

    def _all(self, inputs: dict[str, Any]) -> dict[str, Any]:
        base = {
            "made_from": list(self.made_from),
            "dtype": str(self.source.dtype),
            "device": str(self.source.device),
        }
        return {**base, **inputs}


def write_note(folder: Path, seconds: dict[str, float]) -> None:
    """Keep the seconds that each part of a step took."""
    (folder / NOTE).write_text(json.dumps(seconds), encoding="utf-8")


def read_note(folder: Path) -> dict[str, float]:
    """What `write_note` wrote."""
    return json.loads((folder / NOTE).read_text("utf-8"))


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write what a stage decided and measured."""
    (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
