"""The report tells what was measured, all of it, and nothing else."""

from __future__ import annotations

import copy
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from hf_compress.errors import CheckpointError, CompressionError, RecipeError
from hf_compress.report import (
    Metrics,
    base_model_of,
    license_of,
    load_metrics,
    parse_metrics,
    plot_errors,
    plot_widths,
    save_metrics,
    summary_lines,
    write_card,
)
from hf_compress.report.card import _change, _faster, _with_error
from hf_compress.report.units import duration, in_bytes, in_parameters

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECIPE = "model: some/model\noutput: out\nstages:\n- stage: prune\n  sparsity: 0.2\n"


def minimal() -> dict[str, Any]:
    model = {
        "parameters": 134_515_008,
        "non_embedding_parameters": 106_203_456,
        "weight_bytes": 269_060_552,
        "kv_bytes_per_token": 23_040,
        "perplexity": 40.612,
    }
    smaller = {
        "parameters": 113_100_000,
        "non_embedding_parameters": 84_788_448,
        "weight_bytes": 226_231_120,
        "kv_bytes_per_token": 15_360,
        "perplexity": 57.51,
    }
    return {
        "hf_compress_version": "0.1.0",
        "base_model": "my-model",
        "before": model,
        "after": smaller,
        "comparison": {
            "kl": 0.3611,
            "kl_standard_error": 0.0098,
            "log_perplexity_difference": 0.3479,
            "log_perplexity_difference_standard_error": 0.0121,
            "num_windows": 48,
            "num_tokens": 24_528,
            "max_seq_length": 512,
            "evaluation_source": "python-docs",
            "calibration_source": "self",
        },
        "device": "cpu (2 threads)",
    }


def layer(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "layer": index,
        "intermediate_size_before": 1536,
        "intermediate_size": 912,
        "num_key_value_heads_before": 3,
        "num_key_value_heads": 2,
        "mlp_error": 0.05 + 0.01 * index,
        "mlp_error_without_fold": 0.09 + 0.01 * index,
        "mlp_damping": 0.01,
        "attention_error": 0.1,
        "attention_error_without_fold": 0.3,
        "attention_damping": 0.1,
        **changes,
    }


def full() -> dict[str, Any]:
    raw = minimal()
    raw["base_model"] = BASE
    raw["before"] |= {"prefill_tokens_per_second": 812.3, "decode_tokens_per_second": 24.11}
    raw["after"] |= {"prefill_tokens_per_second": 700.0, "decode_tokens_per_second": 27.7}
    candidates = [
        {"num_key_value_heads": 3, "intermediate_size": 832, "kl": 0.61, "kl_standard_error": 0.02},
        {"num_key_value_heads": 2, "intermediate_size": 912, "kl": 0.36, "kl_standard_error": 0.02},
    ]
    candidates[1]["chosen"] = True
    raw["pruning"] = {
        "sparsity_requested": 0.2,
        "sparsity_achieved": 0.2016,
        "criterion": "obs",
        "fold": True,
        "num_calibration_tokens": 65_536,
        "candidates": candidates,
    }
    raw["layers"] = [layer(index) for index in range(4)]
    raw["seconds"] = {"calibrate": 60.1, "prune": 190.2}
    raw["peak_memory_bytes"] = 1_234_567_890
    raw["verification"] = {
        "relative_logit_error": 0.0,
        "tolerance": 0.01,
        "generated_tokens": 8,
    }
    raw["versions"] = {"torch": "2.13.0"}
    return raw


def changed(raw: dict[str, Any], section: str, **values: Any) -> Metrics:
    raw = copy.deepcopy(raw)
    raw[section] |= values
    return parse_metrics(raw)


def card_text(folder: Path, metrics: Metrics, recipe: str = RECIPE, **options: Any) -> str:
    return write_card(metrics, recipe, folder, **options).read_text(encoding="utf-8")


