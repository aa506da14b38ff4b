"""Invariants of the cut, over every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_compress.errors import ModelError
from hf_compress.model.blocks import ModelInMemory, StreamedCheckpoint
from hf_compress.model.experts import ExpertCut
from hf_compress.model.families import FAMILIES, Experts, family_of, has_experts, native_config
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import Cut, Dimensions, cut_block, weight_of
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan
from hf_compress.pruning import Templates
from tests.tiny import CUTS_HEADS, VARIANTS, random_ids, tiny_model

CAUSAL = [variant for variant in VARIANTS if not FAMILIES[variant.split("-")[0]].masked]
NEURONS = torch.arange(0, 96, 3)
EXPERTS = torch.tensor([0, 2, 3, 5])
ALL_EXPERTS = torch.arange(6)
FOUR_HEADS_A_GROUP = {"num_attention_heads": 12, "hidden_size": 96}


def kept_groups(model: PreTrainedModel) -> torch.Tensor:
    """Two of three, or all where heads cannot be cut."""
    groups = torch.arange(Dimensions.of(model.config).num_key_value_heads)
    return groups[::2] if family_of(model.config).cuts_heads else groups


def cut_model(
    model: PreTrainedModel,
    neurons: torch.Tensor,
    groups: torch.Tensor,
    heads: torch.Tensor | None = None,
    experts: torch.Tensor = EXPERTS,
):
    """Every MLP cut to `neurons`; where a layer has experts, it keeps `experts`, and these
    all of their neurons if they keep as many, and else different ones each."""
    source = ModelInMemory(model)
    dims = Dimensions.of(model.config)
    per_group = None if heads is None else len(heads) // len(groups)
    count = len(experts) if source.family.experts else None
    plan = Plan.uniform(model.config.model_type, 2, len(neurons), len(groups), per_group, count)
    templates = Templates(source, plan)
    state = dict(Walk(source, random_ids(1, 8)).skeleton.state_dict())
    for index in range(2):
        with source.block(index) as block:
            kept = Cut(None if source.family.experts else neurons, groups, heads=heads)
            if has_experts(model.config, index):
                kept = replace(kept, experts=expert_cut(experts, neurons))
            cut = cut_block(block, templates.block(index), source.family, dims, kept)
        state |= {
            f"{source.family.layers}.{index}.{name}": value
            for name, value in cut.state_dict().items()
        }
    auto_class = source.family.auto_class
    pruned = auto_class.from_config(templates.config, dtype=torch.float32).eval()
    pruned.load_state_dict(state, strict=False)
    pruned.tie_weights()
    return pruned


def expert_cut(experts: torch.Tensor, neurons: torch.Tensor) -> ExpertCut:
    return ExpertCut(experts, torch.stack([kept_by(index, neurons) for index in experts.tolist()]))


def kept_by(expert: int, neurons: torch.Tensor) -> torch.Tensor:
    """The same neurons for every expert, moved on by one each, if there is room."""
    return neurons if len(neurons) == 96 else neurons + expert % 3


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the dense model, the columns of what is cut set to zero and the routers'
    logits of experts that are cut to -inf."""
    family, dims = family_of(model.config), Dimensions.of(model.config)
    kept_heads = Cut(NEURONS, kept_groups(model), heads=heads).query_columns(dims)
    routers = []
    for index, block in enumerate(model.get_submodule(family.layers)):
        keep_columns(weight_of(block, family.attention_output, family), kept_heads)
        if has_experts(model.config, index):
            mask_neurons(block, family.experts)
            routers.append(block.get_parameter(family.experts.router[0]))
        elif not family.experts:
            keep_columns(weight_of(block, family.mlp_output, family), NEURONS)
    linear = torch.nn.functional.linear

    def masked(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        out = linear(inputs, weight, bias)
        if any(weight is router for router in routers):
            out[..., [index for index in range(6) if index not in EXPERTS]] = -torch.inf
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", masked)
    return model(ids).logits


def keep_columns(weight: torch.Tensor, kept: torch.Tensor) -> None:
    mask = torch.zeros(weight.shape[1])
    mask[kept] = 1
    weight.mul_(mask)


def mask_neurons(block: torch.nn.Module, experts: Experts) -> None:
    """Zeros in the output layer of the experts, which alone has neurons as single entries."""
    (name,) = (name for name, axis in experts.parameters.items() if axis and axis.parts == 1)
    weight, dim = block.get_parameter(name), experts.parameters[name].dim
    for index in EXPERTS.tolist():
        gone = [n for n in range(96) if n not in kept_by(index, NEURONS)]
        weight[index].index_fill_(dim - 1, torch.tensor(gone), 0)


def test_every_family_has_a_tiny_model() -> None:
    assert {variant.split("-")[0] for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_keeping_everything_is_bit_equal(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(2, 24)
    groups = torch.arange(Dimensions.of(model.config).num_key_value_heads)
    kept = cut_model(model, torch.arange(96), groups, experts=ALL_EXPERTS)
    assert torch.equal(kept(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cutting_equals_masking(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(variant), random_ids(2, 24)
    cut = cut_model(model, NEURONS, kept_groups(model))
    logits = cut(ids).logits
    expected = masked_logits(model, ids, monkeypatch)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", CUTS_HEADS)
@torch.no_grad()
def test_cutting_query_heads_equals_masking_them(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(variant, **FOUR_HEADS_A_GROUP), random_ids(2, 24)
    heads = torch.tensor([1, 3, 8, 9])  # of the first and the last of three groups of four
    assert native_config(model.config, len(NEURONS), 2, 2) is not None
    cut = cut_model(model, NEURONS, torch.tensor([0, 2]), heads)
    assert (cut.config.num_attention_heads, cut.config.num_key_value_heads) == (4, 2)
    logits = cut(ids).logits
    expected = masked_logits(model, ids, monkeypatch, heads)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    require_the_same_when_loaded(cut, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_saved_reloaded_and_generated_is_the_same(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant)
    require_the_same_when_loaded(cut_model(model, NEURONS, kept_groups(model)), tmp_path)


def require_the_same_when_loaded(cut: PreTrainedModel, tmp_path: Path) -> None:
    """Saved, reloaded, and generated token by token with a cache: the same logits."""
    cut.save_pretrained(tmp_path)
    family = family_of(cut.config)
    loaded = family.auto_class.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 24)
    whole = loaded(ids).logits
    assert torch.equal(whole, cut(ids).logits)
    if family.masked:
        return  # an encoder generates nothing
    cache = DynamicCache(config=loaded.config)
    steps = [
        loaded(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(24)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", CAUSAL)
def test_left_padded_batches_generate_what_each_row_does(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant)
    cut_model(model, NEURONS, kept_groups(model)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rows = [random_ids(1, length, seed=length) for length in (9, 20, 14)]
    ids, mask = torch.zeros(2, 3, 20, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, 20 - row.shape[1] :] = row
        mask[index, 20 - row.shape[1] :] = 1

    def continued(ids: torch.Tensor, mask: torch.Tensor, use_cache: bool) -> torch.Tensor:
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        return loaded.generate(ids, attention_mask=mask, use_cache=use_cache, **settings)[:, -8:]

    cached = continued(ids, mask, True)
    assert torch.equal(cached, continued(ids, mask, False))
    alone = [continued(row, torch.ones_like(row), True) for row in rows]
    assert torch.equal(cached, torch.cat(alone))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_walk_computes_the_models_own_logits(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(5, 24)
    expected = model(ids[4:]).logits[0]
    # Dropout, where a model is being trained, is none of a walk's business.
    walk = Walk(ModelInMemory(model.train()), ids, batch_size=2)
    for index in range(2):
        with walk.source.block(index) as block:
            walk.advance(block, index)
    torch.testing.assert_close(walk.logits(4), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_parameters_are_the_models(variant: str) -> None:
    model = tiny_model(variant)
    count = count_parameters(model)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    vocabulary = (
        "embed_tokens",
        "embed_in",
        "wte",
        "word_embeddings",
        "lm_head",
        "predictions.decoder",
    )
    body = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not any(part in name for part in vocabulary)
    )
    assert count.non_embedding == body


def test_heads_that_llama_refuses_are_written_as_mistral() -> None:
    config = native_config(
        tiny_model("llama", num_attention_heads=12, num_key_value_heads=12, hidden_size=96).config,
        96,
        5,
    )
    assert config.model_type == "mistral"
    assert (config.sliding_window, config.head_dim) == (None, 8)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    config = tiny_model("llama").config
    config.model_type = "mamba"
    with pytest.raises(ModelError, match=r"'mamba'.*gemma3_text, gpt2.*llama, mistral"):
        family_of(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_streamed_block_has_the_weights_of_the_model(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    source = StreamedCheckpoint(tmp_path, model.config, torch.float32, torch.device("cpu"))
    with source.block(1) as block:
        expected = model.get_submodule(f"{source.family.layers}.1").state_dict()
        assert block.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in block.state_dict().items())


def test_a_checkpoint_without_its_head_is_read_by_the_names_that_it_has(tmp_path: Path) -> None:
    """That is how GPT-2 lies on the Hub."""
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    source = StreamedCheckpoint(tmp_path, model.config, torch.float32, torch.device("cpu"))
    with source.block(1) as block:
        expected = model.transformer.h[1].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in block.state_dict().items())
    assert torch.equal(source.skeleton().lm_head.weight, model.lm_head.weight)


def test_a_checkpoint_that_lacks_one_expert_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    source = StreamedCheckpoint(tmp_path, model.config, torch.float32, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"block 1 do not fit config\.json"), source.block(1):
        pass
