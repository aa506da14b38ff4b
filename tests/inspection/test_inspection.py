"""An inspection finds what was planted, measures what the fold leaves, and changes nothing."""

from __future__ import annotations

import copy
import itertools
import struct
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_compress.calibration import collect
from hf_compress.errors import CompressionError, DataError, RecipeError
from hf_compress.inspection import (
    Inspection,
    check_targets,
    command,
    inspect_checkpoint,
    inspect_model,
    kept_neurons,
    table_lines,
    write_outputs,
)
from hf_compress.inspection.moments import pass_through
from hf_compress.inspection.redundancy import (
    duplicate_groups,
    effective_rank,
    held_out_errors,
    removable_neurons,
)
from hf_compress.inspection.table import spans
from hf_compress.model.blocks import ModelInMemory, StreamedCheckpoint, mlp_half
from hf_compress.model.families import Family
from hf_compress.model.surgery import Cut, Dimensions, cut_block, weight_of
from hf_compress.model.walk import Walk
from hf_compress.plan import Plan
from hf_compress.pruning import Templates
from hf_compress.regression.fold import Regression
from tests.tiny import COMMON, WITHOUT_EXPERTS, random_ids, tiny_model, tiny_text, tiny_tokenizer

WIDTH = COMMON["intermediate_size"]
PLANTED_DEAD = ([5, 17, 60], [2])
PLANTED_GROUPS = ([[1, 40], [8, 9, 70]], [[30, 31, 50, 95], [60, 61]])


def planted_model(variant: str) -> PreTrainedModel:
    """A tiny model with dead neurons and duplicates, other ones in each layer."""
    model = tiny_model(variant)
    family = ModelInMemory(model).family
    for index, (dead, groups) in enumerate(zip(PLANTED_DEAD, PLANTED_GROUPS, strict=True)):
        block = model.get_submodule(f"{family.layers}.{index}")
        *gate, up = neuron_rows(block, family)
        with torch.no_grad():
            for rows_NI in itertools.chain(*gate, up):
                for first, *others in groups:
                    rows_NI[others] = rows_NI[first].clone()
            for rows_NI in up:
                rows_NI[dead] = 0
                for number, (_, *others) in enumerate(groups):
                    if gate:
                        rows_NI[others] *= 0.5 - number  # the second group's are opposite
            if not gate:
                # What enters a nonlinearity cannot be scaled, what comes out of it can: the
                # OBS sweep takes 16 at a time, and no group shall go as a whole.
                gone = [*dead, *(other for _, *others in groups for other in others)]
                weight_of(block, family.mlp_output, family)[:, gone] *= 0.1
    return model


def neuron_rows(block: torch.nn.Module, family: Family) -> list[list[torch.Tensor]]:
    """Views of the weight (and bias) of the gate, if any, and of the up projection."""
    parts: list[list[torch.Tensor]] = []
    for name, segments in family.mlp_inputs.items():
        bias = block.get_submodule(name).bias
        tensors = [weight_of(block, name, family), *([] if bias is None else [bias])]
        chunks = zip(*(tensor.data.chunk(len(segments)) for tensor in tensors), strict=True)
        parts += [list(chunk) for chunk in chunks]
    return parts


def without_planted(model: PreTrainedModel, inspection: Inspection) -> PreTrainedModel:
    """A copy without the dead neurons and the duplicates; its layers differ in width."""
    source = ModelInMemory(model)
    family, dims = source.family, Dimensions.of(source.config)
    walk, pruned = Walk(source, random_ids(16, 64)), copy.deepcopy(model)
    layers = pruned.get_submodule(family.layers)
    for index, kept in enumerate(kept_neurons(inspection)):
        plan = Plan.uniform(source.config.model_type, 2, len(kept), dims.num_key_value_heads)
        with source.block(index) as block:
            moments = collect(walk, block, index, family.mlp_output, "none")
            walk.advance(block, index)
            weight_OI = weight_of(block, family.mlp_output, family).detach().double()
            problem = Regression.of_own_output(weight_OI, moments.gram.total_II)
            cut = Cut(kept, torch.arange(dims.num_key_value_heads), problem.on(kept).fold(1e-9))
            template = Templates(source, plan).block(index)
            layers[index] = cut_block(block, template, family, dims, cut)
    return pruned


@pytest.fixture(scope="module", params=WITHOUT_EXPERTS)
def planted(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Inspection]:
    model = planted_model(request.param)
    return model, inspect_model(ModelInMemory(model), random_ids(16, 64), name="tiny")


def test_what_was_planted_is_found_and_nothing_else(planted) -> None:
    _, inspection = planted
    assert [layer.dead_neurons for layer in inspection.layers] == list(PLANTED_DEAD)
    found = [[sorted(group) for group in at.duplicate_groups] for at in inspection.layers]
    assert found == list(PLANTED_GROUPS)
    assert [layer.num_duplicates for layer in inspection.layers] == [3, 4]
    assert [len(kept) for kept in kept_neurons(inspection)] == [WIDTH - 6, WIDTH - 5]


