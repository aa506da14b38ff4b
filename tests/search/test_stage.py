"""`stage: search` in a run: budgets are met, plans can be edited, kills do not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hf_compress import Compressor, pipeline
from hf_compress.errors import PlanError, RecipeError
from hf_compress.plan import load_plan
from hf_compress.recipe import parse_recipe
from hf_compress.report import load_metrics
from hf_compress.search import evolution
from tests.search.conftest import BUDGET
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer


def report_of(output: Path) -> dict[str, Any]:
    work = output.with_name(output.name + ".work")
    return json.loads((work / "search" / "report.json").read_text("utf-8"))


def test_layers_get_widths_of_their_own_within_the_budget(searching: dict[str, Any]) -> None:
    output = pipeline.run(parse_recipe(searching))
    metrics, report = load_metrics(output / "metrics.json"), report_of(output)
    assert metrics.removed_share >= 0.3
    assert {"evolved", "solver", "uniform"} == set(report["held_out"])
    assert len(report["history"]) == 3
    plan = load_plan(output / "plan.json")
    assert plan.model_dump(mode="json") == report["plan"]
    if report["is_better_than_uniform"]:
        assert not plan.is_uniform
    else:
        assert plan.is_uniform
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert model.num_parameters() == metrics.after.parameters


@pytest.mark.parametrize(
    "budget",
    [
        {"kv_bytes_per_token": 0.7},
        {"weight_bytes": 0.8, "kv_bytes_per_token": 0.7},
        {"flops_per_token": 0.75, "parameters": 0.9},
        {"decode_latency": 0.999, "non_embedding_parameters": 0.8},
    ],
)
def test_uniform_budgets(
    searching: dict[str, Any],
    budget: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    searching["stages"][0] = {"stage": "search", "budget": budget, "round_to": 8}
    output = pipeline.run(parse_recipe(searching))
    metrics = load_metrics(output / "metrics.json")
    assert load_plan(output / "plan.json").is_uniform
    before, after = metrics.before.model_dump(), metrics.after.model_dump()
    for name, share in budget.items():
        if name in ("parameters", "non_embedding_parameters", "kv_bytes_per_token"):
            assert after[name] <= share * before[name]
    chosen = [one for one in report_of(output)["candidates"] if one["chosen"]]
    assert len(chosen) == 1


def test_whole_layers_may_go(searching: dict[str, Any]) -> None:
    searching["stages"][0] = {
        "stage": "search",
        "budget": {"kv_bytes_per_token": 0.6},
        "structures": ["layers"],
    }
    output = pipeline.run(parse_recipe(searching))
    assert len(load_plan(output / "plan.json").layers) == 3


def test_the_same_seed_gives_the_same_plan(searching: dict[str, Any], tmp_path: Path) -> None:
    plans = []
    for name in ("first", "second"):
        output = pipeline.run(parse_recipe({**searching, "output": str(tmp_path / name)}))
        plans.append((load_plan(output / "plan.json"), report_of(output)["history"]))
    assert plans[0] == plans[1]


def test_killed_in_the_middle_of_the_evolution(
    searching: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.run(parse_recipe({**searching, "output": str(tmp_path / "whole")}))
    expected = report_of(whole)
    select, calls = evolution._select, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return select(*args)

    monkeypatch.setattr(evolution, "_select", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(parse_recipe(searching))
    assert not Path(searching["output"]).exists()
    again = pipeline.run(parse_recipe(searching))
    assert len(calls) == 4  # one generation before the kill, two after it
    assert report_of(again)["history"] == expected["history"]
    assert report_of(again)["plan"] == expected["plan"]


def test_a_plan_that_was_edited_by_hand(searching: dict[str, Any], tmp_path: Path) -> None:
    plan = load_plan(pipeline.run(parse_recipe(searching)) / "plan.json").model_dump(mode="json")
    plan["layers"][2] |= {"intermediate_size": 24, "num_key_value_heads": 2}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(plan))
    edited = {**searching, "output": str(tmp_path / "edited")}
    edited["stages"] = [{"stage": "prune", "plan": str(file)}]
    output = pipeline.run(parse_recipe(edited))
    assert load_plan(output / "plan.json").layers[2].intermediate_size == 24
    plan["layers"][2]["intermediate_size"] = 97
    file.write_text(json.dumps(plan))
    edited["output"] = str(tmp_path / "wrong")
    with pytest.raises(PlanError, match=r"layer 2 .* intermediate_size=97, but"):
        pipeline.run(parse_recipe(edited))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"stage": "prune"}], "neither sparsity nor plan"),
        ([{"stage": "search", "budget": BUDGET}], "behind `search` has to come a `prune`"),
        (
            [{"stage": "search", "budget": BUDGET}, {"stage": "prune", "sparsity": 0.2}],
            "behind `search` has to come a `prune`",
        ),
        (
            [{"stage": "search", "budget": {"kv_bytes_per_token": 0.1}}, {"stage": "prune"}],
            "kv_bytes_per_token .* is out of reach",
        ),
        (
            [{"stage": "search", "budget": BUDGET, "ignore": ["*.nothing"]}, {"stage": "prune"}],
            "nothing",
        ),
    ],
)
def test_recipes_that_cannot_be_carried_out(
    searching: dict[str, Any], stages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pipeline.run(parse_recipe({**searching, "stages": stages}))
    assert not Path(searching["output"]).exists()


def test_families_without_a_modelling_file_have_uniform_widths(
    searching: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    searching["model"] = str(folder)
    searching["stages"][0] |= {"structures": ["mlp_neurons"]}
    with pytest.raises(RecipeError, match="not for gpt2; set uniform: true"):
        pipeline.run(parse_recipe(searching))
    searching["stages"][0] |= {"uniform": True, "budget": {"non_embedding_parameters": 0.8}}
    output = pipeline.run(parse_recipe(searching))
    assert load_metrics(output / "metrics.json").removed_share >= 0.2


def test_what_is_ignored_stays(searching: dict[str, Any]) -> None:
    searching["stages"][0] |= {"ignore": ["model.layers.1.mlp", "model.layers.3.*"]}
    output = pipeline.run(parse_recipe(searching))
    layers = load_plan(output / "plan.json").layers
    assert layers[1].intermediate_size == 96
    assert (layers[3].intermediate_size, layers[3].num_key_value_heads) == (96, 3)


def test_a_search_over_layers_has_text_to_search_on(searching: dict[str, Any]) -> None:
    del searching["data"]["num_fitness_samples"]
    assert parse_recipe(searching).data.num_fitness_samples == 48
    searching["stages"][0]["uniform"] = True
    assert parse_recipe(searching).data.num_fitness_samples == 8


def test_from_python() -> None:
    model, tokenizer = tiny_model("qwen2", num_hidden_layers=3), tiny_tokenizer()
    compressor = Compressor(model, tokenizer)
    compressor.calibrate([tiny_text(6000, 1)], num_samples=32, max_seq_length=32)
    compressor.evaluate_on([tiny_text(2000, 2)], num_samples=8, max_seq_length=32)
    compressor.search(budget={"parameters": 0.8}, round_to=8).prune()
    metrics = compressor.evaluate(speed=False)
    assert metrics.after.parameters <= 0.8 * metrics.before.parameters
    assert metrics.pruning is not None
    assert metrics.pruning.search is not None
    assert metrics.pruning.search.budget == {"parameters": pytest.approx(0.8)}
