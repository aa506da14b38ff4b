"""README.md of the compressed checkpoint, and the closing lines for the terminal.

Numbers become text here and nowhere else; the template only says in which order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_compress.errors import RecipeError
from hf_compress.report import experts, quantized, searched, stream, whole
from hf_compress.report.candidates import candidate_fields, choice
from hf_compress.report.metrics import Metrics
from hf_compress.report.plots import mlp_widths, plot_errors, plot_widths
from hf_compress.report.units import duration, in_bytes, in_parameters
from hf_compress.report.wording import WORDINGS, ZEROS_ALONE, Wording, distilled, refitted, zeroed

TEMPLATE = Path(__file__).with_name("templates") / "card.md.jinja"
WIDTHS_PNG, ERRORS_PNG = "figures/widths.png", "figures/errors.png"


class Row(NamedTuple):
    """A line of the before/after table, as text."""

    name: str
    before: str
    after: str
    change: str


def write_card(
    metrics: Metrics,
    recipe_yaml: str,
    folder: str | Path,
    *,
    license: str | None = None,
    base_model_id: str | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write README.md and its plots (`figures/*.png`) into a checkpoint's folder.

    Args:
        metrics: what the run measured.
        recipe_yaml: the resolved recipe; the card quotes it unchanged.
        folder: the checkpoint; made if it does not exist.
        license: the licence of the base model, as `lineage.license_of` returns it.
        base_model_id: Hub id of the dense model or of what it was made from, if known.
        tags: tags for the Hub, on top of the usual ones.

    Returns:
        The path of README.md.

    Raises:
        RecipeError: `base_model_id` cannot be the id of a model on the Hub.
    """
    folder = Path(folder)
    data = _metadata(metrics, license, base_model_id, tags)
    widths = plot_widths(metrics, folder / WIDTHS_PNG)
    errors = plot_errors(metrics, folder / ERRORS_PNG)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        metrics=metrics,
        pipeline_tag=data.pipeline_tag,
        title=metrics.base_model.rstrip("/").split("/")[-1],
        base_model_id=base_model_id,
        headline=headline(metrics),
        rows=[Row(*map(_cell, row)) for row in table(metrics)],
        mlp_units=mlp_widths(metrics.layers)[0],
        widths_png=WIDTHS_PNG if widths else "",
        errors_png=ERRORS_PNG if errors else "",
        how=_how(metrics),
        candidates=_candidate_rows(metrics),
        candidate_columns=[column for _, column, _ in candidate_fields(metrics)],
        choice=choice(metrics),
        limits=_limits(metrics),
        versions=_versions(metrics),
        recipe_yaml=recipe_yaml,
        fence=_fence(recipe_yaml),
    )
    path = folder / "README.md"
    card.save(path)
    return path


def summary_lines(metrics: Metrics) -> list[str]:
    """The conclusion and an aligned table, line by line, for the terminal."""
    rows = [Row("", "before", "after", "change"), *table(metrics)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row.name:<{widths[0]}}  {row.before:>{widths[1]}}  {row.after:>{widths[2]}}  "
        f"{row.change}".rstrip()
        for row in rows
    ]
    return [headline(metrics), "", *lines]


def headline(metrics: Metrics) -> str:
    """One sentence: what was removed, what it cost, what it gained."""
    before, after = metrics.before, metrics.after
    share = metrics.removed_share
    done = [f"{_percent(share)} of the non-embedding parameters removed"] if share > 0 else []
    done += [clause] if (clause := quantized.clause(metrics)) else []
    what = " and ".join(done) or "No parameters removed"
    gains = [
        f"{_wording(metrics).perplexity} {_perplexity(before.perplexity)} -> "
        f"{_perplexity(after.perplexity)} ({_perplexity_verdict(metrics)})"
    ]
    speed = before.decode_tokens_per_second, after.decode_tokens_per_second
    if speed[0] is not None and speed[1] is not None:
        gains.append(f"decode {_faster(speed[1] / speed[0])}")
    gains.append(f"weights {in_bytes(before.weight_bytes)} -> {in_bytes(after.weight_bytes)}")
    return f"{what[0].upper()}{what[1:]}: {', '.join(gains)}."


