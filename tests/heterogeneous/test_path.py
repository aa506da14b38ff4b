"""A plan whose layers differ goes all the way: cut, refitted, sparsified, measured, published."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_compress.pipeline as pipeline
import hf_compress.stages.prune as prune
from hf_compress import compress
from hf_compress.checkpoint import hub
from hf_compress.dry_run import describe
from hf_compress.errors import ModelError, PlanError, RecipeError
from hf_compress.evaluate_folder import evaluate_folder
from hf_compress.heterogeneous.config import check_plan
from hf_compress.inspection import inspect_model
from hf_compress.model.blocks import ModelInMemory, StreamedCheckpoint, meta_model
from hf_compress.model.families import FAMILIES, family_of
from hf_compress.model.loading import load_config
from hf_compress.model.parameters import block_sizes, count_parameters
from hf_compress.model.surgery import Dimensions, unit_parameters
from hf_compress.model.walk import Walk
from hf_compress.plan import LayerPlan, Plan, compose, load_plan, save_plan
from hf_compress.pruning import candidate_plans, planned_config
from hf_compress.recipe import Prune, parse_recipe
from hf_compress.report import load_metrics, parse_metrics
from tests.heterogeneous.differing import (
    ABLE,
    LAYERS,
    WHOLE,
    dense_model,
    differing_model,
    differing_plan,
)
from tests.tiny import VARIANTS, random_ids, tiny_model, tiny_text, tiny_tokenizer

DROPPED = [LAYERS[0], LAYERS[2], LAYERS[3]]
"""With the second of five layers gone."""


def plan_of(variant: str) -> Plan:
    """Of the layers that are kept, the first of each type has its attention."""
    kept = [0, 1, 2] if variant == "gemma3_text" else [0, 2, 3]
    return differing_plan(variant, DROPPED).model_copy(update={"kept_layers": kept})


@dataclass
class Run:
    """A finished run."""

    variant: str
    plan: Plan
    recipe: dict[str, Any]
    output: Path

    def json(self, name: str) -> Any:
        return json.loads((self.output / name).read_text())


@pytest.fixture(scope="module", params=ABLE)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A plan made by hand, carried out by the stage, and two more stages on what it left."""
    folder = tmp_path_factory.mktemp(request.param)
    dense_model(request.param).save_pretrained(folder / "dense", max_shard_size="60KB")
    data = {}
    for name, seed, windows in (("calibration", 1, 48), ("evaluation", 2, 8)):
        (folder / f"{name}.txt").write_text(tiny_text(2500, seed))
        source = str(folder / f"{name}.txt")
        data[name] = {"source": source, "num_samples": windows, "max_seq_length": 32}
    recipe = {
        "model": str(folder / "dense"),
        "output": str(folder / "out"),
        "data": {**data, "num_fitness_samples": 4},
        "stages": [
            {"stage": "prune", "sparsity": 0.2, "round_to": 8},
            {"stage": "refit", "epochs": 1},
            {"stage": "sparsify", "sparsity": 0.3, "allocation": "owl"},
        ],
        "evaluate": {"prefill_tokens": 16, "decode_tokens": 4},
    }
    plan = plan_of(request.param)

    def run_given(context: prune.Context, settings: Prune) -> Path:
        return prune.prune_to(context, settings, plan)

    kind = replace(pipeline.STAGES["prune"], run=run_given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_compress.subject.load_tokenizer", lambda *_: tiny_tokenizer())
        patch.setitem(pipeline.STAGES, "prune", kind)
        return Run(request.param, plan, recipe, pipeline.run(parse_recipe(recipe)))


def test_the_plan_is_what_was_done(run: Run) -> None:
    assert load_plan(run.output / "plan.json") == run.plan
    config = run.json("config.json")
    assert config["model_type"] == f"hfc_{run.plan.model_type}"
    assert config["architectures"][0].startswith("HFC")
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (3, 96)
    assert config["per_layer_config"]["2"] == {"intermediate_size": 64, "skip": ["attention"]}
    rows = [
        (row["intermediate_size"], row["num_key_value_heads"], row["heads_per_group"])
        for row in run.json("metrics.json")["layers"]
    ]
    gone = (set(range(4)) - set(run.plan.kept_layers or ())).pop()
    assert rows.pop(gone) == (0, 0, 0)
    assert rows == [(32, 3, 4), (0, 2, 3), (64, 0, 0)]


def test_the_parameters_are_those_planned(run: Run) -> None:
    dense = dense_model(run.variant)
    family, dims = family_of(dense.config), Dimensions.of(dense.config)
    block = dense.get_submodule(f"{family.layers}.0")
    neuron, _ = unit_parameters(block, family, dims)
    _, narrow_group = unit_parameters(block, family, replace(dims, heads_per_group=3))
    whole, norm = block_sizes(dense, family)[0], dense.config.hidden_size
    norms = norm * (2 if run.variant == "gemma3_text" else 1)  # of a sub-layer
    mlp = 96 * neuron + norms + (norm if run.variant == "llama-tied-biased" else 0)  # down's bias
    attention = whole - mlp
    fixed = attention - 3 * unit_parameters(block, family, dims)[1]  # no group owns it
    kept = [whole - 64 * neuron, fixed + 2 * narrow_group, mlp - 32 * neuron]
    planned = count_parameters(dense).non_embedding - 4 * whole + sum(kept)
    metrics = run.json("metrics.json")
    assert metrics["after"]["non_embedding_parameters"] == planned
    stored = load_file(run.output / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == metrics["after"]["parameters"]
    config = planned_config(dense.config, run.plan)
    assert count_parameters(meta_model(config, torch.float32)).non_embedding == planned


def test_it_is_verified_and_measured(run: Run) -> None:
    metrics = run.json("metrics.json")
    assert metrics["verification"]["relative_logit_error"] <= 1e-4
    assert metrics["verification"]["generated_tokens"] == 8
    assert metrics["comparison"]["kl"] > 0
    assert metrics["after"]["kv_bytes_per_token"] == 2 * 8 * 4 * (3 + 2)
    assert metrics["after"]["decode_tokens_per_second"] > 0
    pruned = run.output.with_name("out.work") / "prune" / "report.json"
    for part in ("attention", "mlp"):
        for layer in json.loads(pruned.read_text())["layers"]:
            if layer[part]:
                assert layer[part]["error"] <= layer[part]["error_without_fold"]


def test_single_weights_are_zero_in_every_layer_that_is_there(run: Run) -> None:
    stored = load_file(run.output / "model.safetensors")
    linears = {
        name: value for name, value in stored.items() if "proj" in name and name.endswith("weight")
    }
    assert not any("layers.1.mlp" in name or "layers.2.self_attn" in name for name in linears)
    for name, value in linears.items():
        assert (value == 0).float().mean().item() == pytest.approx(0.3, abs=0.09), name


def test_the_card_says_how_to_load_it(run: Run) -> None:
    card = (run.output / "README.md").read_text()
    assert "trust_remote_code=True)" in card
    assert "import hf_compress` first" in card
    assert "hf_compress is not needed" not in card
    assert "cost the least KL" not in card  # the plan came from elsewhere
    kept = run.plan.kept_layers or []
    assert f"Layers without their attention, of 4: {kept[2]}." in card
    assert f"Layers without their MLP, of 4: {kept[1]}." in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert (run.output / "figures" / "widths.png").is_file()


def test_what_is_pushed_has_the_code(run: Run) -> None:
    uploaded = hub._uploaded(run.output)
    assert "modeling_hfc_layers.py" in uploaded
    assert f"modeling_hfc_{run.plan.model_type}.py" in uploaded


def test_a_finished_run_is_measured_anew_to_the_same_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("subject", "evaluate_folder"):
        monkeypatch.setattr(f"hf_compress.{module}.load_tokenizer", lambda *_: tiny_tokenizer())
    again = evaluate_folder(run.output, ["evaluate.speed=false"])
    assert again.comparison == load_metrics(run.output / "metrics.json").comparison


@torch.no_grad()
def test_no_code_of_a_checkpoint_is_run(run: Run, tmp_path: Path) -> None:
    """What lies next to the weights may be anything; we have our own classes."""
    for path in run.output.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in run.output.glob("*.py"):
        (tmp_path / path.name).write_text("raise SystemExit('this was run')\n")
    config = load_config(tmp_path)
    source = StreamedCheckpoint(tmp_path, config, torch.float32, torch.device("cpu"))
    ids = random_ids(2, 16)
    walk = Walk(source, ids)
    for index in range(3):
        with source.block(index) as block:
            walk.advance(block, index)
    expected = AutoModelForCausalLM.from_pretrained(run.output).eval()(ids).logits
    torch.testing.assert_close(walk.logits(1), expected[1], rtol=1e-4, atol=1e-4)


def test_a_second_stage_that_prunes_is_refused(run: Run) -> None:
    config = load_config(run.output)
    with pytest.raises(RecipeError, match="differ already, and it cannot be pruned again"):
        candidate_plans(config, Prune(sparsity=0.2))
    with pytest.raises(PlanError, match="differ already, and it cannot be cut to another plan"):
        check_plan(config, run.plan)


def test_a_checkpoint_whose_layers_differ_can_be_the_model_of_a_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_compress.subject.load_tokenizer", lambda *_: tiny_tokenizer())
    stages = [{"stage": "sparsify", "pattern": "2:4"}]
    changes = {"model": str(run.output), "output": str(tmp_path / "out"), "stages": stages}
    recipe = parse_recipe({**run.recipe, **changes, "evaluate": {"speed": False}})
    assert any("of 3 layers" in line or ", 3 layers" in line for line in describe(recipe))
    metrics = load_metrics(pipeline.run(recipe) / "metrics.json")
    assert metrics.after.parameters == metrics.before.parameters
    assert metrics.has_modeling_files
    # And from memory, where the model is of our own class.
    live = AutoModelForCausalLM.from_pretrained(run.output)
    again = compress(
        live, tiny_tokenizer(), {**run.recipe, **changes, "output": str(tmp_path / "memory")}
    )
    assert type(again) is type(live)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([WHOLE, WHOLE, LAYERS[0]], "has 3 layers, the model 4"),
        ([LAYERS[3], WHOLE, WHOLE, WHOLE], r"layer 0 of the plan skips attention.*silently wrong"),
        (
            [WHOLE, LayerPlan(intermediate_size=97, num_key_value_heads=3), WHOLE, WHOLE],
            "layer 1 of the plan keeps intermediate_size=97, but the model has only 96",
        ),
        (
            [
                WHOLE,
                WHOLE,
                LayerPlan(intermediate_size=96, num_key_value_heads=3, heads_per_group=5),
                WHOLE,
            ],
            "layer 2 of the plan keeps heads_per_group=5, but the model has only 4",
        ),
    ],
)
def test_a_plan_that_does_not_fit_says_why(layers: list[LayerPlan], reason: str) -> None:
    config = dense_model("llama").config
    with pytest.raises(PlanError, match=reason):
        planned_config(config, differing_plan("llama", layers))


