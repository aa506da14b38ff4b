"""Structured pruning with folding (criteria, OBS, folding, the cut of a whole model), and
single weights (masks, criteria, layer shares, a whole model)."""

from hf_compress.pruning.allocation import candidate_plans
from hf_compress.pruning.channels import choose_channels, narrows
from hf_compress.pruning.criteria import CRITERIA
from hf_compress.pruning.depth import Drop, most_passes, settle_layers
from hf_compress.pruning.experts import EXPERT_CRITERIA
from hf_compress.pruning.ignore import kept_sublayers, protected_layers
from hf_compress.pruning.reports import BlockReport, OutputReport
from hf_compress.pruning.residual import ChannelStreams, narrow_blocks
from hf_compress.pruning.rounds import round_sparsities
from hf_compress.pruning.streams import Streams
from hf_compress.pruning.structured import (
    Candidate,
    check_settings,
    compare_splits,
    prune_blocks,
)
from hf_compress.pruning.sublayers import num_lacking, settle_sublayers
from hf_compress.pruning.templates import Templates, planned_config

__all__ = [
    "CRITERIA",
    "EXPERT_CRITERIA",
    "BlockReport",
    "Candidate",
    "ChannelStreams",
    "Drop",
    "OutputReport",
    "Streams",
    "Templates",
    "candidate_plans",
    "check_settings",
    "choose_channels",
    "compare_splits",
    "kept_sublayers",
    "most_passes",
    "narrow_blocks",
    "narrows",
    "num_lacking",
    "planned_config",
    "protected_layers",
    "prune_blocks",
    "round_sparsities",
    "settle_layers",
    "settle_sublayers",
]
