"""(1 + lambda) evolution on the measured KL, after EvoPress (Sieberling et al. 2024).

A child moves units between sub-layers at equal budgets. All children are measured on a little
text, the best of them beside the parent on more; the parent goes only for a better one. Each
generation draws from its own random state, so that a search that was killed goes on with the
same children.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from hf_compress.search.costs import Costs
from hf_compress.search.evaluator import Evaluator
from hf_compress.search.space import Genome

MAX_SWITCHES = 3
ATTEMPTS = 200
"""Tries to find another child, before the parent has no neighbours left."""


@dataclass
class Progress:
    """A search under way.

    Attributes:
        genome: the best so far.
        kl: its KL on the text where it was last measured.
        history: KL of the parent after every generation, and children that were measured.
        stale: generations without a better child.
    """

    genome: Genome
    kl: float
    history: list[dict[str, float]] = field(default_factory=list)
    stale: int = 0


@dataclass(frozen=True)
class Settings:
    """How long to search, and how widely."""

    generations: int
    offspring: int
    survivors: tuple[int, ...]
    """Children that are left for each stage after the first, the last 1 or more."""
    patience: int
    """Generations without a better child after which the search ends."""
    seed: int


def evolve(
    start: Progress,
    costs: Costs,
    limits: Mapping[str, float],
    stages: Sequence[Sequence[Evaluator]],
    settings: Settings,
    save: Callable[[Progress], None],
) -> Progress:
    """The best genome within the limits that is found from `start` on.

    Args:
        stages: measure on more and more text, the last decides; generations take the
            evaluators of each in turns.
        save: is given the progress after each generation.
    """
    progress = start
    done = len(progress.history)
    bar = tqdm(total=settings.generations, initial=done, desc="evolution", unit="gen")
    with bar:
        for generation in range(done, settings.generations):
            if progress.stale >= settings.patience:
                break
            rng = random.Random(f"{settings.seed}-{generation}")
            children = offspring(progress.genome, costs, limits, settings.offspring, rng)
            if not children:
                break
            turn = [of[generation % len(of)] for of in stages]
            best, kl, parent_kl = _select(progress.genome, children, turn, settings.survivors)
            better = kl < parent_kl
            progress = Progress(
                best if better else progress.genome,
                min(kl, parent_kl),
                [*progress.history, {"kl": min(kl, parent_kl), "children": len(children)}],
                0 if better else progress.stale + 1,
            )
            save(progress)
            bar.set_postfix(kl=f"{progress.kl:.4f}")
            bar.update()
    return progress


def _select(
    parent: Genome,
    children: list[Genome],
    stages: Sequence[Evaluator],
    survivors: tuple[int, ...],
) -> tuple[Genome, float, float]:
    """The best child, its KL and the parent's, on the text of the last stage."""
    for evaluator, count in zip(stages[:-1], survivors, strict=True):
        means = evaluator.kl(children).mean(1).tolist()
        ranked = sorted(range(len(children)), key=means.__getitem__)
        children = [children[at] for at in ranked[:count]]
    parent_kl, *kls = stages[-1].kl([parent, *children]).mean(1).tolist()
    best = min(range(len(children)), key=kls.__getitem__)
    return children[best], kls[best], parent_kl


def offspring(
    parent: Genome,
    costs: Costs,
    limits: Mapping[str, float],
    count: int,
    rng: random.Random,
) -> list[Genome]:
    """Up to `count` different children within the limits."""
    children: list[Genome] = []
    for _ in range(ATTEMPTS):
        child = mutate(parent, costs, limits, rng)
        if child != parent and child not in children:
            children.append(child)
        if len(children) == count:
            break
    return children


def mutate(parent: Genome, costs: Costs, limits: Mapping[str, float], rng: random.Random) -> Genome:
    """One to three sub-layers get a level more, others give levels up until the limits hold,
    and what is then left over is spent."""
    choices = costs.space.choices
    child = list(parent)
    raised = set()
    # Few switches are the rule: a child far from its parent is rarely better.
    for _ in range(min(rng.randint(1, MAX_SWITCHES), rng.randint(1, MAX_SWITCHES))):
        room = [at for at, choice in enumerate(choices) if child[at] + 1 < len(choice.levels)]
        if room:
            at = rng.choice(room)
            child[at] += 1
            raised.add(at)
    while not costs.within(tuple(child), limits):
        lower = [at for at in range(len(child)) if child[at] > 0 and at not in raised]
        if not lower:
            return parent
        child[rng.choice(lower)] -= 1
    return fill(tuple(child), costs, limits, rng)


def fill(genome: Genome, costs: Costs, limits: Mapping[str, float], rng: random.Random) -> Genome:
    """Levels raised at random for as long as the limits allow."""
    child, choices = list(genome), costs.space.choices
    open_ = list(range(len(choices)))
    while open_:
        at = rng.choice(open_)
        child[at] += 1
        if child[at] == len(choices[at].levels) or not costs.within(tuple(child), limits):
            child[at] -= 1
            open_.remove(at)
    return tuple(child)


def save_progress(progress: Progress, file: Path) -> None:
    """Write it as JSON, by rename."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    partial.replace(file)


def load_progress(file: Path) -> Progress:
    """What `save_progress` wrote."""
    fields = json.loads(file.read_text("utf-8"))
    return Progress(**{**fields, "genome": tuple(fields["genome"])})
