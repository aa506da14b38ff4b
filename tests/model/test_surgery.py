"""Invariants of the cut, over every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_compress.errors import ModelError
from hf_compress.model.blocks import ModelInMemory, StreamedCheckpoint
from hf_compress.model.families import FAMILIES, family_of, native_config
from hf_compress.model.parameters import count_parameters
from hf_compress.model.surgery import Cut, Dimensions, cut_block, weight_of
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan
from hf_compress.pruning import Templates
from tests.tiny import CUTS_HEADS, VARIANTS, random_ids, tiny_model

CAUSAL = [variant for variant in VARIANTS if not FAMILIES[variant.split("-")[0]].masked]
NEURONS = torch.arange(0, 96, 3)
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
):
    source = ModelInMemory(model)
    dims = Dimensions.of(model.config)
    per_group = None if heads is None else len(heads) // len(groups)
    plan = Plan.uniform(model.config.model_type, 2, len(neurons), len(groups), per_group)
    templates = Templates(source, plan)
    state = dict(Walk(source, random_ids(1, 8)).skeleton.state_dict())
    for index in range(2):
        with source.block(index) as block:
            cut = cut_block(
                block,
                templates.block(index),
                source.family,
                dims,
                Cut(neurons, groups, heads=heads),
            )
        state |= {
            f"{source.family.layers}.{index}.{name}": value
            for name, value in cut.state_dict().items()
        }
    auto_class = source.family.auto_class
    pruned = auto_class.from_config(templates.config, dtype=torch.float32).eval()
    pruned.load_state_dict(state, strict=False)
    pruned.tie_weights()
    return pruned


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel, ids: torch.Tensor, heads: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the dense model, the columns of what is cut set to zero."""
    family, dims = family_of(model.config), Dimensions.of(model.config)
    kept_heads = Cut(NEURONS, kept_groups(model), heads=heads).query_columns(dims)
    for block in model.get_submodule(family.layers):
        for name, kept in ((family.mlp_output, NEURONS), (family.attention_output, kept_heads)):
            weight_OI = weight_of(block, name, family)
            mask_I = torch.zeros(weight_OI.shape[1])
            mask_I[kept] = 1
            weight_OI.mul_(mask_I)
    return model(ids).logits


def test_every_family_has_a_tiny_model() -> None:
    assert {variant.split("-")[0] for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_keeping_everything_is_bit_equal(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(2, 24)
    groups = torch.arange(Dimensions.of(model.config).num_key_value_heads)
    kept = cut_model(model, torch.arange(96), groups)
    assert torch.equal(kept(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cutting_equals_masking(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(2, 24)
    cut = cut_model(model, NEURONS, kept_groups(model))
    logits = cut(ids).logits
    torch.testing.assert_close(logits, masked_logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", CUTS_HEADS)
@torch.no_grad()
def test_cutting_query_heads_equals_masking_them(variant: str, tmp_path: Path) -> None:
    model, ids = tiny_model(variant, **FOUR_HEADS_A_GROUP), random_ids(2, 24)
    heads = torch.tensor([1, 3, 8, 9])  # of the first and the last of three groups of four
    assert native_config(model.config, len(NEURONS), 2, 2) is not None
    cut = cut_model(model, NEURONS, torch.tensor([0, 2]), heads)
    assert (cut.config.num_attention_heads, cut.config.num_key_value_heads) == (4, 2)
    logits = cut(ids).logits
    expected = masked_logits(model, ids, heads)
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
    with pytest.raises(ModelError, match=r"'mamba'.*gemma3_text.*llama, mistral"):
        family_of(config)


def test_a_streamed_block_has_the_weights_of_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama-tied-biased")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    source = StreamedCheckpoint(tmp_path, model.config, torch.float32, torch.device("cpu"))
    with source.block(1) as block:
        expected = model.model.layers[1].state_dict()
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
