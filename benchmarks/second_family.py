"""Train a small Qwen2 for the benchmark's second family: `python -m benchmarks.second_family`.

Unlike the benchmark's Llama it has biases in q, k and v. It and its tokenizer are trained from
scratch on local text, without a network; the same seed and number of threads, the same model.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.smollm2 import is_complete
from hf_compress.checkpoint import staging
from hf_compress.data.sources import read_documents
from hf_compress.errors import CompressionError, DataError, ModelError
from hf_compress.recipe import TextSource

TEXT = "../shared/data/brown-train.jsonl.gz"
HELD_OUT_EVERY = 20
"""Every twentieth document is not trained on; perplexity is measured on those."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the model that the command line describes; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        prepare(arguments)
    except CompressionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run, with every default filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_family", description=__doc__)
    parser.add_argument("--text", default=TEXT, help="file, folder or Hub dataset to train on")
    parser.add_argument("--output", type=Path, default=Path(".cache/tiny-qwen2"), help="folder")
    for name, default, text in (
        ("steps", 3000, "optimizer steps"),
        ("batch-size", 2, "windows in a step"),
        ("max-seq-length", 256, "tokens in a window"),
        ("vocab-size", 4096, "tokens that the tokenizer knows, at most"),
        ("seed", 0, "of the weights and the batches"),
        ("hidden-size", 192, "a multiple of 16"),
        ("num-hidden-layers", 6, "decoder layers"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.hidden_size % 16:  # eight heads, each of even width
        parser.error("--steps has to be at least 1, and --hidden-size a multiple of 16")
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """Train the tokenizer and the model, and write both to `arguments.output`.

    A complete folder is left as it is, whatever settings it was made with. Raises
    ModelError where the folder holds something else, DataError for text that cannot be used.
    """
    if is_complete(output := arguments.output):
        print(f"{output} is complete")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(
            f"{output} exists and holds no complete model; remove it or name another folder"
        )
    texts, held_out = read_texts(arguments.text)
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    windows_NL = pack(texts, tokenizer, arguments.max_seq_length)
    held_out_NL = pack(held_out, tokenizer, arguments.max_seq_length)
    model = initial_model(arguments, len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {windows_NL.numel():,} tokens to train on")
    train_loss, held_out_loss = train(model, windows_NL, held_out_NL, arguments)
    with staging(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(
        f"train loss {train_loss:.3f} (entropy of single tokens {entropy(windows_NL):.3f}), "
        f"held-out perplexity {math.exp(held_out_loss):.1f}; wrote {output}"
    )


def read_texts(source: str) -> tuple[list[str], list[str]]:
    """The documents of a text source to train on, and those held out.

    Raises DataError where the source cannot be read, or is not two plain texts or more.
    """
    documents = list(read_documents(TextSource(source=source)))
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < max(2, len(documents)):
        raise DataError(
            f"{source!r} holds {len(documents)} documents, {len(texts)} of them plain text; "
            "to train on, give two or more plain texts, as JSON lines with the key `text`"
        )
    rest = [text for index, text in enumerate(texts) if index % HELD_OUT_EVERY]
    return rest, texts[::HELD_OUT_EVERY]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; it knows all 256 bytes, so any NFC text decodes to itself.

    It splits words as Qwen2 does: AutoTokenizer does so beside a Qwen2, whatever was saved.
    """
    return Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """The texts one after the other, EOS behind each, int64 [N, length]; no padding.

    Raises DataError where the tokens do not fill one window.
    """
    ids: list[int] = []
    for encoded in tokenizer(texts, verbose=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    if len(ids) < length:
        raise DataError(
            f"{len(texts)} documents give {len(ids)} tokens, and a window takes {length}; add text"
        )
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def initial_model(arguments: argparse.Namespace, vocab_size: int) -> Qwen2ForCausalLM:
    """The untrained model, float32; the seed decides its weights."""
    set_seed(arguments.seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=arguments.max_seq_length,
        tie_word_embeddings=True,
        eos_token_id=0,  # the tokenizer's special tokens come first
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Qwen2ForCausalLM,
    windows_NL: torch.Tensor,
    held_out_NL: torch.Tensor,
    arguments: argparse.Namespace,
) -> tuple[float, float]:
    """Train in place; returns the loss over the last steps and the held-out loss, nats a token."""
    with tempfile.TemporaryDirectory(prefix="second-family-") as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,  # a share of the steps, as is the next
            logging_steps=0.05,
            weight_decay=0.1,
            adam_beta2=0.95,
            seed=arguments.seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        rows, held_out = (
            [{"input_ids": ids_L, "labels": ids_L} for ids_L in ids_NL]
            for ids_NL in (windows_NL, held_out_NL)
        )
        trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=held_out)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses[-1], trainer.evaluate()["eval_loss"]


def entropy(windows_NL: torch.Tensor) -> float:
    """Entropy of single tokens in nats: the loss of a model that sees no context."""
    counts = windows_NL.unique(return_counts=True)[1].double()
    return float(torch.distributions.Categorical(probs=counts).entropy())


if __name__ == "__main__":
    sys.exit(main())
