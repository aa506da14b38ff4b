"""Numbers with their units, as text."""

from __future__ import annotations

from collections.abc import Sequence


def scaled(value: float, digits: int, units: Sequence[str]) -> str:
    """`value` in the largest of the units (each 1000 of the one before) that fits."""
    step = 0
    # 999.96 with four digits would print as 1000, so it moves up as well.
    while step + 1 < len(units) and float(f"{value:.{digits}g}") >= 1000:
        value, step = value / 1000, step + 1
    number = f"{value:.0f}" if step == 0 else f"{value:#.{digits}g}".rstrip(".")
    return f"{number} {units[step]}".rstrip()


def in_bytes(value: float) -> str:
    return scaled(value, 3, ("B", "kB", "MB", "GB", "TB"))


def in_parameters(value: float) -> str:
    return scaled(value, 4, ("", "k", "M", "B"))


def duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
