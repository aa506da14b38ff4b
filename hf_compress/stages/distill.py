"""`stage: distill`: train on the teacher's distributions, keep what lowers KL to it, verify."""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.data import answers
from hf_compress.errors import DataError, ModelError, RecipeError
from hf_compress.model.blocks import ModelInMemory, meta_model
from hf_compress.model.families import family_of
from hf_compress.model.loading import resolve_folder
from hf_compress.model.parameters import count_parameters
from hf_compress.model.walk import finite_state, require_finite
from hf_compress.recipe import Distill
from hf_compress.stages.context import Context, write_note, write_report
from hf_compress.stages.output import Output, is_lower, restore
from hf_compress.workspace import digest, digest_files

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import TrainingArguments

    from hf_compress.distillation.trainer import DistillationTrainer

# The trainer is imported where it is used: with accelerate and datasets it takes seconds.

EVALUATIONS = 10
"""Of the held-out windows in a training, unless the recipe says `eval_steps`."""
BYTES_PER_PARAMETER = 16
"""In training: float32 weight, gradient and Adam's two moments."""


def check_distill(config: PretrainedConfig, settings: Distill) -> None:
    """Raise RecipeError for a model or arguments that cannot be trained so."""
    if family_of(config).masked:
        raise RecipeError(
            f"`distill` trains models that predict the next token, and this {config.model_type} "
            "predicts masked ones; leave the stage out"
        )
    with tempfile.TemporaryDirectory() as scratch:
        training_arguments(settings, Path(scratch), config.max_position_embeddings)


def describe_distill(
    config: PretrainedConfig, settings: Distill, dtype: torch.dtype
) -> tuple[list[str], PretrainedConfig]:
    """What the stage will do; the configuration stays."""
    check_distill(config, settings)
    loss: str = settings.loss if settings.cross_entropy < 1 else "cross-entropy"
    if 0 < settings.cross_entropy < 1:
        loss += f" and {settings.cross_entropy:.0%} cross-entropy"
    teacher = settings.teacher or "the dense model"
    return [
        f"distill    {settings.max_tokens:,} tokens, {loss} to {teacher} ({settings.method}); kept "
        "if KL to it falls",
    ], config


def training_bytes(config: PretrainedConfig, settings: Distill) -> int:
    """Memory of a student of this configuration while it is trained, without activations."""
    trained = BYTES_PER_PARAMETER if settings.method == "full" else 4
    return trained * count_parameters(meta_model(config, torch.float32)).total


def passes_of_distill(settings: Distill, tokens: int) -> float:
    """About how many forward passes over the calibration text it costs: three of the student's
    and one of the teacher's for each token."""
    return 4 * settings.max_tokens / tokens


def run_distill(context: Context, settings: Distill) -> Path:
    """The trained checkpoint, or the one that was found where that is no better."""
    check_distill(context.source.config, settings)
    windows_NL = _training_windows(context, settings)
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "num_windows": len(windows_NL),
        "teacher": _identity(context, settings),
    }

    def build(folder: Path) -> None:
        _build(context, settings, windows_NL, folder, context.unfinished(inputs))

    result = context.step(context.name, inputs, build)
    shutil.rmtree(context.unfinished(inputs))
    return result


