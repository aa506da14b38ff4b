"""Calibration: one pass over the decoder blocks that collects Gram matrices."""

from hf_compress.calibration.collect import calibrate, collect

__all__ = ["calibrate", "collect"]