def test_the_first_layer_of_a_type_is_counted_among_those_that_stay() -> None:
    config = dense_model("gemma3_text").config  # sliding, full, sliding, full
    layers = [WHOLE, WHOLE, LAYERS[3]]
    plan = differing_plan("gemma3_text", layers)
    planned_config(config, plan.model_copy(update={"kept_layers": [0, 1, 2]}))
    with pytest.raises(PlanError, match=r"layer 2 of the plan skips attention.*full_attention"):
        planned_config(config, plan.model_copy(update={"kept_layers": [0, 2, 3]}))


UNABLE = sorted({variant.split("-")[0] for variant in VARIANTS} - {"llama", *ABLE})


@pytest.mark.parametrize("variant", UNABLE)
def test_a_family_without_a_modelling_file_says_which_have_one(variant: str) -> None:
    config = tiny_model(variant).config
    dims = Dimensions.of(config)
    whole = LayerPlan(
        intermediate_size=dims.intermediate_size, num_key_value_heads=dims.num_key_value_heads
    )
    layers = [whole, whole.model_copy(update={"intermediate_size": 8})]
    with pytest.raises(PlanError, match=rf"no native {variant}.*gemma3_text, llama, mistral"):
        planned_config(config, Plan(model_type=variant, layers=layers))
    assert f"hfc_{variant}" not in FAMILIES


