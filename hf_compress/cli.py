"""The command line: run, plan, evaluate, push."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Optional

import typer

from hf_compress.errors import CompressionError
from hf_compress.recipe import load_recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a Hugging Face language model smaller, and prove what it kept.",
)

RecipePath = Annotated[Path, typer.Argument(help="A YAML recipe.", metavar="RECIPE")]
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
def evaluate(
    directory: Annotated[Path, typer.Argument(help="Output folder of a run.", metavar="DIR")],
) -> None:
    """Print what a finished run measured."""
    from hf_compress.report import load_metrics, summary_lines

    for line in summary_lines(load_metrics(directory / "metrics.json")):
        typer.echo(line)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="Output folder of a run.", metavar="DIR")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, user/name.")],
    private: Annotated[bool, typer.Option(help="Create it as a private repository.")] = False,
) -> None:
    """Upload weights, card, recipe, plan and metrics to the Hub."""
    from hf_compress.checkpoint.hub import push_folder

    typer.echo(push_folder(directory, repo, private=private or None))


def main() -> None:
    """Entry point: an expected failure is one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except CompressionError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command again to go on", err=True)
        raise SystemExit(130) from None
