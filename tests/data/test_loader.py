"""The loader: what a sample is, sharding, resuming, blending, validation, the thread behind it."""

import threading
import time

import pytest
import torch
from small_corpus import make_config, titles, write_corpus

from deepv3.config.schema import SourceConfig
from deepv3.data.loader import build_data
from deepv3.data.packing import Packed
from deepv3.data.prefetch import Prefetch
from deepv3.dist import Grid
from deepv3.errors import ConfigError, DataError


@pytest.fixture
def build(configure):
    """build(dp, rank, **data fields) -> Data; everything is closed at the end."""
    made = []

    def one(dp=1, rank=0, **fields):
        made.append(build_data(configure(**fields), Grid(dp, rank)))
        return made[-1]

    yield one
    for data in made:
        data.close()


def rows(batches):
    """The rows of micro-batches, one after another."""
    return [row for batch in batches for row in batch.tokens.tolist()]


@pytest.fixture
def plain(build):
    """The first 96 samples of the run, read by one rank one by one."""
    return rows(build().train.micro_batches(0, 96, 1))


def test_a_batch_has_its_shape_and_type(build):
    batch = next(build(mtp=2).train.micro_batches(0, 4, 4))
    assert batch.tokens.shape == (4, 32 + 1 + 2)
    assert batch.tokens.dtype == torch.int64
    assert batch.documents is None


@pytest.mark.parametrize(("dp", "size"), [(1, 4), (2, 1), (2, 3), (4, 2), (8, 4)])
def test_a_sample_depends_on_neither_ranks_nor_micro_batches(build, plain, dp, size):
    for rank in range(dp):
        mine = rows(build(dp, rank).train.micro_batches(0, 96, size))
        assert mine == plain[rank::dp]


def test_a_sample_depends_on_the_seed(build, plain):
    assert rows(build(seed=1, fim_rate=0.0).train.micro_batches(0, 96, 1)) != plain


def test_steps_follow_one_another_and_any_sample_can_be_asked_for(build, plain):
    train = build().train
    steps = [rows(train.micro_batches(first, 8, 4)) for first in range(0, 96, 8)]
    assert sum(steps, []) == plain
    for first in (40, 3, 88):
        assert rows(train.micro_batches(first, 8, 2)) == plain[first : first + 8]


@pytest.mark.parametrize("at", [0, 1, 7, 32, 95])
def test_resuming_at_any_sample_goes_on_as_if_nothing_had_happened(build, plain, at):
    first = build().train
    assert rows(first.micro_batches(0, at, 1)) == plain[:at]
    state = first.state_dict()
    again = build().train
    again.load_state_dict(state)
    assert state["next_sample"] == at
    assert rows(again.micro_batches(state["next_sample"], 96 - at, 1)) == plain[at:]


def test_an_epoch_reads_every_packed_row_once(build):
    data = build(mtp=0)
    (packed,) = data.train._feeds
    everything = sorted(packed.row(i).tolist() for i in range(packed.rows))
    assert data.train.rows == packed.rows > 300
    for epoch in range(2):
        assert sorted(rows(data.train.micro_batches(epoch * packed.rows, packed.rows, 1))) == everything


def test_without_shuffling_rows_come_in_order(build):
    data = build(shuffle=False)
    (packed,) = data.train._feeds
    assert rows(data.train.micro_batches(0, 20, 1)) == [packed.row(i).tolist() for i in range(20)]


def test_blended_sources_have_their_shares_and_their_own_order(build, tmp_path, corpus):
    write_corpus(tmp_path / "other", 80)
    names = [str(corpus), str(tmp_path / "other")]
    sources = [SourceConfig(path=names[0], weight=3), SourceConfig(path=names[1], weight=1)]
    data = build(sources=sources)
    feeds = data.train._feeds
    blend = data.train._blend
    drawn = [blend.locate(n) for n in range(128)]
    assert [sum(s == k for s, _ in drawn) for k in (0, 1)] == [96, 32]
    expected = [feeds[source].sample(n, index).tolist() for n, (source, index) in enumerate(drawn)]
    assert rows(data.train.micro_batches(0, 128, 2)) == expected


