"""Which tokens a masked language model is asked for."""

from __future__ import annotations

import pytest
import torch

from hf_compress.data.masking import masked_tokens
from hf_compress.errors import DataError
from hf_compress.model.divergence import UNASKED
from tests.tiny import random_ids, tiny_tokenizer

TOKENIZER = tiny_tokenizer(mask_token="w155")


def test_the_same_number_is_masked_in_every_window_and_asked_for() -> None:
    ids_NL = random_ids(6, 40)
    asked = masked_tokens(ids_NL, TOKENIZER, seed=3)
    changed_NL = asked.ids_NL != ids_NL
    assert changed_NL.sum(-1).tolist() == [6] * 6
    assert (asked.ids_NL[changed_NL] == TOKENIZER.mask_token_id).all()
    assert torch.equal(asked.targets_NP, ids_NL.where(changed_NL, UNASKED))
    assert asked.num_tokens == 36


def test_the_seed_decides_which() -> None:
    ids_NL = random_ids(6, 40)
    first, again, other = (masked_tokens(ids_NL, TOKENIZER, seed).ids_NL for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_special_tokens_are_never_masked() -> None:
    ids_NL = random_ids(4, 40)
    ids_NL[:, 6:] = TOKENIZER.bos_token_id
    asked = masked_tokens(ids_NL, TOKENIZER, seed=0)
    assert (asked.targets_NP[:, :6] != UNASKED).all()
    assert (asked.ids_NL[:, 6:] == TOKENIZER.bos_token_id).all()


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(DataError, match="no mask token"):
        masked_tokens(random_ids(2, 40), tiny_tokenizer(), seed=0)
    ids_NL = random_ids(2, 40)
    ids_NL[1, 3:] = TOKENIZER.bos_token_id
    with pytest.raises(DataError, match=r"only 3 tokens .* and 6 are to be masked"):
        masked_tokens(ids_NL, TOKENIZER, seed=0)
