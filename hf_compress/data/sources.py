"""Documents from where a recipe says: local files, a Hub dataset, the Python documentation.

Local files are read with plain readers instead of `datasets`: they are streamed without a
copy in a cache, and a faulty line is named by its number.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from hf_compress.errors import DataError
from hf_compress.recipe import TextSource

Document: TypeAlias = "str | list[dict[str, Any]]"
"""A text, or a conversation: messages with the keys `role` and `content`."""

TXT_PIECE_CHARACTERS = 100_000
"""A .txt file is one document, handed over in pieces of about this many characters."""

_WAY_OUT = "use a local file (.txt, .jsonl, .parquet), `self` or `python-docs` instead"


def read_documents(source: TextSource) -> Iterator[Document]:
    """Documents of `source` in a fixed order, read lazily; empty ones are skipped.

    Returns:
        An iterator over texts, or over lists of messages where the column holds those.

    Raises:
        DataError: at the call for a path that does not exist, a kind of file that cannot be
            read, a Hub dataset that cannot be reached, `self` or `texts`; while iterating for a
            missing column, a faulty line or a broken connection.
    """
    kind = source_kind(source)
    if kind == "self":
        raise DataError(
            "the source `self` is sampled from the model and holds no documents to read; "
            "it is allowed for calibration, where the model is at hand"
        )
    if kind == "texts":
        raise DataError(
            "the source `texts` stands for texts handed over from Python, which are not kept; "
            "hand them over again, or name another source"
        )
    if kind == "python-docs":
        return _python_docs()
    if kind == "local":
        return _local(Path(source.source).expanduser(), source.column)
    return _hub(source)


def source_kind(source: TextSource) -> Literal["self", "texts", "python-docs", "local", "hub"]:
    """How `source` is read; raises DataError for a local path that does not exist."""
    if source.source == "self":
        return "self"
    if source.source == "texts":
        return "texts"
    if source.source == "python-docs":
        return "python-docs"
    if Path(source.source).expanduser().exists():
        return "local"
    if _looks_like_path(source.source):
        raise DataError(
            f"the text source {source.source!r} looks like a local path, and no file or folder "
            f"is there (working directory: {Path.cwd()}); correct the path"
        )
    return "hub"


def same_text(a: TextSource, b: TextSource) -> bool:
    """Whether two sources read the same documents, however they are cut into windows."""
    kind = source_kind(a)
    if kind != source_kind(b):
        return False
    if kind == "local":
        same_path = Path(a.source).expanduser().samefile(Path(b.source).expanduser())
        return same_path and a.column == b.column
    if kind == "hub":
        keys = ("source", "name", "split", "column")
        return all(getattr(a, key) == getattr(b, key) for key in keys)
    return True


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or text.endswith(tuple(_READERS))


def _python_docs() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without its documentation (the module pydoc_data), so "
            "`python-docs` is empty here; use a local file (.txt, .jsonl, .parquet) instead"
        ) from error
    return (topics[name] for name in sorted(topics) if topics[name].strip())


def _local(path: Path, column: str) -> Iterator[Document]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(tuple(_READERS)))
        if not files:
            raise DataError(
                f"the folder {str(path)!r} holds no text directly in it; "
                f"what can be read: {', '.join(_READERS)}"
            )
    readers = [(file, _reader(file)) for file in files]
    return (
        document
        for file, reader in readers
        for document in _guarded(file, reader(file, column))
        if not _is_empty(document)
    )


def _reader(path: Path) -> Callable[[Path, str], Iterator[Document]]:
    for suffix, reader in _READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise DataError(
        f"cannot read {str(path)!r} as text: its suffix is {path.suffix!r}; "
        f"what can be read: {', '.join(_READERS)}"
    )


def _guarded(path: Path, documents: Iterator[Document]) -> Iterator[Document]:
    """Pass documents on; what the file system, gzip or a codec complains about, as DataError."""
    try:
        yield from documents
    # pyarrow's complaints about a file are ValueErrors, as UnicodeDecodeError is.
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}; check that it is complete and UTF-8"
        ) from error


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _read_txt(path: Path, column: str) -> Iterator[Document]:
    with _open_text(path) as handle:
        piece: list[str] = []
        characters = 0
        # A limit for readline, since a text may come as one endless line.
        while line := handle.readline(TXT_PIECE_CHARACTERS):
            piece.append(line)
            characters += len(line)
            at_blank_line = not line.strip() and characters >= TXT_PIECE_CHARACTERS
            if at_blank_line or characters >= 2 * TXT_PIECE_CHARACTERS:
                yield "".join(piece).strip("\n")
                piece, characters = [], 0
        yield "".join(piece).strip("\n")


def _read_jsonl(path: Path, column: str) -> Iterator[Document]:
    with _open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"line {number} of {str(path)!r} is not JSON ({error}); "
                    "the file has to hold one JSON object a line"
                ) from error
            yield _document(row, column, f"line {number} of {str(path)!r}")


def _read_json(path: Path, column: str) -> Iterator[Document]:
    """A .json file: one list of objects, or JSON lines under another name."""
    with _open_text(path) as handle:
        is_list = handle.read(1) == "["
        handle.seek(0)
        rows = json.load(handle) if is_list else None
    if rows is None:
        yield from _read_jsonl(path, column)
        return
    for number, row in enumerate(rows):
        yield _document(row, column, f"entry {number} of {str(path)!r}")


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    # pyarrow comes with datasets; it is slow to import, and only this needs it.
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise _missing_column(repr(str(path)), column, names)
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _document({column: value}, column, repr(str(path)))


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".txt.gz": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".parquet": _read_parquet,
}
"""To read another kind of file, add its suffix and a reader."""


def _hub(source: TextSource) -> Iterator[Document]:
    # Both are slow to import, and only this needs them.
    import datasets
    from huggingface_hub.errors import HTTPError

    where = describe(source)
    # What load_dataset raises: OSError (offline, not found), HTTPError (the connection),
    # ValueError (configuration, split), RuntimeError (it needs a script), and its own family.
    failures = (OSError, HTTPError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(source.source, source.name, split=source.split, streaming=True)
    except failures as error:
        raise DataError(f"cannot load {where}: {error}; {_WAY_OUT}") from error

    def documents() -> Iterator[Document]:
        try:
            for number, row in enumerate(rows):
                document = _document(row, source.column, f"row {number} of {where}")
                if not _is_empty(document):
                    yield document
        except failures as error:
            raise DataError(f"lost {where} while reading: {error}; {_WAY_OUT}") from error

    return documents()


def describe(source: TextSource) -> str:
    """The source in words, for messages."""
    if source.source in ("self", "texts", "python-docs"):
        return f"the source `{source.source}`"
    if Path(source.source).expanduser().exists():
        return f"the source {source.source!r}"
    name = f"configuration {source.name!r}, " if source.name else ""
    return f"the Hub dataset {source.source!r} ({name}split {source.split!r})"


def _document(row: Any, column: str, where: str) -> Document:
    """The document in a row; null becomes an empty one."""
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is a {type(row).__name__}, not an object with columns; "
            f'write it as {{"{column}": ...}}'
        )
    if column not in row:
        raise _missing_column(where, column, list(row))
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    raise DataError(
        f"the column {column!r} in {where} holds a {type(value).__name__}, neither text nor a "
        "list of messages; set `column` to one that does"
    )


def _missing_column(where: str, column: str, names: list[str]) -> DataError:
    return DataError(
        f"{where} has no column {column!r}; set `column` to one of: {', '.join(map(str, names))}"
    )


def _is_empty(document: Document) -> bool:
    return not (document.strip() if isinstance(document, str) else document)
