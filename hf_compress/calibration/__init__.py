"""Calibration: one pass over the decoder blocks that collects Gram matrices."""

from hf_compress.calibration.collect import calibrate, collect, collect_beside, warn_if_few_tokens

__all__ = ["calibrate", "collect", "collect_beside", "warn_if_few_tokens"]
