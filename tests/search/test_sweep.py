"""One calibration, every size: the front, its picture and its plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_compress import pipeline
from hf_compress.cli import app
from hf_compress.errors import RecipeError
from hf_compress.plan import load_plan
from hf_compress.recipe import parse_recipe
from hf_compress.report import load_metrics
from hf_compress.stages import statistics
from hf_compress.sweep import sweep
from tests.search.conftest import BUDGET


def test_every_size_from_one_calibration(
    searching: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    front = sweep(parse_recipe(searching), [0.8, 0.6])
    assert {(point.share, point.widths) for point in front.points} == {
        (share, widths) for share in (0.8, 0.6) for widths in ("by layer", "uniform")
    }
    for point in front.points:
        name = "non_embedding_parameters"
        assert point.costs[name] <= point.share * front.dense[name]
        assert point.kl > 0
    by_layer = [point.kl for point in front.points if point.widths == "by layer"]
    assert by_layer == sorted(by_layer)
    assert (front.folder / "front.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((front.folder / "front.json").read_text("utf-8"))
    assert [point["kl"] for point in stored["points"]] == [point.kl for point in front.points]

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(statistics, "calibrate", again)
    plan = front.folder / front.points[0].plan
    export = [{"stage": "prune", "plan": str(plan), "recollect": False}]
    output = pipeline.run(parse_recipe({**searching, "stages": export}))
    assert load_plan(output / "plan.json") == load_plan(plan)
    assert load_metrics(output / "metrics.json").removed_share >= 0.2


def test_the_command_prints_the_front(searching: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(searching))
    result = CliRunner().invoke(app, ["sweep", str(file), "--share", "0.7"])
    assert result.exit_code == 0, result.output
    assert "by layer" in result.stdout
    assert "front.png" in result.stdout


@pytest.mark.parametrize(
    ("stages", "shares", "message"),
    [
        ([{"stage": "prune", "sparsity": 0.2}], [], "has to be the recipe's first stage"),
        (
            [{"stage": "search", "budget": BUDGET, "structures": ["layers"]}, {"stage": "prune"}],
            [],
            "add mlp_neurons",
        ),
        ([{"stage": "search", "budget": BUDGET}, {"stage": "prune"}], [1.2], "no share"),
        ([{"stage": "search", "budget": BUDGET}, {"stage": "prune"}], [0.01], "out of reach"),
    ],
)
def test_what_cannot_be_swept(
    searching: dict[str, Any],
    stages: list[dict[str, Any]],
    shares: list[float],
    message: str,
) -> None:
    with pytest.raises(RecipeError, match=message):
        sweep(parse_recipe({**searching, "stages": stages}), shares)
    assert not Path(searching["output"] + ".sweep").exists()