def table_of(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if len(row) == 4 and not row[0].isdigit()}


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("raw", [minimal(), full()], ids=["minimal", "full"])
def test_metrics_round_trip(tmp_path: Path, raw: dict[str, Any]) -> None:
    metrics = parse_metrics(raw)
    path = tmp_path / "metrics.json"
    save_metrics(metrics, path)
    assert load_metrics(path) == metrics
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["schema_version"] == 1
    assert set(raw) <= set(written) and raw["comparison"].items() <= written["comparison"].items()


@pytest.mark.parametrize(
    ("section", "key", "value", "where"),
    [
        ("before", "colour", 1, "before.colour"),
        ("comparison", "kl", float("nan"), "comparison.kl"),
        ("after", "perplexity", 0.0, "after.perplexity"),
        ("pruning", "fold", None, "pruning.fold"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(
    section: str, key: str, value: Any, where: str
) -> None:
    raw = full()
    raw[section][key] = value
    with pytest.raises(CheckpointError, match=where.replace(".", r"\.")):
        parse_metrics(raw)


def test_a_file_that_is_not_metrics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(CompressionError, match="cannot read"):
        load_metrics(path)
    path.write_text("{not json")
    with pytest.raises(CompressionError, match="does not hold"):
        load_metrics(path)


@pytest.mark.parametrize("raw", [minimal(), full()], ids=["minimal", "full"])
def test_card_metadata_loads_back(tmp_path: Path, raw: dict[str, Any]) -> None:
    metrics = parse_metrics(raw)
    path = write_card(
        metrics, RECIPE, tmp_path, license="apache-2.0", base_model_id=BASE, tags=["tiny"]
    )
    data = ModelCard.load(path).data.to_dict()
    validate_repo_id(data["base_model"])
    pruning = ["pruning"] if metrics.pruning else []
    assert data == {
        "base_model": BASE,
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["hf_compress", "compressed", *pruning, "tiny"],
    }


def test_what_is_unknown_stays_out_of_the_metadata(tmp_path: Path) -> None:
    path = write_card(parse_metrics(minimal()), RECIPE, tmp_path)
    data = ModelCard.load(path).data.to_dict()
    assert not {"license", "base_model", "base_model_relation"} & set(data)
    with pytest.raises(RecipeError, match=r"'/home/me/model' cannot be the id"):
        write_card(parse_metrics(minimal()), RECIPE, tmp_path, base_model_id="/home/me/model")


@pytest.mark.parametrize("raw", [minimal(), full()], ids=["minimal", "full"])
def test_card_has_no_none_no_empty_section_and_no_dead_link(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    text = card_text(tmp_path, parse_metrics(raw))
    assert not re.search(r"\b(None|nan|null)\b", text.replace(RECIPE, ""))
    assert "\n\n\n" not in text
    for heading, following in re.findall(r"^(## .+)\n\n(.*)", text, flags=re.MULTILINE):
        assert following and not following.startswith("#"), heading
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(images) == (2 if raw.get("layers") else 0)
    assert all(png_size(tmp_path / image)[0] == 1200 for image in images)


def test_card_numbers(tmp_path: Path) -> None:
    text = card_text(tmp_path, parse_metrics(full()))
    rows = table_of(text)
    assert rows["Parameters"] == ["134.5 M", "113.1 M", "-15.9 %"]
    assert rows["Non-embedding parameters"] == ["106.2 M", "84.79 M", "-20.2 %"]
    assert rows["Weights on disk"] == ["269 MB", "226 MB", "-15.9 %"]
    assert rows["KV cache per token"] == ["23.0 kB", "15.4 kB", "-33.3 %"]
    assert rows["Perplexity, held-out text"] == ["40.61", "57.51", "1.42x"]
    assert rows["KL to the dense model"] == ["0", "0.3611 ± 0.0098", "nats per token"]
    assert rows["Prefill, tokens/s"] == ["812", "700", "1.16x slower"]
    assert rows["Decode, tokens/s"] == ["24.1", "27.7", "1.15x faster"]
    assert "| 2 | 912 | 0.360 ± 0.020 | **chosen** |" in text
    headline = re.search(r"^\*\*(.+)\*\*$", text, flags=re.MULTILINE)
    assert headline is not None and headline[1] == (
        "20.2 % of the non-embedding parameters removed: perplexity 40.61 -> 57.51 (1.42x), "
        "decode 1.15x faster, weights 269 MB -> 226 MB."
    )


def test_speed_that_was_not_measured_is_not_mentioned(tmp_path: Path) -> None:
    text = card_text(tmp_path, parse_metrics(minimal()))
    assert "tokens/s" not in text and "faster" not in text and "Speed" not in text


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE.strip(), "# {{ title }} | é\n```\n# '````'\n"])
def test_the_recipe_is_quoted_unchanged(tmp_path: Path, recipe: str) -> None:
    text = card_text(tmp_path, parse_metrics(full()), recipe)
    block = re.search(r"^(`{3,})yaml\n(.*?)\n\1$", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None and block[2] == recipe.removesuffix("\n")


def test_the_snippet_is_plain_transformers(tmp_path: Path) -> None:
    text = card_text(tmp_path, parse_metrics(full()))
    block = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert block is not None and "hf_compress" not in block[1]
    compile(block[1], "README.md", "exec")


@pytest.mark.parametrize(
    ("difference", "is_claimed"), [(0.05, True), (-0.05, True), (0.025, True), (0.024, False)]
)
def test_a_difference_under_two_standard_errors_is_not_claimed(
    tmp_path: Path, difference: float, is_claimed: bool
) -> None:
    metrics = changed(full(), "comparison", log_perplexity_difference=difference)
    text = card_text(tmp_path, metrics)
    assert ("The difference is real" in text) == is_claimed
    assert ("No difference in perplexity can be claimed" in text) != is_claimed
    assert (table_of(text)["Perplexity, held-out text"][2] == "1.42x") == is_claimed


@pytest.mark.parametrize(("other", "is_noise"), [(0.38, True), (0.61, False)])
def test_candidates_within_the_noise_are_called_so(
    tmp_path: Path, other: float, is_noise: bool
) -> None:
    raw = full()
    raw["pruning"]["candidates"][0]["kl"] = other
    assert ("cannot tell them apart" in card_text(tmp_path, parse_metrics(raw))) == is_noise


def test_evaluation_on_the_calibration_text_is_admitted(tmp_path: Path) -> None:
    same = changed(full(), "comparison", calibration_source="python-docs")
    assert "flatter" in card_text(tmp_path, same)
    assert "flatter" not in card_text(tmp_path, parse_metrics(full()))


def test_summary_is_an_aligned_table_with_the_card_s_numbers(tmp_path: Path) -> None:
    metrics = parse_metrics(full())
    lines = summary_lines(metrics)
    text = card_text(tmp_path, metrics)
    assert lines[0] in text and max(map(len, lines[1:])) <= 80
    start = lines[2].index("change")
    for line, (name, row) in zip(lines[3:], table_of(text).items(), strict=True):
        assert line.startswith(name) and line[start:] == row[2] and line[start - 1] == " "


@pytest.mark.parametrize("plot", [plot_widths, plot_errors])
def test_plots_are_pngs_that_follow_the_metrics(tmp_path: Path, plot: Any) -> None:
    raw = full()
    first = plot(parse_metrics(raw), tmp_path / "a.png")
    again = plot(parse_metrics(raw), tmp_path / "b.png")
    assert png_size(first) == (1200, 735) and first.read_bytes() == again.read_bytes()
    raw["layers"][1] |= {"intermediate_size": 640, "mlp_error": 0.4}
    other = plot(parse_metrics(raw), tmp_path / "c.png")
    assert other.read_bytes() != first.read_bytes()


def test_dropped_layers_and_query_heads_are_told(tmp_path: Path) -> None:
    raw = full()
    for at, kept in zip(raw["layers"], (3, 3, 0, 3), strict=True):
        at |= {"heads_per_group_before": 4, "heads_per_group": kept}
    raw["layers"][2] |= {"intermediate_size": 0, "num_key_value_heads": 0}
    raw["layers"][2] |= {"mlp_error": None, "attention_error": None}
    for candidate, layers in zip(raw["pruning"]["candidates"], (4, 3), strict=True):
        candidate |= {"num_hidden_layers": layers, "heads_per_group": 3}
    raw["pruning"]["candidates"][0]["kl"] = 0.37
    text = card_text(tmp_path, parse_metrics(raw))
    assert "Whole layers dropped, of 4: 2." in text
    assert "| Layers | KV groups per layer | MLP neurons per layer | KL" in text
    assert "| 3 | 2 | 912 | 0.360 ± 0.020 | **chosen** |" in text
    assert "the one with 4 layers, 3 KV groups and 832 MLP neurons" in text
    tall, plain = (
        tmp_path / "figures/widths.png",
        plot_widths(parse_metrics(full()), tmp_path / "p"),
    )
    assert png_size(tall)[1] > png_size(plain)[1]


@pytest.mark.parametrize("num_layers", [1, 2, 80])
def test_plots_cover_any_depth_and_any_gap(tmp_path: Path, num_layers: int) -> None:
    raw = minimal()
    nothing = {
        f"{part}_error{end}": None for part in ("mlp", "attention") for end in ("", "_without_fold")
    }
    raw["layers"] = [layer(index, **(nothing if index % 2 else {})) for index in range(num_layers)]
    raw["layers"][0] |= {"mlp_error": 0.0, "attention_error": 1e-6}
    assert plot_widths(parse_metrics(raw), tmp_path / "w.png")
    assert plot_errors(parse_metrics(raw), tmp_path / "e.png")


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    metrics = parse_metrics(minimal())
    assert plot_widths(metrics, tmp_path / "w.png") is None
    assert plot_errors(metrics, tmp_path / "e.png") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        ("---\nlanguage: en\n---\n# Base\n", None),
        ("# Base without metadata\n", None),
        ("---\nlicense: [broken\n---\n", None),
        ("---\n- a list\n---\n", None),
        (None, None),
    ],
)
def test_license_of(tmp_path: Path, readme: str | None, expected: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert license_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nbase_model: owner/name\n---\n", "owner/name"),
        ("---\nbase_model: [owner/one, owner/two]\n---\n", None),
        ("---\nbase_model: not a valid id\n---\n", None),
        ("# Base without metadata\n", None),
        (None, None),
    ],
)
def test_base_model_of(tmp_path: Path, readme: str | None, expected: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert base_model_of(tmp_path) == expected


def test_license_of_reads_what_write_card_wrote(tmp_path: Path) -> None:
    write_card(parse_metrics(full()), RECIPE, tmp_path, license="mit")
    assert license_of(tmp_path) == "mit"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_bytes(999), "999 B"),
        (in_bytes(999_960), "1.00 MB"),
        (in_bytes(1_500_000_000_000), "1.50 TB"),
        (in_parameters(999_960), "1.000 M"),
        (in_parameters(999_940), "999.9 k"),
        (in_parameters(7_241_732_096), "7.242 B"),
        (_change(3, 3), "unchanged"),
        (_change(100_000, 99_990), "-0.01 %"),
        (_change(100, 120), "+20.0 %"),
        (_faster(1.001), "equally fast"),
        (_faster(0.5), "2.00x slower"),
        (_with_error(0.36, 0.0), "0.36"),
        (_with_error(12.345, 3.21), "12.3 ± 3.2"),
        (duration(2.34), "2.3 s"),
        (duration(130), "2 min"),
        (duration(9000), "2.5 h"),
    ],
)
def test_human_units(text: str, expected: str) -> None:
    assert text == expected