def table(metrics: Metrics) -> list[Row]:
    """The before/after table; rows of what was not measured are left out."""
    before, after = metrics.before, metrics.after
    kl = _with_error(metrics.comparison.kl, metrics.comparison.kl_standard_error)
    rows = [
        _count_row("Parameters", before.parameters, after.parameters, in_parameters),
        _count_row(
            "Non-embedding parameters",
            before.non_embedding_parameters,
            after.non_embedding_parameters,
            in_parameters,
        ),
        _count_row("Weights on disk", before.weight_bytes, after.weight_bytes, in_bytes),
        *(
            _count_row("Residual stream, channels", *counts, "{:,}".format)
            for counts in stream.widths(metrics)
        ),
        *_kv_rows(before.kv_bytes_per_token, after.kv_bytes_per_token),
        *(
            _count_row("Experts, all layers", *counts, "{:,}".format)
            for counts in experts.counts(metrics)
        ),
        *(
            _count_row("Neurons of each expert", *counts, "{:,}".format)
            for counts in experts.widths(metrics)
        ),
        Row(
            f"{_wording(metrics).perplexity.capitalize()}, held-out text",
            _perplexity(before.perplexity),
            _perplexity(after.perplexity),
            _perplexity_verdict(metrics),
        ),
        Row("KL to the dense model", "0", kl, "nats per token"),
    ]
    for name, was, now in (
        ("Prefill", before.prefill_tokens_per_second, after.prefill_tokens_per_second),
        ("Decode", before.decode_tokens_per_second, after.decode_tokens_per_second),
    ):
        if was is not None and now is not None:
            rows.append(Row(f"{name}, tokens/s", _number(was), _number(now), _faster(now / was)))
    return rows


def _kv_rows(before: int, after: int) -> list[Row]:
    """An encoder has no cache to speak of."""
    return [_count_row("KV cache per token", before, after, in_bytes)] if before else []


def _wording(metrics: Metrics) -> Wording:
    return WORDINGS[metrics.comparison.predicts]


def _metadata(
    metrics: Metrics, license: str | None, base_model_id: str | None, tags: Sequence[str]
) -> ModelCardData:
    if base_model_id is not None:
        try:
            validate_repo_id(base_model_id)
        except HFValidationError as error:
            raise RecipeError(
                f"{base_model_id!r} cannot be the id of a base model on the Hub ({error}); "
                "leave it out for a model from a folder"
            ) from error
    usual = ["hf_compress", "compressed", *(["pruning"] if metrics.pruning else [])]
    usual += ["quantization", metrics.quantization.format.lower()] if metrics.quantization else []
    # The Hub knows adapter, merge, quantized and finetune; a pruned model is none of them.
    only_quantized = metrics.quantization and not (metrics.pruning or metrics.zeroing)
    relation = "quantized" if base_model_id and only_quantized else None
    return ModelCardData(
        base_model=base_model_id,
        base_model_relation=relation,
        library_name="transformers",
        pipeline_tag=_wording(metrics).pipeline_tag,
        license=license,
        tags=[*usual, *tags],
    )


def _versions(metrics: Metrics) -> dict[str, str]:
    others = {name: number for name, number in metrics.versions.items() if name != "hf-compress"}
    return {"hf_compress": metrics.hf_compress_version, **others}


def _how(metrics: Metrics) -> list[str]:
    """Sentences on how the checkpoint came about."""
    lines = []
    pruning, verification = metrics.pruning, metrics.verification
    if pruning:
        folded = (
            "what was removed is folded into what is kept, by least squares"
            if pruning.fold
            else "what was removed is simply dropped (no folding)"
        )
        asked = f"Asked for {_percent(pruning.sparsity_requested)}, removed"
        removed = "Removed" if pruning.search else asked
        lines.append(
            f"Structured pruning, criterion `{pruning.criterion}`; {folded}. {removed} "
            f"{_percent(pruning.sparsity_achieved)} of the non-embedding parameters."
        )
        lines += searched.sentences(metrics)
        lines += experts.sentences(metrics) + stream.sentences(metrics)
        lines += whole.sentences(metrics)
        lines.append(
            f"Calibration: {pruning.num_calibration_tokens:,} tokens of "
            f"{_source(metrics.comparison.calibration_source)}."
        )
    if metrics.zeroing:
        lines.append(zeroed(metrics.zeroing, _source(metrics.comparison.calibration_source)))
    if metrics.refit:
        lines.append(refitted(metrics.refit))
    if metrics.distillation:
        lines.append(distilled(metrics.distillation))
    lines += quantized.sentences(metrics, _source(metrics.comparison.calibration_source))
    if verification:
        error, generated = verification.relative_logit_error, verification.generated_tokens
        distance = f"the same logits to within {error:.2g}" if error else "exactly the same logits"
        lines.append(
            f"Verified: the saved checkpoint, loaded in a fresh process, gives {distance} as the "
            f"model in memory (tolerance {verification.tolerance:g})"
            + (f", and generated {generated} tokens." if generated else ".")
        )
    cost = [f"{stage} {duration(spent)}" for stage, spent in metrics.seconds.items()]
    if metrics.peak_memory_bytes is not None:
        cost.append(f"peak memory {in_bytes(metrics.peak_memory_bytes)}")
    if cost:
        lines.append(f"Cost on {metrics.device}: {', '.join(cost)}.")
    return lines


