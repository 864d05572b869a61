"""Sources: every format yields the same documents; bad input is named, counted or refused."""

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import make_text

from deepv3.config.schema import SourceConfig
from deepv3.data import pieces, reading
from deepv3.data.corpus import open_source, read_text
from deepv3.data.prepare import prepare
from deepv3.errors import DataError

TEXTS = [make_text(i) for i in range(60)]


def read(path, cache, stop=False, **fields):
    """All documents of a source, as dictionaries."""
    source = open_source(SourceConfig(path=str(path), **fields), "data.sources[0]", cache, stop)
    return list(source.documents(cache))


def write_rows(path, texts=TEXTS, field="text"):
    """A jsonl file."""
    path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    return path


def write_parquet(path, texts=TEXTS, row_group_size=20):
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=row_group_size)
    return path


# -- formats -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_text_gives_one_document_a_file_in_sorted_order(tmp_path, cache):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    found = read(tmp_path, cache)
    assert [row["text"] for row in found] == TEXTS
    assert [row["number"] for row in found] == [i << reading.PLACE_BITS for i in range(60)]
    assert found[3]["name"] == str(tmp_path / "03.txt")


def test_jsonl_parquet_arrow_and_saved_datasets_give_the_same_documents(tmp_path, cache):
    table = datasets.Dataset.from_dict({"id": list(range(60)), "text": TEXTS})
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dictionary")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.data.schema) as writer:
        writer.write_table(table.data.table)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(write_rows(tmp_path / "a.jsonl").read_bytes()))
    write_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "saved", "dictionary", "file.arrow"):
        assert [row["text"] for row in read(tmp_path / name, cache)] == TEXTS, name


