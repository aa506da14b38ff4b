"""The stages in order: windows, calibrate, prune, evaluate, report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_compress.calibration import (
    calibrate,
    collect,
    collect_beside,
    collect_experts,
    warn_if_few_tokens,
)
from hf_compress.checkpoint import ShardWriter, publish, staging, verify
from hf_compress.data import load_windows, sample_windows
from hf_compress.errors import RecipeError
from hf_compress.measurement import measure
from hf_compress.model.surgery import widest_output
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan, save_plan
from hf_compress.pruning import (
    BlockReport,
    Candidate,
    Streams,
    Templates,
    candidate_plans,
    check_settings,
    compare_splits,
    prune_blocks,
)
from hf_compress.recipe import Calibrate, Prune, Recipe, dump_recipe
from hf_compress.report import base_model_of, license_of, load_metrics, save_metrics, write_card
from hf_compress.statistics import Statistics
from hf_compress.subject import Subject
from hf_compress.workspace import MANIFEST, Workspace, digest, digest_file, digest_files

logger = logging.getLogger(__name__)

PROBE_SHAPE = (2, 64)
"""Windows and tokens of the ids on which a saved checkpoint is compared."""
SPLIT_SHARE = 1 / 8
"""Of the calibration text, where statistics only serve to compare splits."""
Texts = Iterable[Any] | None


def run(
    recipe: Recipe,
    subject: Subject | None = None,
    *,
    calibration_texts: Texts = None,
    evaluation_texts: Texts = None,
) -> Path:
    """Carry out a recipe; returns the output folder.

    Steps that an earlier, interrupted run completed are not repeated.

    Raises:
        CompressionError: see the subclasses; nothing that looks finished is left.
    """
    check_recipe(recipe)
    workspace = Workspace(recipe.output.with_name(recipe.output.name + ".work"))
    _require_ours(recipe.output, workspace)
    subject = subject or Subject.from_recipe(recipe)
    job = Job(recipe, subject, workspace)
    windows = job.windows(calibration_texts, evaluation_texts)
    statistics = job.calibrate(windows) if job.needs_statistics else None
    pruned = job.prune(windows, statistics)
    evaluated = job.evaluate(windows, pruned)
    return job.publish(pruned, evaluated)


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError for what the schema alone cannot see."""
    kinds = [stage.stage for stage in recipe.stages]
    if kinds.count("prune") != 1 or kinds.count("calibrate") > 1 or kinds[-1] != "prune":
        raise RecipeError(
            f"the stages are {', '.join(kinds)}; a recipe has one `prune` stage, after at most one "
            "`calibrate` (which otherwise runs by itself)"
        )
    check_settings(_stage(recipe, Prune))


