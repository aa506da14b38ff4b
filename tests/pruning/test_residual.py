"""A narrower residual stream, over every family that can have one, and who cannot."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_compress.pipeline as pipeline
import hf_compress.subject as subject
from hf_compress import compress
from hf_compress.calibration import collect_beside, collect_reads, survey_stream
from hf_compress.dry_run import describe
from hf_compress.errors import PlanError, RecipeError
from hf_compress.heterogeneous.config import check_plan
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.channels import NarrowSource, cut_channels, cut_skeleton
from hf_compress.model.families import FAMILIES, family_of
from hf_compress.model.parameters import count_parameters
from hf_compress.model.walk import Walk
from hf_compress.order import check_recipe
from hf_compress.plan import Plan, compose, load_plan
from hf_compress.pruning import (
    ChannelStreams,
    Templates,
    candidate_plans,
    check_settings,
    choose_channels,
    narrow_blocks,
)
from hf_compress.recipe import Prune, parse_recipe
from hf_compress.report import load_metrics
from hf_compress.statistics import StreamStatistics
from tests.model.test_surgery import require_the_same_when_loaded
from tests.tiny import VARIANTS, random_ids, tiny_model, tiny_text, tiny_tokenizer

ABLE = [name for name in VARIANTS if FAMILIES[name.split("-")[0]].narrows_stream]
UNABLE = [name for name in VARIANTS if name not in ABLE]
NARROW: dict[str, Any] = {"structures": ["residual_channels"], "round_to": 1}


def full_plan(model: PreTrainedModel, hidden_size: int) -> Plan:
    config = model.config
    widths = config.intermediate_size, config.num_key_value_heads
    plan = Plan.uniform(config.model_type, config.num_hidden_layers, *widths)
    return plan.model_copy(update={"hidden_size": hidden_size})


def narrowed(
    model: PreTrainedModel, kept_S: torch.Tensor, settings: Prune
) -> tuple[PreTrainedModel, Any]:
    """The model that `narrow_blocks` writes, and what it reports."""
    source, ids_NL = ModelInMemory(model), random_ids(24, 32)
    templates = Templates(source, full_plan(model, len(kept_S)))
    narrow = NarrowSource(source, templates.model, kept_S)
    probe = Walk(narrow, random_ids(2, 24))
    streams = ChannelStreams(
        Walk(source, ids_NL),
        Walk(narrow, ids_NL) if settings.corrects else None,
        collect_reads,
        partial(collect_beside, weighting="inverse_norm"),
    )
    state: dict[str, torch.Tensor] = {}
    reports = narrow_blocks(
        source,
        narrow,
        kept_S,
        templates,
        settings,
        streams=streams,
        probe=probe,
        write=state.__setitem__,
    )
    state |= narrow.skeleton().state_dict()
    smaller = AutoModelForCausalLM.from_config(templates.config, dtype=torch.float32).eval()
    smaller.load_state_dict(state)
    logits = torch.stack([probe.logits(index) for index in range(2)])
    torch.testing.assert_close(logits, smaller(random_ids(2, 24)).logits, rtol=1e-4, atol=1e-4)
    return smaller, reports


@pytest.mark.parametrize("variant", ABLE)
def test_keeping_all_channels_keeps_every_bit(variant: str) -> None:
    model = tiny_model(variant)
    source, everything = ModelInMemory(model), torch.arange(48)
    templates = Templates(source, full_plan(model, 48))
    state = cut_skeleton(source.skeleton(), templates.model, source.family, everything).state_dict()
    for index in range(2):
        with source.block(index) as block:
            cut = cut_channels(block, templates.block(index), source.family, everything)
        prefix = f"{source.family.layers}.{index}."
        state |= {prefix + name: value for name, value in cut.state_dict().items()}
    same = AutoModelForCausalLM.from_config(templates.config, dtype=torch.float32).eval()
    same.load_state_dict(state)
    ids = random_ids(2, 24)
    assert torch.equal(same(ids).logits, model(ids).logits)


@torch.no_grad()
def with_idle_channels(variant: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model whose stream is zero in an eighth of its channels, and the others."""
    model = tiny_model(variant)
    idle = torch.arange(5, 48, 8)
    model.get_input_embeddings().weight[:, idle] = 0
    family = family_of(model.config)
    for block in model.get_submodule(family.layers):
        for name in (family.attention_output, family.mlp_output):
            writer = block.get_submodule(name)
            writer.weight[idle] = 0
            if writer.bias is not None:
                writer.bias[idle] = 0
    return model, torch.tensor([index for index in range(48) if index not in idle.tolist()])


