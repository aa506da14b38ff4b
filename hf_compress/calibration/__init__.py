"""Calibration: one pass over the decoder blocks that collects Gram matrices."""

from hf_compress.calibration.collect import calibrate, collect, collect_beside, warn_if_few_tokens
from hf_compress.calibration.experts import collect_experts

__all__ = ["calibrate", "collect", "collect_beside", "collect_experts", "warn_if_few_tokens"]