def test_validation_shares_no_document_with_training(build):
    data = build(fim_rate=0.0)
    texts = []
    for loader in (data.train, data.validation):
        (packed,) = loader._feeds
        text = data.tokenizer.decode([t for i in range(packed.rows) for t in packed.row(i)[:32].tolist()])
        texts.append(titles(text))
    train, held_out = texts
    assert not train & held_out
    assert len(held_out) > 10
    assert len(train) + len(held_out) > 235  # a title cut by the last row is lost


def test_validation_is_the_same_for_every_seed_and_every_time(build):
    data, other = build(), build(seed=5)
    assert isinstance(data.validation._feeds[0], Packed)
    first = rows(data.validation.micro_batches(0, 8, 2))
    assert first == rows(data.validation.micro_batches(0, 8, 4)) == rows(other.validation.micro_batches(0, 8, 1))


def test_separate_validation_sources_leave_training_whole(build, tmp_path):
    write_corpus(tmp_path / "held", 30)
    data = build(validation_sources=[SourceConfig(path=str(tmp_path / "held"))])
    sources = [line for line in data.summary if "documents" in line]
    assert "240 documents" in sources[0]
    assert "30 documents" in sources[1]
    assert "; 0 rewritten for FIM" in sources[1]
    assert build(validation_fraction=0.0).validation is None


def test_masked_documents_are_numbered_within_their_row(build):
    data = build(mask_documents=True)
    for batch in data.train.micro_batches(0, 16, 4):
        ends = batch.tokens == data.tokenizer.eos
        assert batch.documents.dtype == torch.int32
        assert torch.equal(batch.documents[:, 1:], ends.cumsum(1)[:, :-1].int())
        assert not batch.documents[:, 0].any()


def test_a_count_that_does_not_divide_is_refused_with_both_sides(build):
    with pytest.raises(ConfigError, match=r"10 sequences .*micro_batch_size = 2 on 2 data .*10 % 4 = 2"):
        next(build(2, 0).train.micro_batches(0, 10, 2))


def test_a_state_of_other_files_is_refused(build, tmp_path):
    folder = write_corpus(tmp_path / "in", 60)
    state = build(path=folder).train.state_dict()
    (folder / "new.txt").write_text("more " * 500)
    with pytest.raises(DataError, match=r"so sample 0 is another one; bring the files back"):
        build(path=folder).train.load_state_dict(state)


def test_the_loader_is_far_faster_than_training(tmp_path, cache, corpus):
    data = build_data(make_config(cache, tmp_path, path=corpus, seq_len=256), Grid(1, 0))
    next(data.train.micro_batches(0, 8, 8))
    started = time.perf_counter()
    for _ in data.train.micro_batches(0, 2048, 8):
        pass
    rate = 2048 * 256 / (time.perf_counter() - started)
    data.close()
    assert rate > 2e6, f"{rate:,.0f} tokens/s"


# -- the thread --------------------------------------------------------------------------------------------------------


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data"]


def test_an_error_while_loading_surfaces_in_the_training_thread(build, monkeypatch):
    data = build()
    batches = data.train.micro_batches(0, 8, 1)
    next(batches)
    data.close()

    def fail(self, n, index):
        raise DataError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Packed, "sample", fail)
        with pytest.raises(DataError, match="the disk is gone"):
            next(data.train.micro_batches(8, 8, 1))
    assert len(rows(data.train.micro_batches(8, 8, 1))) == 8  # and the loader can be asked again


def test_the_thread_ends_with_close_or_when_dropped():
    before = len(data_threads())
    endless = Prefetch(iter(int, 1), 3)
    assert [next(endless) for _ in range(5)] == [0] * 5
    assert len(data_threads()) == before + 1
    endless.close()
    assert len(data_threads()) == before
    dropped = Prefetch(iter(int, 1), 3)
    del dropped
    assert len(data_threads()) == before


def test_a_finished_iterator_ends_in_order():
    assert list(Prefetch(iter(range(10)), 3)) == list(Prefetch(iter(range(10)), 0)) == list(range(10))