def training_arguments(
    settings: Distill,
    folder: Path,
    length: int,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TrainingArguments:
    """What the trainer is given.

    Args:
        folder: where it keeps its checkpoints.
        length: tokens in a window.
        device, dtype: of the run.

    Raises:
        RecipeError: transformers refuses a value in `training`.
    """
    from transformers import TrainingArguments

    device = device or torch.device("cpu")
    try:
        arguments = TrainingArguments(
            **_defaults(settings, device, dtype),
            output_dir=str(folder),
            max_steps=1,
            seed=seed,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            eval_strategy="steps",
            save_strategy="steps",
            load_best_model_at_end=False,
            metric_for_best_model="kl",
            greater_is_better=False,
            restore_callback_states_from_checkpoint=True,
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"training: {json.dumps(settings.training, default=str)} is refused by "
            f"transformers.TrainingArguments: {error}"
        ) from error
    per_step = length * arguments.train_batch_size * arguments.gradient_accumulation_steps
    arguments.max_steps = max(1, math.ceil(settings.max_tokens / per_step))
    if "eval_steps" not in settings.training:
        arguments.eval_steps = math.ceil(arguments.max_steps / EVALUATIONS)
    if "logging_steps" not in settings.training:
        arguments.logging_steps = math.ceil(arguments.max_steps / 100)
    arguments.save_steps = arguments.eval_steps
    arguments.load_best_model_at_end = True
    return arguments


def _defaults(settings: Distill, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of TrainingArguments that `training` may say otherwise, and what it does say."""
    ours: dict[str, Any] = {
        "learning_rate": 1e-4 if settings.method == "full" else 2e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.05,
        "weight_decay": 0.0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "save_total_limit": 1,
        "report_to": "none",
        "bf16": dtype != torch.float32,
        "dataloader_pin_memory": device.type != "cpu",
    }
    if settings.training.get("lr_scheduler_type", "cosine_with_min_lr") != "cosine_with_min_lr":
        del ours["lr_scheduler_kwargs"]
    return {**ours, **settings.training}


def _training_windows(context: Context, settings: Distill) -> torch.Tensor:
    length = context.windows["calibration"].shape[1]
    windows_NL = context.training(math.ceil(settings.max_tokens / length))
    for name, ids_NL in (("fitness", context.windows["fitness"]), ("training", windows_NL)):
        asked_NL = _asked(context, settings, ids_NL)
        if asked_NL is not None and not asked_NL[:, 1:].any():
            raise DataError(
                f"no token of the {name} windows is an assistant's answer; leave completion_only "
                "out, or make the windows longer (data.calibration.max_seq_length)"
            )
    # One without any would have no mean.
    return windows_NL if asked_NL is None else windows_NL[asked_NL[:, 1:].any(-1)]


def _asked(context: Context, settings: Distill, ids_NL: torch.Tensor) -> torch.Tensor | None:
    """Which tokens count, where not all do."""
    return answers(ids_NL, context.subject.tokenizer) if settings.completion_only else None


def _build(
    context: Context, settings: Distill, windows_NL: torch.Tensor, folder: Path, training: Path
) -> None:
    start = time.perf_counter()
    trainer = _trainer(context, settings, windows_NL, training)
    first = trainer.evaluate()
    before_N = trainer.window_kl_N
    trainer.train(resume_from_checkpoint=_last_checkpoint(training))
    if settings.save_adapter:
        trainer.model.save_pretrained(folder / "adapter")
    student = _finished(trainer, context.source.dtype)
    last = trainer.evaluate()
    kept = is_lower(trainer.window_kl_N, before_N)
    seconds = time.perf_counter() - start
    verification = asdict(_write(context, student, folder)) if kept else restore(context, folder)
    write_note(folder, {"distill": seconds, "verify": time.perf_counter() - start - seconds})
    curve = _curve(trainer, windows_NL.shape[1], first)
    report = {
        "stage": "distill",
        "settings": settings.model_dump(mode="json"),
        "teacher": settings.teacher or context.subject.name,
        "kept": kept,
        "kl_before": first["eval_kl"],
        "kl_after": last["eval_kl"],
        "perplexity_before": first["eval_perplexity"],
        "perplexity_after": last["eval_perplexity"],
        "tokens": curve[-1]["tokens"],
        "minutes": curve[-1]["minutes"],
        "num_windows": len(windows_NL),
        "curve": curve,
        "verification": verification,
    }
    write_report(folder, report)


def _trainer(
    context: Context, settings: Distill, windows_NL: torch.Tensor, folder: Path
) -> DistillationTrainer:
    from transformers import EarlyStoppingCallback

    from hf_compress.distillation.losses import Objective
    from hf_compress.distillation.trainer import DistillationTrainer
    from hf_compress.distillation.windows import WindowDataset

    source, teacher = context.source, _teacher(context, settings)
    fitness_NL = context.windows["fitness"]
    names = ("loss", "temperature", "beta", "top_k", "cross_entropy")
    return DistillationTrainer(
        _student(context, settings),
        teacher,
        training_arguments(
            settings,
            folder,
            windows_NL.shape[1],
            device=source.device,
            dtype=source.dtype,
            seed=context.seed,
        ),
        objective=Objective(**{name: getattr(settings, name) for name in names}),
        hidden_cosine=settings.hidden_cosine,
        layers=None if settings.teacher else context.layers,
        train_dataset=_training_data(context, settings, windows_NL, teacher),
        eval_dataset=WindowDataset(fitness_NL, _asked(context, settings, fitness_NL)),
        callbacks=[EarlyStoppingCallback(settings.patience)],
    )


def _training_data(
    context: Context, settings: Distill, windows_NL: torch.Tensor, teacher: PreTrainedModel
) -> Dataset[dict[str, torch.Tensor]]:
    """The windows, with what was drawn from the teacher if that is to be kept."""
    from hf_compress.distillation.cache import CachedDataset, write_cache
    from hf_compress.distillation.windows import WindowDataset

    windows = WindowDataset(windows_NL, _asked(context, settings, windows_NL))
    if not settings.cached_draws:
        return windows
    draws, seed = settings.cached_draws, context.seed
    inputs = {
        "windows": context.workspace.key("training-windows"),
        "completion_only": settings.completion_only,
        "teacher": _identity(context, settings),
        "dtype": [settings.teacher_dtype, str(context.source.dtype)],
        "draws": draws,
        "seed": seed,
    }
    folder = context.workspace.step(
        "teacher",
        inputs,
        lambda folder: write_cache(folder / "cache", teacher, windows, draws=draws, seed=seed),
    )
    return CachedDataset(folder / "cache")


def _identity(context: Context, settings: Distill) -> str:
    """Hash of the teacher's content."""
    if settings.teacher is None:
        return context.subject.identity
    return digest(digest_files(resolve_folder(settings.teacher)))


def _student(context: Context, settings: Distill) -> PreTrainedModel:
    """The model as the stage before left it, in float32, with adapters if asked."""
    folder = context.found or context.subject.folder
    if folder is None:
        student = copy.deepcopy(context.subject.whole()).float()
    else:
        auto_class = context.source.family.auto_class
        student = auto_class.from_pretrained(folder, dtype=torch.float32)
    if settings.method == "full":
        return student
    from hf_compress.distillation.lora import with_adapters

    return with_adapters(student, settings.lora_rank)


def _teacher(context: Context, settings: Distill) -> PreTrainedModel:
    if settings.teacher is None:
        dense = context.subject.whole()
        # The trainer freezes it, and a model handed over from Python is never changed.
        return copy.deepcopy(dense) if isinstance(context.subject.source, ModelInMemory) else dense
    from hf_compress.distillation.teacher import load_teacher

    return load_teacher(
        settings.teacher, settings.teacher_dtype, context.subject.tokenizer, context.source.device
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The last one that is complete: the trainer's state is written behind all the rest."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    last = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    for path in folder.glob("checkpoint-*"):
        if path not in found:
            shutil.rmtree(path)
    return None if last is None else str(last)


@torch.no_grad()
def _finished(trainer: DistillationTrainer, dtype: torch.dtype) -> PreTrainedModel:
    """The student without adapters and projections, each weight one of `dtype`, still float32
    so that it is measured as it is trained."""
    from hf_compress.distillation.trainer import PROJECTION

    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    # accelerate has put autocast around its forward, which the checkpoint's has not. Unwrapped, the
    # method still stands in the instance, bound to it, and copies that share its parts (the
    # skeleton of a walk) would run the whole model.
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    if not isinstance(model, PreTrainedModel):
        model = model.merge_and_unload()
    model._modules.pop(PROJECTION, None)
    for name, parameter in model.named_parameters():
        require_finite(parameter, f"the trained weight {name}")
        parameter.copy_(parameter.to(dtype))
    trainer.model = trainer.model_wrapped = model
    return model


def _write(context: Context, student: PreTrainedModel, folder: Path) -> Any:
    """The checkpoint, verified in a fresh process."""
    source = ModelInMemory(student.to(context.source.dtype).eval())
    output = Output(folder, context, meta_model(context.source.config, source.dtype), source)
    for index in range(source.config.num_hidden_layers):
        with source.block(index) as block:
            for key, value in finite_state(block, f"{source.family.layers}.{index}", "trained"):
                output.write(key, value)
            output.probe.advance(block, index)
    output.close()
    return output.verify()


def _curve(
    trainer: DistillationTrainer, length: int, first: dict[str, float]
) -> list[dict[str, float]]:
    """A row for each evaluation: tokens, minutes, held-out KL and perplexity, training loss."""
    arguments = trainer.args
    per_step = length * arguments.train_batch_size * arguments.gradient_accumulation_steps
    rows = [_row(0, {**first, "minutes": 0.0}, None)]
    losses: list[float] = []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            losses.append(entry["loss"])
        if "eval_kl" in entry and entry["step"] * per_step > rows[-1]["tokens"]:
            rows.append(_row(entry["step"] * per_step, entry, losses))
            losses = []
    if len(rows) == 1:
        raise ModelError("training ended before anything was evaluated; lower eval_steps")
    return rows


def _row(tokens: int, entry: dict[str, float], losses: list[float] | None) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "minutes": entry["minutes"],
        "kl": entry["eval_kl"],
        "perplexity": entry["eval_perplexity"],
        "train_loss": sum(losses) / len(losses) if losses else None,
    }
