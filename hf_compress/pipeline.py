"""A whole run: windows, the stages in order, evaluation, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_compress.checkpoint import publish, staging
from hf_compress.data import Windows, load_training_windows, load_windows, sample_windows
from hf_compress.errors import DataError, RecipeError
from hf_compress.measurement import measure
from hf_compress.model.blocks import BlockSource, StreamedCheckpoint
from hf_compress.model.families import Family, require_positions
from hf_compress.model.loading import load_config
from hf_compress.order import check_recipe
from hf_compress.plan import Plan, compose, load_plan, save_plan
from hf_compress.recipe import Calibrate, Distill, Recipe, Search, dump_recipe
from hf_compress.report import base_model_of, license_of, load_metrics, save_metrics, write_card
from hf_compress.stages import STAGES, Context, in_rounds, read_note
from hf_compress.subject import Subject
from hf_compress.workspace import (
    MANIFEST,
    NOTE,
    PLAN,
    REPORT,
    Workspace,
    digest,
    digest_file,
    digest_files,
)

logger = logging.getLogger(__name__)

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
    job = Job(recipe, subject or Subject.from_recipe(recipe), workspace)
    windows = job.windows(calibration_texts, evaluation_texts)
    results = job.compress(windows)
    evaluated = job.evaluate(windows, results)
    return job.publish(results, evaluated)


def require_author(recipe: Recipe, family: Family) -> None:
    """Raise DataError where a model is to write the calibration text that only predicts
    masked tokens."""
    if family.masked and recipe.data.calibration.source == "self":
        raise DataError(
            "a masked language model writes no text to calibrate on (data.calibration.source: "
            "self); set it to python-docs, a local file or a Hub dataset"
        )


class Job:
    """One run: each method is a step that the workspace keeps."""

    def __init__(self, recipe: Recipe, subject: Subject, workspace: Workspace) -> None:
        self.recipe = recipe
        self.subject = subject
        self.workspace = workspace
        for text in (recipe.data.calibration, recipe.data.evaluation):
            require_positions(subject.source.config, text.max_seq_length)
        first = next(
            stage for stage in in_rounds(recipe.stages) if not isinstance(stage, Calibrate)
        )
        # What later stages can reach depends on what comes before them.
        STAGES[first.stage].check(subject.source.config, first)
        for stage in recipe.stages:
            if isinstance(stage, Distill):  # what it needs, no stage before it changes
                STAGES[stage.stage].check(subject.source.config, stage)
        self._texts: list[Any] = [None, None]

    def windows(self, calibration_texts: Texts, evaluation_texts: Texts) -> dict[str, torch.Tensor]:
        """Token windows for calibration, fitness and evaluation."""
        data = self.recipe.data
        if calibration_texts is None:
            require_author(self.recipe, self.subject.source.family)
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
            self._texts = [calibration_texts, evaluation_texts]
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

        folder = self.workspace.step("windows", inputs, build)
        windows = load_file(folder / "windows.safetensors")
        for name in ("calibration", "fitness"):
            windows[name] = self.subject.questions(windows[name], self.recipe.seed).ids_NL
        return windows

    def training(self, num: int) -> torch.Tensor:
        """Up to `num` windows to train on, int64 [N, L]; see `load_training_windows`."""
        windows = load_file(self.workspace.folder / "windows" / "windows.safetensors")

        def sample(more: int, length: int) -> torch.Tensor:
            return self._sample(more, length, self.recipe.seed + 1)

        def build(folder: Path) -> None:
            training_NL = load_training_windows(
                self.recipe.data,
                self.subject.tokenizer,
                self.recipe.seed,
                Windows(**windows),
                num,
                sample=sample,
                calibration_texts=self._texts[0],
                evaluation_texts=self._texts[1],
            )
            save_file({"training": training_NL.contiguous()}, folder / "windows.safetensors")

        inputs = {"windows": self.workspace.key("windows"), "num": num}
        folder = self.workspace.step("training-windows", inputs, build)
        return load_file(folder / "windows.safetensors")["training"]

    def compress(self, windows: dict[str, torch.Tensor]) -> list[Path]:
        """Carry out the stages in order; the folder of each, the last holding the result."""
        results: list[Path] = []
        proposal: Path | None = None
        calibration = Calibrate()
        kinds: list[str] = []
        for stage in in_rounds(self.recipe.stages):
            if isinstance(stage, Calibrate):
                calibration = stage
                continue
            kinds.append(stage.stage)
            count = kinds.count(stage.stage)
            name = stage.stage if count == 1 else f"{stage.stage}-{count}"
            context = self.context(name, windows, calibration, results, proposal)
            result = STAGES[stage.stage].run(context, stage)
            if isinstance(stage, Search):
                proposal = result
            else:
                results.append(result)
                proposal = None
        return results

    def context(
        self,
        name: str,
        windows: dict[str, torch.Tensor],
        calibration: Calibrate,
        results: Sequence[Path] = (),
        proposal: Path | None = None,
    ) -> Context:
        """What a stage is given.

        Args:
            name: of its step in the workspace.
            results: of the stages before it.
            proposal: what a search right before it has found.
        """
        made_from = ["windows", *(result.name for result in results[-1:])]
        return Context(
            name=name,
            subject=self.subject,
            source=self._source(results),
            layers=self._layers(results),
            windows=windows,
            calibration=calibration,
            workspace=self.workspace,
            found=results[-1] if results else None,
            made_from=tuple(map(self.workspace.key, made_from)),
            training=self.training,
            seed=self.recipe.seed,
            proposal=proposal,
        )

    def _source(self, results: Sequence[Path]) -> BlockSource:
        """The model as the last stage left it."""
        dense = self.subject.source
        if not results:
            return dense
        return StreamedCheckpoint(results[-1], load_config(results[-1]), dense.dtype, dense.device)

    def _layers(self, results: Sequence[Path]) -> tuple[int, ...]:
        """For each block that the last stage left, its index in the dense model."""
        plan = _plan(results)
        return tuple(
            plan.positions if plan else range(self.subject.source.config.num_hidden_layers)
        )

    def evaluate(self, windows: dict[str, torch.Tensor], results: list[Path]) -> Path:
        """metrics.json."""
        source = self.subject.source
        inputs = {
            "made_from": [self.workspace.key(result.name) for result in results],
            "dtype": str(source.dtype),
            "device": str(source.device),
            "evaluate": self.recipe.evaluate.model_dump(mode="json"),
        }

        def build(folder: Path) -> None:
            metrics = measure(
                self.recipe, self.subject, results, windows["evaluation"], _seconds(results)
            )
            save_metrics(metrics, folder / "metrics.json")

        return self.workspace.step("evaluate", inputs, build)

    def publish(self, results: list[Path], evaluated: Path) -> Path:
        """The output folder: checkpoint, card, plots, metrics, plan, recipe."""
        output = self.recipe.output
        record = self.workspace.folder / "output.json"
        metrics = load_metrics(evaluated / "metrics.json")
        recipe_yaml = dump_recipe(self.recipe)
        with staging(output) as folder:
            publish([results[-1]], folder)
            plan = _plan(results)
            if plan:
                save_plan(plan, folder / PLAN)
            for name in (MANIFEST, NOTE, REPORT):
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

    def _sample(self, num: int, length: int, seed: int | None = None) -> torch.Tensor:
        seed = self.recipe.seed if seed is None else seed
        return sample_windows(self.subject.whole(), self.subject.tokenizer, num, length, seed)


def _plan(results: Sequence[Path]) -> Plan | None:
    """What all stages together cut of the dense model; None where nothing was cut."""
    plans = [load_plan(result / PLAN) for result in results if (result / PLAN).is_file()]
    return compose(plans) if plans else None


def _seconds(results: list[Path]) -> dict[str, float]:
    """Spent in the parts of all stages together."""
    seconds: dict[str, float] = {}
    for result in results:
        for part, spent in read_note(result).items():
            seconds[part] = seconds.get(part, 0.0) + spent
    return seconds


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
