"""Models whose layers differ behave as any model of the library does, over every family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_compress.heterogeneous import modeling_hfc_layers
from hf_compress.heterogeneous.auto import STEMS, auto_map
from hf_compress.model.families import family_of
from hf_compress.model.parameters import count_parameters, kv_bytes_per_token
from hf_compress.plan import Plan
from tests.heterogeneous.differing import (
    ABLE,
    LAYERS,
    WHOLE,
    cut_to,
    dense_model,
    differing_model,
    differing_plan,
    masked,
)
from tests.tiny import random_ids

NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("variant", ABLE)
@torch.no_grad()
def test_cutting_is_masking(variant: str) -> None:
    dense, plan, ids = dense_model(variant), differing_plan(variant), random_ids(2, 24)
    smaller = cut_to(dense, plan)
    assert smaller.config.model_type == f"hfc_{dense.config.model_type}"
    expected = masked(dense, plan)(ids).logits
    torch.testing.assert_close(smaller(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ABLE)
@torch.no_grad()
def test_the_same_widths_everywhere_are_the_dense_model_bit_by_bit(variant: str) -> None:
    dense, ids = dense_model(variant), random_ids(2, 24)
    native = cut_to(dense, differing_plan(variant, [WHOLE] * 4))
    assert type(native) is type(dense)
    values = {**dense.config.to_dict(), "head_dim": 8}
    del values["model_type"]
    config = AutoConfig.for_model(f"hfc_{dense.config.model_type}", **values)
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert type(ours).__name__.startswith("HFC")
    ours.load_state_dict(dense.state_dict())
    for model in (native, ours):
        assert torch.equal(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("variant", ABLE)
def test_what_is_left_out_is_not_stored(variant: str) -> None:
    model = differing_model(variant)
    names = [name for name, _ in model.named_parameters()]
    dense = dict(dense_model(variant).named_parameters())
    assert not any("layers.2.mlp" in name or "layers.3.self_attn" in name for name in names)
    gone = {name for name in dense if name not in names}
    norms = sum("norm" in name for name in gone)
    # A norm before each sub-layer, and in Gemma one behind it as well.
    inside = sum("layers.3.self_attn" in name and "norm" in name for name in gone)
    assert norms - inside == (4 if variant == "gemma3_text" else 2)


@pytest.mark.parametrize("variant", ABLE)
@torch.no_grad()
def test_the_cache_holds_as_much_as_is_counted(variant: str) -> None:
    model, ids = differing_model(variant), random_ids(3, 12)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    values = sum(tensor.numel() for tensor in held if tensor is not None)
    assert values == ids.numel() * kv_bytes_per_token(model.config, 1)
    count = count_parameters(model)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())


def continued(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **how: Any) -> Any:
    return model.generate(ids, attention_mask=mask, **NEW, **how)[:, -8:]


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, length - row.shape[1] :] = row
        mask[index, length - row.shape[1] :] = 1
    return ids, mask


ROWS = [random_ids(1, length, seed=length) for length in (9, 20, 14)]


@pytest.mark.parametrize("variant", ABLE)
def test_every_cache_generates_the_same_and_padding_changes_nothing(variant: str) -> None:
    model = differing_model(variant)
    ids, mask = left_padded(ROWS)
    expected = continued(model, ids, mask, use_cache=False)
    for kind in ("dynamic", "static"):
        assert torch.equal(continued(model, ids, mask, cache_implementation=kind), expected), kind
    alone = [continued(model, row, torch.ones_like(row)) for row in ROWS]
    assert torch.equal(torch.cat(alone), expected)


FIRST = [("llama", 0), ("gemma3_text", 0), ("gemma3_text", 1)]


@pytest.mark.parametrize(("variant", "layer"), FIRST)
def test_the_first_of_each_layer_type_needs_its_attention(
    variant: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it is refused; where this fails one day, the library can do it."""
    skips = WHOLE.model_copy(update={"skip": ("attention",)})
    layers = [skips if index == layer else WHOLE for index in range(4)]
    with pytest.raises(Exception, match="cached decoding would be silently wrong"):
        differing_plan(variant, layers).check(
            variant, 4, 96, 3, layer_types=["sliding", "full"] * 2 if "gemma" in variant else None
        )
    config = dense_model(variant).config
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}

    def built() -> PreTrainedModel:
        config = AutoConfig.for_model(
            f"hfc_{variant}", **values, per_layer_config={layer: {"skip": ["attention"]}}
        )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    with pytest.raises(Exception, match=rf"layer {layer} skips attention.*silently wrong"):
        built()
    monkeypatch.setattr(modeling_hfc_layers, "attention_that_stays", lambda *_: [])
    model = built()
    ids, mask = left_padded(ROWS)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
        positions = mask.sum(-1, keepdim=True) - 1
        last = model(
            ids[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits[:, -1]
        whole = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        ).logits[:, -1]
    assert not torch.allclose(last, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ABLE)
def test_gradient_checkpointing_gives_the_same_gradients(variant: str) -> None:
    ids, gradients = random_ids(2, 16), []
    for checkpointing in (False, True):
        model = differing_model(variant).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("variant", ABLE)
def test_the_trainer_trains_every_layer(variant: str, tmp_path: Path) -> None:
    model = differing_model(variant)
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 16)]
    Trainer(model, arguments, train_dataset=rows).train()
    unchanged = [name for name, value in model.named_parameters() if value.equal(before[name])]
    assert not unchanged


