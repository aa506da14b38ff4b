"""Latencies of every level, measured on the device: the table that budgets in seconds need.

Models of a few random blocks are timed at some widths of each kind of sub-layer, the other kind
whole; between the widths time is interpolated. As many blocks are stacked as it takes for their
weights not to fit into a processor's cache, where the real model's do not either. All models
take turns, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from hf_compress.model.blocks import meta_model
from hf_compress.model.families import family_of
from hf_compress.model.parameters import block_sizes
from hf_compress.plan import LayerPlan, Plan
from hf_compress.pruning.templates import planned_config
from hf_compress.search.space import Kind, Space, layer_at, stack, whole_layer
from hf_compress.workspace import digest, versions

CACHE_BYTES = 512e6
"""More than a processor keeps near."""
FEWEST_BLOCKS = 4
ROUNDS = 7
DECODE_STEPS = 4
WIDTHS = 5
"""Widths of an MLP that are timed, evenly spread."""


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        batch_size: sequences at once.
        context: tokens of the prompt, or in the cache while decoding.
    """

    batch_size: int
    context: int


@dataclass(frozen=True)
class Latencies:
    """Seconds.

    Attributes:
        dense: of the dense model, by `prefill_latency` and `decode_latency`.
        layer: of one of its layers.
        changes: by name, kind and level, what one sub-layer costs more than the dense one.
    """

    dense: dict[str, float]
    layer: dict[str, float]
    changes: dict[str, dict[Kind, dict[int, float]]]

    def change(self, name: str, kind: Kind, level: int) -> float:
        """Interpolated between the levels that were timed."""
        known = self.changes[name][kind]
        levels = sorted(known)
        return float(np.interp(level, levels, [known[at] for at in levels]))


def measure_latencies(
    config: PretrainedConfig,
    space: Space,
    dtype: torch.dtype,
    device: torch.device,
    setting: Setting,
) -> Latencies:
    """Time every kind of sub-layer, unless the same was timed on this machine before."""
    file = _cache_file(config, space, dtype, device, setting)
    if file.is_file():
        return _read(file)
    found = _Timer(config, dtype, device, setting).table(space)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
    partial.replace(file)
    return found


