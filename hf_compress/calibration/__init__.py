"""Calibration: one pass over the decoder blocks that collects Gram matrices."""

from hf_compress.calibration.channels import collect_reads, survey_stream
from hf_compress.calibration.collect import calibrate, collect, collect_beside, warn_if_few_tokens
from hf_compress.calibration.expert_neurons import (
    collect_expert_neurons,
    neuron_bytes,
    warn_if_experts_get_few,
)
from hf_compress.calibration.experts import collect_experts
from hf_compress.calibration.sublayers import SublayerStreams, input_norms

__all__ = [
    "SublayerStreams",
    "calibrate",
    "collect",
    "collect_beside",
    "collect_expert_neurons",
    "collect_experts",
    "collect_reads",
    "input_norms",
    "neuron_bytes",
    "survey_stream",
    "warn_if_experts_get_few",
    "warn_if_few_tokens",
]
