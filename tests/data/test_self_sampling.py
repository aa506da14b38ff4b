"""The seed alone decides what the model writes, and windows always reach their length."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_compress.data.self_sampling import DOCUMENT_LENGTH, sample_windows
from hf_compress.errors import DataError, ModelError

NUM_WORDS = 200


def word_tokenizer(bos=False):
    words = ["<s>", "</s>", "a", *(f"w{number}" for number in range(NUM_WORDS - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<special>"], special_tokens=True)
    return tokenizer


PLAIN, WITH_BOS = word_tokenizer(), word_tokenizer(bos=True)


def tiny_llama(vocab_size=NUM_WORDS + 56, scale=0.3):
    """Its vocabulary is larger than the tokenizer's, as those of published models are."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=scale,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def sample(model, seed=0, tokenizer=PLAIN, num=10, length=24, burn_in=0, **settings):
    settings["burn_in"] = burn_in
    return sample_windows(model, tokenizer, num, length, seed, progress=False, **settings)


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
@pytest.mark.parametrize("length", [1, 2, 3, 24])
def test_shape_type_and_vocabulary(model, tokenizer, length):
    ids = sample(model, tokenizer=tokenizer, num=33, length=length)
    assert ids.shape == (33, length)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < len(tokenizer) < model.config.vocab_size


def test_the_seed_decides_everything_and_the_global_state_nothing(model):
    torch.manual_seed(1)
    first = sample(model)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(sample(model), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(state, before)
    assert not torch.equal(sample(model, seed=1), first)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_the_batch_size_does_not_change_the_text(model, batch_size):
    assert torch.equal(sample(model, batch_size=batch_size), sample(model, batch_size=4))


def test_all_windows_differ_from_their_first_token_on(model):
    ids = sample(model, num=NUM_WORDS - 2, length=4)
    assert ids[:, 0].unique().numel() == len(ids)
    special = set(PLAIN.all_special_ids) | {PLAIN.convert_tokens_to_ids("<special>")}
    assert not special & set(ids[:, 0].tolist())
    more = sample(model, num=2 * NUM_WORDS, length=24)
    assert len({tuple(row) for row in more.tolist()}) == len(more)


def test_bos_comes_first_and_only_where_the_tokenizer_adds_it(model):
    with_bos = sample(model, tokenizer=WITH_BOS)
    assert (with_bos[:, 0] == WITH_BOS.bos_token_id).all()
    assert with_bos[:, 1].unique().numel() == len(with_bos)
    assert (sample(model)[:, 0] != PLAIN.bos_token_id).all()


def test_the_burn_in_is_written_and_dropped(model):
    whole = sample(model, num=6, length=24)
    assert torch.equal(sample(model, num=6, length=19, burn_in=5), whole[:, 5:])
    with_bos = sample(model, tokenizer=WITH_BOS, num=6, length=25)
    dropped = sample(model, tokenizer=WITH_BOS, num=6, length=20, burn_in=5)
    assert (dropped[:, 0] == WITH_BOS.bos_token_id).all()
    assert torch.equal(dropped[:, 1:], with_bos[:, 6:])


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
def test_long_windows_are_packed_with_documents(model, tokenizer):
    ids = sample(model, tokenizer=tokenizer, num=3, length=300)
    assert ids.shape == (3, 300)
    bos = int(tokenizer is WITH_BOS)
    bodies = ids[:, bos:]
    starts = bodies[:, ::DOCUMENT_LENGTH]
    assert starts.unique().numel() == starts.numel() == 9
    alone = sample(model, tokenizer=tokenizer, num=9, length=DOCUMENT_LENGTH + bos)[:, bos:]
    assert torch.equal(bodies[:, :DOCUMENT_LENGTH], alone[::3])
    assert torch.equal(bodies[:, 256:], alone[2::3, : 300 - bos - 256])


def test_windows_go_on_after_eos():
    model = tiny_llama()
    with torch.no_grad():
        # One direction of the residual stream that leads to EOS.
        model.lm_head.weight[1] *= 3
    ids = sample(model, num=64, length=32)
    after_eos = ids[:, :-1] == PLAIN.eos_token_id
    assert after_eos.any()
    assert (ids[:, 1:][after_eos] != PLAIN.eos_token_id).any()


def test_the_text_follows_the_distribution_of_the_model(model):
    ids = torch.cat([sample(model, seed=s, num=1000, length=2, batch_size=500) for s in range(8)])
    with torch.no_grad():
        logits = model(ids[:, :1]).logits[:, 0, : len(PLAIN)]
    expected = logits.softmax(-1).sum(0)
    counts = torch.bincount(ids[:, 1], minlength=len(PLAIN))
    # The variance of a sum of indicators is at most its mean.
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 2).all()
    # The model prefers some tokens clearly, or this would show nothing.
    assert expected.max() > 4 * expected.mean()


def test_the_cache_changes_nothing(model):
    """At a low temperature the text is the greedy one of a full forward pass."""
    ids = sample(model, temperature=1e-4)
    with torch.no_grad():
        greedy = model(ids).logits[:, :-1, : len(PLAIN)].argmax(-1)
    assert torch.equal(ids[:, 1:], greedy)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_nothing_requires_grad(training):
    model = tiny_llama().train(training)
    ids = sample(model)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert not ids.requires_grad


def test_the_mode_is_restored_after_a_failure():
    model = tiny_llama().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not all finite"):
        sample(model)
    assert model.training


def test_half_precision_is_sampled_in_single_precision():
    ids = sample(tiny_llama().to(torch.bfloat16), num=64)
    assert ids.unique().numel() > NUM_WORDS / 2


@pytest.mark.parametrize(
    "settings",
    [{"num": 0}, {"length": 0}, {"batch_size": 0}, {"temperature": 0.0}, {"burn_in": -1}],
)
def test_arguments_out_of_range_are_named(model, settings):
    (name, value), *_ = settings.items()
    with pytest.raises(DataError, match=f"{name}={value}"):
        sample(model, **settings)


def test_progress_counts_tokens_and_is_cleared(model, capsys):
    sample_windows(model, PLAIN, 4, 8, 0, progress=True)
    shown = capsys.readouterr().err
    assert "tok/s" in shown
    assert shown.endswith("\r")
    sample(model)
    assert capsys.readouterr().err == ""
