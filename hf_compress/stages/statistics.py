"""Statistics of the model as a stage finds it: one step, whichever stage asks first."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from hf_compress.calibration import SublayerStreams, calibrate
from hf_compress.stages.context import Context, write_note
from hf_compress.statistics import Statistics


def calibration_step(context: Context) -> str:
    """The step's name: `calibrate`, and behind it what tells this stage from one of its kind."""
    _, dash, number = context.name.partition("-")
    return f"calibrate{dash}{number}"


def collect_statistics(context: Context, ids_NL: torch.Tensor) -> Statistics:
    """Gram matrices on these windows, collected unless they are there already."""
    settings = context.calibration

    def build(folder: Path) -> None:
        start = time.perf_counter()
        calibrate(
            context.source,
            ids_NL,
            folder,
            weighting=settings.token_weighting,
            batch_size=settings.batch_size,
        )
        write_note(folder, {"calibrate": time.perf_counter() - start})

    inputs = {"settings": settings.model_dump(mode="json"), "num_windows": len(ids_NL)}
    return Statistics(context.step(calibration_step(context), inputs, build))


def sublayer_streams(context: Context, beside: bool) -> SublayerStreams:
    """The calibration windows, to be carried through a model whose linear layers change.

    Args:
        beside: carry the model as it was found along.
    """
    return SublayerStreams(
        context.source,
        context.windows["calibration"],
        beside=beside,
        weighting=context.calibration.token_weighting,
        batch_size=context.calibration.batch_size,
    )