class _Timer:
    """Times stacks of blocks."""

    def __init__(
        self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, setting: Setting
    ) -> None:
        self._config, self._dtype, self._device, self._setting = config, dtype, device, setting
        self._whole = whole_layer(config)
        block = block_sizes(meta_model(config, dtype), family_of(config))[0] * dtype.itemsize
        enough = max(FEWEST_BLOCKS, -(-int(CACHE_BYTES) // block))
        self._blocks = min(config.num_hidden_layers, enough)

    def table(self, space: Space) -> Latencies:
        """All levels of interest beside the dense blocks."""
        blocks = self._model([self._whole] * self._blocks)
        dense, layer = self._dense(blocks)
        changes: dict[str, dict[Kind, dict[int, float]]] = {
            name: {"attention": {}, "mlp": {}} for name in dense
        }
        levels = [(kind, level) for kind in ("attention", "mlp") for level in _timed(space, kind)]
        for kind, level in tqdm(levels, desc="latency", unit="width"):
            for name, change in self._change(blocks, kind, level).items():
                changes[name][kind][level] = change
        for of_kinds in changes.values():
            for kind, of_levels in of_kinds.items():
                of_kinds[kind] = _falling(of_levels)
        return Latencies(dense, layer, changes)

    def _dense(self, blocks: PreTrainedModel) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of the dense model (its blocks, and all that is not in a block), and of one
        block."""
        one = self._model([self._whole])
        full = self._model([self._whole], vocabulary=True)
        rounds = self._in_turns([blocks, one, full])
        dense, layer = {}, {}
        for name, (of_blocks, of_one, of_full) in rounds.items():
            layer[name] = (median(of_blocks) - median(of_one)) / (self._blocks - 1)
            dense[name] = median(of_full) + (self._config.num_hidden_layers - 1) * layer[name]
        return dense, layer

    def _change(self, blocks: PreTrainedModel, kind: Kind, level: int) -> dict[str, float]:
        """What one sub-layer at a level costs more than the dense one, from the ratio of times
        that were taken one right after the other."""
        layer = layer_at(self._config, kind, level)
        if layer == self._whole:
            return dict.fromkeys(("prefill_latency", "decode_latency"), 0.0)
        layers = stack(self._config, layer, self._blocks)
        narrow = self._model(layers)
        rounds = self._in_turns([blocks, narrow])
        changes = {}
        for name, (of_dense, of_narrow) in rounds.items():
            ratio = median(new / old for new, old in zip(of_narrow, of_dense, strict=True))
            changes[name] = (ratio - 1) * median(of_dense) / layers.count(layer)
        return changes

    def _in_turns(self, models: list[PreTrainedModel]) -> dict[str, list[list[float]]]:
        """Seconds of every model in every round, by name of the latency."""
        rounds: dict[str, list[list[float]]] = {
            name: [[] for _ in models] for name in ("prefill_latency", "decode_latency")
        }
        for round_ in range(ROUNDS + 1):
            for at, model in enumerate(models):
                prefill, decode = time_once(model, self._setting)
                if round_:  # the first warms up
                    rounds["prefill_latency"][at].append(prefill)
                    rounds["decode_latency"][at].append(decode)
        return rounds

    def _model(self, layers: list[LayerPlan], vocabulary: bool = False) -> PreTrainedModel:
        """A random model of these layers; mostly without a vocabulary to speak of."""
        plan = Plan(
            model_type=self._config.model_type, layers=layers, kept_layers=list(range(len(layers)))
        )
        config = planned_config(self._config, plan)
        if not vocabulary:
            config.vocab_size, config.pad_token_id = 64, None
        with self._device:
            model = family_of(config).auto_class.from_config(config, dtype=self._dtype)
        return model.eval()


@torch.no_grad()
def time_once(model: PreTrainedModel, setting: Setting) -> tuple[float, float]:
    """Seconds of a prefill, and of a decoding step behind it."""
    shape = setting.batch_size, setting.context
    ids_BL = torch.randint(model.config.vocab_size, shape, device=model.device)
    cache = DynamicCache(config=model.config)
    start = _now(model)
    model(ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
    middle = _now(model)
    for _ in range(DECODE_STEPS):
        model(ids_BL[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return middle - start, (_now(model) - middle) / DECODE_STEPS


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _falling(changes: dict[int, float]) -> dict[int, float]:
    """Without noise in its crudest form: who keeps less is not slower, and nobody is slower
    than the dense sub-layer."""
    least, found = 0.0, {}
    for level in sorted(changes, reverse=True):
        found[level] = least = min(least, changes[level])
    return found


def _timed(space: Space, kind: Kind) -> list[int]:
    """Levels of a kind that are timed, of those that any layer may have."""
    levels = sorted({level for c in space.choices if c.kind == kind for level in c.levels})
    if len(levels) <= WIDTHS:
        return levels
    at = np.linspace(0, len(levels) - 1, WIDTHS).round().astype(int)
    return [levels[index] for index in at]


def _cache_file(
    config: PretrainedConfig,
    space: Space,
    dtype: torch.dtype,
    device: torch.device,
    setting: Setting,
) -> Path:
    from huggingface_hub.constants import HF_HOME

    is_cuda = device.type == "cuda"
    key = {
        "config": config.to_dict(),
        "levels": {kind: _timed(space, kind) for kind in ("attention", "mlp")},
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "setting": [setting.batch_size, setting.context],
        "versions": versions(),
    }
    return Path(HF_HOME) / "hf_compress" / "latency" / f"{digest(key)}.json"


def _processor() -> str:
    """Name of the processor, as exactly as this system tells."""
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(file: Path) -> Latencies:
    stored = json.loads(file.read_text("utf-8"))
    changes = {
        name: {kind: {int(at): s for at, s in of.items()} for kind, of in kinds.items()}
        for name, kinds in stored["changes"].items()
    }
    return Latencies(stored["dense"], stored["layer"], changes)