def test_pruning_exactly_the_planted_changes_no_logit(planted) -> None:
    model, inspection = planted
    pruned = without_planted(model, inspection)
    ids_NL = random_ids(8, 64, seed=1)
    with torch.no_grad():
        difference = (pruned(ids_NL).logits - model(ids_NL).logits).abs().max().item()
    assert difference < 1e-4
    family = ModelInMemory(model).family
    first = pruned.get_submodule(family.layers)[0]
    assert weight_of(first, family.mlp_output, family).shape[1] == WIDTH - 6


def test_the_planted_can_go_at_the_smallest_error(planted) -> None:
    _, inspection = planted
    for layer, kept in zip(inspection.layers, kept_neurons(inspection), strict=True):
        counts = [layer.removable_neurons[level] for level in inspection.error_levels]
        assert counts == sorted(counts)
        assert WIDTH - len(kept) <= counts[0] < counts[-1] < WIDTH


@pytest.mark.parametrize("variant", WITHOUT_EXPERTS)
def test_a_streamed_model_gives_the_same_and_the_model_is_not_changed(
    variant: str, tmp_path: Path
) -> None:
    model = tiny_model(variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    device = torch.device("cpu")
    streamed = StreamedCheckpoint(tmp_path, model.config, torch.float32, device)
    ids_NL = random_ids(6, 32)
    in_memory = inspect_model(ModelInMemory(model), ids_NL, batch_size=2)
    assert inspect_model(streamed, ids_NL, batch_size=2) == in_memory
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for layer in in_memory.layers:
        assert not layer.dead_neurons and not layer.duplicate_groups
        assert 1 < layer.mlp_effective_rank <= COMMON["hidden_size"]
        assert 1 < layer.attention_effective_rank <= COMMON["hidden_size"]


def test_every_width_has_the_error_of_its_fold() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    first, second = (mixing @ torch.randn(24, 60, generator=generator).double() for _ in range(2))
    grams = first @ first.T, second @ second.T
    fitted, held_out = (Regression.of_own_output(weight, gram) for gram in grams)
    order = torch.randperm(24, generator=generator)
    errors = held_out_errors(weight, *grams, order, 0.01)
    for gone in range(24):
        kept = order[gone:].sort().values
        expected = held_out.on(kept).error(fitted.on(kept).fold(0.01))
        assert errors[gone].item() == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert errors[24].item() == pytest.approx(held_out.energy)


def test_removable_neurons_stop_at_the_level() -> None:
    # Independent neurons of energies 1, 2, 3, 4: nothing can be folded, shares add up.
    gram = torch.eye(4, dtype=torch.float64)
    weight = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).sqrt())
    order = torch.arange(4)
    found = removable_neurons(weight, (gram, gram), order, (0.05, 0.11, 0.35, 0.61, 1.0))
    assert found == {0.05: 0, 0.11: 1, 0.35: 2, 0.61: 3, 1.0: 4}


def test_duplicates_are_of_centred_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 500, generator=generator, dtype=torch.float64)
    x[3] = 7 - 2 * x[0]  # opposite, around another mean
    x[4] = 5 + 0.1 * x[4]  # parallel to x[5] only by its mean
    x[5] = 5 + 0.1 * x[5]
    x[2] = 1  # constant
    centred = x - x.mean(1, keepdim=True)
    second_moment, energy = x.square().mean(1), torch.tensor([1.0, 1, 1, 9, 1, 1])
    covariance = centred @ centred.T / 500
    assert duplicate_groups(covariance, second_moment, energy, [], 0.95) == [[3, 0]]
    assert duplicate_groups(covariance, second_moment, energy, [3], 0.95) == []


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.diag(torch.tensor([2.0, 2, 2, 0, 0]))) == pytest.approx(3)
    assert effective_rank(torch.ones(5, 5)) == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 5)) == 0
    assert 1 < effective_rank(torch.diag(torch.tensor([1.0, 0.1]))) < 2


def test_the_covariance_is_that_of_the_weighted_activations() -> None:
    source = ModelInMemory(tiny_model())
    walk = Walk(source, random_ids(5, 16), batch_size=2)
    with source.block(0) as block:
        half = mlp_half(block, source.family)
        before = walk.hidden_NLD.clone()
        moments = pass_through(walk, half, 0, source.family.mlp_output)
        normed = block.post_attention_layernorm(before)
        inputs = block.mlp.act_fn(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)
    weight = 1 / walk.hidden_NLD.double().square().mean(-1).flatten()
    expected = torch.cov(inputs.detach().double().flatten(0, 1).T, aweights=weight, correction=0)
    torch.testing.assert_close(moments.covariance_II, expected, rtol=1e-4, atol=1e-6)


