"""The peer is what its authors describe: enough goes, and biases stand for what went."""

from __future__ import annotations

import pytest
import torch

from benchmarks import flap
from hf_compress.evaluation import measure_divergence
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.divergence import next_tokens
from tests.tiny import random_ids, tiny_model


@pytest.mark.parametrize("variant", ["llama", "llama-tied-biased", "qwen2"])
def test_enough_goes_and_the_model_stays_as_it_is(variant: str) -> None:
    source = ModelInMemory(tiny_model(variant))
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    pruned = flap.FlapSource(source, random_ids(16, 32), 0.3)
    assert 0.3 <= pruned.removed_share < 0.36
    assert measure_divergence(source, pruned, next_tokens(random_ids(8, 32, seed=1))).kl[0] > 0
    after = source.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_bias_stands_for_inputs_that_never_vary() -> None:
    torch.manual_seed(0)
    inputs_TI = torch.randn(64, 12)
    gone_I = torch.arange(12) % 3 == 0
    inputs_TI[:, gone_I] = torch.randn(4)
    linear = torch.nn.Linear(12, 5).requires_grad_(False)
    expected_TO = linear(inputs_TI)
    flap._remove(linear, gone_I, inputs_TI.double().mean(0))
    assert (linear.weight[:, gone_I] == 0).all()
    torch.testing.assert_close(linear(inputs_TI), expected_TO)