@pytest.mark.parametrize("variant", ABLE)
@torch.no_grad()
def test_saved_again_it_stays_the_same(variant: str, tmp_path: Path) -> None:
    model, ids = differing_model(variant), random_ids(2, 24)
    for name in ("once", "twice"):
        folder = tmp_path / name
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        kind = model.config.model_type.removeprefix("hfc_")
        assert config["auto_map"] == auto_map(kind)
        assert {path.name for path in folder.glob("*.py")} == {
            f"modeling_hfc_{kind}.py",
            "modeling_hfc_layers.py",
        }
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        model = loaded
    body = AutoModel.from_pretrained(tmp_path / "twice").eval()
    assert torch.equal(body(ids)[0], model.model(ids)[0])


# PEFT's own use of the library, and not ours.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("variant", ABLE)
def test_adapters_attach(variant: str) -> None:
    model, ids = differing_model(variant), random_ids(2, 16)
    family = family_of(model.config)
    outputs = [family.attention_output.split(".")[-1], family.mlp_output.split(".")[-1]]
    before = model(ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=outputs, task_type="CAUSAL_LM"))
    assert torch.equal(adapted(ids).logits, before)
    adapted(input_ids=ids, labels=ids).loss.backward()
    learning = [name for name, value in adapted.named_parameters() if value.grad is not None]
    # Two matrices for each output layer that is there: all but one of each.
    assert len(learning) == 2 * (4 + 4 - 2)


@pytest.mark.parametrize("variant", ABLE)
@torch.no_grad()
def test_another_attention_reaches_every_layer(variant: str) -> None:
    model, ids = differing_model(variant), random_ids(2, 16)
    assert model.config._attn_implementation == "sdpa"
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    found = model(ids, output_attentions=True)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    # Only eager attention gives its weights: heads of every layer that has attention.
    assert [weights.shape[1] for weights in found.attentions] == [12, 8, 6]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"skip": ["attn"]}, r"layer 2 skips \['attn'\]; known: \['attention', 'mlp'\]"),
        ({"num_attention_heads": 5}, "layer 2 has 5 query heads, which 3 KV heads do not divide"),
    ],
)
def test_an_impossible_entry_is_refused(entry: dict[str, Any], reason: str) -> None:
    values = {**dense_model("llama").config.to_dict(), "per_layer_config": {2: entry}}
    del values["model_type"]
    with pytest.raises(Exception, match=reason):
        AutoConfig.for_model("hfc_llama", **values)


FRESH = """
import json, sys
{first}
from transformers import {auto}
import torch
found = dict()
for folder in sys.argv[1:]:
    model = {auto}.from_pretrained(folder{flag}).eval()
    ids = torch.load(folder + "/ids.pt")
    found[folder] = [type(model).__name__, model(ids, use_cache=False)[0].double().sum().item()]
print("RESULT", json.dumps(found), "hf_compress" in sys.modules)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    """A model of every family, by the folder where it was saved."""
    models = {}
    for kind in STEMS:
        folder = tmp_path_factory.mktemp(kind)
        models[str(folder)] = differing_model(kind)
        models[str(folder)].save_pretrained(folder)
        torch.save(random_ids(2, 12), folder / "ids.pt")
    return models


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
@pytest.mark.parametrize(
    ("first", "flag", "has_package"),
    [
        ("", ", trust_remote_code=True", False),
        ("import hf_compress", "", True),
        ("import transformers.models.auto; import hf_compress", "", True),
        ("import hf_compress; assert not {'torch', 'transformers'} & set(sys.modules)", "", True),
    ],
)
def test_it_loads_in_a_fresh_process(
    saved: dict[str, PreTrainedModel],
    first: str,
    flag: str,
    has_package: bool,
    auto: str,
    tmp_path: Path,
) -> None:
    script = tmp_path / "load.py"
    script.write_text(FRESH.format(first=first, flag=flag, auto=auto))
    root = str(Path(__file__).parents[2]) if has_package else ""
    run = subprocess.run(
        [sys.executable, str(script), *saved],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    words = run.stdout.split("RESULT ")[1].rsplit(" ", 1)
    assert words[1].strip() == str(has_package)
    found = json.loads(words[0])
    for folder, model in saved.items():
        body = model if auto == "AutoModelForCausalLM" else model.model
        ids = torch.load(f"{folder}/ids.pt")
        name, total = found[folder]
        assert name == type(body).__name__
        assert total == pytest.approx(body(ids)[0].double().sum().item(), rel=1e-6)


def test_without_the_flag_and_without_the_package_it_is_refused(
    saved: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    script = tmp_path / "load.py"
    script.write_text(FRESH.format(first="", flag="", auto="AutoModelForCausalLM"))
    run = subprocess.run(
        [sys.executable, str(script), *saved],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)},
        check=False,
    )
    assert run.returncode != 0
    assert "trust_remote_code=True" in run.stderr


def test_planned_layers_are_those_of_the_configuration() -> None:
    plan = Plan(model_type="llama", layers=LAYERS)
    entries = cut_to(dense_model("llama"), plan).config.to_dict()["per_layer_config"]
    assert entries == {
        "0": {"intermediate_size": 32},
        "1": {"num_key_value_heads": 2, "num_attention_heads": 8},
        "2": {"num_key_value_heads": 2, "num_attention_heads": 6, "skip": ["mlp"]},
        "3": {"intermediate_size": 64, "skip": ["attention"]},
    }
