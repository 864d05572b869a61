"""Saving and loading on one and on several ranks: same state, same future, whatever the layout."""

import json
import os
from pathlib import Path

import pytest
import ranks
import torch
from safetensors import safe_open
from standin import BATCH, EXPERTS, config, same, start, whole

from deepv3.checkpoint import store
from deepv3.errors import CheckpointError
from deepv3.optim.ema import WeightAverage


def _train(run_dir, precision, load, steps, save, ema):
    """On a rank: load a checkpoint or none, take `steps`, save if asked. Returns everything that must be the same."""
    cfg = config(precision)
    run = start(cfg)
    average = WeightAverage(run.engine, 0.9) if ema else None
    client = {"progress": {"step": 0, "samples": 0}}
    if load:
        client = store.load(store.newest(run_dir, run.grid), run.engine, run.model, average, run.grid)
    first = client["progress"]["step"]
    for number in range(first + 1, first + steps + 1):
        run.step(number)
        run.model.bias += number  # router biases move outside the optimizer
        torch.rand(number)  # and something draws random numbers
        if average:
            average.update()
    client = {"progress": {"step": first + steps, "samples": (first + steps) * BATCH}, "rank": run.grid.rank}
    if save:
        store.save(run_dir, first + steps, run.engine, run.model, average, run.grid, cfg, client)
    averages = {}
    if average:
        average.wait()
        averages = {f"{f.name}/{f.lo}": average.view(f).clone() for f in run.engine.fragments()}
    extra = {"bias": run.model.bias.clone(), "random": torch.rand(4), **averages}
    return run.state(), run.weights(), run.norms, run.engine.counters(), extra, client


def _equal(a, b):
    return all(
        same(x[0], y[0]) and same(x[1], y[1]) and x[3:4] == y[3:4] and same(x[4], y[4]) and x[5] == y[5]
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("world", "precision", "ema"), [(1, "fp32", False), (1, "bf16", True), (2, "bf16", True), (2, "fp32", False)]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, world, precision, ema):
    whole_run = ranks.run(world, _train, tmp_path / "a", precision, False, 4, False, ema)
    ranks.run(world, _train, tmp_path / "b", precision, False, 2, True, ema)
    resumed = ranks.run(world, _train, tmp_path / "b", precision, True, 2, False, ema)
    assert _equal(whole_run, resumed)
    assert [norms for _, _, norms, *_ in resumed] == [norms[2:] for _, _, norms, *_ in whole_run]


def test_state_is_the_same_through_dp_2_to_1_to_2_and_so_is_the_future(tmp_path):
    ranks.run(2, _train, tmp_path, "bf16", False, 3, True, True)
    two = ranks.run(2, _train, tmp_path, "bf16", True, 0, False, True)
    one = ranks.run(1, _train, tmp_path, "bf16", True, 0, True, True)  # rewrites the same step
    assert same(whole([r[0] for r in one]), whole([r[0] for r in two]))
    again = ranks.run(2, _train, tmp_path, "bf16", True, 0, False, True)
    for before, after in zip(two, again):
        assert all(same(before[part], after[part]) for part in (0, 1))
        bias, averages = before[4].pop("bias"), before[4]
        assert torch.equal(bias, after[4]["bias"])
        assert all(torch.equal(t, after[4][name]) for name, t in averages.items() if name != "random")