def test_a_plan_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(differing_plan("llama"), path)
    raw = json.loads(path.read_text())
    assert raw["layers"][2]["skip"] == ["mlp"]
    assert load_plan(path) == differing_plan("llama")
    for skip, reason in (
        (["attention", "mlp"], "leaves nothing of the layer"),
        (["norm"], "'attention' or 'mlp'"),
    ):
        raw["layers"][2]["skip"] = skip
        path.write_text(json.dumps(raw))
        with pytest.raises(PlanError, match=rf"layers\.2\.skip.*{reason}"):
            load_plan(path)


def test_plans_of_several_stages_add_up() -> None:
    first = Plan.uniform("llama", 4, 96, 3, 3)
    second = differing_plan("llama")
    whole = compose([first, second])
    assert [layer.skip for layer in whole.layers] == [layer.skip for layer in LAYERS]
    assert [layer.heads_per_group for layer in whole.layers] == [3, 3, 3, 3]


def test_inspect_needs_both_sublayers() -> None:
    with pytest.raises(ModelError, match="layer 2 of this model has no mlp"):
        inspect_model(ModelInMemory(differing_model("llama")), random_ids(2, 16))


def test_old_metrics_are_read() -> None:
    from tests.report.test_report import minimal

    assert not parse_metrics(minimal()).has_modeling_files
