"""The training of the benchmark's second model, on a few hundred made-up sentences."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import second_family

NOUNS = ("a river", "the old mill", "my neighbour", "every bridge", "the council", "a heron")
VERBS = ("crosses", "remembers", "paid for", "cannot see", "was built beside", "outlived")
STRANGE = " Zürich — naïve\tcafé\n\n日本語 🦊  two spaces, <s> and 1961. "


def command_line(folder: Path, output: str = "model", seed: int = 0) -> list[str]:
    """Arguments for a two-layer model of width 32, trained on the text in `folder`."""
    settings = {
        "text": folder / "text.jsonl",
        "output": folder / output,
        "steps": 30,
        "vocab-size": 300,
        "hidden-size": 32,
        "num-hidden-layers": 2,
        "max-seq-length": 32,
        "seed": seed,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def write_text(folder: Path) -> None:
    draw = random.Random(0)
    lines = []
    for _ in range(60):
        triples = [(draw.choice(NOUNS), draw.choice(VERBS), draw.choice(NOUNS)) for _ in range(6)]
        sentences = [f'"{a} {b} {c}" (1961-{draw.randint(1962, 1999)}).' for a, b, c in triples]
        lines.append(json.dumps({"text": " ".join(sentences)}))
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text and the model `model` that was trained on it."""
    folder = tmp_path_factory.mktemp("second-family")
    write_text(folder)
    assert second_family.main(command_line(folder)) == 0
    return folder


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_folder_holds_a_qwen2_that_learned_something(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    arguments = second_family.parse_arguments(command_line(folder))
    untrained = second_family.initial_model(arguments, len(tokenizer))
    _, held_out = second_family.read_texts(arguments.text)
    ids_NL = second_family.pack(held_out, tokenizer, 32)
    with torch.no_grad():
        before, after = (float(each(ids_NL, labels=ids_NL).loss) for each in (untrained, model))
    assert before == pytest.approx(math.log(len(tokenizer)), abs=0.3)
    assert after < before - 0.5
    biases = [model.get_parameter(f"model.layers.1.self_attn.{name}_proj.bias") for name in "qv"]
    assert all(bias.abs().max() > 0 for bias in biases)  # they start at zero
    assert (model.config.model_type, model.dtype) == ("qwen2", torch.float32)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_tokenizer_reads_back_what_it_wrote(folder: Path) -> None:
    texts, held_out = second_family.read_texts(str(folder / "text.jsonl"))
    trained = second_family.train_tokenizer(texts, 300)
    loaded = AutoTokenizer.from_pretrained(folder / "model")
    assert len(loaded) == 300
    for text in (held_out[0], STRANGE):
        ids = loaded(text)["input_ids"]
        assert ids == trained(text)["input_ids"]
        assert loaded.decode(ids) == text
    assert len(loaded(held_out[0])["input_ids"]) < len(held_out[0])


def test_held_out_documents_are_not_trained_on(folder: Path) -> None:
    texts, held_out = second_family.read_texts(str(folder / "text.jsonl"))
    assert (len(texts), len(held_out)) == (57, 3)
    assert not set(texts) & set(held_out)


def test_a_second_call_leaves_the_files_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder / "model")
    assert second_family.main(command_line(folder, seed=1)) == 0
    assert files(folder / "model") == before
    assert f"{folder / 'model'} is complete" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"text.jsonl", "model"}


def test_the_seed_decides_the_weights(folder: Path, tmp_path: Path) -> None:
    write_text(tmp_path)
    for output, seed in (("same", 0), ("other", 1)):
        assert second_family.main(command_line(tmp_path, output, seed)) == 0
    weights = (folder / "model/model.safetensors").read_bytes()
    assert (tmp_path / "same/model.safetensors").read_bytes() == weights
    assert (tmp_path / "other/model.safetensors").read_bytes() != weights
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("same", "other")]
    assert tokenizers == [(folder / "model/tokenizer.json").read_bytes()] * 2


def test_a_folder_with_something_else_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    arguments = [*command_line(folder), "--output", str(tmp_path)]
    assert second_family.main(arguments) == 1
    assert f"{tmp_path} exists and holds no complete model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("wrong", ["--steps=0", "--hidden-size=40"])
def test_settings_that_make_no_model_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        second_family.main([*command_line(folder, "unmade"), wrong])
    assert wrong.split("=")[0] in capsys.readouterr().err
    assert not (folder / "unmade").exists()


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "one short text"}, "holds 1 documents"),
        ({"text": [{"role": "user", "content": "hello"}]}, "0 of them plain text"),
    ],
)
def test_text_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, object], complaint: str
) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps(row))
    assert second_family.main(command_line(tmp_path)) == 1
    assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]