def _limits(metrics: Metrics) -> list[str]:
    """What the numbers do not say; each only where it applies."""
    comparison = metrics.comparison
    lines = [_significance(metrics)]
    wording, source = _wording(metrics), _source(comparison.evaluation_source)
    lines.append(
        f"{wording.measured(comparison, source)} Other text, other languages and longer "
        "contexts may lose more."
    )
    if comparison.evaluation_source == comparison.calibration_source:
        lines.append(
            "Calibration used other windows of the same text, so these figures flatter the "
            "compressed model."
        )
    lines.append(wording.caveat)
    if metrics.zeroing:
        lines.append(ZEROS_ALONE)
    if metrics.after.decode_tokens_per_second or metrics.after.prefill_tokens_per_second:
        lines.append(
            f"Speed was measured once, on {metrics.device}, without an error bar. It differs on "
            "other hardware and at other batch sizes."
        )
    return lines


def _significance(metrics: Metrics) -> str:
    comparison = metrics.comparison
    difference = comparison.log_perplexity_difference
    error = comparison.log_perplexity_difference_standard_error
    name = _wording(metrics).perplexity
    measured = (
        f"log {name} changed by {difference:+.4f} ± {error:.4f} nats per token "
        "(one standard error, paired over windows)"
    )
    if comparison.is_significant:
        low, high = metrics.perplexity_ratio_range
        return (
            f"The difference is real on this text: {measured}, which puts the perplexity ratio "
            f"between {_ratio(low)} and {_ratio(high)} (two standard errors)."
        )
    return (
        f"No difference in {name} can be claimed: {measured}, and a difference under two "
        "standard errors is no difference."
    )


def _candidate_rows(metrics: Metrics) -> list[list[str]]:
    candidates = metrics.pruning.candidates if metrics.pruning else []
    return [
        [
            *(f"{getattr(one, name):,}" for name, _, _ in candidate_fields(metrics)),
            _with_error(one.kl, one.kl_standard_error),
            "**chosen**" if one.chosen else "",
        ]
        for one in candidates
    ]


def _count_row(name: str, before: int, after: int, unit: Callable[[float], str]) -> Row:
    return Row(name, unit(before), unit(after), _change(before, after))


def _perplexity_verdict(metrics: Metrics) -> str:
    if metrics.comparison.is_significant:
        return _ratio(metrics.perplexity_ratio)
    return "unchanged" if metrics.comparison.is_equal else "no measurable difference"


def _with_error(value: float, error: float) -> str:
    """A value with its standard error, which gets two significant digits."""
    if error == 0:
        return f"{value:.3g}"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 8)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _change(before: float, after: float) -> str:
    if before == after:
        return "unchanged"
    if before == 0:
        return ""
    percent = 100 * (after / before - 1)
    return f"{percent:+.1f} %" if abs(percent) >= 0.05 else f"{percent:+.1g} %"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ratio(ratio: float) -> str:
    return f"{ratio:.3f}x" if abs(ratio - 1) < 0.02 else f"{_number(ratio)}x"


def _faster(ratio: float) -> str:
    if round(ratio, 2) == 1:
        return "equally fast"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def _number(value: float) -> str:
    """Three significant digits, never an exponent below a million."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 100 else _number(value)


def _source(name: str) -> str:
    known = {
        "self": "text that the model itself wrote",
        "texts": "texts handed over from Python",
        "python-docs": "the Python documentation",
    }
    return known.get(name, f"`{name}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fence(text: str) -> str:
    """A code fence that no line of `text` can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)
