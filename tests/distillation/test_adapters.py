"""Adapters on a base in four bits (QLoRA): they learn, and are saved as PEFT saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from hf_compress.distillation.lora import with_adapters
from hf_compress.distillation.teacher import load_teacher
from hf_compress.distillation.windows import WindowDataset
from tests.distillation.conftest import student_of
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

WIDTHS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}


# peft asks transformers by an older name whether activations are checkpointed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_on_a_base_in_four_bits(trainer_of: Any, tmp_path: Path) -> None:
    teacher = tiny_model(**WIDTHS, intermediate_size=128)
    folder = tmp_path / "base"
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def base() -> PreTrainedModel:
        return load_teacher(str(folder), "nf4", tiny_tokenizer(), torch.device("cpu"))

    student = with_adapters(base(), rank=16)
    training = {"learning_rate": 5e-4, "max_steps": 60, "per_device_train_batch_size": 8}
    data = WindowDataset(random_ids(480, 24))  # so many that none is seen twice
    trainer = trainer_of(student, teacher, data, training)
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    last = trainer.evaluate()["eval_kl"]
    assert 0 < last < 0.95 * first
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    ids_NL = random_ids(2, 16)
    with torch.no_grad():
        again, trained = loaded(ids_NL).logits, student.eval()(ids_NL).logits
        untrained = base()(ids_NL).logits
    # Products in bfloat16, which the two need not round alike.
    assert (again - trained).norm() < 0.02 * trained.norm()
    assert (again - trained).norm() < 0.2 * (untrained - trained).norm()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_only_adapters_are_trained(trainer_of: Any) -> None:
    student = with_adapters(student_of(tiny_model()), rank=4)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer_of(student, training={"learning_rate": 1e-2}).train()
    changed = {
        name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed and all("lora_" in name for name in changed)
