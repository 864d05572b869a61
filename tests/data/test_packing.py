"""Packed rows: coverage, overlap, document ids; the files they are read from."""

import json

import numpy as np
import pytest

from deepv3.data import packing
from deepv3.data.packing import Packed, RowShape, document_ids
from deepv3.data.tokenise import BATCH_TOKENS, TokenWriter, token_file


def write_tokens(folder, pieces, dtype_rows=400):
    """Pieces of documents as the tokenising processes leave them. pieces: list of lists of arrays."""
    counts = []
    for number, documents in enumerate(pieces):
        counts.append(sum(map(len, documents)))
        if documents:
            writer = TokenWriter(token_file(folder, number, "train"), dtype_rows)
            for i, tokens in enumerate(documents):
                writer.add(i, np.asarray(tokens, np.int32))
            writer.close()
    summary = {"piece_tokens": {"train": counts}}
    (folder / packing.SUMMARY).write_text(json.dumps(summary), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """A run of 1000 distinct tokens over pieces of all sizes, one of them empty."""
    rng, start, pieces = np.random.default_rng(0), 0, [[] for _ in range(6)]
    while start < 1000:
        stop = min(1000, start + int(rng.integers(1, 60)))
        pieces[(0, 1, 2, 4, 5)[start // 200]].append(np.arange(start, stop))
        start = stop
    write_tokens(tmp_path, pieces, 2000)
    return tmp_path


@pytest.mark.parametrize(("seq_len", "extra"), [(4, 1), (32, 2), (100, 1), (250, 3)])
def test_rows_are_stretches_that_overlap_by_their_extra_targets(run, seq_len, extra):
    packed = Packed(run, "train", RowShape(seq_len, seq_len + extra), None)
    for i in range(packed.rows):
        assert packed.row(i).tolist() == list(range(i * seq_len, i * seq_len + seq_len + extra))
    assert packed.rows == (1000 - extra) // seq_len


@pytest.mark.parametrize(("seq_len", "depth"), [(7, 0), (32, 1), (64, 2)])
def test_each_token_is_a_main_target_exactly_once_an_epoch(run, seq_len, depth):
    packed = Packed(run, "train", RowShape(seq_len, seq_len + 1 + depth), (0, 0))
    for epoch in range(3):
        drawn = [packed.sample(0, epoch * packed.rows + i) for i in range(packed.rows)]
        targets = sorted(token for row in drawn for token in row[1 : seq_len + 1].tolist())
        assert targets == list(range(1, packed.rows * seq_len + 1))


def test_the_number_of_rows_is_exact_at_its_edges():
    shape = RowShape(4, 6)
    assert [shape.rows(tokens) for tokens in (0, 5, 6, 9, 10, 13, 14)] == [0, 0, 1, 1, 2, 2, 3]


def test_epochs_differ_in_order_unless_shuffling_is_off(run):
    shape = RowShape(10, 12)
    shuffled, plain = Packed(run, "train", shape, (0, 0)), Packed(run, "train", shape, None)
    epochs = [[int(shuffled.sample(0, e * shuffled.rows + i)[0]) for i in range(shuffled.rows)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [int(plain.sample(0, i)[0]) for i in range(plain.rows)]
    assert epochs[0] != epochs[1]


def test_a_row_crosses_record_batches_and_keeps_every_token(tmp_path, monkeypatch):
    monkeypatch.setattr("deepv3.data.tokenise.BATCH_TOKENS", 16)
    write_tokens(tmp_path, [[np.arange(i, i + 5) for i in range(0, 300, 5)]], 100_000)
    packed = Packed(tmp_path, "train", RowShape(40, 42), None)
    assert [packed.row(i).tolist() for i in range(packed.rows)] == [list(range(40 * i, 40 * i + 42)) for i in range(7)]
    assert BATCH_TOKENS > 16


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_tokens_take_two_bytes_where_they_fit_and_lose_nothing(tmp_path, vocabulary, dtype):
    write_tokens(tmp_path, [[np.array([0, vocabulary - 1, 5, 6])]], vocabulary)
    row = Packed(tmp_path, "train", RowShape(2, 4), None).row(0)
    assert row.dtype == dtype
    assert row.tolist() == [0, vocabulary - 1, 5, 6]


def test_datasets_opens_a_token_file(run):
    import datasets

    opened = datasets.Dataset.from_file(str(token_file(run, 0, "train")))
    assert opened.column_names == ["number", "tokens"]
    assert opened[0]["tokens"][:2] == [0, 1]


def test_document_ids_change_after_each_eos():
    tokens = np.array([[5, 6, 1, 7, 1, 1, 8], [1, 5, 5, 5, 5, 5, 1]])
    assert document_ids(tokens, 1).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
