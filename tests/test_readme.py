"""The README's Python snippet runs, and its recipe validates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from hf_compress.recipe import parse_recipe
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert match, f"the README has no {language} block"
    return match.group(1)


def test_the_python_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "model": tiny_model(),
        "tokenizer": tiny_tokenizer(),
        "texts": [tiny_text(4000, 1)],
        "held_out_texts": [tiny_text(2000, 2)],
    }
    exec(block("python"), names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert loaded.num_parameters() < names["model"].num_parameters()


def test_the_recipe_validates() -> None:
    assert parse_recipe(yaml.safe_load(block("yaml"))).stages[0].sparsity == 0.2
