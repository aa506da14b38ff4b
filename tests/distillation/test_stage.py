"""`stage: distill` in whole runs: what comes out, what is kept, what goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

import hf_compress.pipeline as pipeline
from hf_compress import Compressor
from hf_compress.distillation.teacher import load_teacher
from hf_compress.dry_run import describe
from hf_compress.errors import ModelError, RecipeError
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.walk import Walk
from hf_compress.recipe import dump_recipe, parse_recipe
from hf_compress.stages.distill import _finished
from tests.tiny import random_ids, tiny_model, tiny_text, tiny_tokenizer

STAGE = {
    "stage": "distill",
    "max_tokens": 4096,
    "training": {"learning_rate": 3e-3, "report_to": "none", "disable_tqdm": True},
}


@pytest.fixture
def distilling(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["data"]["num_fitness_samples"] = 12
    recipe["stages"].append(STAGE)
    return recipe


def report_of(output: Path, name: str = "distill") -> dict[str, Any]:
    return json.loads((output.with_name("out.work") / name / "report.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def test_a_whole_run_gives_an_ordinary_checkpoint_nearer_to_its_teacher(
    distilling: dict[str, Any],
) -> None:
    output = pipeline.run(parse_recipe(distilling))
    report = report_of(output)
    assert report["kept"] and report["kl_after"] < report["kl_before"]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["distillation"]["kl_after"] == report["kl_after"]
    assert metrics["distillation"]["tokens"] == 4096 == report["curve"][-1]["tokens"]
    assert metrics["verification"]["relative_logit_error"] <= 1e-4
    assert metrics["pruning"]["sparsity_achieved"] >= 0.3
    assert "Distilled from the dense model on 4,096 tokens" in (output / "README.md").read_text()
    found, final = weights(output.with_name("out.work") / "prune"), weights(output)
    assert found.keys() == final.keys()
    assert any(not torch.equal(found[name], final[name]) for name in found)
    assert not any(parts.is_dir() for parts in output.glob("checkpoint-*"))
    assert not list(output.with_name("out.work").glob("*.unfinished"))
    AutoModelForCausalLM.from_pretrained(output)


def test_the_curve_says_tokens_minutes_and_held_out_kl(distilling: dict[str, Any]) -> None:
    curve = report_of(pipeline.run(parse_recipe(distilling)))["curve"]
    assert [row["tokens"] for row in curve] == sorted({row["tokens"] for row in curve})
    assert [row["minutes"] for row in curve] == sorted(row["minutes"] for row in curve)
    assert curve[0]["tokens"] == 0 and curve[0]["train_loss"] is None
    assert all(row["train_loss"] > 0 and row["perplexity"] > 1 for row in curve[1:])


def test_training_text_is_never_what_is_measured_on(distilling: dict[str, Any]) -> None:
    output = pipeline.run(parse_recipe(distilling))
    work = output.with_name("out.work")
    training_NL = load_file(work / "training-windows" / "windows.safetensors")["training"]
    windows = load_file(work / "windows" / "windows.safetensors")
    seen = {tuple(window) for window in training_NL.tolist()}
    assert len(seen) == len(training_NL) > len(windows["calibration"])
    assert seen >= {tuple(window) for window in windows["calibration"].tolist()}
    for name in ("fitness", "evaluation"):
        assert not seen & {tuple(window) for window in windows[name].tolist()}


def test_training_that_gains_nothing_is_not_kept(distilling: dict[str, Any]) -> None:
    distilling["stages"][-1] = {**STAGE, "training": {"learning_rate": 1e-12}}
    output = pipeline.run(parse_recipe(distilling))
    found, final = weights(output.with_name("out.work") / "prune"), weights(output)
    assert all(torch.equal(found[name], final[name]) for name in found)
    assert not report_of(output)["kept"]
    assert "not kept" in (output / "README.md").read_text()


class Killed(BaseException):
    """Nothing catches it."""


def test_a_killed_training_goes_on_from_its_last_checkpoint(
    distilling: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = report_of(pipeline.run(parse_recipe({**distilling, "output": str(tmp_path / "w/out")})))
    steps: list[int] = []
    original = Trainer.training_step

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 19:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(Killed):
        pipeline.run(parse_recipe(distilling))
    assert not Path(distilling["output"]).exists()
    output = pipeline.run(parse_recipe(distilling))
    assert steps[18] == 18 and steps[19] == 16  # the last multiple of eval_steps
    again = report_of(output)
    for ours, theirs in zip(again["curve"], whole["curve"], strict=True):
        for name in ("tokens", "kl", "perplexity"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    other = weights(tmp_path / "w" / "out")
    assert all(torch.allclose(value, other[name]) for name, value in weights(output).items())


def test_a_changed_recipe_does_not_go_on_with_old_training(
    distilling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = Trainer.training_step, []

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 10:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(Killed):
        pipeline.run(parse_recipe(distilling))
    distilling["stages"][-1] = {**STAGE, "temperature": 2.0}
    pipeline.run(parse_recipe(distilling))
    assert steps[10] == 0


def test_zeros_of_sparsify_are_there_at_the_end(distilling: dict[str, Any]) -> None:
    distilling["stages"][0] = {"stage": "sparsify", "sparsity": 0.5, "criterion": "wanda"}
    output = pipeline.run(parse_recipe(distilling))
    assert report_of(output)["kept"]
    found, final = weights(output.with_name("out.work") / "sparsify"), weights(output)
    for name, value in found.items():
        if value.dim() > 1:
            assert torch.equal(value == 0, final[name] == 0), name


def test_a_bfloat16_model_comes_out_in_bfloat16(distilling: dict[str, Any]) -> None:
    distilling["dtype"] = "bfloat16"
    output = pipeline.run(parse_recipe(distilling))
    assert report_of(output)["kept"]
    assert {value.dtype for value in weights(output).values()} == {torch.bfloat16}


# peft asks transformers by an older name whether activations are checkpointed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_are_merged_and_kept_if_asked(distilling: dict[str, Any]) -> None:
    from peft import PeftModel

    stage = {**STAGE, "method": "lora", "save_adapter": True, "training": {"learning_rate": 1e-2}}
    distilling["stages"][-1] = stage
    output = pipeline.run(parse_recipe(distilling))
    assert report_of(output)["kept"]
    base = AutoModelForCausalLM.from_pretrained(output.with_name("out.work") / "prune")
    ids_NL = torch.arange(4, 20)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(output)(ids_NL).logits
        before = base(ids_NL).logits
        adapted = PeftModel.from_pretrained(base, output / "adapter")(ids_NL).logits
    assert torch.allclose(merged, adapted, atol=1e-3)
    assert not torch.allclose(merged, before, atol=1e-2)


def test_a_teacher_is_passed_once_for_many_students(distilling: dict[str, Any]) -> None:
    distilling["stages"][-1] = {
        **STAGE,
        "cached_draws": 255,
        "patience": 10,
        "max_tokens": 8192,
    }
    output = pipeline.run(parse_recipe(distilling))
    report = report_of(output)
    assert report["kept"] and report["curve"][-1]["train_loss"] > report["kl_after"]
    written = output.with_name("out.work") / "teacher" / "manifest.json"
    first = written.stat().st_mtime_ns
    distilling["stages"][0] |= {"sparsity": 0.2}
    assert report_of(pipeline.run(parse_recipe(distilling)))["kl_before"] < report["kl_before"]
    assert written.stat().st_mtime_ns == first
    with pytest.raises(RecipeError, match="set it to 0 for another loss"):
        parse_recipe({**distilling, "stages": [{**distilling["stages"][-1], "loss": "jsd"}]})


def test_dropped_layers_are_compared_with_the_blocks_they_stand_for(
    distilling: dict[str, Any],
) -> None:
    distilling["stages"][0] |= {"structures": ["layers"], "ignore": ["model.layers.1"]}
    distilling["stages"][-1] = {**STAGE, "hidden_cosine": 0.5}
    assert report_of(pipeline.run(parse_recipe(distilling)))["kept"]


@pytest.mark.parametrize("cosine", [0.0, 0.5])
def test_layers_that_differ(distilling: dict[str, Any], cosine: float) -> None:
    distilling["stages"][0] |= {"structures": ["mlp_sublayers"], "sparsity": 0.2}
    distilling["stages"][-1] = {**STAGE, "hidden_cosine": cosine}
    output = pipeline.run(parse_recipe(distilling))
    assert report_of(output)["kept"]
    assert (output / "modeling_hfc_llama.py").is_file()
    AutoModelForCausalLM.from_pretrained(output)


def test_another_teacher_with_the_same_tokenizer(
    distilling: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "larger"
    tiny_model("qwen2", seed=4, hidden_size=60, vocab_size=176).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stage = {**STAGE, "teacher": str(folder), "hidden_cosine": 0.1}
    distilling["stages"] = [stage]  # the dense model itself is the student
    output = pipeline.run(parse_recipe(distilling))
    assert report_of(output)["kept"]
    assert "Distilled from `larger`" in (output / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_teacher_in_few_bits(dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "larger"
    widths = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    widths |= {"intermediate_size": 128}
    model = tiny_model("qwen2", **widths)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    teacher = load_teacher(str(folder), dtype, tiny_tokenizer(), torch.device("cpu"))
    assert teacher.get_memory_footprint() < 0.8 * model.get_memory_footprint()
    ids_NL = torch.arange(4, 20)[None]
    with torch.no_grad():
        exact, rounded = model(ids_NL).logits, teacher(ids_NL).logits.float()
    assert 0 < (exact - rounded).norm() < 0.3 * exact.norm()


def test_a_teacher_with_another_vocabulary_is_refused(
    distilling: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    tiny_model(seed=4, vocab_size=176).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(folder)
    distilling["stages"][-1] = {**STAGE, "teacher": str(folder)}
    with pytest.raises(ModelError, match=r"another vocabulary: 161 tokens.*'extra'"):
        pipeline.run(parse_recipe(distilling))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"learning_rat": 1e-4},
            "no field of transformers.TrainingArguments; near are learning_rate",
        ),
        ({"output_dir": "x"}, "output_dir is not set here: the workspace keeps training"),
        ({"hub_token": "x"}, "hub_token is not set here"),
        ({"max_steps": 3}, "max_tokens says how long"),
    ],
)
def test_arguments_of_training_are_checked(
    distilling: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    distilling["stages"][-1] = {**STAGE, "training": training}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(distilling)


def test_values_that_transformers_refuses_are_told_before_anything_runs(
    distilling: dict[str, Any],
) -> None:
    distilling["stages"][-1] = {**STAGE, "training": {"lr_scheduler_type": "square"}}
    with pytest.raises(RecipeError, match=r"refused by\s+transformers.TrainingArguments"):
        pipeline.run(parse_recipe(distilling))
    assert not (Path(distilling["output"]).with_name("out.work") / "prune").exists()


def test_a_number_that_yaml_reads_as_text_is_a_number(distilling: dict[str, Any]) -> None:
    distilling["stages"][-1] = {**STAGE, "training": {"learning_rate": "4e-4"}}
    recipe = parse_recipe(distilling)
    assert recipe.stages[-1].training == {"learning_rate": 4e-4}
    assert "learning_rate: 0.0004" in dump_recipe(recipe)


def test_what_makes_no_sense_is_refused(distilling: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="cannot learn from itself"):
        pipeline.run(parse_recipe({**distilling, "stages": [STAGE]}))
    sparse = {"stage": "sparsify", "sparsity": 0.5}
    stages = [sparse, {**STAGE, "method": "lora"}]
    with pytest.raises(RecipeError, match="would fill its zeros"):
        pipeline.run(parse_recipe({**distilling, "stages": stages}))
    with pytest.raises(RecipeError, match="save_adapter needs method: lora"):
        parse_recipe({**distilling, "stages": [{**STAGE, "save_adapter": True}]})


def test_a_masked_model_is_refused(distilling: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    tiny_tokenizer(mask_token="w9").save_pretrained(tmp_path / "bert")
    distilling["model"] = str(tmp_path / "bert")
    distilling["stages"][0] |= {"structures": ["mlp_neurons"]}
    with pytest.raises(RecipeError, match="this bert predicts masked ones"):
        pipeline.run(parse_recipe(distilling))


def test_the_dry_run_tells_tokens_and_memory(distilling: dict[str, Any]) -> None:
    lines = "\n".join(describe(parse_recipe(distilling)))
    assert "distill    4,096 tokens, forward_kl to the dense model (full)" in lines


def test_from_python_the_model_given_is_not_changed() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressor = Compressor(model, tiny_tokenizer())
    compressor.calibrate([tiny_text(6000, 1)], num_samples=32, max_seq_length=32)
    compressor.evaluate_on([tiny_text(2000, 2)], num_samples=8, max_seq_length=32)
    compressor.prune(sparsity=0.3, round_to=8)
    pruned = compressor.model.state_dict()
    compressor.distill(max_tokens=4096, training={"learning_rate": 3e-3})
    assert any(
        not torch.equal(value, pruned[name])
        for name, value in compressor.model.state_dict().items()
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_finished_student_runs_its_own_forward(trainer_of: Any) -> None:
    """What mixed precision binds to an instance would go along with copies of it, and the
    skeleton of a walk would then run every block."""
    student = tiny_model()
    trainer = trainer_of(student, tiny_model(seed=1), training={"bf16": True, "max_steps": 1})
    trainer.train()
    finished = _finished(trainer, torch.bfloat16)
    assert "forward" not in vars(finished)
    walk = Walk(ModelInMemory(finished), random_ids(2, 8))
    with torch.no_grad():
        whole_LV = finished(random_ids(2, 8)[:1]).logits[0]
    # No block has been passed yet.
    assert not torch.allclose(walk.logits(0), whole_LV, atol=1e-3)
    for index in range(finished.config.num_hidden_layers):
        walk.advance(finished.model.layers[index], index)
    assert torch.allclose(walk.logits(0), whole_LV, atol=1e-4)
