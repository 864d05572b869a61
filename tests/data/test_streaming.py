"""Streaming sources: lanes, resuming on any number of ranks, epochs, held-out rows."""

import json

import pytest
from small_corpus import make_config, make_text, titles, write_corpus

from deepv3.config.schema import SourceConfig
from deepv3.data import streaming
from deepv3.data.loader import build_data
from deepv3.dist import Grid
from deepv3.errors import ConfigError, DataError

LANES = 12


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch):
    """A corpus of hundreds of documents would be dealt thinly to 768 lanes."""
    monkeypatch.setattr(streaming, "LANES", LANES)
    monkeypatch.setattr(streaming, "NOTE_EVERY", 16)


class FakeGrid(Grid):
    """One of several data ranks in one process; ``gather`` is told what the others would send."""

    others: list = []

    def gather(self, value):
        return [json.loads(json.dumps(v)) for v in (self.others or [value])]


@pytest.fixture
def build(tmp_path, cache, corpus):
    made = []

    def one(dp=1, rank=0, path=corpus, **fields):
        fields.setdefault("sources", [SourceConfig(path=str(path), streaming=True)])
        fields.setdefault("validation_fraction", 0.0)
        grid = FakeGrid(dp, rank)
        made.append(build_data(make_config(cache, tmp_path / "run", **fields), grid))
        return made[-1], grid

    yield one
    for data, _ in zip(made, made):
        data.close()


def rows(batches):
    return [row for batch in batches for row in batch.tokens.tolist()]


def state_of(built):
    """The state that all ranks of a run agree on; built: (data, grid) of every rank."""
    parts = [data.train._states for data, _ in built]
    for _, grid in built:
        grid.others = parts
    states = [data.train.state_dict() for data, _ in built]
    assert all(state == states[0] for state in states)
    return json.loads(json.dumps(states[0]))


@pytest.fixture
def plain(build):
    return rows(build()[0].train.micro_batches(0, 480, 1))