def test_massive_activations_are_found_in_their_channel() -> None:
    model = tiny_model("llama-tied-biased")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.bias[7] = 1e5
        model.model.layers[1].mlp.down_proj.bias[7] = -1e5
    inspection = inspect_model(ModelInMemory(model), random_ids(4, 16))
    first, second = (layer.massive_activations for layer in inspection.layers)
    assert first.channels == [7]
    assert first.num_entries == 4 * 16
    assert first.max_magnitude == pytest.approx(1e5, rel=1e-3)
    assert first.max_to_median > 1000
    assert not second.channels
    assert "massive activations after layer 0:" in "\n".join(table_lines(inspection))


def test_an_mlp_that_gives_nothing_can_go_whole() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    layer = inspect_model(ModelInMemory(model), random_ids(4, 16)).layers[1]
    assert layer.dead_neurons == list(range(WIDTH))
    assert set(layer.removable_neurons.values()) == {WIDTH}
    assert layer.mlp_effective_rank == 0


def test_the_table_is_aligned_and_says_what_was_found() -> None:
    inspection = inspect_model(
        ModelInMemory(planted_model("llama")), random_ids(8, 64), name="tiny"
    )
    lines = table_lines(inspection)
    rows = [line for line in lines if line.split()[:1] in (["layer"], ["0"], ["1"], ["all"])]
    assert len(rows) == 4
    # Channels, at the end, are a list; the column before them ends at one place.
    assert len({len(row.rsplit(maxsplit=1)[0]) for row in rows}) == 1
    assert all(len(line) < 80 and not line.strip().startswith("%") for line in lines)
    cells = {row.split()[0]: row.split() for row in rows}
    assert cells["0"][1:4] == ["3", "3", "2"]
    assert cells["all"][1:4] == ["4", "7", "4"]
    counts = [inspection.layers[0].removable_neurons[level] for level in inspection.error_levels]
    assert cells["0"][4:7] == [str(count) for count in counts]
    closing = " ".join(lines[lines.index("", lines.index(rows[-1]) + 2) + 1 :])
    assert closing.startswith("In short: ")
    assert "dead: 4, near-duplicates: 7" in closing


def test_runs_of_layers_are_drawn_together() -> None:
    assert spans([2, 4, 5, 11, 12, 13]) == "2, 4, 5, 11 to 13"


def test_a_checkpoint_becomes_a_picture_and_a_file_that_are_never_overwritten(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(2000, 1))
    png = check_targets(str(checkpoint), None, json := tmp_path / "found.json")
    assert png == Path("inspect-tiny-llama.png")
    inspection = inspect_checkpoint(
        str(checkpoint), source="text.txt", num_samples=4, max_seq_length=32
    )
    write_outputs(inspection, png, json)
    assert Inspection.model_validate_json(json.read_bytes()) == inspection
    assert (inspection.model, inspection.text) == ("tiny-llama", "text.txt")
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">I", header[16:20])[0] == 1200
    for targets in ((None, None), (tmp_path / "new.png", json)):
        with pytest.raises(RecipeError, match="exists and is not overwritten"):
            check_targets(str(checkpoint), *targets)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_samples": 1}, RecipeError, "2 or more"),
        ({"num_samples": 0}, RecipeError, "num_samples"),
        ({"duplicate_cosine": 1.5}, RecipeError, "1.5"),
        ({"dtype": "int8"}, RecipeError, "int8"),
        ({"source": "self"}, DataError, "self"),
        ({"source": "gone.txt"}, CompressionError, "gone.txt"),
    ],
)
def test_what_cannot_be_is_refused(checkpoint: Path, options, kind, message, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(400, 1))
    values = {"source": str(text), "max_seq_length": 16, **options}
    with pytest.raises(kind, match=message):
        inspect_checkpoint(str(checkpoint), **values)


@pytest.mark.parametrize(
    ("png", "json", "message"),
    [("a.png", "a.png", "both name"), ("no/a.png", None, "folder"), ("a.png", "no/a", "folder")],
)
def test_targets_that_cannot_be_written(tmp_path, png, json, message) -> None:
    with pytest.raises(RecipeError, match=message):
        check_targets("user/model", tmp_path / png, json and tmp_path / json)


def test_an_encoder_is_inspected_under_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text(tiny_text(800, 3))
    settings = {"source": str(tmp_path / "text.txt"), "num_samples": 8, "max_seq_length": 32}
    monkeypatch.setattr(command, "load_tokenizer", lambda *_: tiny_tokenizer())
    with pytest.raises(DataError, match="no mask token"):
        inspect_checkpoint(str(tmp_path / "bert"), **settings)
    with pytest.raises(DataError, match=r"300 tokens.*256 positions"):
        inspect_checkpoint(str(tmp_path / "bert"), **{**settings, "max_seq_length": 300})
    tokenizer = tiny_tokenizer(mask_token="w155")
    monkeypatch.setattr(command, "load_tokenizer", lambda *_: tokenizer)
    assert len(inspect_checkpoint(str(tmp_path / "bert"), **settings).layers) == 2
