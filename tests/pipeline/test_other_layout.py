"""A checkpoint of one layout goes on on any other: the same state exactly, and the next losses are its own."""

from pathlib import Path

import pytest
import ranks
import torch
from layouts import Case, Outcome, Trainer, together
from standin import same

from deepv3.checkpoint import store

RING = [
    Case(), Case("dualpipev", 2, 2, 2), Case("1f1b", 1, 1, 4), Case("dualpipe", 4), Case("1f1b", 1, 4, 4),
    Case("zb1p", 2, 1, 1), Case("dualpipe", 2, 2, 2), Case("1f1b", 1, 1, 2), Case("dualpipev", 4), Case("zb1p", 4),
    Case("dualpipev", 1), Case("1f1b", 2, 2, 2), Case(),
]  # fmt: skip


def go_on(case: Case, folder: Path, resume: bool, save: bool) -> Outcome:
    """On a rank: two steps after the folder's newest checkpoint, or from the start. The state is that of the
    checkpoint: the one loaded, or the one saved afterwards."""
    trainer = Trainer(case._replace(precision="fp32"))
    grid, engine, model, done = trainer.grid, trainer.engine, trainer.model, 0
    trainer.cfg.run_dir = str(folder)
    if resume:
        newest = store.newest(folder, grid)
        assert newest is not None
        done = store.load(newest, engine, model, None, grid)["done"]
    before = trainer.outcome()
    for step in (done + 1, done + 2):
        trainer.step(step)
    if save:
        store.save(folder, done + 2, engine, model, None, grid, trainer.cfg, {"done": done + 2})
        before = trainer.outcome()
    return before._replace(losses=trainer.losses, counts=[], norms=trainer.norms)


@pytest.mark.parametrize(("saved", "loaded"), list(zip(RING, RING[1:])), ids=str)
def test_state_is_the_same_exactly_on_another_layout_and_so_are_the_next_losses(saved, loaded, tmp_path):
    before = together(ranks.run(saved.world, go_on, saved, tmp_path, False, True))
    alike = together(ranks.run(saved.world, go_on, saved, tmp_path, True, False))
    other = together(ranks.run(loaded.world, go_on, loaded, tmp_path, True, False))
    assert same(alike.state, before.state) and same(alike.biases, before.biases)
    assert same(other.state, before.state) and same(other.biases, before.biases)
    assert torch.tensor(other.losses) == pytest.approx(torch.tensor(alike.losses), rel=1e-5)
