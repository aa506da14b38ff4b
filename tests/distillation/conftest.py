"""Students, teachers and trainers that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments

from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.distillation.windows import WindowDataset
from tests.tiny import random_ids, tiny_model


def student_of(teacher: PreTrainedModel, noise: float = 0.02) -> PreTrainedModel:
    """The teacher with noise on its weights."""
    student = tiny_model(teacher.config.model_type, **{})
    student.load_state_dict(teacher.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.fixture
def trainer_of(tmp_path: Path) -> Any:
    """Makes a trainer on random windows; keywords of `TrainingArguments` in `training`."""

    def make(
        student: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
        data: Any = None,
        training: dict[str, Any] | None = None,
        **others: Any,
    ) -> DistillationTrainer:
        teacher = teacher or tiny_model()
        settings = {
            "output_dir": str(tmp_path / "training"),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **(training or {}),
        }
        return DistillationTrainer(
            student or student_of(teacher),
            teacher,
            TrainingArguments(**settings),
            train_dataset=data or WindowDataset(random_ids(32, 24)),
            eval_dataset=WindowDataset(random_ids(6, 24, seed=9)),
            **others,
        )

    return make


def curve(trainer: DistillationTrainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
