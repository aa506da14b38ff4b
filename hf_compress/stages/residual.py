"""`stage: prune` with `structures: [residual_channels]`: survey, choose channels, cut, verify."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hf_compress.calibration import (
    collect_beside,
    collect_reads,
    survey_stream,
    warn_if_few_tokens,
)
from hf_compress.model.channels import NarrowSource
from hf_compress.model.walk import Walk
from hf_compress.plan import save_plan
from hf_compress.pruning import (
    ChannelStreams,
    Templates,
    candidate_plans,
    choose_channels,
    narrow_blocks,
)
from hf_compress.recipe import Prune
from hf_compress.stages.context import Context, write_note, write_report
from hf_compress.stages.output import Output
from hf_compress.workspace import PLAN


def run_residual(context: Context, settings: Prune) -> Path:
    """The narrower checkpoint, verified in a fresh process."""
    return context.step(
        context.name,
        {
            "settings": settings.model_dump(mode="json"),
            "calibration": context.calibration.model_dump(mode="json"),
        },
        lambda folder: _build(context, settings, folder),
    )


def _build(context: Context, settings: Prune, folder: Path) -> None:
    """Write the checkpoint, its plan and its report into `folder`."""
    source, ids_NL = context.source, context.windows["calibration"]
    (plan,) = candidate_plans(source.config, settings)
    assert plan.hidden_size is not None  # it is what the structure is about
    num, length = ids_NL.shape
    warn_if_few_tokens(num, length, source.config.hidden_size)
    start = time.perf_counter()
    # What reads the stream is pooled over all its places: a part of the text tells enough.
    seen = survey_stream(source, context.some_text(), context.calibration.batch_size)
    kept_S = choose_channels(seen, settings, plan.hidden_size)
    seconds = {"calibrate": time.perf_counter() - start}
    templates = Templates(source, plan)
    narrow = NarrowSource(source, templates.model, kept_S)
    output = Output(folder, context, templates.model, narrow)
    reports, head = narrow_blocks(
        source,
        narrow,
        kept_S,
        templates,
        settings,
        streams=_streams(context, settings, narrow),
        probe=output.probe,
        write=output.write,
    )
    output.close()
    save_plan(plan, folder / PLAN)
    seconds["prune"] = time.perf_counter() - start - sum(seconds.values())
    result = output.verify()
    seconds["verify"] = time.perf_counter() - start - sum(seconds.values())
    write_note(folder, seconds)
    report = {
        "stage": "prune",
        "settings": settings.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
        "candidates": [],
        "dropped_layers": [],
        "dropped_sublayers": [],
        "search": None,
        "kept_channels": kept_S.tolist(),
        "layers": [asdict(each) for each in reports],
        "head": asdict(head),
        "verification": asdict(result),
        "num_calibration_tokens": ids_NL.numel(),
    }
    write_report(folder, report)


def _streams(context: Context, settings: Prune, narrow: NarrowSource) -> ChannelStreams:
    ids_NL, batch_size = context.windows["calibration"], context.calibration.batch_size
    beside = Walk(narrow, ids_NL, batch_size) if settings.corrects else None
    return ChannelStreams(
        Walk(context.source, ids_NL, batch_size),
        beside,
        collect_reads,
        partial(collect_beside, weighting=context.calibration.token_weighting),
    )
