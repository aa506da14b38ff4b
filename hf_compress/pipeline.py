"""The stages in order: windows, calibrate, prune, evaluate, report."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress import __version__
from hf_compress.calibration import calibrate, collect_block
from hf_compress.checkpoint import ShardWriter, publish, staging, verify
from hf_compress.data import load_windows, sample_windows
from hf_compress.errors import RecipeError
from hf_compress.evaluation import measure_divergence, measure_speeds
from hf_compress.model.blocks import BlockSource, ModelInMemory, StreamedCheckpoint, meta_model
from hf_compress.model.loading import (
    check_vocabulary,
    load_config,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_folder,
)
from hf_compress.model.parameters import count_parameters, kv_bytes_per_token
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan, load_plan, save_plan
from hf_compress.pruning import (
    Templates,
    candidate_plans,
    check_settings,
    compare_splits,
    prune_blocks,
)
from hf_compress.recipe import Calibrate, Prune, Recipe, dump_recipe
from hf_compress.report import license_of, parse_metrics, save_metrics, write_card
from hf_compress.statistics import Statistics
from hf_compress.workspace import MANIFEST, Workspace, digest, digest_files, digest_model, versions

logger = logging.getLogger(__name__)

PROBE_SHAPE = (2, 64)
"""Windows and tokens of the ids on which a saved checkpoint is compared."""
Texts = Iterable[Any] | None


@dataclass
class Subject:
    """The dense model of a run, however it came."""

    source: BlockSource
    tokenizer: PreTrainedTokenizerBase
    identity: str
    """Hash of its content."""
    name: str
    folder: Path | None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Subject:
        folder = resolve_folder(recipe.model)
        config = load_config(folder)
        device = resolve_device(recipe.device)
        source = StreamedCheckpoint(folder, config, resolve_dtype(recipe.dtype, config), device)
        tokenizer = load_tokenizer(folder, config)
        name = recipe.model if not Path(recipe.model).is_dir() else folder.resolve().name
        return cls(source, tokenizer, digest(digest_files(folder)), name, folder)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str
    ) -> Subject:
        target = model.device if device == "auto" else resolve_device(device)
        check_vocabulary(tokenizer, model.config)
        name = model.config._name_or_path or model.config.model_type
        return cls(
            ModelInMemory(model, target), tokenizer, digest_model(model), Path(name).name, None
        )

    def whole(self) -> PreTrainedModel:
        """The model in one piece, for sampling text and measuring speed."""
        if isinstance(self.source, ModelInMemory):
            return self.source.model
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.source.dtype)
        return model.to(self.source.device).eval()

    def save_companions(self, folder: Path) -> None:
        """Tokenizer, chat template and generation config, as the dense model has them."""
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.source, ModelInMemory):
            if self.source.model.generation_config is not None:
                self.source.model.generation_config.save_pretrained(folder)
        elif self.folder and (self.folder / "generation_config.json").is_file():
            shutil.copyfile(
                self.folder / "generation_config.json", folder / "generation_config.json"
            )


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
    statistics = job.calibrate(windows)
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

    def calibrate(self, windows: dict[str, torch.Tensor]) -> Statistics:
        """Gram matrices of the dense model."""
        inputs = {**self._base("windows"), "settings": self.calibration.model_dump(mode="json")}

        def build(folder: Path) -> None:
            start = time.perf_counter()
            calibrate(
                self.subject.source,
                windows["calibration"],
                folder,
                weighting=self.calibration.token_weighting,
                batch_size=self.calibration.batch_size,
            )
            _note(folder, {"seconds": time.perf_counter() - start})

        return Statistics(self.workspace.step("calibrate", inputs, build))

    def prune(self, windows: dict[str, torch.Tensor], statistics: Statistics) -> Path:
        """The pruned checkpoint, verified in a fresh process."""
        inputs = {**self._base("calibrate"), "settings": self.settings.model_dump(mode="json")}
        return self.workspace.step(
            "prune", inputs, lambda folder: self._prune(folder, windows, statistics)
        )

    def evaluate(self, windows: dict[str, torch.Tensor], pruned: Path) -> Path:
        """metrics.json."""
        inputs = {**self._base("prune"), "evaluate": self.recipe.evaluate.model_dump(mode="json")}
        return self.workspace.step(
            "evaluate", inputs, lambda folder: self._evaluate(folder, windows, pruned)
        )

    def publish(self, pruned: Path, evaluated: Path) -> Path:
        """The output folder: checkpoint, card, plots, metrics, plan, recipe."""
        output = self.recipe.output
        record = self.workspace.folder / "output.json"
        metrics = parse_metrics(json.loads((evaluated / "metrics.json").read_text("utf-8")))
        recipe_yaml = dump_recipe(self.recipe)
        with staging(output) as folder:
            publish([pruned], folder)
            for name in (MANIFEST, "note.json", "report.json"):
                (folder / name).unlink(missing_ok=True)
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            save_metrics(metrics, folder / "metrics.json")
            is_hub_id = self.subject.folder is not None and not Path(self.recipe.model).is_dir()
            write_card(
                metrics,
                recipe_yaml,
                folder,
                license=license_of(self.subject.folder) if self.subject.folder else None,
                base_model_id=self.recipe.model if is_hub_id else None,
            )
        record.write_text(json.dumps(digest_files(output), indent=1), encoding="utf-8")
        return output

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
        self, folder: Path, windows: dict[str, torch.Tensor], statistics: Statistics
    ) -> None:
        start = time.perf_counter()
        source, settings = self.subject.source, self.settings
        candidates = []
        plan = self._plans[0]
        if len(self._plans) > 1:
            candidates = compare_splits(
                source, statistics, self._plans, windows["fitness"], settings
            )
            plan = min(candidates, key=lambda candidate: candidate.kl).plan
        templates = Templates(source, plan)
        templates.config.save_pretrained(folder)
        writer = ShardWriter(folder, templates.model)
        probe = Walk(source, windows["fitness"][: PROBE_SHAPE[0], : PROBE_SHAPE[1]])
        for name, value in probe.skeleton.state_dict().items():
            writer.add(name, value)
        reports = prune_blocks(
            source,
            statistics,
            plan,
            templates,
            settings,
            recollect=self._recollect(windows) if settings.recollect else None,
            probe=probe,
            write=writer.add,
        )
        writer.close()
        save_plan(plan, folder / "plan.json")
        self.subject.save_companions(folder)
        logits = torch.stack([probe.logits(index) for index in range(len(probe.hidden_NLD))])
        ids = windows["fitness"][: PROBE_SHAPE[0], : PROBE_SHAPE[1]]
        result = verify(folder, ids, logits, source.device)
        _note(folder, {"seconds": time.perf_counter() - start})
        report = {
            "candidates": [
                {
                    "num_key_value_heads": candidate.plan.widths.num_key_value_heads,
                    "intermediate_size": candidate.plan.widths.intermediate_size,
                    "kl": candidate.kl,
                    "kl_standard_error": candidate.kl_standard_error,
                    "chosen": candidate.plan == plan,
                }
                for candidate in candidates
            ],
            "layers": [asdict(report) for report in reports],
            "verification": asdict(result),
            "num_calibration_tokens": statistics.num_tokens,
        }
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    def _recollect(self, windows: dict[str, torch.Tensor]) -> Any:
        walk = Walk(self.subject.source, windows["calibration"], self.calibration.batch_size)

        def collect(walk: Walk, block: torch.nn.Module, index: int) -> Any:
            weighting = self.calibration.token_weighting
            return collect_block(walk, block, index, weighting, advance=False)

        return walk, collect

    def _evaluate(self, folder: Path, windows: dict[str, torch.Tensor], pruned: Path) -> None:
        start = time.perf_counter()
        source, ids = self.subject.source, windows["evaluation"]
        config = load_config(pruned)
        compressed = StreamedCheckpoint(pruned, config, source.dtype, source.device)
        divergence = measure_divergence(source, compressed, ids)
        speeds: list[dict[str, float]] = [{}, {}]
        if self.recipe.evaluate.speed:
            speeds = [asdict(speed) for speed in self._speeds(pruned, ids)]
        kl, kl_error = divergence.kl
        difference, difference_error = divergence.nll_difference
        report = json.loads((pruned / "report.json").read_text("utf-8"))
        plan = load_plan(pruned / "plan.json")
        before = _sizes(source.config, source.dtype)
        after = _sizes(config, source.dtype)
        metrics = {
            "hf_compress_version": __version__,
            "versions": versions(),
            "base_model": self.subject.name,
            "before": {**before, "perplexity": _exp(divergence.reference_nll_N), **speeds[0]},
            "after": {**after, "perplexity": _exp(divergence.nll_N), **speeds[1]},
            "comparison": {
                "kl": kl,
                "kl_standard_error": kl_error,
                "log_perplexity_difference": difference,
                "log_perplexity_difference_standard_error": difference_error,
                "num_windows": len(ids),
                "num_tokens": len(ids) * (ids.shape[1] - 1),
                "max_seq_length": ids.shape[1],
                "evaluation_source": _label(self.recipe.data.evaluation.source),
                "calibration_source": _label(self.recipe.data.calibration.source),
            },
            "pruning": {
                "sparsity_requested": self.settings.sparsity,
                "sparsity_achieved": 1
                - after["non_embedding_parameters"] / before["non_embedding_parameters"],
                "criterion": self.settings.criterion,
                "fold": self.settings.fold,
                "num_calibration_tokens": report["num_calibration_tokens"],
                "candidates": report["candidates"],
            },
            "layers": _layers(source.config, plan, report["layers"]),
            "verification": {
                key: value for key, value in report["verification"].items() if key != "parameters"
            },
            "seconds": {
                name: _read_note(self.workspace.folder / name)["seconds"]
                for name in ("calibrate", "prune")
            }
            | {"evaluate": time.perf_counter() - start},
            "peak_memory_bytes": _peak_memory(source.device),
            "device": _device_name(source.device),
        }
        save_metrics(parse_metrics(metrics), folder / "metrics.json")

    def _speeds(self, pruned: Path, ids: torch.Tensor) -> Any:
        settings = self.recipe.evaluate
        prompt = ids.flatten()[: settings.prefill_tokens]
        compressed = AutoModelForCausalLM.from_pretrained(pruned, dtype=self.subject.source.dtype)
        models = [self.subject.whole(), compressed.to(self.subject.source.device)]
        return measure_speeds(models, prompt, settings.decode_tokens)


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
            files[source] = digest(digest_files(path.parent).get(path.name))
        elif path.is_dir():
            files[source] = digest(digest_files(path))
    return files


def _listed(*texts: Texts) -> list[Any]:
    return [None if text is None else list(text) for text in texts]


def _sizes(config: Any, dtype: torch.dtype) -> dict[str, int]:
    count = count_parameters(meta_model(config, dtype))
    return {
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "weight_bytes": count.total * dtype.itemsize,
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype.itemsize),
    }


def _layers(config: Any, plan: Plan, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, (layer, report) in enumerate(zip(plan.layers, reports, strict=True)):
        row: dict[str, Any] = {
            "layer": index,
            "intermediate_size_before": config.intermediate_size,
            "intermediate_size": layer.intermediate_size,
            "num_key_value_heads_before": config.num_key_value_heads,
            "num_key_value_heads": layer.num_key_value_heads,
        }
        for part in ("mlp", "attention"):
            if report[part]:
                row[f"{part}_error"] = report[part]["error"]
                row[f"{part}_error_without_fold"] = report[part]["error_without_fold"]
                row[f"{part}_damping"] = report[part]["damping"]
        rows.append(row)
    return rows


def _exp(nll_N: torch.Tensor) -> float:
    return nll_N.mean().exp().item()


def _label(source: str) -> str:
    """A source as a reader of a published card should see it: no folders of this machine."""
    return Path(source).name if Path(source).exists() else source


def _note(folder: Path, note: dict[str, float]) -> None:
    (folder / "note.json").write_text(json.dumps(note), encoding="utf-8")


def _read_note(folder: Path) -> dict[str, float]:
    return json.loads((folder / "note.json").read_text("utf-8"))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
