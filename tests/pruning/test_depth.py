"""Whole layers: a dropped one is skipped and nothing else, and the idle ones go first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_compress.errors import PlanError
from hf_compress.model.blocks import ModelInMemory, Passage
from hf_compress.model.families import family_of, native_config
from hf_compress.model.surgery import Dimensions
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan, load_plan, save_plan
from hf_compress.pruning import Templates, prune_blocks, settle_layers
from hf_compress.recipe import Prune
from tests.model.test_surgery import require_the_same_when_loaded
from tests.tiny import VARIANTS, random_ids, tiny_model

LAYERS = {"num_hidden_layers": 4}


def plan_for(model: PreTrainedModel, layers: int, kept: list[int] | None = None) -> Plan:
    """Full widths, fewer layers."""
    dims = Dimensions.of(model.config)
    plan = Plan.uniform(
        model.config.model_type, layers, dims.intermediate_size, dims.num_key_value_heads
    )
    return plan.model_copy(update={"kept_layers": kept})


def pruned(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The model that `prune_blocks` writes for a plan."""
    source = ModelInMemory(model)
    templates = Templates(source, plan)
    probe = Walk(source, random_ids(2, 24))
    state = dict(probe.skeleton.state_dict())
    prune_blocks(
        source,
        None,
        plan,
        templates,
        Prune(sparsity=0.1),
        streams=None,
        probe=probe,
        write=state.__setitem__,
    )
    smaller = AutoModelForCausalLM.from_config(templates.config, dtype=torch.float32).eval()
    smaller.load_state_dict(state, strict=False)
    smaller.tie_weights()
    return smaller


def without(model: PreTrainedModel, *gone: int) -> PreTrainedModel:
    """The dense model, some blocks handing on what they get."""
    blocks = model.get_submodule(family_of(model.config).layers)
    for index in gone:
        blocks[index] = Passage()
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_dropping_layers_is_skipping_them(variant: str, tmp_path: Path) -> None:
    model, ids = tiny_model(variant, **LAYERS), random_ids(2, 24)
    smaller = pruned(model, plan_for(model, 2, [0, 3]))
    assert smaller.config.num_hidden_layers == 2
    assert torch.equal(smaller(ids).logits, without(model, 1, 2)(ids).logits)
    require_the_same_when_loaded(smaller, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_keeping_all_layers_is_bit_equal(variant: str) -> None:
    model, ids = tiny_model(variant, **LAYERS), random_ids(2, 24)
    for kept in (None, [0, 1, 2, 3]):
        assert torch.equal(pruned(model, plan_for(model, 4, kept))(ids).logits, model(ids).logits)


def test_per_layer_fields_belong_to_the_layers_that_stay() -> None:
    config = tiny_model("gemma3_text", num_hidden_layers=4).config
    assert native_config(config, 96, 3, kept_layers=[1, 2]).layer_types == [
        "full_attention",
        "sliding_attention",
    ]
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    config = tiny_model("qwen2", num_hidden_layers=4, **changes).config
    smaller = native_config(config, 96, 3, kept_layers=[0, 2, 3])
    assert smaller.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert smaller.max_window_layers == 2


@torch.no_grad()
def idle(model: PreTrainedModel, *layers: int) -> PreTrainedModel:
    family = family_of(model.config)
    for layer in layers:
        block = model.get_submodule(f"{family.layers}.{layer}")
        for output in (family.attention_output, family.mlp_output):
            block.get_submodule(output).weight.zero_()
    return model


@torch.no_grad()
def kl_without(model: PreTrainedModel, ids: torch.Tensor, *gone: int) -> float:
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    source = ModelInMemory(model)
    log_q = without(AutoModelForCausalLM.from_config(model.config).eval(), *gone)
    log_q.load_state_dict(source.model.state_dict(), strict=False)
    log_q = log_q(ids).logits[:, :-1].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_the_layers_that_do_nothing_go_first() -> None:
    model = idle(tiny_model("llama", num_hidden_layers=6), 1, 4)
    plans = [plan_for(model, left) for left in (6, 5, 4, 3)]
    settled, drops = settle_layers(ModelInMemory(model), plans, random_ids(4, 16))
    assert {drop.layer for drop in drops[:2]} == {1, 4}
    assert [drop.kl for drop in drops[:2]] == pytest.approx([0, 0], abs=1e-6)
    assert [plan.kept_layers for plan in settled[:1]] == [None]
    assert settled[2].kept_layers == [0, 2, 3, 5]
    assert set(settled[3].kept_layers) < set(settled[2].kept_layers) < set(settled[1].kept_layers)


def test_every_choice_is_the_least_kl_of_what_was_considered() -> None:
    model, ids = tiny_model("gemma3_text", num_hidden_layers=6), random_ids(4, 16)
    _, drops = settle_layers(ModelInMemory(model), [plan_for(model, 4)], ids)
    gone: list[int] = []
    for drop in drops:
        assert len(drop.considered) == 4
        for layer, kl in drop.considered.items():
            assert kl == pytest.approx(kl_without(model, ids, *gone, layer), rel=1e-3)
        assert drop.kl == min(drop.considered.values()) == drop.considered[drop.layer]
        gone.append(drop.layer)


def test_protected_layers_stay() -> None:
    model = idle(tiny_model("llama", num_hidden_layers=4), 1)
    protected = frozenset({1, 2})
    (plan,), drops = settle_layers(
        ModelInMemory(model), [plan_for(model, 2)], random_ids(2, 16), protected
    )
    assert plan.kept_layers == [1, 2]
    assert all(not set(drop.considered) & protected for drop in drops)


@pytest.mark.parametrize("kept", [[1, 0], [0], [0, 0], [-1, 0]])
def test_a_plan_names_each_layer_once(kept: list[int], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(plan_for(tiny_model(), 2, kept), path)
    with pytest.raises(PlanError, match=r"kept_layers .* has to name 2 layers"):
        load_plan(path)


def test_a_plan_is_checked_against_the_number_of_layers() -> None:
    model = tiny_model()
    with pytest.raises(PlanError, match="kept_layers says which stay"):
        plan_for(model, 1).check("llama", 2, 96, 3)
    with pytest.raises(PlanError, match=r"keeps layer 2.*is 1"):
        plan_for(model, 2, [0, 2]).check("llama", 2, 96, 3)
    plan_for(model, 1, [1]).check("llama", 2, 96, 3)
