"""A whole run on a tiny checkpoint of every family, streamed and in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_compress.evaluate_folder as evaluate_folder
import hf_compress.pipeline as pipeline
import hf_compress.stages.output as output
import hf_compress.stages.prune as prune
import hf_compress.subject as subject
from hf_compress import compress
from hf_compress.checkpoint.verify import VerificationResult
from hf_compress.dry_run import describe
from hf_compress.errors import DataError, ModelError, RecipeError
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.families import FAMILIES, Family, family_of, mlp_width, native_config
from hf_compress.model.parameters import count_parameters
from hf_compress.model.walk import Walk
from hf_compress.pruning import Streams, candidate_plans
from hf_compress.recipe import Prune, parse_recipe
from hf_compress.report import load_metrics
from tests.tiny import MIXTURES, VARIANTS, random_ids, tiny_model, tiny_text, tiny_tokenizer

TOKENIZER = tiny_tokenizer(mask_token="w155")


def family(variant: str) -> Family:
    return FAMILIES[variant.split("-")[0]]


@dataclass
class Run:
    """A finished run."""

    variant: str
    recipe: dict[str, Any]
    output: Path

    def json(self, name: str) -> Any:
        return json.loads((self.output / name).read_text())


@pytest.fixture(scope="module", params=VARIANTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fifth of a streamed checkpoint removed, everything measured."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder / "dense", max_shard_size="60KB")
    data = {}
    for name, seed, windows in (("calibration", 1, 48), ("evaluation", 2, 8)):
        (folder / f"{name}.txt").write_text(tiny_text(2500, seed))
        source = str(folder / f"{name}.txt")
        data[name] = {"source": source, "num_samples": windows, "max_seq_length": 32}
    stage = {"stage": "prune", "sparsity": 0.2, "round_to": 8}
    if request.param in MIXTURES:
        stage |= {"structures": ["experts", "kv_groups"], "experts": "merge"}
    recipe = {
        "model": str(folder / "dense"),
        "output": str(folder / "out"),
        "data": {**data, "num_fitness_samples": 4},
        "stages": [stage],
        "evaluate": {"prefill_tokens": 16, "decode_tokens": 4},
    }
    with pytest.MonkeyPatch.context() as patch:
        # transformers reads a tokenizer by the family's own class, which this one is not of.
        patch.setattr(subject, "load_tokenizer", lambda *_: TOKENIZER)
        return Run(request.param, recipe, pipeline.run(parse_recipe(recipe)))


def test_the_parameters_are_those_planned(run: Run) -> None:
    metrics, widths = run.json("metrics.json"), run.json("plan.json")["layers"][0]
    dense = tiny_model(run.variant)
    config = native_config(
        dense.config,
        widths["intermediate_size"],
        widths["num_key_value_heads"],
        num_experts=widths["num_experts"],
    )
    planned = count_parameters(type(dense)(config))
    after = metrics["after"]
    assert planned.total == after["parameters"]
    assert planned.non_embedding == after["non_embedding_parameters"]
    assert metrics["before"]["parameters"] == dense.num_parameters()
    assert metrics["pruning"]["sparsity_achieved"] >= 0.2


def test_the_saved_model_is_verified_and_measured(run: Run) -> None:
    metrics, masked = run.json("metrics.json"), family(run.variant).masked
    comparison, after = metrics["comparison"], metrics["after"]
    assert metrics["verification"]["relative_logit_error"] <= 1e-4
    assert metrics["verification"]["generated_tokens"] == (0 if masked else 8)
    assert comparison["kl"] > 0
    assert comparison["num_tokens"] == 8 * (5 if masked else 31)
    assert after["prefill_tokens_per_second"] > 0
    assert (after["decode_tokens_per_second"] is None) == masked
    assert (after["kv_bytes_per_token"] == 0) == masked
    card = (run.output / "README.md").read_text()
    assert ("Masked-token perplexity" in card) == masked
    assert f"pipeline_tag: {'fill-mask' if masked else 'text-generation'}" in card
    assert ("KV cache" in card) != masked
    assert ("generated 8 tokens" in card) != masked


def test_tensors_have_the_names_that_save_pretrained_gives_them(run: Run, tmp_path: Path) -> None:
    auto_class = family(run.variant).auto_class
    auto_class.from_pretrained(run.output).save_pretrained(tmp_path)
    ours, stock = (load_file(one / "model.safetensors") for one in (run.output, tmp_path))
    assert ours.keys() == stock.keys()
    assert any(name.startswith("embed_out.") for name in ours) == ("gpt_neox" in run.variant)


def test_folding_never_has_the_larger_error(run: Run) -> None:
    layers = run.json("metrics.json")["layers"]
    parts = [
        (layer[f"{part}_error"], layer[f"{part}_error_without_fold"])
        for layer in layers
        for part in ("mlp", "attention")
        if layer[f"{part}_error"] is not None
    ]
    assert parts or run.variant in MIXTURES  # experts are not folded
    assert all(folded <= dropped for folded, dropped in parts)


def test_memory_gives_the_same_bits_as_the_stream(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Verified once already, by the run that this one has to equal.
    monkeypatch.setattr(output, "verify", lambda *_: VerificationResult(0.0, 1e-4, 8, 1))
    recipe = {**run.recipe, "output": str(tmp_path / "memory"), "evaluate": {"speed": False}}
    dense = tiny_model(run.variant).train()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    compress(dense, TOKENIZER, recipe)
    compared = 0
    for step in ("calibrate", "prune"):
        for path in run.output.with_name("out.work").joinpath(step).glob("*.safetensors"):
            other = load_file(tmp_path / "memory.work" / step / path.name)
            for name, value in load_file(path).items():
                assert torch.equal(value, other[name]), (step, name)
                compared += 1
    assert compared > len(before) / 2
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


WITHOUT_HEADS = [variant for variant in VARIANTS if not family(variant).cuts_heads]


@pytest.mark.parametrize("variant", WITHOUT_HEADS)
def test_where_heads_cannot_be_cut_only_neurons_go(
    variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_model(variant).config
    (plan,) = candidate_plans(config, Prune(sparsity=0.1, round_to=8))
    assert plan.widths.num_key_value_heads == 6
    assert plan.widths.intermediate_size < 96
    assert "pruned without kv_groups" in caplog.text
    with pytest.raises(RecipeError, match=rf"heads of {config.model_type}.*\[mlp_neurons\]"):
        candidate_plans(config, Prune(sparsity=0.1, structures=["kv_groups"]))


@pytest.mark.parametrize("variant", ["gpt2", "bert"])
def test_where_heads_cannot_be_cut_layers_and_neurons_are_compared(
    variant: str, tmp_path: Path
) -> None:
    text = {"max_seq_length": 32, "num_samples": 16}
    (tmp_path / "text.txt").write_text(tiny_text(4000, 1))
    source = str(tmp_path / "text.txt")
    recipe = {
        "model": variant,
        "output": str(tmp_path / "out"),
        "data": {name: {"source": source, **text} for name in ("calibration", "evaluation")},
        "stages": [
            {
                "stage": "prune",
                "sparsity": 0.3,
                "round_to": 8,
                "structures": ["mlp_neurons", "layers"],
            }
        ],
        "evaluate": {"speed": False},
    }
    dense = tiny_model(variant, num_hidden_layers=4)
    pruned = compress(dense, TOKENIZER, recipe)
    candidates = load_metrics(tmp_path / "out" / "metrics.json").pruning.candidates
    assert len({candidate.num_hidden_layers for candidate in candidates}) > 1
    (chosen,) = [candidate for candidate in candidates if candidate.chosen]
    assert chosen.kl == min(candidate.kl for candidate in candidates)
    assert pruned.config.num_hidden_layers == chosen.num_hidden_layers
    assert pruned.num_parameters() < dense.num_parameters()


def test_a_width_that_the_configuration_leaves_open() -> None:
    model = tiny_model("gpt2", n_inner=None)
    assert mlp_width(model.config) == 4 * 48 == model.transformer.h[0].mlp.c_fc.nf


@pytest.mark.parametrize(("variant", "corrects"), [("gpt2", True), ("opt-350m", False)])
def test_no_correction_through_a_norm(
    variant: str, corrects: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"stage": "prune", "sparsity": 0.1, "round_to": 8}]
    data = {name: {"max_seq_length": 32} for name in ("calibration", "evaluation")}
    recipe = parse_recipe({"model": "m", "output": tmp_path / "o", "data": data, "stages": stages})
    dense = subject.Subject.from_model(tiny_model(variant), tiny_tokenizer(), "cpu")
    job = pipeline.Job(recipe, dense, pipeline.Workspace(tmp_path / "work"))
    windows = dict.fromkeys(("calibration", "fitness"), random_ids(4, 16))
    asked = []

    def counted(*args: Any, streams: Streams, **kwargs: Any) -> None:
        asked.append(streams)
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "prune_blocks", counted)
    with pytest.raises(KeyboardInterrupt):
        job.compress(windows)
    (streams,) = asked
    assert streams is not None
    assert (streams.dense is not None) == corrects


def test_windows_longer_than_the_learned_positions() -> None:
    with pytest.raises(DataError, match=r"300 tokens.*256 positions"):
        Walk(ModelInMemory(tiny_model("gpt2")), random_ids(2, 300))


def test_another_kind_of_model_under_the_same_name() -> None:
    with pytest.raises(ModelError, match="gpt2 has add_cross_attention"):
        family_of(tiny_model("gpt2", add_cross_attention=True).config)


def test_the_dry_run_says_what_will_be_done(run: Run) -> None:
    lines = describe(parse_recipe(run.recipe))
    widths = run.json("plan.json")["layers"][0]
    groups, mlp = widths["num_key_value_heads"], f"{widths['intermediate_size']} neurons"
    if run.variant in MIXTURES:
        mlp = f"{widths['num_experts']} experts of {mlp}"
    assert any(f"{groups} KV groups, {mlp}" in line for line in lines)


def test_a_finished_run_is_measured_anew_to_the_same_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (subject, evaluate_folder):
        monkeypatch.setattr(module, "load_tokenizer", lambda *_: TOKENIZER)
    again = evaluate_folder.evaluate_folder(run.output, ["evaluate.speed=false"])
    assert again.comparison == load_metrics(run.output / "metrics.json").comparison


def test_an_encoder_writes_no_text(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    stages = [{"stage": "prune", "sparsity": 0.1, "round_to": 8}]
    recipe = parse_recipe(
        {"model": str(tmp_path / "bert"), "output": str(tmp_path / "out"), "stages": stages}
    )
    with pytest.raises(DataError, match=r"writes no text.*set it to python-docs"):
        describe(recipe)
    dense = subject.Subject.from_model(tiny_model("bert"), TOKENIZER, "cpu")
    data = {"data": {name: {"max_seq_length": 32} for name in ("calibration", "evaluation")}}
    with pytest.raises(DataError, match=r"writes no text.*set it to python-docs"):
        pipeline.run(parse_recipe({**recipe.model_dump(), **data}), dense)
