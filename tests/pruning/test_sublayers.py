"""Whole attention and MLP sub-layers: the idle ones go first, the budget is kept, all is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hf_compress import compress
from hf_compress.dry_run import describe
from hf_compress.errors import RecipeError
from hf_compress.heterogeneous.auto import STEMS
from hf_compress.model.blocks import ModelInMemory, meta_model
from hf_compress.model.families import family_of
from hf_compress.model.parameters import count_parameters
from hf_compress.plan import Plan
from hf_compress.pruning import (
    candidate_plans,
    kept_sublayers,
    planned_config,
    settle_layers,
    settle_sublayers,
)
from hf_compress.pruning.allocation import MAX_CANDIDATES
from hf_compress.pruning.sublayers import lacking, num_lacking
from hf_compress.recipe import Prune, parse_recipe
from hf_compress.report import load_metrics, summary_lines
from tests.heterogeneous.differing import ABLE
from tests.tiny import VARIANTS, random_ids, tiny_model, tiny_text, tiny_tokenizer

BOTH = ["attention_sublayers", "mlp_sublayers"]
STRUCTURES = (
    BOTH,
    ["attention_sublayers"],
    ["mlp_sublayers"],
    ["mlp_neurons", *BOTH],
    ["mlp_neurons", "kv_groups", "query_heads", "layers", *BOTH],
)
EIGHT = {"num_hidden_layers": 8}


def removed(config: PretrainedConfig, plan: Plan) -> float:
    before, after = (
        count_parameters(meta_model(each, torch.float32)).non_embedding
        for each in (config, planned_config(config, plan))
    )
    return 1 - after / before


def lost(plan: Plan) -> tuple[int, int]:
    """Attention and MLP sub-layers that eight layers lost."""
    return num_lacking(plan, "attention", 8), num_lacking(plan, "mlp", 8)


@pytest.mark.parametrize("structures", STRUCTURES, ids=" ".join)
@pytest.mark.parametrize("variant", ABLE)
def test_every_candidate_removes_what_was_asked(variant: str, structures: list[str]) -> None:
    config = tiny_model(variant, **EIGHT).config
    sparsity = 0.2
    plans = candidate_plans(config, Prune(sparsity=sparsity, structures=structures, round_to=8))
    assert 1 <= len(plans) <= MAX_CANDIDATES
    assert len({plan.model_dump_json() for plan in plans}) == len(plans)
    for plan in plans:
        assert removed(config, plan) >= sparsity
        # And no more than the smallest step too much.
        assert removed(config, plan) < sparsity + 0.12
        assert plan.widths.intermediate_size == 96 or "mlp_neurons" in structures
        assert not lost(plan)[0] or "attention_sublayers" in structures or len(plan.layers) < 8
        assert not lost(plan)[1] or "mlp_sublayers" in structures or len(plan.layers) < 8
    for which, structure in enumerate(BOTH):
        assert any(lost(plan)[which] for plan in plans) == (
            structure in structures or "layers" in structures
        )


def test_widths_make_up_for_what_sublayers_leave() -> None:
    config = tiny_model("llama", **EIGHT).config
    settings = Prune(sparsity=0.3, structures=["mlp_neurons", *BOTH], round_to=1)
    plans = candidate_plans(config, settings)
    assert lost(plans[0]) == (0, 0)
    assert plans[0].is_uniform
    for plan in plans:
        # A neuron in each MLP that stays is the finest step.
        assert removed(config, plan) == pytest.approx(0.3, abs=0.012)


@pytest.mark.parametrize(("structures", "most"), [(BOTH, 0.86), (BOTH[:1], 0.3), (BOTH[1:], 0.6)])
def test_out_of_reach_says_how_far_it_goes(structures: list[str], most: float) -> None:
    config = tiny_model("llama", **EIGHT).config
    with pytest.raises(RecipeError, match=r"at most 0\.\d+") as error:
        candidate_plans(config, Prune(sparsity=0.97, structures=structures))
    share = float(str(error.value).split("at most ")[1].split()[0])
    assert share == pytest.approx(most, abs=0.05)
    assert candidate_plans(config, Prune(sparsity=share - 0.001, structures=structures))
    with pytest.raises(RecipeError):
        candidate_plans(config, Prune(sparsity=share + 0.001, structures=structures))


@torch.no_grad()
def idle(model: PreTrainedModel, **layers: list[int]) -> PreTrainedModel:
    """The model, in which the `attention` or `mlp` of some layers adds nothing."""
    family = family_of(model.config)
    outputs = {"attention": family.attention_output, "mlp": family.mlp_output}
    for part, indices in layers.items():
        for index in indices:
            block = model.get_submodule(f"{family.layers}.{index}")
            for parameter in block.get_submodule(outputs[part]).parameters():
                parameter.zero_()
    return model


def plan_lacking(model: PreTrainedModel, **gone: list[int]) -> Plan:
    count = model.config.num_hidden_layers
    plan = Plan.uniform(model.config.model_type, count, 96, 3)
    return lacking(plan, {"attention": [], "mlp": [], **gone})


@pytest.mark.parametrize("variant", ABLE)
def test_the_sublayers_that_do_nothing_go_first(variant: str) -> None:
    model = idle(tiny_model(variant, num_hidden_layers=6), attention=[2, 4], mlp=[1])
    protected = kept_sublayers(model.config, Prune(sparsity=0.1))
    plans = [plan_lacking(model, attention=[5], mlp=[4]), plan_lacking(model, attention=[4, 5])]
    plans.append(plan_lacking(model))
    settled, drops = settle_sublayers(ModelInMemory(model), plans, random_ids(4, 16), protected)
    assert [drop.part for drop in drops] == ["attention", "attention", "mlp"]
    assert {drop.layer for drop in drops[:2]} == {2, 4}
    assert drops[2].layer == 1
    assert [drop.kl for drop in drops] == pytest.approx([0, 0, 0], abs=1e-6)
    skips = [
        {index: layer.skip for index, layer in enumerate(plan.layers) if layer.skip}
        for plan in settled
    ]
    attention, mlp = ("attention",), ("mlp",)
    assert skips == [{1: mlp, drops[0].layer: attention}, {2: attention, 4: attention}, {}]


@torch.no_grad()
def test_every_choice_is_the_least_kl_of_what_was_considered() -> None:
    ids = random_ids(4, 16)
    fresh = lambda: tiny_model("gemma3_text", num_hidden_layers=6)  # noqa: E731
    log_p = fresh()(ids).logits[:, :-1].log_softmax(-1)
    source = ModelInMemory(fresh())
    protected = kept_sublayers(source.config, Prune(sparsity=0.1))
    for part in ("attention", "mlp"):
        plan = plan_lacking(source.model, **{part: [4, 5]})
        _, drops = settle_sublayers(source, [plan], ids, protected)
        gone: list[int] = []
        for drop in drops:
            assert len(drop.considered) >= 3
            for layer, kl in drop.considered.items():
                other = idle(fresh(), **{part: [*gone, layer]})(ids).logits[:, :-1]
                expected = (log_p.exp() * (log_p - other.log_softmax(-1))).sum(-1).mean().item()
                assert kl == pytest.approx(expected, rel=1e-3)
            assert drop.kl == min(drop.considered.values())
            gone.append(drop.layer)


@pytest.mark.parametrize(("variant", "first"), [("llama", {0}), ("gemma3_text", {0, 1})])
def test_the_first_attention_of_each_kind_stays(variant: str, first: set[int]) -> None:
    model = idle(tiny_model(variant, num_hidden_layers=4), attention=[0, 1])
    settings = Prune(sparsity=0.1, structures=["attention_sublayers"])
    assert candidate_plans(model.config, settings)
    protected = kept_sublayers(model.config, settings)
    assert protected["attention"] == first
    most = plan_lacking(model, attention=sorted(set(range(4)) - first))
    (settled,), drops = settle_sublayers(ModelInMemory(model), [most], random_ids(2, 16), protected)
    assert {drop.layer for drop in drops} == set(range(4)) - first
    planned_config(model.config, settled)


def test_a_layer_that_loses_both_is_dropped() -> None:
    model = idle(tiny_model("llama", num_hidden_layers=4), attention=[2], mlp=[2])
    plan = plan_lacking(model, attention=[3], mlp=[1])
    protected = kept_sublayers(model.config, Prune(sparsity=0.1))
    source, ids = ModelInMemory(model), random_ids(2, 16)
    (settled,), _ = settle_sublayers(source, [plan], ids, protected)
    assert settled.kept_layers == [0, 1, 3]
    assert planned_config(model.config, settled).model_type == "llama"
    # Nor is it then for others to say which layers go, and the other way round.
    assert settle_layers(source, [settled], ids)[0] == [settled]
    layers = Plan.uniform("llama", 3, 96, 3)
    assert settle_sublayers(source, [layers], ids, protected)[0] == [layers]


@pytest.mark.parametrize(
    ("ignore", "attention", "mlp"),
    [
        (["*.self_attn"], {0, 1, 2, 3}, set()),
        (["model.layers.2.mlp"], {0}, {2}),
        (["model.layers.2"], {0, 2}, {2}),
        (["model.layers.1.*"], {0, 1}, {1}),
    ],
)
def test_what_is_ignored_stays(ignore: list[str], attention: set[int], mlp: set[int]) -> None:
    config = tiny_model("llama", num_hidden_layers=4).config
    settings = Prune(sparsity=0.1, structures=BOTH, ignore=ignore)
    assert kept_sublayers(config, settings) == {"attention": attention, "mlp": mlp}
    for plan in candidate_plans(config, settings):
        assert num_lacking(plan, "attention", 4) <= 4 - len(attention)
        assert num_lacking(plan, "mlp", 4) <= 4 - len(mlp)


def test_nothing_left_to_prune() -> None:
    config = tiny_model("llama").config
    settings = Prune(sparsity=0.1, structures=["attention_sublayers"], ignore=["*.self_attn"])
    with pytest.raises(RecipeError, match="ignore leaves nothing of structures"):
        candidate_plans(config, settings)


UNABLE = sorted({variant.split("-")[0] for variant in VARIANTS} - set(STEMS))


@pytest.mark.parametrize("variant", UNABLE)
def test_a_family_that_cannot_says_which_can(variant: str) -> None:
    settings = Prune(sparsity=0.1, structures=["attention_sublayers"])
    with pytest.raises(RecipeError, match=rf"gemma3_text, llama, mistral.*not of a {variant}"):
        candidate_plans(tiny_model(variant).config, settings)


def test_a_model_whose_layers_differ_is_not_pruned_again(recipe: dict[str, Any]) -> None:
    stage = {"stage": "prune", "sparsity": 0.1, "structures": BOTH}
    with pytest.raises(RecipeError, match="rounds: 2 prunes a model that was pruned"):
        parse_recipe({**recipe, "stages": [{**stage, "rounds": 2}]})
    plain = {"stage": "prune", "sparsity": 0.1}
    with pytest.raises(RecipeError, match="only the last prune stage may have"):
        parse_recipe({**recipe, "stages": [stage, plain]})
    parse_recipe({**recipe, "stages": [plain, stage, {"stage": "refit"}]})


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "phi3"])
def test_a_run_tells_which_went(variant: str, tmp_path: Path) -> None:
    idle(tiny_model(variant, num_hidden_layers=6), attention=[3], mlp=[2]).save_pretrained(
        tmp_path / "dense"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny_text(4000, 1))
    text = {"source": str(tmp_path / "text.txt"), "max_seq_length": 32, "num_samples": 32}
    stage = {"stage": "prune", "sparsity": 0.1, "round_to": 8, "structures": ["mlp_neurons", *BOTH]}
    recipe = {
        "model": str(tmp_path / "dense"),
        "output": str(tmp_path / "out"),
        "data": {"calibration": text, "evaluation": text, "num_fitness_samples": 8},
        "stages": [stage],
        "evaluate": {"speed": False},
    }
    lines = "\n".join(describe(parse_recipe(recipe)))
    assert "6 layers, 6 with attention, 5 with mlp, 3 KV groups" in lines
    assert "6 layers, 5 with attention, 6 with mlp, 3 KV groups" in lines
    assert "of 6 mlp sub-layers costs at most" in lines
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruned = compress(dense, tiny_tokenizer(), recipe)
    assert pruned.config.model_type == f"hfc_{variant}"
    metrics = load_metrics(tmp_path / "out" / "metrics.json")
    assert metrics.pruning is not None
    assert metrics.pruning.sparsity_achieved >= 0.1
    assert metrics.after.parameters == pruned.num_parameters()
    (chosen,) = [candidate for candidate in metrics.pruning.candidates if candidate.chosen]
    assert chosen.kl == min(candidate.kl for candidate in metrics.pruning.candidates)
    assert (chosen.attention_sublayers, chosen.mlp_sublayers) in ((6, 5), (5, 6))
    report = json.loads((tmp_path / "out.work" / "prune" / "report.json").read_text())
    went = [drop for drop in report["dropped_sublayers"] if drop["dropped"]]
    (drop,) = went
    assert (drop["part"], drop["layer"]) in (("attention", 3), ("mlp", 2))
    card = (tmp_path / "out" / "README.md").read_text()
    name = {"attention": "attention", "mlp": "MLP"}[drop["part"]]
    assert f"Layers without their {name}, of 6: {drop['layer']}. Each was the one whose" in card
    assert "| Layers with attention | Layers with an MLP |" in card
    assert "trust_remote_code=True)" in card
    assert summary_lines(metrics)