@pytest.mark.parametrize("variant", ABLE)
@pytest.mark.parametrize(
    "changes", [{}, {"recollect": False}, {"fold": False}], ids=["", "dense", "sliced"]
)
def test_idle_channels_are_found_and_removing_them_changes_nothing(
    variant: str, changes: dict[str, Any]
) -> None:
    model, busy = with_idle_channels(variant)
    settings = Prune(sparsity=0.1, **NARROW, **changes)
    seen = survey_stream(ModelInMemory(model), random_ids(24, 32))
    kept_S = choose_channels(seen, settings, 42)
    assert torch.equal(kept_S, busy)
    smaller, (reports, head) = narrowed(model, kept_S, settings)
    ids = random_ids(2, 24, seed=3)
    wanted, got = model(ids).logits, smaller(ids).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    for report in [head, *(r.mlp_input for r in reports), *(r.attention_input for r in reports)]:
        assert report.error < 1e-6


@pytest.mark.parametrize("variant", ABLE)
def test_folding_errs_less_and_comes_nearer_to_the_dense_model(variant: str) -> None:
    model, kept_S = tiny_model(variant), torch.arange(0, 48, 2)
    distances = {}
    for fold in (True, False):
        settings = Prune(sparsity=0.1, fold=fold, recollect=False, **NARROW)
        smaller, (reports, head) = narrowed(model, kept_S, settings)
        ids = random_ids(24, 32)
        distances[fold] = (smaller(ids).logits - model(ids).logits).square().mean().item()
        parts = [part for one in reports for part in (one.attention_input, one.mlp_input)]
        for part in [*parts, head]:
            assert (part.error < part.error_without_fold) == fold
            assert (part.damping is not None) == fold
    assert distances[True] < distances[False]


def test_channels_with_massive_activations_stay() -> None:
    model, _ = with_idle_channels("llama")
    seen = survey_stream(ModelInMemory(model), random_ids(24, 32))
    settings = Prune(sparsity=0.1, **NARROW)
    gone = sorted(set(range(48)) - set(choose_channels(seen, settings, 42).tolist()))
    peak_D = seen.peak_D.clone()
    peak_D[gone[0]] = 1e4
    marked = StreamStatistics(seen.gram_DD, seen.readers_DD, peak_D)
    kept = choose_channels(marked, settings, 42).tolist()
    assert gone[0] in kept
    assert len(kept) == 42
    with pytest.raises(RecipeError, match=r"48 channels.*massive activations.*leaves 42"):
        everywhere = StreamStatistics(seen.gram_DD, seen.readers_DD, torch.full_like(peak_D, 1e4))
        choose_channels(everywhere, settings, 42)


@torch.no_grad()
def test_a_massive_activation_of_one_token_is_seen() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight[7, 11] = 1e5
    ids = random_ids(8, 32)
    ids[3, 5] = 7
    peak_D = survey_stream(ModelInMemory(model), ids).peak_D
    assert peak_D.argmax() == 11
    assert (peak_D >= 1e4).sum() == 1


