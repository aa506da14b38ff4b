"""Distillation on answers only: which tokens those are, and that only they count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_compress.pipeline as pipeline
from hf_compress.data import answers
from hf_compress.errors import DataError, RecipeError
from hf_compress.recipe import parse_recipe
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}<s> {{ 'w1' if message.role == 'user' else 'w2' }} "
    "{{ message.content }} </s> {% endfor %}"
)


def chatting(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_answers_are_what_the_assistant_wrote() -> None:
    tokenizer = chatting()
    text = "w9 </s> <s> w1 w5 w6 </s> <s> w2 w7 w8 </s> <s> w1 w5 </s> <s> w2 w9 w9 w9"
    ids_1L = torch.tensor([tokenizer(text)["input_ids"]])
    mask_L = answers(ids_1L, tokenizer)[0]
    said = tokenizer.convert_ids_to_tokens(ids_1L[0][mask_L].tolist())
    assert said == ["w7", "w8", "</s>", "w9", "w9", "w9"]
    assert not mask_L[:2].any()


def test_a_template_without_special_tokens_is_refused() -> None:
    tokenizer = chatting("{% for message in messages %}{{ message.content }} {% endfor %}")
    with pytest.raises(DataError, match="by no special tokens"):
        answers(torch.ones(1, 8, dtype=torch.int64), tokenizer)


def test_a_run_on_conversations(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "chat-model"
    tiny_model().save_pretrained(folder)
    chatting().save_pretrained(folder)
    rows = []
    for seed in range(300):
        question = {"role": "user", "content": tiny_text(6, seed)}
        answer = {"role": "assistant", "content": tiny_text(9, 1000 + seed)}
        rows.append({"text": [question, answer]})
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe["model"] = str(folder)
    recipe["data"]["calibration"] |= {"source": str(path), "chat_template": True}
    recipe["data"]["num_fitness_samples"] = 12
    stage = {"stage": "distill", "max_tokens": 12288, "training": {"learning_rate": 1e-3}}
    recipe["stages"].append({**stage, "completion_only": True})
    output = pipeline.run(parse_recipe(recipe))
    report = json.loads((output.with_name("out.work") / "distill" / "report.json").read_text())
    assert report["kl_after"] < report["kl_before"]
    recipe["data"]["calibration"]["chat_template"] = False
    with pytest.raises(RecipeError, match=r"data\.calibration is plain text"):
        pipeline.run(parse_recipe(recipe))
