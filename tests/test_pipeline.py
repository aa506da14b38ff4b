"""Whole runs on a tiny checkpoint: what comes out, what is kept, what is refused."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_compress.pipeline as pipeline
from hf_compress import Compressor, compress
from hf_compress.checkpoint import ShardWriter
from hf_compress.dry_run import describe
from hf_compress.errors import CheckpointError, CompressionError, DataError, ModelError, RecipeError
from hf_compress.model.loading import load_config
from hf_compress.plan import load_plan
from hf_compress.recipe import parse_recipe
from hf_compress.report import Metrics, load_metrics
from hf_compress.report.metrics import LayerMetrics
from tests.model.test_surgery import FOUR_HEADS_A_GROUP
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def nothing_finished(recipe: dict[str, Any]) -> bool:
    output = Path(recipe["output"])
    work = output.with_name(output.name + ".work")
    leftovers = list(output.parent.glob(".*incomplete*")) + list(work.glob(".*incomplete*"))
    return not output.exists() and not (work / "prune").exists() and not leftovers


def test_a_run_gives_back_an_ordinary_verified_checkpoint(recipe: dict[str, Any]) -> None:
    output = pipeline.run(parse_recipe(recipe))
    assert {"config.json", "README.md", "metrics.json", "plan.json", "recipe.yaml"} <= files(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    metrics = json.loads((output / "metrics.json").read_text())
    assert model.config.model_type in ("llama", "mistral")
    assert metrics["after"]["parameters"] == model.num_parameters()
    assert metrics["pruning"]["sparsity_achieved"] >= 0.3
    assert metrics["verification"]["relative_logit_error"] <= 1e-4
    assert metrics["verification"]["generated_tokens"] == 8
    plan = json.loads((output / "plan.json").read_text())
    assert plan["layers"][0]["intermediate_size"] == model.config.intermediate_size


def test_the_same_command_repeats_nothing_and_a_change_what_depends_on_it(
    recipe: dict[str, Any],
) -> None:
    output = pipeline.run(parse_recipe(recipe))
    work = output.with_name(output.name + ".work")

    def built() -> dict[str, int]:
        return {
            name: (work / name / "manifest.json").stat().st_mtime_ns
            for name in ("windows", "calibrate", "prune", "evaluate")
        }

    first = built()
    pipeline.run(parse_recipe(recipe))
    assert built() == first
    recipe["stages"][0]["sparsity"] = 0.4
    pipeline.run(parse_recipe(recipe))
    second = built()
    assert {name for name in first if first[name] != second[name]} == {"prune", "evaluate"}


def test_stages_in_a_row_each_start_from_what_the_last_one_made(recipe: dict[str, Any]) -> None:
    once, again = {**recipe["stages"][0], "sparsity": 0.2}, {**recipe["stages"][0], "sparsity": 0.1}
    recipe["stages"] = [{"stage": "calibrate", "batch_size": 2}, once, again]
    output = pipeline.run(parse_recipe(recipe))
    metrics = load_metrics(output / "metrics.json")
    first = AutoModelForCausalLM.from_pretrained(output.with_name("out.work") / "prune")
    final = AutoModelForCausalLM.from_pretrained(output)
    plan = json.loads((output / "plan.json").read_text())
    assert final.num_parameters() < first.num_parameters() < metrics.before.parameters
    assert plan["layers"][0]["intermediate_size"] == final.config.intermediate_size
    assert metrics.pruning.sparsity_requested == pytest.approx(1 - 0.8 * 0.9)
    assert metrics.pruning.sparsity_achieved >= metrics.pruning.sparsity_requested
    assert metrics.layers[0].intermediate_size_before == 96
    assert {"calibrate", "prune"} <= set(metrics.seconds)


@pytest.fixture
def deep(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe for six layers with four query heads in each of three KV groups."""
    folder = tmp_path / "deep"
    model = tiny_model("mistral", **FOUR_HEADS_A_GROUP, num_hidden_layers=6)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    recipe["model"] = str(folder)
    return recipe


