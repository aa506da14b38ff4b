"""How the card speaks of what a model predicts (the next token, or masked ones), and of zeros."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.report.metrics import Comparison
from hf_compress.report.stages import Distilled, Refitted, Zeroing


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

ZEROS_ALONE = (
    "Zeros are stored and multiplied like any other number: by themselves they make this "
    "checkpoint no smaller and no faster in stock runtimes. Only kernels or compressors made for "
    "sparse weights gain from them."
)


def zeroed(zeroing: Zeroing, source: str) -> str:
    """One sentence: which single weights became zero, and how."""
    text, tokens = "no calibration text", zeroing.num_calibration_tokens
    if tokens:
        text = f"{tokens:,} tokens of {source}"
    rest = "what is left was fitted by least squares" if zeroing.refit else "no refit of the rest"
    return (
        f"Single weights: {100 * zeroing.zeros / zeroing.weights:.1f} % of the "
        f"{zeroing.weights:,} weights of linear layers in the blocks became zero (pattern "
        f"{zeroing.pattern}, shared out {zeroing.allocation}), criterion `{zeroing.criterion}`, "
        f"on {text}; {rest}."
    )


def refitted(refit: Refitted) -> str:
    """A sentence on what training block by block did."""
    return (
        f"Refitted block by block on the calibration text ({refit.epochs} epochs, each block on "
        f"its own output error): KL on fitness text {refit.kl_before:.3f} -> {refit.kl_after:.3f}"
        f"{'' if refit.kept else ', which was not kept'}."
    )


def distilled(training: Distilled) -> str:
    """One line about `stage: distill`."""
    loss = training.loss.replace("_", " ").replace("kl", "KL")
    if training.cross_entropy == 1:
        loss = "cross-entropy"
    elif training.cross_entropy:
        loss += f" with {training.cross_entropy:.0%} cross-entropy"
    teacher = f"`{training.teacher}`" if training.teacher else "the dense model"
    how = "all weights" if training.method == "full" else "adapters, merged"
    return (
        f"Distilled from {teacher} on {training.tokens:,} tokens of the calibration source "
        f"({loss}; {how}; {training.minutes:.0f} min): KL on fitness text "
        f"{training.kl_before:.3f} -> {training.kl_after:.3f}"
        f"{'' if training.kept else ', which was not kept'}."
    )