def test_globs_and_another_field_are_read(tmp_path, cache):
    write_rows(tmp_path / "a1.jsonl", TEXTS[:30], "content")
    write_rows(tmp_path / "a2.jsonl", TEXTS[30:], "content")
    write_rows(tmp_path / "b.jsonl", ["no"], "content")
    assert [row["text"] for row in read(tmp_path / "a*.jsonl", cache, field="content")] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_documents_and_numbers_do_not_depend_on_the_pieces(tmp_path, cache, monkeypatch, name):
    write_rows(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    whole = read(tmp_path / name, cache)
    monkeypatch.setattr(pieces, "MIN_BYTES", 700)
    source = open_source(SourceConfig(path=str(tmp_path / name)), "data.sources[0]", cache, False)
    assert len(source.pieces) > 2
    assert [row for i in range(len(source.pieces)) for row in source.documents(cache, i)] == whole
    assert len({row["number"] for row in whole}) == 60


def test_the_standard_library_is_a_source_without_its_tests(cache):
    source = open_source(SourceConfig(path="python-stdlib"), "data.sources[0]", cache, True)
    paths = [path for piece in source.pieces for path in piece.paths]
    assert len(paths) > 300
    assert all(path.endswith(".py") and "/test/" not in path and "site-packages" not in path for path in paths)
    assert sum(path.endswith(os.sep + "argparse.py") for path in paths) == 1
    rows = list(source.documents(cache, 3))
    assert all(row["error"] is None for row in rows)


def test_a_tokenizer_is_trained_on_text_from_all_over_the_source(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_BYTES", 700)
    source = open_source(SourceConfig(path=str(write_rows(tmp_path / "a.jsonl"))), "data.sources[0]", cache, False)
    taken = list(read_text(source, cache, 4000))
    assert 4000 <= sum(len(text.encode()) for text in taken) < 5000
    places = [TEXTS.index(text) for text in taken[:-1]]
    assert max(places) > 30
    assert sorted(read_text(source, cache, 10**9)) == sorted(TEXTS)


# -- bad documents are named and counted -------------------------------------------------------------------------------


def damaged_folder(folder):
    """Two good documents among every kind of bad one."""
    folder.mkdir()
    (folder / "good1.txt").write_text(make_text(1), encoding="utf-8")
    (folder / "good2.txt").write_text("\ufeff" + make_text(2), encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (folder / "binary.txt").write_bytes(b"MZ\x00\x01")
    (folder / "empty.txt").write_text("")
    (folder / "cut.txt").write_bytes("🙂".encode()[:3])
    return folder


def test_a_bad_text_file_is_named_with_its_reason_and_the_rest_is_read(tmp_path, cache):
    rows = {os.path.basename(row["name"]): row for row in read(damaged_folder(tmp_path / "in"), cache)}
    assert rows["good1.txt"]["text"] == make_text(1)
    assert rows["good2.txt"]["text"] == make_text(2)  # its byte order mark is no text
    assert rows["latin.txt"]["error"] == "invalid UTF-8: byte 0xe9 at 3 of 12"
    assert rows["binary.txt"]["error"] == "binary: a NUL byte at 2 of 4"
    assert "invalid UTF-8" in rows["cut.txt"]["error"]
    assert rows["empty.txt"]["text"] == ""
    assert all(row["text"] is None for row in rows.values() if row["error"])


def test_the_summary_counts_and_names_what_was_left_out(tmp_path, configure, silent):
    cfg = configure(path=damaged_folder(tmp_path / "in"), validation_fraction=0.0, cache=tmp_path / "cache", seq_len=8)
    prepared = prepare(cfg, silent)
    counts = prepared.train[0].counts
    assert (counts["bad"], counts["empty"], counts["documents"]["train"]) == (3, 1, 2)
    text = "\n".join(prepared.describe())
    assert "1 empty and 3 bad left out" in text
    assert f"bad document {tmp_path / 'in' / 'latin.txt'}: invalid UTF-8" in text


def test_stop_refuses_the_first_bad_document_by_name_even_if_the_cache_is_there(tmp_path, configure, silent):
    fields = {
        "path": damaged_folder(tmp_path / "in"),
        "validation_fraction": 0.0,
        "cache": tmp_path / "c",
        "seq_len": 8,
    }
    with pytest.raises(DataError, match=r"binary.txt.*data.bad_documents=skip"):
        prepare(configure(**fields, bad_documents="stop"), silent)
    prepare(configure(**fields), silent)
    with pytest.raises(DataError, match=r"binary.txt.*data.bad_documents=skip"):
        prepare(configure(**fields, bad_documents="stop"), silent)


def test_bad_lines_of_a_jsonl_file_are_named_by_their_place(tmp_path, cache):
    lines = [
        b'{"text": "one"}',
        b'{"text": "two"',
        b"",
        b'{"text": "caf\xe9"}',
        b'{"text": "half \\ud800"}',
        b'{"other": "x"}',
        b'{"text": 5}',
        b"[1, 2]",
        b"[" * 100_000,
        '{"text": "naïve"}'.encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "a.jsonl", cache)
    assert [row["text"] for row in rows if not row["error"]] == ["one", "naïve"]
    errors = [row["error"] for row in rows if row["error"]]
    starts = ["no JSON", "invalid UTF-8", "invalid UTF-8: lone", "no text: the field is missing", "no text: the field"]
    assert all(error.startswith(start) for error, start in zip(errors, [*starts, "no JSON object", "no JSON"]))
    assert len(errors) == 7
    assert rows[1]["name"] == f"{tmp_path / 'a.jsonl'} at byte 16"


@pytest.mark.parametrize("packed", [False, True])
def test_a_giant_line_is_passed_by_and_the_next_one_read(tmp_path, cache, monkeypatch, packed):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 4000)
    monkeypatch.setattr(pieces, "MIN_BYTES", 3000)
    data = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in ("a", "b" * 20_000, "c", "d" * 9000, "e"))
    name = "a.jsonl.gz" if packed else "a.jsonl"
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    rows = read(tmp_path / name, cache)
    assert [row["text"] for row in rows] == ["a", None, "c", None, "e"]
    assert "a line of more than 4,000 bytes" in rows[1]["error"]
    (tmp_path / "big.txt").write_text("x" * 5000)
    assert "more than 4,000 bytes" in read(tmp_path / "big.txt", cache)[0]["error"]


def test_invalid_utf8_in_a_parquet_column_is_one_bad_row(tmp_path, cache):
    column = pa.array([b"one", b"caf\xe9", None, b"four"], pa.binary())
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", cache)
    assert [row["text"] for row in rows] == ["one", None, None, "four"]
    assert rows[1]["name"] == f"{tmp_path / 'a.parquet'} row 1"
    assert "0xe9" in rows[1]["error"]


def test_a_truncated_parquet_file_among_sound_ones_is_named_and_counted(tmp_path, configure, silent):
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "a.parquet")
    whole = write_parquet(folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    prepared = prepare(configure(path=folder, cache=tmp_path / "cache"), silent)
    assert prepared.train[0].counts["bad"] == 1
    assert f"bad document {folder / 'b.parquet'}:" in "\n".join(prepared.describe())
    with pytest.raises(DataError, match=r"1 of 2 files .*b.parquet .*bad_documents=skip"):
        prepare(configure(path=folder, cache=tmp_path / "cache", bad_documents="stop"), silent)


def test_a_damaged_row_group_costs_its_rows_only(tmp_path, cache):
    path = write_parquet(tmp_path / "a.parquet")
    place = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = read(path, cache)
    good = [row["text"] for row in rows if not row["error"]]
    assert good[:20] == TEXTS[:20]
    assert good[-20:] == TEXTS[40:]
    assert [row["name"] for row in rows if row["error"]] == [f"{path} row 20 to the end of row group 1"]


# -- refused before any work -------------------------------------------------------------------------------------------


def refuse(path, cache, match, **fields):
    with pytest.raises(DataError, match=match):
        read(path, cache, **fields)


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "missing.jsonl", "~/missing/x", "data/*.parquet"])
def test_a_path_that_leads_nowhere_is_refused_without_asking_the_hub(path, cache, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    refuse(path, cache, r"data.sources\[0\].path=.*(no such file or folder|matches no file)")


def test_a_hub_name_out_of_reach_says_so(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for streaming in (False, True):
        refuse("owner/name", cache, r"data.sources\[0\].path=owner/name: no file or folder here", streaming=streaming)


def test_an_empty_folder_is_refused(tmp_path, cache):
    (tmp_path / "sub").mkdir()
    refuse(tmp_path, cache, r"data.sources\[0\].path=.*: the folder is empty")


def test_a_folder_without_fitting_files_says_what_is_there(tmp_path, cache):
    (tmp_path / "a.py").write_text("x")
    refuse(tmp_path, cache, r"none ends in .txt, .md \(there are: .py 1\); set data.sources\[0\].suffixes")
    assert [row["text"] for row in read(tmp_path, cache, suffixes=[".py"])] == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_an_empty_file_is_refused(tmp_path, cache, name):
    (tmp_path / name).write_bytes(b"")
    refuse(tmp_path / name, cache, "all 1 files are empty; give files that hold text")


def test_files_without_a_row_are_refused(tmp_path, cache):
    write_parquet(tmp_path / "a.parquet", [])
    refuse(tmp_path, cache, "1 files without a single row")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_a_file_that_is_not_what_it_says_is_refused_by_name(tmp_path, cache, name):
    (tmp_path / name).write_bytes(b"this is no such file, " * 20)
    refuse(tmp_path / name, cache, rf"none of 1 files can be read: {tmp_path / name} .*format to what they are")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_a_missing_field_is_refused_with_the_fields_there_are(tmp_path, cache, name):
    write_rows(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"id": [1], "text": ["a"]}).save_to_disk(tmp_path / "saved")
    refuse(tmp_path / name, cache, r"has no field 'content' .*id, text.* set data.sources\[0\].field", field="content")


def test_a_missing_split_is_refused_with_the_splits_there_are(tmp_path, cache):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "d")
    refuse(tmp_path / "d", cache, r"data.sources\[0\].split=test: .* holds train", split="test")