@pytest.mark.parametrize(
    "structures",
    [["layers"], ["query_heads"], ["kv_groups", "query_heads"], ["mlp_neurons", "layers"]],
    ids=" ".join,
)
@pytest.mark.parametrize("recollect", [True, False])
def test_layers_and_query_heads(
    deep: dict[str, Any], structures: list[str], recollect: bool
) -> None:
    deep["stages"][0] |= {"structures": structures, "sparsity": 0.1, "recollect": recollect}
    output = pipeline.run(parse_recipe(deep))
    metrics = load_metrics(output / "metrics.json")
    model = AutoModelForCausalLM.from_pretrained(output)
    plan = load_plan(output / "plan.json")
    config, widths = model.config, plan.widths
    assert metrics.pruning.sparsity_achieved >= 0.1
    assert metrics.after.parameters == model.num_parameters()
    assert config.num_hidden_layers == len(plan.layers)
    assert config.num_attention_heads == (
        (widths.heads_per_group or 4) * widths.num_key_value_heads
    )
    assert [at.layer for at in metrics.layers] == list(range(6))
    assert [at.layer for at in metrics.layers if not at.is_dropped] == list(plan.positions)
    assert all(at.heads_per_group == (widths.heads_per_group or 4) for at in kept(metrics))
    report = json.loads((output.with_name("out.work") / "prune" / "report.json").read_text())
    dropped = {drop["layer"] for drop in report["dropped_layers"] if drop["dropped"]}
    assert dropped == set(range(6)) - set(plan.positions)
    if structures == ["query_heads"]:
        assert (config.num_key_value_heads, widths.heads_per_group) == (3, 2)
        assert all(at.attention_error <= at.attention_error_without_fold for at in kept(metrics))
    if structures == ["layers"]:
        assert f"dropped, of 6: {min(dropped)}." in (output / "README.md").read_text()


def kept(metrics: Metrics) -> list[LayerMetrics]:
    return [at for at in metrics.layers if not at.is_dropped]


def test_what_two_stages_drop_is_told_of_the_dense_model(deep: dict[str, Any]) -> None:
    stage = {**deep["stages"][0], "structures": ["layers"], "sparsity": 0.1}
    heads = {**stage, "structures": ["query_heads"]}
    deep["stages"] = [heads, stage, stage]
    output = pipeline.run(parse_recipe(deep))
    plan = load_plan(output / "plan.json")
    dense = AutoModelForCausalLM.from_pretrained(deep["model"])
    final = AutoModelForCausalLM.from_pretrained(output)
    assert final.config.num_hidden_layers == len(plan.positions) == 4
    for index, position in plan.positions.items():
        name = "input_layernorm.weight"
        one, other = dense.model.layers[index], final.model.layers[position]
        assert torch.equal(one.get_parameter(name), other.get_parameter(name))
    metrics = load_metrics(output / "metrics.json")
    assert [at.layer for at in kept(metrics)] == list(plan.positions)
    assert {at.heads_per_group for at in kept(metrics)} == {2}


def test_rounds_are_stages_in_a_row(recipe: dict[str, Any]) -> None:
    recipe["stages"][0]["rounds"] = 2
    output = pipeline.run(parse_recipe(recipe))
    assert output.with_name("out.work").joinpath("prune-2").is_dir()
    metrics = load_metrics(output / "metrics.json")
    assert metrics.pruning.sparsity_requested == pytest.approx(0.3)
    assert metrics.pruning.sparsity_achieved >= 0.3
    first = load_config(output.with_name("out.work") / "prune")
    assert 96 > first.intermediate_size > metrics.layers[0].intermediate_size
    planned = "\n".join(describe(parse_recipe(recipe)))
    assert planned.count("prune      16.3%") == 2