def _numbers(name: str, kind: str, count: int) -> torch.Tensor:
    """The value every element of a tensor is given: it depends on its global place only."""
    seed = sum(name.encode()) + {"master": 0, "exp_avg": 1, "exp_avg_sq": 2}[kind]
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def _fill_or_check(run_dir, ep, save):
    """On a rank with a share of the experts: write known numbers and save, or load and compare."""
    cfg = config()
    cfg.parallel.ep_size = ep
    run = start(cfg, ep_size=ep)
    if not save:
        store.load(store.newest(run_dir, run.grid), run.engine, run.model, None, run.grid)
    good, elements = True, 0
    for f in run.engine.fragments():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            held = getattr(f, kind)
            wanted = _numbers(f.name, kind, torch.Size(f.shape).numel())[f.lo : f.hi].to(held.dtype)
            if save:
                held.copy_(wanted)
            good &= torch.equal(held, wanted)
        elements += f.hi - f.lo
    if save:
        store.save(run_dir, 1, run.engine, run.model, None, run.grid, cfg, {})
    else:
        up = run.model.mlp["experts"].up.weight
        first = run.grid.ep_rank * EXPERTS // ep
        wanted = _numbers("mlp.experts.up.weight", "master", up.numel() * ep).view(EXPERTS, *up.shape[1:])
        good &= torch.equal(up.detach(), wanted[first : first + EXPERTS // ep].to(up.dtype))
    return good, elements


@pytest.mark.parametrize(("saved", "loaded"), [((1, 1), (4, 2)), ((4, 2), (1, 1)), ((4, 4), (2, 1)), ((2, 2), (4, 4))])
def test_any_layout_loads_what_any_other_saved(tmp_path, saved, loaded):
    """Layouts are (ranks, ep_size)."""
    wrote = ranks.run(saved[0], _fill_or_check, tmp_path, saved[1], True)
    read = ranks.run(loaded[0], _fill_or_check, tmp_path, loaded[1], False)
    assert all(good for good, _ in wrote + read)
    assert sum(elements for _, elements in wrote) == sum(elements for _, elements in read)


def test_a_checkpoint_is_json_and_safetensors_that_the_library_reads(tmp_path):
    before = ranks.run(2, _train, tmp_path, "bf16", False, 2, True, True)
    folder = tmp_path / "checkpoints/step-00000002"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"
    ]  # fmt: skip
    for rank, (state, *_) in enumerate(before):
        with safe_open(folder / f"rank-0000{rank}.safetensors", "pt") as file:
            for name, pieces in state.items():
                for lo, kinds in pieces.items():
                    assert all(same(file.get_tensor(f"{kind}/{name}/{lo}"), t) for kind, t in kinds.items())
    manifest = json.loads((folder / "manifest.json").read_text())["content"]
    assert manifest["step"] == 2 and manifest["counters"] == {"applied_steps": 2, "skipped_steps": 0}
    assert manifest["grid"] == {"world_size": 2, "pp_size": 1, "ep_size": 1}
    assert manifest["kinds"] == ["master", "exp_avg", "exp_avg_sq", "ema"]
    assert manifest["config"]["seed"] == 3 and manifest["versions"]["torch"] == torch.__version__
    assert manifest["shards"][0]["buffers"] == ["bias"] and manifest["shards"][1]["buffers"] == []
    assert (tmp_path / "checkpoints/latest").resolve() == folder


def _other_model(run_dir, change):
    run = start(config())
    if change == "smaller":
        del run.engine.flat_groups[-1]
        message = r"holds 1\d{3} parameters, this model \d+"
    elif change == "renamed":
        piece = run.engine.flat_groups[0].pieces[0]
        run.engine.flat_groups[0].pieces[0] = type(piece)("other", *list(vars(piece).values())[1:])
        message = r"other is absent, this model's is \[37, 13\]; set the fields of `model`"
    else:
        run.model.register_buffer("another", torch.zeros(1))
        message = "holds no buffer another"
    with pytest.raises(CheckpointError, match=message):
        store.load(run_dir / "checkpoints/step-00000001", run.engine, run.model, None, run.grid)
    return True


@pytest.mark.parametrize("change", ["smaller", "renamed", "buffer"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change):
    ranks.run(1, _train, tmp_path, "bf16", False, 1, True, False)
    assert ranks.run(2, _other_model, tmp_path, change) == [True, True]


def _no_average_stored(run_dir):
    run = start(config())
    average = WeightAverage(run.engine, 0.9)
    store.load(run_dir / "checkpoints/step-00000001", run.engine, run.model, average, run.grid)
    return all(torch.equal(average.view(f), f.master) for f in run.engine.fragments())


def test_an_average_that_was_not_stored_starts_from_the_masters(tmp_path):
    ranks.run(1, _train, tmp_path, "bf16", False, 1, True, False)
    assert ranks.run(1, _no_average_stored, tmp_path) == [True]


def _write_fails(run_dir, error, only_rank):
    """Rank `only_rank` cannot write its shard. Returns what this rank raised and what is on the disk afterwards."""
    from deepv3.checkpoint import shards

    cfg = config()
    run = start(cfg)
    real = shards.write

    def broken(path, source):
        if run.grid.rank == only_rank:
            path.write_bytes(b"half")
            raise error
        return real(path, source)

    shards.write = broken
    try:
        store.save(run_dir, 7, run.engine, run.model, None, run.grid, cfg, {})
    except Exception as raised:
        run.grid.barrier()
        return type(raised).__name__, str(raised), sorted(os.listdir(run_dir / "checkpoints"))
    finally:
        shards.write = real


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OSError(28, "No space left on device"),
            "ResourceError",
            "No space left on device: free some, lower checkpoint.keep",
        ),
        (OSError(30, "Read-only file system"), "CheckpointError", "Read-only file system"),
    ],
)
def test_where_one_rank_cannot_write_all_raise_and_nothing_is_left(tmp_path, error, kind, words):
    for name, message, left in ranks.run(2, _write_fails, tmp_path, error, 1):
        assert name == kind and words in message and "rank-00001.safetensors" in message and "(rank 1)" in message
        assert left == []


def test_an_unforeseen_error_on_one_rank_hangs_nobody(tmp_path):
    (_, message, left), (own, *_) = ranks.run(2, _write_fails, tmp_path, KeyError("bug"), 1)
    assert own == "KeyError" and "KeyError('bug')" in message and left == []


def test_resuming_needs_no_path_of_the_machine_that_saved(tmp_path):
    """A folder may be moved."""
    before = ranks.run(1, _train, tmp_path / "a", "bf16", False, 1, True, False)
    Path(tmp_path / "a").rename(tmp_path / "b")
    after = ranks.run(1, _train, tmp_path / "b", "bf16", True, 0, False, False)
    assert same(before[0][0], after[0][0])