class Job:
    """One run: each method is a step that the workspace keeps."""

    def __init__(self, recipe: Recipe, subject: Subject, workspace: Workspace) -> None:
        self.recipe = recipe
        self.subject = subject
        self.workspace = workspace
        self.settings = _stage(recipe, Prune)
        self.calibration = next(
            (stage for stage in recipe.stages if isinstance(stage, Calibrate)), Calibrate()
        )
        self._plans = candidate_plans(subject.source.config, self.settings)

    def windows(self, calibration_texts: Texts, evaluation_texts: Texts) -> dict[str, torch.Tensor]:
        """Token windows for calibration, fitness and evaluation."""
        data = self.recipe.data
        inputs = {
            "model": self.subject.identity,
            "data": data.model_dump(mode="json"),
            "seed": self.recipe.seed,
            "files": _data_files(data.calibration.source, data.evaluation.source),
            # Texts handed over from Python are part of the identity by content.
            "texts": None,
        }
        if calibration_texts is not None or evaluation_texts is not None:
            calibration_texts, evaluation_texts = _listed(calibration_texts, evaluation_texts)
            inputs["texts"] = digest([calibration_texts, evaluation_texts])

        def build(folder: Path) -> None:
            windows = load_windows(
                data,
                self.subject.tokenizer,
                self.recipe.seed,
                sample=self._sample,
                calibration_texts=calibration_texts,
                evaluation_texts=evaluation_texts,
            )
            save_file(
                {
                    "calibration": windows.calibration.contiguous(),
                    "fitness": windows.fitness.contiguous(),
                    "evaluation": windows.evaluation.contiguous(),
                },
                folder / "windows.safetensors",
            )

        return load_file(self.workspace.step("windows", inputs, build) / "windows.safetensors")

    @property
    def needs_statistics(self) -> bool:
        """Whether anything is decided by the dense model's statistics."""
        return not self.settings.recollect or len(self._plans) > 1

    def calibrate(self, windows: dict[str, torch.Tensor]) -> Statistics:
        """Gram matrices of the dense model.

        Where pruning recollects them, they only serve to compare splits, and a share of the
        text tells as much about that.
        """
        ids_NL = windows["calibration"]
        if self.settings.recollect:
            ids_NL = ids_NL[: max(2, round(SPLIT_SHARE * len(ids_NL)))]
        inputs = {
            **self._base("windows"),
            "settings": self.calibration.model_dump(mode="json"),
            "num_windows": len(ids_NL),
        }

        def build(folder: Path) -> None:
            start = time.perf_counter()
            calibrate(
                self.subject.source,
                ids_NL,
                folder,
                weighting=self.calibration.token_weighting,
                batch_size=self.calibration.batch_size,
            )
            _note(folder, {"calibrate": time.perf_counter() - start})

        return Statistics(self.workspace.step("calibrate", inputs, build))

    def prune(self, windows: dict[str, torch.Tensor], statistics: Statistics | None) -> Path:
        """The pruned checkpoint, verified in a fresh process."""
        made_from = "calibrate" if self.needs_statistics else "windows"
        inputs = {**self._base(made_from), "settings": self.settings.model_dump(mode="json")}
        return self.workspace.step(
            "prune", inputs, lambda folder: self._prune(folder, windows, statistics)
        )

    def evaluate(self, windows: dict[str, torch.Tensor], pruned: Path) -> Path:
        """metrics.json."""
        inputs = {**self._base("prune"), "evaluate": self.recipe.evaluate.model_dump(mode="json")}

        def build(folder: Path) -> None:
            steps = ["calibrate", "prune"] if self.needs_statistics else ["prune"]
            seconds = {
                stage: spent
                for step in steps
                for stage, spent in _read_note(self.workspace.folder / step).items()
            }
            metrics = measure(
                self.recipe, self.settings, self.subject, pruned, windows["evaluation"], seconds
            )
            save_metrics(metrics, folder / "metrics.json")

        return self.workspace.step("evaluate", inputs, build)

    def publish(self, pruned: Path, evaluated: Path) -> Path:
        """The output folder: checkpoint, card, plots, metrics, plan, recipe."""
        output = self.recipe.output
        record = self.workspace.folder / "output.json"
        metrics = load_metrics(evaluated / "metrics.json")
        recipe_yaml = dump_recipe(self.recipe)
        with staging(output) as folder:
            publish([pruned], folder)
            for name in (MANIFEST, "note.json", "report.json"):
                (folder / name).unlink(missing_ok=True)
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            save_metrics(metrics, folder / "metrics.json")
            license, base_model_id = self._lineage()
            write_card(metrics, recipe_yaml, folder, license=license, base_model_id=base_model_id)
        record.write_text(json.dumps(digest_files(output), indent=1), encoding="utf-8")
        return output

    def _lineage(self) -> tuple[str | None, str | None]:
        """Licence of the dense model, and its Hub id."""
        folder = self.subject.folder
        if folder is None:
            return None, None
        is_hub_id = not Path(self.recipe.model).is_dir()
        base = self.recipe.model if is_hub_id else base_model_of(folder)
        return license_of(folder), base

    def _base(self, step: str) -> dict[str, Any]:
        return {
            "made_from": self.workspace.key(step),
            "dtype": str(self.subject.source.dtype),
            "device": str(self.subject.source.device),
        }

    def _sample(self, num: int, length: int) -> torch.Tensor:
        return sample_windows(
            self.subject.whole(), self.subject.tokenizer, num, length, self.recipe.seed
        )

    def _prune(
        self, folder: Path, windows: dict[str, torch.Tensor], statistics: Statistics | None
    ) -> None:
        start = time.perf_counter()
        seconds: dict[str, float] = {}
        source, settings = self.subject.source, self.settings
        if settings.criterion != "magnitude" or settings.fold:
            num, length = windows["calibration"].shape
            warn_if_few_tokens(num, length, widest_output(source.config))
        plan, candidates = self._plans[0], []
        if statistics and len(self._plans) > 1:
            candidates = compare_splits(
                source, statistics, self._plans, windows["fitness"], settings
            )
            plan = min(candidates, key=lambda candidate: candidate.kl).plan
            seconds["compare splits"] = time.perf_counter() - start
        ids_NL = windows["fitness"][: PROBE_SHAPE[0], : PROBE_SHAPE[1]]
        probe = Walk(source, ids_NL)
        reports = self._write(folder, plan, windows["calibration"], statistics, probe)
        seconds["prune"] = time.perf_counter() - start - sum(seconds.values())
        logits = torch.stack([probe.logits(index) for index in range(len(ids_NL))])
        result = verify(folder, ids_NL, logits, source.device)
        seconds["verify"] = time.perf_counter() - start - sum(seconds.values())
        _note(folder, seconds)
        report = {
            "candidates": [_candidate(candidate, plan) for candidate in candidates],
            "layers": [asdict(report) for report in reports],
            "verification": asdict(result),
            "num_calibration_tokens": windows["calibration"].numel(),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    def _write(
        self,
        folder: Path,
        plan: Plan,
        ids_NL: torch.Tensor,
        statistics: Statistics | None,
        probe: Walk,
    ) -> list[BlockReport]:
        """The checkpoint at the widths of a plan; `probe` then stands behind its last block."""
        source, settings = self.subject.source, self.settings
        templates = Templates(source, plan)
        templates.config.save_pretrained(folder)
        writer = ShardWriter(folder, templates.model)
        for name, value in probe.skeleton.state_dict().items():
            writer.add(name, value)
        reports = prune_blocks(
            source,
            statistics,
            plan,
            templates,
            settings,
            streams=self._streams(ids_NL),
            probe=probe,
            write=writer.add,
        )
        writer.close()
        save_plan(plan, folder / "plan.json")
        self.subject.save_companions(folder)
        return reports

    def _streams(self, ids_NL: torch.Tensor) -> Streams | None:
        settings, source = self.settings, self.subject.source
        if not settings.recollect:
            return None
        batch_size = self.calibration.batch_size
        weighting = self.calibration.token_weighting
        pruned = Walk(source, ids_NL, batch_size)
        experts = partial(collect_experts, pruned, weighting=weighting)
        if not settings.corrects:
            return Streams(pruned, None, partial(collect, pruned, weighting=weighting), experts)
        dense = Walk(source, ids_NL, batch_size)
        beside = partial(collect_beside, pruned, dense, weighting=weighting)
        return Streams(pruned, dense, beside, experts)


def _candidate(candidate: Candidate, chosen: Plan) -> dict[str, Any]:
    widths = candidate.plan.widths
    return {
        "num_key_value_heads": widths.num_key_value_heads,
        "intermediate_size": widths.intermediate_size,
        "num_experts": widths.num_experts,
        "kl": candidate.kl,
        "kl_standard_error": candidate.kl_standard_error,
        "chosen": candidate.plan == chosen,
    }


def _stage(recipe: Recipe, kind: type[Prune]) -> Prune:
    return next(stage for stage in recipe.stages if isinstance(stage, kind))


def _require_ours(output: Path, workspace: Workspace) -> None:
    """Refuse an output folder that holds anything that an earlier run did not write."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    record = workspace.folder / "output.json"
    if (
        output.is_dir()
        and record.is_file()
        and digest_files(output) == json.loads(record.read_text("utf-8"))
    ):
        return
    raise RecipeError(
        f"the output {output} is not empty and is not the untouched result of an earlier run; "
        "nothing was changed. Choose another output, or move it away"
    )


def _data_files(*sources: str) -> dict[str, str]:
    files = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file():
            files[source] = digest_file(path)
        elif path.is_dir():
            files[source] = digest(digest_files(path))
    return files


def _listed(*texts: Texts) -> list[Any]:
    return [None if text is None else list(text) for text in texts]


def _note(folder: Path, note: dict[str, float]) -> None:
    """Keep the seconds that each part of a step took."""
    (folder / "note.json").write_text(json.dumps(note), encoding="utf-8")


def _read_note(folder: Path) -> dict[str, float]:
    return json.loads((folder / "note.json").read_text("utf-8"))