def test_a_recipe_whose_last_stage_does_nothing(recipe: dict[str, Any]) -> None:
    recipe["stages"].append({"stage": "calibrate"})
    with pytest.raises(RecipeError, match=r"prune, calibrate;.*has to follow: .*prune"):
        pipeline.run(parse_recipe(recipe))


def test_pruning_after_zeros_is_refused(recipe: dict[str, Any]) -> None:
    recipe["stages"].insert(0, {"stage": "sparsify", "sparsity": 0.5})
    with pytest.raises(RecipeError, match=r"sparsify, prune;.*put `prune` before it"):
        pipeline.run(parse_recipe(recipe))


def test_memory_and_stream_give_the_same_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    streamed = pipeline.run(parse_recipe(recipe))
    model = AutoModelForCausalLM.from_pretrained(recipe["model"], dtype="auto")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe["output"] = str(tmp_path / "memory")
    compress(model, tiny_tokenizer(), recipe)
    for step, pattern in (("calibrate", "*.safetensors"), ("prune", "*.safetensors")):
        for path in streamed.with_name("out.work").joinpath(step).glob(pattern):
            other = load_file(tmp_path / "memory.work" / step / path.name)
            for name, value in load_file(path).items():
                assert torch.equal(value, other[name]), (step, name)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_killed_run_leaves_nothing_and_goes_on_to_the_same_bits(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(parse_recipe(recipe))
    assert nothing_finished(recipe)
    resumed = pipeline.run(parse_recipe(recipe))
    recipe["output"] = str(tmp_path / "straight")
    straight = pipeline.run(parse_recipe(recipe))
    for path in resumed.glob("*.safetensors"):
        assert path.read_bytes() == (straight / path.name).read_bytes()


def test_the_python_api(tmp_path: Path) -> None:
    model, windows = tiny_model(), {"max_seq_length": 32}
    compressor = Compressor(model, tiny_tokenizer())
    with pytest.raises(RecipeError, match="prune"):
        compressor.save_pretrained(tmp_path / "early")
    compressor.calibrate([tiny_text(4000, 1)], num_samples=64, **windows)
    compressor.evaluate_on([tiny_text(2000, 2)], num_samples=8, **windows)
    compressor.prune(sparsity=0.25, round_to=8)
    assert compressor.model.num_parameters() < model.num_parameters()
    metrics = compressor.evaluate(speed=True)
    assert metrics.after.decode_tokens_per_second > 0
    assert metrics.comparison.kl > 0
    assert metrics.comparison.calibration_source == "texts"
    assert len(metrics.comparison.window_kl) == metrics.comparison.num_windows == 8
    compressor.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.num_parameters() == compressor.model.num_parameters()


def test_the_python_api_goes_on_stage_by_stage() -> None:
    model, windows = tiny_model(), {"max_seq_length": 32}
    compressor = Compressor(model, tiny_tokenizer())
    compressor.calibrate([tiny_text(4000, 1)], num_samples=64, **windows)
    compressor.evaluate_on([tiny_text(2000, 2)], num_samples=8, **windows)
    smaller = compressor.prune(sparsity=0.25, round_to=8).model.num_parameters()
    with pytest.raises(RecipeError, match="sparsity is required"):
        compressor.sparsify()
    assert compressor.sparsify(sparsity=0.5).model.num_parameters() == smaller
    down = compressor.model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert (down == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    compressor.refit(epochs=2, batch_size=4)
    down = compressor.model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert (down == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    metrics = compressor.evaluate(speed=False)
    assert metrics.pruning and metrics.refit
    assert smaller < model.num_parameters()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"stages.0.stage": "prun"}, RecipeError, "'prun'.*'calibrate'.*'prune'"),
        ({"stages.0.sparsty": 0.3}, RecipeError, "stages.0.prune.sparsty: unknown key.*sparsity"),
        ({"stages.0.criterion": "obss"}, RecipeError, "'obss'.*obs, wanda, magnitude"),
        ({"stages.0.sparsity": 0}, RecipeError, "greater than 0"),
        ({"stages.0.sparsity": 1.0}, RecipeError, "less than 1"),
        ({"stages.0.sparsity": 0.99}, RecipeError, "0 units"),
        ({"data.calibration.num_samples": 5000}, DataError, "5000|5004"),
        ({"model": "no/such-model-here"}, ModelError, "no/such-model-here"),
    ],
)
def test_bad_recipes_are_one_clear_error(
    recipe: dict[str, Any], change: dict[str, Any], error: type[Exception], words: str
) -> None:
    for path, value in change.items():
        node: Any = recipe
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part)] if part.isdecimal() else node[part]
        node[last] = value
    with pytest.raises(error, match=words):
        pipeline.run(parse_recipe(recipe))
    assert nothing_finished(recipe)