@pytest.mark.parametrize(("dp", "size"), [(2, 1), (3, 4), (4, 2), (12, 1)])
def test_a_sample_depends_on_neither_ranks_nor_micro_batches(build, plain, dp, size):
    for rank in range(0, dp, max(1, dp // 3)):
        assert rows(build(dp, rank)[0].train.micro_batches(0, 480, size)) == plain[rank::dp]


def test_a_lane_packs_its_own_documents_in_order(build):
    data, _ = build(fim_rate=0.0, mtp=0)
    lane = [row for i, row in enumerate(rows(data.train.micro_batches(0, 480, 1))) if i % LANES == 5]
    tokens = lane[0] + [token for row in lane[1:] for token in row[1:]]
    names = list(range(240))
    names.sort(key=lambda i: f"sub/{i:03d}" if i % 3 == 0 else f"{i:03d}")
    mine = "".join(make_text(i) + "<｜end▁of▁sentence｜>" for i in names[5::LANES])
    text = data.tokenizer.decode(tokens)
    assert mine.startswith(text[:-5]) or text.startswith(mine)
    assert len(text) > 2000


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (4, 2), (3, 12), (12, 1)])
@pytest.mark.parametrize("at", [0, 12, 156])
def test_resuming_on_any_number_of_ranks_goes_on_as_if_nothing_had_happened(build, plain, before, after, at):
    first = [build(before, rank) for rank in range(before)]
    for data, _ in first:
        rows(data.train.micro_batches(0, at, 1))
    state = state_of(first)
    for rank in range(0, after, max(1, after // 2)):
        data, _ = build(after, rank)
        data.train.load_state_dict(state)
        assert rows(data.train.micro_batches(at, 480 - at, 1)) == plain[at:][rank::after]


@pytest.mark.parametrize("at", [1, 5, 33, 479])
def test_resuming_at_odd_samples_is_exact(build, plain, at):
    built = build()
    rows(built[0].train.micro_batches(0, at, 1))
    again, _ = build()
    again.train.load_state_dict(state_of([built]))
    assert rows(again.train.micro_batches(at, 480 - at, 1)) == plain[at:]


def test_a_resumed_reader_starts_near_where_it_was(build):
    built = build()
    rows(built[0].train.micro_batches(0, 1200, 1))
    state = state_of([built])["streams"][0]
    first = min(place[0] for place in state["lanes"].values())
    assert first - 16 <= max(note["ordinal"] for note in state["notes"]) <= first
    assert first > 100


def test_what_was_made_ahead_is_not_lost_when_the_micro_batch_changes(build, plain):
    data, _ = build()
    taken = rows(data.train.micro_batches(0, 12, 2)) + rows(data.train.micro_batches(12, 12, 4))
    data.train.close()
    assert taken + rows(data.train.micro_batches(24, 24, 4)) == plain[:48]


def test_a_stream_cannot_jump(build):
    data, _ = build()
    with pytest.raises(DataError, match="stands at sample 0 and cannot jump to 8"):
        next(data.train.micro_batches(8, 4, 1))


def test_a_stream_starts_over_and_never_ends(build, tmp_path):
    folder = write_corpus(tmp_path / "few", 20)
    data, _ = build(path=folder, fim_rate=0.0)
    text = data.tokenizer.decode([t for row in rows(data.train.micro_batches(0, 600, 4)) for t in row])
    assert text.count("document 7\n") > 2


def test_lanes_that_ranks_do_not_divide_are_refused_before_any_work(build):
    with pytest.raises(ConfigError, match=r"12 lanes, which 5 data ranks do not divide \(12 % 5 = 2\)"):
        build(5, 0)


def test_the_real_lanes_suit_common_numbers_of_ranks(monkeypatch):
    monkeypatch.undo()
    for dp in (1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 64, 96, 128, 256):
        streaming.check_lanes(dp)


def test_streams_and_mapped_sources_blend_and_resume(build, corpus, tmp_path):
    write_corpus(tmp_path / "other", 200)
    sources = [
        SourceConfig(path=str(corpus), streaming=True, weight=0.5),
        SourceConfig(path=str(tmp_path / "other"), weight=0.5),
    ]
    whole = rows(build(sources=sources)[0].train.micro_batches(0, 384, 1))
    first = [build(4, rank, sources=sources) for rank in range(4)]
    for rank, (data, _) in enumerate(first):
        assert rows(data.train.micro_batches(0, 192, 2)) == whole[:192][rank::4]
    state = state_of(first)
    data, _ = build(2, 1, sources=sources)
    data.train.load_state_dict(state)
    assert rows(data.train.micro_batches(192, 192, 1)) == whole[192:][1::2]
    with pytest.raises(DataError, match="were 1 streams"):
        build(sources=sources[1:])[0].train.load_state_dict(state)


def test_bad_documents_of_a_stream_are_named_and_passed_by_or_stop_it(build, tmp_path, capsys):
    folder = write_corpus(tmp_path / "in", 60)
    (folder / "005.txt").write_bytes(b"caf\xe9")
    data, _ = build(path=folder)
    rows(data.train.micro_batches(0, 48, 1))
    assert f"bad document {folder / '005.txt'}: invalid UTF-8" in capsys.readouterr().err
    stopping, _ = build(path=folder, bad_documents="stop", tokenizer=str(tmp_path / "run" / "tokenizer"))
    with pytest.raises(DataError, match=r"005.txt: invalid UTF-8.*data.bad_documents=skip"):
        rows(stopping.train.micro_batches(0, 48, 1))


def test_held_out_documents_of_a_stream_validate_and_are_not_trained_on(build):
    data, _ = build(validation_fraction=0.2, fim_rate=0.0)
    held = rows(data.validation.micro_batches(0, 24, 2))
    assert held == rows(data.validation.micro_batches(0, 24, 4))
    trained = rows(data.train.micro_batches(0, 480, 1))
    kept, seen = (titles(data.tokenizer.decode([t for row in part for t in row])) for part in (held, trained))
    assert len(kept) > 3
    assert len(seen) > 50
    assert not kept & seen
    both = [build(2, rank, validation_fraction=0.2, fim_rate=0.0)[0].validation for rank in (0, 1)]
    halves = [rows(loader.micro_batches(0, 24, 2)) for loader in both]
    assert [row for pair in zip(*halves) for row in pair] == held


def test_a_stream_that_gives_nothing_to_this_part_is_an_error_not_a_hang(build):
    data, _ = build(validation_fraction=1e-9)
    with pytest.raises(DataError, match="gave no document for validation"):
        next(data.validation.micro_batches(0, 2, 1))
