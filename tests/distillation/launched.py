"""Trains on ragged windows and writes the curve: what test_launch.py launches.

python launched.py FOLDER BATCH_SIZE ACCUMULATION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.distillation.windows import WindowDataset
from tests.tiny import random_ids, tiny_model


def main() -> None:
    folder, size, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ids_NL = random_ids(32, 24)
    lengths_N = torch.randint(2, 24, (32,), generator=torch.Generator().manual_seed(5))
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=6,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = DistillationTrainer(
        tiny_model(seed=1, tie_word_embeddings=True),
        tiny_model(hidden_size=60),
        arguments,
        hidden_cosine=0.1,
        train_dataset=WindowDataset(ids_NL, torch.arange(24) < lengths_N[:, None]),
        eval_dataset=WindowDataset(random_ids(7, 24, seed=9)),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        found = {
            "processes": arguments.world_size,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "kl": [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry],
            "windows": trainer.window_kl_N.tolist(),
        }
        (folder / "curve.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
