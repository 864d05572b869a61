"""Real data ranks: several processes prepare together, share the samples and agree on one state."""

import json

import ranks
from small_corpus import make_config

from deepv3.config.schema import SourceConfig


def _read(cfg, state, first, count, state_at):
    """One rank: (its rows of the samples, the state after state_at more samples)."""
    from deepv3.data.loader import build_data
    from deepv3.dist import init_distributed

    data = build_data(cfg, init_distributed(cfg))
    if state is not None:
        data.train.load_state_dict(state)
    rows = [row for batch in data.train.micro_batches(first, count, 1) for row in batch.tokens.tolist()]
    saved = data.train.state_dict() if state_at else None
    data.close()
    return rows, json.dumps(saved)


def test_ranks_share_the_samples_and_a_state_moves_between_numbers_of_ranks(tmp_path, corpus):
    sources = [
        SourceConfig(path=str(corpus), streaming=True, weight=0.25),
        SourceConfig(path=str(corpus), weight=0.75),
    ]
    cfg = make_config(tmp_path / "cache", tmp_path / "run", sources=sources, validation_fraction=0.0)
    ((whole, _),) = ranks.run(1, _read, cfg, None, 0, 64, False)
    first = ranks.run(2, _read, cfg, None, 0, 32, True)
    assert [row for pair in zip(first[0][0], first[1][0]) for row in pair] == whole[:32]
    assert first[0][1] == first[1][1]
    ((rest, _),) = ranks.run(1, _read, cfg, json.loads(first[0][1]), 32, 32, False)
    assert rest == whole[32:]
