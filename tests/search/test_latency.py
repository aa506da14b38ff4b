"""The latency table: timed once, kept, and sensible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_compress.search import latency
from hf_compress.search.costs import count_costs, with_latencies
from hf_compress.search.latency import Setting, measure_latencies
from hf_compress.search.space import Space
from tests.tiny import tiny_model

NAMES = ("prefill_latency", "decode_latency")


def test_timed_once_and_never_faster_for_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    config = tiny_model("llama", num_hidden_layers=4).config
    structures = ("mlp_neurons", "kv_groups", "attention_sublayers", "mlp_sublayers")
    space = Space.of(config, structures, 8)
    args = config, space, torch.float32, torch.device("cpu"), Setting(2, 16)
    found = measure_latencies(*args)
    for name in NAMES:
        assert found.dense[name] > 0
        for kind, whole in (("attention", 3), ("mlp", 96)):
            changes = [found.change(name, kind, level) for level in range(whole + 1)]
            assert changes == sorted(changes)
            assert changes[-1] == 0

    def again(*_: object) -> None:
        raise AssertionError("was timed before")

    monkeypatch.setattr(latency, "_Timer", again)
    assert measure_latencies(*args) == found
    with pytest.raises(AssertionError, match="timed before"):
        measure_latencies(*args[:-1], Setting(1, 16))


def test_latencies_are_costs_like_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    config = tiny_model("qwen3", num_hidden_layers=4).config
    space = Space.of(config, ("mlp_neurons",), 32)
    counted = count_costs(config, space, torch.float32, 16)
    cpu = torch.device("cpu")
    found = measure_latencies(config, space, torch.float32, cpu, Setting(1, 16))
    costs = with_latencies(counted, found)
    assert costs.total("parameters", space.dense) == counted.dense["parameters"]
    narrow = (*space.dense[:1], 0, *space.dense[2:])
    for name in NAMES:
        expected = found.dense[name] + found.change(name, "mlp", 32)
        assert costs.total(name, narrow) == pytest.approx(expected)
