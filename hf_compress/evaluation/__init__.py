"""Measuring a compressed model against the dense one: text and speed."""

from hf_compress.evaluation.speed import Speed, measure_speeds
from hf_compress.evaluation.text import measure_divergence

__all__ = ["Speed", "measure_divergence", "measure_speeds"]
