"""How the card speaks of what a model predicts: the next token, or masked ones."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.report.metrics import Comparison


@dataclass(frozen=True)
class Wording:
    """Words for one kind of model."""

    perplexity: str
    pipeline_tag: str
    _measured: str
    caveat: str

    def measured(self, comparison: Comparison, source: str) -> str:
        """One sentence: on how much of what text the numbers were measured."""
        windows = (
            f"({comparison.num_windows:,} windows of at most {comparison.max_seq_length:,}) "
            f"of {source}"
        )
        return self._measured.format(tokens=f"{comparison.num_tokens:,}", windows=windows)


WORDINGS: dict[str, Wording] = {
    "next": Wording(
        perplexity="perplexity",
        pipeline_tag="text-generation",
        _measured="Perplexity and KL were measured on {tokens} tokens {windows}.",
        caveat="Perplexity only says so much: it does not tell whether the model still follows "
        "instructions, reasons, or refuses what it should. Measure your own task before use.",
    ),
    "masked": Wording(
        perplexity="masked-token perplexity",
        pipeline_tag="fill-mask",
        _measured="Masked-token perplexity is that of {tokens} tokens {windows}; they were "
        "drawn at random, the same for both models, and masked together. (A pseudo-perplexity "
        "masks one token at a time.) KL is the mean over all positions.",
        caveat="Masked-token perplexity only says so much: it does not tell what the model is "
        "worth once it is trained on a task. Measure your own task before use.",
    ),
}
"""By what `Comparison.predicts` says."""
