"""The command line: run, plan, sweep, evaluate, inspect, push."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from hf_compress.errors import CompressionError, RecipeError
from hf_compress.recipe import load_recipe

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun, `accelerate launch` and the kinds of mpirun say how many processes run."""


class Commands(TyperGroup):
    """The commands; an expected failure of one is one line on stderr and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            _require_one_process()
            return super().invoke(ctx)
        except CompressionError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        # Caught here, because typer itself ends without a word, or with another status.
        except KeyboardInterrupt as error:
            typer.echo("interrupted; run the same command again to go on", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a Hugging Face language model smaller, and prove what it kept.",
)

RecipePath = Annotated[Path, typer.Argument(help="A YAML recipe.", metavar="RECIPE")]
Directory = Annotated[Path, typer.Argument(help="Output folder of a run.", metavar="DIR")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer reads this annotation on Python 3.10)
    typer.Option("--set", help="Override a key, such as stages.0.sparsity=0.3."),
]


@app.command()
def run(recipe: RecipePath, set_: Overrides = None) -> None:
    """Carry out a recipe; run again to go on after an interruption."""
    from hf_compress import pipeline
    from hf_compress.report import load_metrics, summary_lines

    output = pipeline.run(load_recipe(recipe, set_ or ()))
    typer.echo("")
    for line in summary_lines(load_metrics(output / "metrics.json")):
        typer.echo(line)
    typer.echo(f"\ncompressed model: {output}\nreport:           {output / 'README.md'}")


@app.command()
def plan(recipe: RecipePath, set_: Overrides = None) -> None:
    """Dry run: what each stage will do, from config.json alone; loads no weights."""
    from hf_compress.dry_run import describe

    for line in describe(load_recipe(recipe, set_ or ())):
        typer.echo(line)


@app.command()
def sweep(
    recipe: RecipePath,
    share: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="Share of the dense model's cost; say it several times."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Draw what every size would cost, from one calibration, for a recipe with a `search`.

    Each point is a plan; `--set 'stages=[{stage: prune, plan: PLAN}]'` has `run` cut to it.
    """
    from hf_compress.sweep import sweep as draw
    from hf_compress.sweep import table_lines

    front = draw(load_recipe(recipe, set_ or ()), share or ())
    for line in table_lines(front):
        typer.echo(line)
    typer.echo(f"\npicture: {front.folder / 'front.png'}\nplans:   {front.folder / 'plans'}")


@app.command()
def evaluate(
    directory: Directory,
    model: Annotated[str | None, typer.Option(help="Dense model to compare with.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Evaluation text: python-docs, a file or a Hub dataset.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Windows of it.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    speed: Annotated[
        bool | None, typer.Option("--speed/--no-speed", help="Time prefill and decode.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16, for both models.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write the metrics to this new file.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Measure a finished run anew, on its evaluation text or on another; DIR is only read.

    What no option says is as in the recipe in DIR.

    Another text leaves out what the run calibrated on; --set data.evaluation.split=test says more.
    """
    from hf_compress import evaluate_folder as folder
    from hf_compress.report import summary_lines

    overrides = folder.as_overrides(
        source,
        model=model,
        device=device,
        dtype=dtype,
        evaluate__speed=speed,
        data__evaluation__num_samples=num_samples,
        data__evaluation__max_seq_length=max_seq_length,
    )
    if json_ is not None:
        folder.check_target(json_, directory)
    metrics = folder.evaluate_folder(directory, [*overrides, *(set_ or ())])
    for line in summary_lines(metrics):
        typer.echo(line)
    if json_ is not None:
        folder.write_metrics(metrics, json_)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A Hub id, or a folder with a checkpoint.", metavar="MODEL")
    ],
    source: Annotated[
        str, typer.Option(help="Text to read it on: python-docs, a file or a Hub dataset.")
    ] = "python-docs",
    num_samples: Annotated[int, typer.Option(help="Windows of it.")] = 16,
    max_seq_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    duplicate_cosine: Annotated[
        float, typer.Option(help="Neurons are near-duplicates from this |cosine| on.")
    ] = 0.95,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write what was found to this new file.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="New file for the picture.", show_default="inspect-<model name>.png"),
    ] = None,
) -> None:
    """Show how redundant a model is, layer by layer; MODEL is only read.

    Dead and duplicate neurons, effective ranks, massive activations, and
    how many neurons could go at 0.1, 1 and 5 % output error: a table here,
    and one picture.
    """
    from hf_compress import inspection

    picture = inspection.check_targets(model, png, json_)
    found = inspection.inspect_checkpoint(
        model,
        source=source,
        num_samples=num_samples,
        max_seq_length=max_seq_length,
        dtype=dtype,
        device=device,
        duplicate_cosine=duplicate_cosine,
    )
    inspection.write_outputs(found, picture, json_)
    for line in inspection.table_lines(found):
        typer.echo(line)
    typer.echo(f"\npicture: {picture}")


@app.command()
def push(
    directory: Directory,
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, user/name.")],
    private: Annotated[bool, typer.Option(help="Create it as a private repository.")] = False,
) -> None:
    """Upload weights, card, recipe, plan and metrics to the Hub."""
    from hf_compress.checkpoint.hub import push_folder

    typer.echo(push_folder(directory, repo, private=private or None))


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    app()


def _require_one_process() -> None:
    """Several processes would write to one workspace.

    Read from the environment and not asked of accelerate, which starts no process group on
    CPUs and then counts one process, or waits for the others.
    """
    for name in WORLD_SIZES:
        size = os.environ.get(name, "1")
        if size.isdecimal() and int(size) > 1:
            raise RecipeError(
                f"launched with {size} processes ({name}); hf-compress runs in one: "
                "accelerate launch --num_processes 1"
            )
