"""Predicted latency against measured: `python -m benchmarks.latency`.

For several budgets of decode latency, the solver gives widths for every layer (scores do not
matter here, so each level costs what it removes), a model of those widths is built with random
weights, and both its latencies are measured in turns with the dense model's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.table import MODEL
from hf_compress.model.families import family_of
from hf_compress.model.loading import load_config, resolve_device, resolve_dtype
from hf_compress.pruning import planned_config
from hf_compress.search.costs import LATENCIES, count_costs, with_latencies
from hf_compress.search.latency import ROUNDS, Setting, measure_latencies, time_once
from hf_compress.search.solver import solve
from hf_compress.search.space import Space

HEADER = "| budget | latency | predicted, of the dense model's | measured | off by |"


def main() -> None:
    """Print the table as Markdown and write it as JSON."""
    arguments = _arguments()
    config = load_config(Path(arguments.model))
    dtype, device = resolve_dtype("auto", config), resolve_device("auto")
    setting = Setting(arguments.batch_size, arguments.context)
    space = Space.of(config, ("mlp_neurons", "kv_groups"), 64)
    costs = with_latencies(
        count_costs(config, space, dtype, arguments.context),
        measure_latencies(config, space, dtype, device, setting),
    )
    scores = [-of for of in costs.changes["parameters"]]
    auto_class = family_of(config).auto_class

    def build(planned) -> PreTrainedModel:  # type: ignore[no-untyped-def]
        with device:
            return auto_class.from_config(planned, dtype=dtype).eval()

    dense = build(config)
    print(HEADER + "\n|--:|---|--:|--:|--:|", flush=True)
    rows = []
    for share in arguments.shares:
        limits = {"decode_latency": share * costs.dense["decode_latency"]}
        genome = solve(costs, scores, limits)
        planned = planned_config(config, space.plan(genome, config))
        ratios = _ratios(build(planned), dense, setting)
        for name in LATENCIES:
            predicted = costs.total(name, genome) / costs.dense[name]
            off = predicted / ratios[name] - 1
            rows.append({"budget": share, "latency": name, "predicted": predicted})
            rows[-1] |= {"measured": ratios[name], "off": off}
            print(
                f"| {share:.0%} | {name} | {predicted:.3f} | {ratios[name]:.3f} | {off:+.1%} |",
                flush=True,
            )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latency.json"))
    return parser.parse_args()


def _ratios(model: PreTrainedModel, dense: PreTrainedModel, setting: Setting) -> dict[str, float]:
    """Medians of what one model took over what the other took right before it."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for round_ in tqdm(range(2 * ROUNDS + 1), desc="measured", leave=False):
        times = [time_once(each, setting) for each in (dense, model)]
        if round_:
            for name, old, new in zip(LATENCIES, *times, strict=True):
                found[name].append(new / old)
    return {name: median(ratios) for name, ratios in found.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
