"""Every kind of source gives the same documents, and every refusal names its way out."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hf_compress.data.sources import TXT_PIECE_CHARACTERS, read_documents, same_text, source_kind
from hf_compress.errors import DataError
from hf_compress.recipe import TextSource

DOCUMENTS = ["The first document.", "Der zweite, größer:\n\nmit Leerzeile.", "第三"]
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    [{"role": "user", "content": "bye"}],
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def read(source, **settings):
    return list(read_documents(TextSource(source=str(source), **settings)))


def write(path, documents, column="text"):
    """Write documents as the kind of file that the name says."""
    rows = [{"id": number, column: document} for number, document in enumerate(documents)]
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if name.endswith(".txt"):
        text = "\n\n".join(documents)
    elif name == "list.json":
        text = json.dumps(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


ROW_FILES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "list.json", "a.parquet"]


@pytest.mark.parametrize("name", ROW_FILES)
def test_files_of_rows_give_their_documents_in_order(tmp_path, name):
    assert read(write(tmp_path / name, DOCUMENTS)) == DOCUMENTS


@pytest.mark.parametrize("name", ROW_FILES)
def test_files_of_rows_give_conversations(tmp_path, name):
    assert read(write(tmp_path / name, CHATS, column="messages"), column="messages") == CHATS


@pytest.mark.parametrize("name", ROW_FILES)
def test_empty_and_null_documents_are_skipped(tmp_path, name):
    documents = ["", DOCUMENTS[0], None, " \n", DOCUMENTS[1]]
    assert read(write(tmp_path / name, documents)) == DOCUMENTS[:2]


@pytest.mark.parametrize("name", ROW_FILES)
def test_missing_column_lists_those_that_exist(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS, column="content")
    with pytest.raises(DataError, match=r"no column 'text'.*: id, content"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_txt_is_one_document(tmp_path, name):
    assert read(write(tmp_path / name, DOCUMENTS)) == ["\n\n".join(DOCUMENTS)]


def test_a_long_txt_comes_in_pieces_that_rejoin_to_the_text(tmp_path):
    paragraph = " ".join(["word"] * 400)
    text = "\n\n".join(f"{number} {paragraph}" for number in range(300))
    (tmp_path / "a.txt").write_text(text)
    pieces = read(tmp_path / "a.txt")
    assert len(pieces) > 3
    assert max(map(len, pieces)) <= 2 * TXT_PIECE_CHARACTERS
    assert "\n\n".join(pieces) == text


def test_a_txt_of_one_endless_line_is_read_whole(tmp_path):
    (tmp_path / "a.txt").write_text("abcd" * TXT_PIECE_CHARACTERS)
    assert "".join(read(tmp_path / "a.txt")) == "abcd" * TXT_PIECE_CHARACTERS


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    assert read(tmp_path / "a.txt") == ["text"]


def test_a_folder_gives_its_files_by_name(tmp_path):
    write(tmp_path / "b.jsonl", DOCUMENTS[1:])
    write(tmp_path / "a.txt", DOCUMENTS[:1])
    (tmp_path / "notes.md").write_text("not read")
    assert read(tmp_path) == DOCUMENTS


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("not read")
    with pytest.raises(DataError, match=r"no text directly in it.*\.jsonl\.gz"):
        read(tmp_path)


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(DataError, match=r"suffix is '\.csv'.*\.parquet"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "source", ["./corpus", "../corpus/a", "/nowhere/corpus", "~/nowhere/corpus", "corpus.jsonl.gz"]
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(source):
    with pytest.raises(DataError, match="no file or folder") as caught:
        read(source)
    assert source in str(caught.value)
    assert "Hub" not in str(caught.value)


def test_a_faulty_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": \n')
    with pytest.raises(DataError, match="line 3 of"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("row", ['"text"', '{"text": 3}', '{"text": ["a"]}'])
def test_a_row_that_holds_no_document_is_refused(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(DataError, match="line 1 of"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz", "a.parquet"])
def test_a_truncated_file_is_named(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot read") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "a.txt")


def test_python_docs_are_long_and_always_in_the_same_order():
    documents = read("python-docs")
    assert sum(map(len, documents)) > 300_000
    assert documents == read("python-docs")
    assert all(document.strip() for document in documents)


def test_self_has_no_documents():
    with pytest.raises(DataError, match="sampled from the model"):
        read("self")


@pytest.mark.parametrize("name", ["wikitext-2-raw-v1", None])
def test_the_hub_out_of_reach_is_one_clear_error(name):
    with pytest.raises(DataError, match=r"Hub dataset 'some-org/text' .*`python-docs`") as caught:
        read("some-org/text", name=name)
    assert isinstance(caught.value.__cause__, OSError)
    assert (name or "split 'train'") in str(caught.value)


@pytest.mark.parametrize(
    "failure",
    [
        datasets.exceptions.DatasetNotFoundError("gone"),
        datasets.exceptions.DatasetGenerationError("broken"),
        ValueError("BuilderConfig 'x' not found"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_what_load_dataset_raises_becomes_a_data_error(monkeypatch, failure):
    def load_dataset(*args, **kwargs):
        assert "trust_remote_code" not in kwargs
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=str(failure)[:20]):
        read("some-org/text")


def test_a_hub_dataset_is_streamed_row_by_row(monkeypatch):
    taken = []

    def rows():
        for number in range(1000):
            taken.append(number)
            yield {"body": f"document {number}" if number else None}

    def load_dataset(path, name, *, split, streaming):
        assert (path, name, split, streaming) == ("some-org/text", "en", "validation", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = TextSource(source="some-org/text", name="en", split="validation", column="body")
    documents = read_documents(source)
    assert [next(documents), next(documents)] == ["document 1", "document 2"]
    assert len(taken) < 10
    with pytest.raises(DataError, match=r"no column 'text'.*: body"):
        next(read_documents(source.model_copy(update={"column": "text"})))


def test_a_connection_that_breaks_while_reading_is_a_data_error(monkeypatch):
    def rows():
        yield {"text": "first"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    with pytest.raises(DataError, match="reset by peer"):
        read("some-org/text")


def test_same_text_sees_through_spelling_but_not_through_columns(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", DOCUMENTS)
    monkeypatch.chdir(tmp_path)
    relative, absolute = TextSource(source="a.jsonl"), TextSource(source=str(tmp_path / "a.jsonl"))
    assert source_kind(relative) == "local"
    assert same_text(relative, absolute.model_copy(update={"max_seq_length": 8, "split": "x"}))
    assert not same_text(relative, absolute.model_copy(update={"column": "title"}))
    assert not same_text(relative, TextSource(source="python-docs"))
    hub = TextSource(source="some-org/text")
    assert same_text(hub, hub.model_copy(update={"num_samples": 1}))
    assert not same_text(hub, hub.model_copy(update={"split": "test"}))
