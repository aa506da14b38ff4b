"""Names of modules by patterns, as in llm-compressor's `ignore`."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from hf_compress.errors import RecipeError
from hf_compress.model.families import Family

SHOWN = 5
"""Names in an error message."""


def matching(pattern: str, names: list[str], family: Family, key: str = "ignore") -> list[str]:
    """The names that a pattern of a recipe's `key` matches: a glob, or after `re:` a regular
    expression that has to match from the start of a name.

    Raises:
        RecipeError: it matches nothing, or is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise RecipeError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        found = [name for name in names if expression.match(name)]
    else:
        found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        first = [name for name in names if name.startswith(f"{family.layers}.0")]
        raise RecipeError(
            f"{key}: {pattern!r} matches no module of the model; names are such as "
            f"{', '.join(first[:SHOWN])}"
        )
    return found