def recipe_for(folder: Path, stages: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """A recipe on tiny texts."""
    data = {}
    for name, seed, windows in (("calibration", 1, 32), ("evaluation", 2, 8)):
        (folder / f"{name}.txt").write_text(tiny_text(2500, seed))
        source = str(folder / f"{name}.txt")
        data[name] = {"source": source, "num_samples": windows, "max_seq_length": 32}
    return {
        "model": model,
        "output": str(folder / "out"),
        "data": {**data, "num_fitness_samples": 4},
        "stages": stages,
        "evaluate": {"speed": False},
    }


@pytest.mark.parametrize("variant", ABLE)
def test_a_whole_run_streamed_and_in_memory(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers reads a tokenizer by the family's own class, which this one is not of.
    monkeypatch.setattr(subject, "load_tokenizer", lambda *_: tiny_tokenizer())
    dense = tiny_model(variant)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    stage = {"stage": "prune", "sparsity": 0.2, **NARROW}
    recipe = recipe_for(tmp_path, [stage], str(tmp_path / "dense"))
    planned = "\n".join(describe(parse_recipe(recipe)))
    out = pipeline.run(parse_recipe(recipe))
    metrics, plan = load_metrics(out / "metrics.json"), load_plan(out / "plan.json")
    saved = AutoModelForCausalLM.from_pretrained(out).eval()
    assert saved.config.hidden_size == plan.hidden_size == saved.lm_head.weight.shape[1] < 48
    count = count_parameters(saved)
    assert (count.total, count.non_embedding) == (
        metrics.after.parameters,
        metrics.after.non_embedding_parameters,
    )
    assert f"{plan.hidden_size} channels of the residual stream: {count.total:,} param" in planned
    assert f"{metrics.removed_share:.1%} removed" in planned
    assert 0.2 <= metrics.removed_share < 0.25
    assert count.total - count.non_embedding < metrics.before.parameters - (
        metrics.before.non_embedding_parameters
    )
    assert metrics.verification and metrics.verification.relative_logit_error <= 1e-4
    assert metrics.verification.generated_tokens == 8
    assert (metrics.pruning.hidden_size_before, metrics.pruning.hidden_size) == (
        48,
        plan.hidden_size,
    )
    for layer in metrics.layers:
        assert layer.mlp_input_error < layer.mlp_input_error_without_fold
        assert layer.attention_input_error < layer.attention_input_error_without_fold
        assert layer.intermediate_size == layer.intermediate_size_before
    card = (out / "README.md").read_text()
    assert f"| Residual stream, channels | 48 | {plan.hidden_size} |" in card
    assert "channels, ranked by `wanda` over all layers" in card
    assert "criterion `wanda`" in card
    assert (out / "figures" / "errors.png").is_file()
    require_the_same_when_loaded(saved, tmp_path / "again")

    in_memory = {**recipe, "output": str(tmp_path / "memory")}
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    compress(dense, tiny_tokenizer(), in_memory)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    streamed, other = (
        load_file(tmp_path / f"{name}.work" / "prune" / "model.safetensors")
        for name in ("out", "memory")
    )
    assert streamed.keys() == other.keys()
    for name, value in streamed.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("variant", ABLE)
def test_left_padded_batches_generate_what_each_row_does(variant: str) -> None:
    settings = Prune(sparsity=0.1, **NARROW)
    smaller, _ = narrowed(tiny_model(variant), torch.arange(0, 48, 2), settings)
    rows = [random_ids(1, length, seed=length) for length in (9, 20)]
    ids, mask = torch.zeros(2, 2, 20, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, 20 - row.shape[1] :] = row
        mask[index, 20 - row.shape[1] :] = 1
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = smaller.generate(ids, attention_mask=mask, **how)[:, -6:]
    uncached = smaller.generate(ids, attention_mask=mask, use_cache=False, **how)[:, -6:]
    alone = [smaller.generate(row, attention_mask=torch.ones_like(row), **how) for row in rows]
    assert torch.equal(together, torch.cat([row[:, -6:] for row in alone]))
    assert torch.equal(together, uncached)


def test_correction_brings_the_stream_nearer_than_folding_alone() -> None:
    model, kept_S = tiny_model("mistral", num_hidden_layers=6), torch.arange(0, 48, 2)
    ids = random_ids(24, 32)
    distances = []
    for correction in (0.5, 0.0):
        settings = Prune(sparsity=0.1, correction=correction, **NARROW)
        smaller, _ = narrowed(model, kept_S, settings)
        distances.append((smaller(ids).logits - model(ids).logits).square().mean().item())
    assert distances[0] < distances[1]


def test_stages_in_a_row_cut_the_stream_and_the_rest(tmp_path: Path) -> None:
    rest = {"stage": "prune", "sparsity": 0.1, "round_to": 8}
    stream = {"stage": "prune", "sparsity": 0.2, **NARROW}
    for name, stages in (("first", [stream, rest]), ("last", [rest, {**stream, "rounds": 2}])):
        folder = tmp_path / name
        folder.mkdir()
        recipe = recipe_for(folder, stages, "tiny")
        smaller = compress(tiny_model("qwen2"), tiny_tokenizer(), recipe)
        plan = load_plan(folder / "out" / "plan.json")
        assert plan.hidden_size == smaller.config.hidden_size <= 40
        assert plan.widths.intermediate_size == smaller.config.intermediate_size < 96
        metrics = load_metrics(folder / "out" / "metrics.json")
        assert metrics.removed_share >= 1 - 0.9 * 0.8
        assert metrics.pruning.hidden_size == plan.hidden_size


def test_zeros_can_follow(tmp_path: Path) -> None:
    stages = [{"stage": "prune", "sparsity": 0.2, **NARROW}, {"stage": "sparsify", "sparsity": 0.5}]
    compress(tiny_model(), tiny_tokenizer(), recipe_for(tmp_path, stages, "tiny"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["zeroing"]["zeros"] >= 0.5 * metrics["zeroing"]["weights"]


def test_no_refit_after_the_stream_is_narrower(tmp_path: Path) -> None:
    refit, stream = {"stage": "refit"}, {"stage": "prune", "sparsity": 0.2, **NARROW}
    other = {"stage": "prune", "sparsity": 0.2}
    recipe = recipe_for(tmp_path, [other, stream, refit], "tiny")
    with pytest.raises(RecipeError, match=r"residual_channels\]; `refit`.*wider.*Leave"):
        check_recipe(parse_recipe(recipe))
    check_recipe(parse_recipe({**recipe, "stages": [other, refit, stream]}))


def test_off_by_default() -> None:
    assert "residual_channels" not in Prune(sparsity=0.2).structures


def test_other_structures_go_in_a_stage_of_their_own() -> None:
    settings = Prune(sparsity=0.2, structures=["mlp_neurons", "residual_channels"])
    with pytest.raises(RecipeError, match=r"beside mlp_neurons.*two prune stages in a row"):
        candidate_plans(tiny_model().config, settings)


def test_an_unknown_criterion_of_channels() -> None:
    settings = Prune(sparsity=0.2, channel_criterion="largest", **NARROW)
    with pytest.raises(RecipeError, match=r"channel_criterion 'largest'.*obs, wanda, magnitude"):
        check_settings(settings)


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
def test_every_criterion_finds_idle_channels(criterion: str) -> None:
    model, busy = with_idle_channels("mistral")
    seen = survey_stream(ModelInMemory(model), random_ids(24, 32))
    settings = Prune(sparsity=0.1, channel_criterion=criterion, **NARROW)
    assert torch.equal(choose_channels(seen, settings, 42), busy)


def test_nothing_can_be_ignored() -> None:
    settings = Prune(sparsity=0.2, ignore=["*.self_attn"], **NARROW)
    with pytest.raises(RecipeError, match=r"ignore \(\*\.self_attn\) cannot keep"):
        candidate_plans(tiny_model().config, settings)


@pytest.mark.parametrize("variant", UNABLE)
def test_other_families_keep_their_stream(variant: str) -> None:
    config = tiny_model(variant).config
    with pytest.raises(RecipeError, match=rf"{config.model_type} cannot be cut.*llama, mistral"):
        candidate_plans(config, Prune(sparsity=0.2, **NARROW))


def test_widths_are_those_a_native_class_can_have() -> None:
    def width(round_to: int, **fields: Any) -> int | None:
        common = {"vocab_size": 99, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
        config = AutoConfig.for_model("llama", hidden_size=144, **common, **heads, **fields)
        settings = Prune(sparsity=0.1, structures=["residual_channels"], round_to=round_to)
        (plan,) = candidate_plans(config, settings)
        return plan.hidden_size

    assert (width(1), width(16)) == (129, 128)  # a Mistral, whose heads need not divide it
    assert (width(1, attention_bias=True), width(4, attention_bias=True)) == (126, 108)
    with pytest.raises(
        RecipeError, match=r"round_to 64 leaves no width.*of 144.*llama with 9 heads"
    ):
        width(64, attention_bias=True)


def test_plans_say_how_wide_the_stream_is() -> None:
    dense = Plan.uniform("llama", 2, 96, 3)
    narrow = dense.model_copy(update={"hidden_size": 40})
    assert compose([narrow, dense]).hidden_size == 40
    assert compose([dense, narrow]).hidden_size == 40
    assert compose([narrow, narrow.model_copy(update={"hidden_size": 32})]).hidden_size == 32
    assert compose([dense, dense]).hidden_size is None
    with pytest.raises(PlanError, match=r"hidden_size=40, .*residual_channels"):
        check_plan(tiny_model("llama").config, narrow)