def test_an_output_that_is_not_ours_is_left_alone(recipe: dict[str, Any]) -> None:
    output = Path(recipe["output"])
    output.mkdir()
    (output / "thesis.txt").write_text("do not lose me")
    with pytest.raises(RecipeError, match="not empty"):
        pipeline.run(parse_recipe(recipe))
    assert files(output) == {"thesis.txt"}


@pytest.fixture
def broken(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may break."""
    copy = tmp_path / "broken"
    shutil.copytree(recipe["model"], copy)
    recipe["model"] = str(copy)
    return copy


def test_a_truncated_shard(recipe: dict[str, Any], broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard.name} is truncated"):
        pipeline.run(parse_recipe(recipe))


def test_a_missing_shard(recipe: dict[str, Any], broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}.*missing"):
        pipeline.run(parse_recipe(recipe))


def test_a_truncated_index(recipe: dict[str, Any], broken: Path) -> None:
    index = broken / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes()[:40])
    with pytest.raises(ModelError, match=r"index\.json is truncated"):
        pipeline.run(parse_recipe(recipe))


def test_an_output_that_cannot_be_written(recipe: dict[str, Any], tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("not a folder")
    recipe["output"] = str(blocked / "out")
    with pytest.raises(CheckpointError, match="cannot write"):
        pipeline.run(parse_recipe(recipe))
    assert blocked.read_text() == "not a folder"


def test_nan_in_a_weight(recipe: dict[str, Any], broken: Path) -> None:
    for shard in broken.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("layers.1.mlp.up_proj.weight"):
                tensors[name][0, 0] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        pipeline.run(parse_recipe(recipe))
    assert nothing_finished(recipe)


def test_a_tokenizer_larger_than_the_embedding(recipe: dict[str, Any], broken: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"more{index}" for index in range(20)])
    tokenizer.save_pretrained(broken)
    with pytest.raises(ModelError, match=r"180 tokens.*160 rows"):
        pipeline.run(parse_recipe(recipe))


@pytest.mark.parametrize("largest", [400, 4_000, 40_000])
def test_a_full_disk(recipe: dict[str, Any], largest: int) -> None:
    """No file may grow larger, as if the disk were full: by step, the windows, the
    statistics and the pruned checkpoint cannot be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*File too large"):
            pipeline.run(parse_recipe(recipe))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert nothing_finished(recipe)


def test_a_checkpoint_that_computes_something_else_fails_the_run(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ShardWriter.add

    def spoiled(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        add(self, name, tensor * 1.1 if name.endswith("down_proj.weight") else tensor)

    monkeypatch.setattr(ShardWriter, "add", spoiled)
    with pytest.raises(CheckpointError, match="other logits"):
        pipeline.run(parse_recipe(recipe))
    assert nothing_finished(recipe)


def test_all_errors_are_compression_errors() -> None:
    assert all(
        issubclass(kind, CompressionError)
        for kind in (CheckpointError, DataError, ModelError, RecipeError)
    )
