"""What a recipe leaves alone is left alone, or the recipe is refused."""

from __future__ import annotations

import pytest

from hf_compress.errors import RecipeError
from hf_compress.model.families import family_of
from hf_compress.pruning import candidate_plans, protected_layers
from hf_compress.pruning.ignore import find_ignored
from hf_compress.recipe import Prune
from tests.tiny import VARIANTS, tiny_model

LAYERS = {"num_hidden_layers": 12}


def settings(*ignore: str, structures: tuple[str, ...] = ("mlp_neurons", "kv_groups")) -> Prune:
    return Prune(sparsity=0.2, structures=list(structures), ignore=list(ignore), round_to=8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_of_a_family_can_be_ignored(variant: str) -> None:
    model = tiny_model(variant)
    family = family_of(model.config)
    for part in ("attention", "mlp"):
        other = {"attention": "mlp", "mlp": "attention"}[part]
        name = f"{family.layers}.1.{getattr(family, part)}"
        inside = f"{family.layers}.1.{getattr(family, part + '_output')}"
        if part == "mlp" and family.experts:
            inside = f"{family.layers}.1.{family.experts.module}"
        patterns = [inside]
        if family.cuts_heads:  # or it has no module of its own for each part
            patterns += [name, f"re:.*\\.1\\.{getattr(family, part)}$"]
        for pattern in patterns:
            found = find_ignored(model, [pattern])
            assert found.layers == found.widths[part] == {1}
            assert found.widths[other] == set()


@pytest.mark.parametrize(
    ("pattern", "layers", "widths"),
    [
        ("model.layers.1", {1}, set()),
        ("model.layers.1.*", {1}, {1}),
        ("model.layers.1*", {1, 10, 11}, {1, 10, 11}),
        ("re:model.layers.1", {1, 10, 11}, {1, 10, 11}),
        ("re:model.layers.1$", {1}, set()),
        ("*.input_layernorm", set(range(12)), set()),
        ("lm_head", set(), set()),
    ],
)
def test_what_a_pattern_protects(pattern: str, layers: set[int], widths: set[int]) -> None:
    found = find_ignored(tiny_model("llama", **LAYERS), [pattern])
    assert found.layers == layers
    assert found.widths == {"attention": widths, "mlp": widths}


def test_ignoring_all_attention_leaves_it_as_it_is() -> None:
    config = tiny_model("llama", **LAYERS).config
    plans = candidate_plans(config, settings("*.self_attn"))
    assert plans == candidate_plans(config, settings(structures=("mlp_neurons",)))
    assert len(candidate_plans(config, settings())) > 1


def test_ignoring_the_mlp_keeps_experts() -> None:
    config = tiny_model("qwen3_moe-dense-first", num_hidden_layers=6).config
    structures = ("experts", "kv_groups")
    settings_of = {
        pattern: Prune(sparsity=0.03, structures=list(structures), ignore=[pattern])
        for pattern in ("*.mlp", "model.layers.0.mlp", "model.layers.3.mlp")
    }
    assert all(
        plan.widths.num_experts == 6 for plan in candidate_plans(config, settings_of["*.mlp"])
    )
    # The first layer has none anyway.
    free = Prune(sparsity=0.03, structures=list(structures))
    assert candidate_plans(config, settings_of["model.layers.0.mlp"]) == candidate_plans(
        config, free
    )
    with pytest.raises(RecipeError, match=r"mlp of layer 3 wider.*take experts out"):
        candidate_plans(config, settings_of["model.layers.3.mlp"])


def test_ignoring_layers_keeps_them_from_being_dropped() -> None:
    config = tiny_model("llama", num_hidden_layers=6).config
    kept = settings("model.layers.[0-3]", structures=("layers", "mlp_neurons"))
    assert protected_layers(config, kept) == {0, 1, 2, 3}
    assert min(len(plan.layers) for plan in candidate_plans(config, kept)) >= 4
    only = Prune(sparsity=0.4, structures=["layers"], ignore=["model.layers.[0-3]"])
    with pytest.raises(RecipeError, match=r"ignore model\.layers\.\[0-3\].*at most 0\.33"):
        candidate_plans(config, only)


@pytest.mark.parametrize(
    ("ignore", "structures", "words"),
    [
        ("model.layers.3.mlp", ("mlp_neurons",), "mlp of layer 3 wider.*one width"),
        ("model.layers.1?.self_attn", ("kv_groups",), "attention of layers 10, 11 wider"),
        ("model.layers.3.*", ("query_heads", "layers"), "attention of layer 3 wider"),
        ("*.mlp", ("mlp_neurons",), "nothing of structures mlp_neurons"),
        ("model.layers.*", ("layers",), "nothing of structures layers"),
        ("model.layers.3", ("mlp_neurons",), r"layer 3 from being dropped.*layers\.3\.\*"),
        ("model.layer.3", ("layers",), r"'model.layer.3' matches no module.*model\.layers\.0,"),
        ("re:model.(", ("layers",), "no regular expression"),
    ],
)
def test_what_cannot_be_kept_is_one_clear_error(
    ignore: str, structures: tuple[str, ...], words: str
) -> None:
    config = tiny_model("llama", **LAYERS).config
    with pytest.raises(RecipeError, match=words):
        candidate_plans(config, settings(ignore, structures=structures))
