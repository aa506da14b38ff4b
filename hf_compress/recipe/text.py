"""What a recipe says of its texts."""

from __future__ import annotations

from pydantic import Field

from hf_compress.recipe.strict import Strict


class TextSource(Strict):
    """Where text comes from and how it is cut into windows of token ids."""

    source: str = "self"
    """`self` (sampled from the model), `python-docs` (the English text that ships with
    Python), a local .txt, .jsonl, .jsonl.gz or .parquet file, or a Hub dataset id. The
    Python API writes `texts` here for texts that it was handed."""
    name: str | None = None
    """Configuration of the Hub dataset, such as `wikitext-2-raw-v1`."""
    split: str = "train"
    """Split of the Hub dataset."""
    column: str = "text"
    """Column that holds the text; with `chat_template`, the list of messages."""
    num_samples: int = Field(128, ge=1)
    """Number of windows."""
    max_seq_length: int = Field(512, ge=8)
    """Tokens in a window."""
    chat_template: bool = False
    """Pass documents through the tokenizer's chat template."""


class Evaluation(TextSource):
    """Text on which the report measures; it is never calibrated on."""

    source: str = "python-docs"
    num_samples: int = Field(48, ge=1)


class Data(Strict):
    calibration: TextSource = TextSource()
    evaluation: Evaluation = Evaluation()
    num_fitness_samples: int = Field(8, ge=1)
    """Windows from the calibration source, disjoint from those used for calibration, on
    which choices (such as neurons against KV groups) are compared; 48 for a `search` over
    layers."""
