"""What the card says of weights that are stored in few bits."""

from __future__ import annotations

from hf_compress.report.metrics import Metrics
from hf_compress.report.stages import Quantization


def clause(metrics: Metrics) -> str:
    """Of the headline: the format, where there is one."""
    found = metrics.quantization
    return f"linear layers stored as {found.format}" if found else ""


def sentences(metrics: Metrics, source: str) -> list[str]:
    """How codes were chosen, and how near they come to what they stand for."""
    found = metrics.quantization
    if not found:
        return []
    lines = [
        f"Quantized: {found.weights:,} weights of linear layers in the blocks as `{found.format}`"
        f"{_scales(found)}, {8 * found.bytes / found.weights:.2f} bits each with their scales; "
        "embeddings and the head keep their dtype."
    ]
    if not found.calibrated:
        return [*lines, "Codes are rounded to nearest, as the format's own library does it."]
    how = "codes by error feedback (GPTQ and coordinate descent)"
    if found.effort == "best":
        how += ", then learned block by block together with scales, biases and norms"
    lines.append(f"Calibrated on {found.num_calibration_tokens:,} tokens of {source}: {how}.")
    if found.error is not None and found.error_nearest is not None:
        lines.append(
            f"Error of a layer's output in closed form, mean over layers: {found.error:.2g} of its "
            f"energy; rounded to nearest it would be {found.error_nearest:.2g}."
        )
    return lines


def _scales(found: Quantization) -> str:
    shared = f"a scale for {found.block_size} weights" if found.block_size else "a scale a row"
    return f" ({shared}{', stored in 8 bits' if found.double_quant else ''})"
