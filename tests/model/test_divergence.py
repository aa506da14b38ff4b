"""What is measured of a model is what the model itself would say."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from hf_compress.data.masking import masked_tokens
from hf_compress.evaluation import measure_divergence
from hf_compress.model.blocks import ModelInMemory
from hf_compress.model.divergence import UNASKED, Questions, next_tokens
from tests.tiny import random_ids, tiny_model, tiny_tokenizer


def questions(variant: str) -> Questions:
    if variant == "bert":
        return masked_tokens(random_ids(3, 80), tiny_tokenizer(mask_token="w155"), seed=0)
    return next_tokens(random_ids(3, 80))


@pytest.mark.parametrize(("variant", "positions"), [("llama", 79), ("bert", 80)])
@torch.no_grad()
def test_nll_and_kl_are_those_of_the_logits(variant: str, positions: int) -> None:
    reference, other = tiny_model(variant), tiny_model(variant, seed=1)
    asked = questions(variant)
    found = measure_divergence(ModelInMemory(reference), ModelInMemory(other), asked)
    assert asked.targets_NP.shape == (3, positions)
    logs = [
        model(asked.ids_NL).logits[:, :positions].log_softmax(-1) for model in (reference, other)
    ]
    for window, targets_P in enumerate(asked.targets_NP):
        p, q = (log[window] for log in logs)
        for nll_N, log in ((found.reference_nll_N, p), (found.nll_N, q)):
            expected = cross_entropy(log, targets_P, ignore_index=UNASKED)
            assert nll_N[window].item() == pytest.approx(expected.item(), rel=1e-4)
        kl = kl_div(q, p, log_target=True, reduction="sum") / positions
        assert found.kl_N[window].item() == pytest.approx(kl.item(), rel=1e-3)