def test_a_folder_of_several_formats_asks_which(tmp_path, cache):
    write_rows(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "a.parquet")
    refuse(tmp_path, cache, r"holds jsonl and parquet files; set data.sources\[0\].format")
    assert len(read(tmp_path, cache, format="parquet")) == 60


def test_more_files_than_documents_can_be_numbered_are_refused(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("deepv3.data.corpus.MAX_FILES", 2)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("x")
    refuse(tmp_path, cache, "holds 3 files, more than 2; pack the documents into parquet")


def test_a_dangling_link_is_a_bad_file_not_a_crash(tmp_path, cache):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    source = open_source(SourceConfig(path=str(tmp_path)), "data.sources[0]", cache, False)
    assert [path for path, _ in source.damaged] == [str(tmp_path / "b.txt")]


def test_only_bad_documents_are_refused_with_their_reasons(tmp_path, configure, silent):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff\xfe")
    cfg = configure(path=tmp_path / "in", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="no readable text to train a tokenizer on"):
        prepare(cfg, silent)


def test_too_little_text_for_a_row_or_for_validation_names_both_sides(tmp_path, configure, silent):
    (tmp_path / "a.txt").write_text("a few words only")
    with pytest.raises(DataError, match=r"data.sources\[0\] gives \d+ tokens to train on, but a row takes 34"):
        prepare(configure(path=tmp_path / "a.txt", cache=tmp_path / "c", validation_fraction=0.0), silent)
    (tmp_path / "a.txt").write_text(make_text(1, 5000))
    with pytest.raises(DataError, match=r"validation_fraction = 0.1 of 1 documents holds out 0 tokens"):
        prepare(configure(path=tmp_path / "a.txt", cache=tmp_path / "c"), silent)
