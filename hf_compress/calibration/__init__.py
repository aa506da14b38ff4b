"""Calibration: one pass over the decoder blocks that collects Gram matrices."""

from hf_compress.calibration.channels import collect_reads, survey_stream
from hf_compress.calibration.collect import calibrate, collect, collect_beside, warn_if_few_tokens
from hf_compress.calibration.experts import collect_experts
from hf_compress.calibration.sublayers import SublayerStreams, input_norms

__all__ = [
    "SublayerStreams",
    "calibrate",
    "collect",
    "collect_beside",
    "collect_experts",
    "collect_reads",
    "input_norms",
    "survey_stream",
    "warn_if_few_tokens",
]
