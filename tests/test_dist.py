"""The rank grid, its groups, and the agreement of ranks at the start."""

import os

import pytest
import ranks
import torch
import torch.distributed

from deepv3.config.schema import Config
from deepv3.dist import GROUPS, Grid, init_distributed, set_determinism, shutdown
from deepv3.errors import ConfigError


@pytest.mark.parametrize(("world", "pp", "ep"), [(1, 1, 1), (8, 2, 2), (16, 4, 4), (24, 2, 3), (64, 8, 8)])
def test_every_kind_of_group_covers_the_world_once(world, pp, ep):
    for name in GROUPS:
        assert sorted(sum(Grid(world, 0, pp, ep).slices(name), [])) == list(range(world)), name
    for rank in range(world):
        grid = Grid(world, rank, pp, ep)
        assert grid.rank == grid.pp_rank * grid.dp_size + grid.dp_rank
        assert grid.dp_rank == grid.edp_rank * grid.ep_size + grid.ep_rank
        assert grid.ranks[grid.pp_rank, grid.edp_rank, grid.ep_rank] == rank
        assert all(rank in grid.members(name) for name in GROUPS)


def test_groups_of_a_rank_are_those_of_the_worked_example():
    grid = Grid(8, 5, pp_size=2, ep_size=2)
    found = {name: grid.members(name) for name in ("zero", "ep", "edp", "pp_act", "pp_grad")}
    assert found == {"zero": [4, 5, 6, 7], "ep": [4, 5], "edp": [5, 7], "pp_act": [1, 5], "pp_grad": [1, 5]}


def test_twins_of_a_mirrored_pipeline_share_their_parameters_and_the_ends_share_the_embedding():
    grid = Grid(16, 9, pp_size=4, ep_size=2, mirrored=True)  # ranks 0-3 | 4-7 | 8-11 | 12-15
    found = {name: grid.members(name) for name in ("zero", "ep", "edp", "pp_act", "ends")}
    assert found == {
        "zero": [4, 5, 6, 7, 8, 9, 10, 11], "ep": [8, 9], "edp": [5, 7, 9, 11], "pp_act": [1, 5, 9, 13],
        "ends": [8, 9, 10, 11],
    }  # fmt: skip
    assert Grid(16, 1, 4, 2, mirrored=True).members("edp") == [1, 3, 13, 15]
    assert Grid(16, 14, 4, 2).members("ends") == [0, 1, 2, 3, 12, 13, 14, 15]
    assert [Grid(16, rank, 4, 2, mirrored=True).first_copy for rank in range(0, 16, 4)] == [True, True, False, False]
    with pytest.raises(ConfigError, match="3 % 2 = 1"):
        Grid(6, 0, 3, 1, mirrored=True)


@pytest.mark.parametrize(
    ("sizes", "sides"),
    [
        ((6, 0, 4, 1), "6 ranks .* parallel.pp_size = 4: 6 % 4 = 2"),
        ((6, 0, 1, 4), "parallel.ep_size = 4 does not divide the 6 data ranks .* 6 % 4 = 2"),
        ((8, 0, 4, 4), "parallel.ep_size = 4 does not divide the 2 data ranks"),
        ((4, 0, 0, 1), "parallel.pp_size = 0: must be at least 1"),
    ],
)
def test_an_impossible_grid_names_both_sides(sizes, sides):
    with pytest.raises(ConfigError, match=sides):
        Grid(*sizes)


def test_a_process_without_torchrun_is_a_world_of_one():
    for _ in range(2):  # and may start again
        grid = init_distributed(Config())
        assert (grid.world_size, grid.rank) == (1, 0)
        assert torch.distributed.is_initialized() and os.environ["LOCAL_RANK"] == "0"
        assert grid.gather({"a": [1, "x"]}) == [{"a": [1, "x"]}]
        assert grid.sum_over_world(torch.ones(2)).tolist() == [1, 1]
        assert torch.distributed.get_world_size(grid.group("pp_act")) == 1
        grid.barrier()
        shutdown()
        assert not torch.distributed.is_initialized()


def _groups(pp, ep):
    cfg = Config()
    cfg.parallel.pp_size, cfg.parallel.ep_size = pp, ep
    grid = init_distributed(cfg)
    for name in GROUPS:
        values = torch.tensor([1 << grid.rank])
        torch.distributed.all_reduce(values, group=grid.group(name))
        assert int(values) == sum(1 << rank for rank in grid.members(name)), name
    assert grid.group("zero") is grid.group("zero")
    assert grid.group("pp_grad") is not grid.group("pp_act")
    assert grid.gather("é" * grid.rank) == ["é" * rank for rank in range(grid.world_size)]
    summed = grid.sum_over_world(torch.tensor([float(grid.rank)]))
    return summed.item(), grid.group("edp") is grid.group("zero")


@pytest.mark.parametrize(("pp", "ep"), [(1, 1), (2, 2), (2, 1)])
def test_collectives_on_every_group_reach_its_members_and_no_others(pp, ep):
    results = ranks.run(4, _groups, pp, ep)
    assert [total for total, _ in results] == [6.0] * 4
    assert all(shared == (ep == 1) for _, shared in results)


def _other_config():
    cfg = Config()
    if os.environ["RANK"] == "1":
        cfg.optim.lr = 1.0
    with pytest.raises(ConfigError, match=r"optim.lr: 0.00022 on rank 0, 1.0 on rank 1"):
        init_distributed(cfg)
    return True


def test_ranks_with_different_configs_are_refused_with_both_values():
    assert ranks.run(2, _other_config) == [True, True]


def _fails_on_one():
    grid = init_distributed(Config())
    assert grid.rank == 0, "rank 1 gives up"
    grid.barrier()


def test_the_pool_reports_a_failing_rank_and_where_the_others_hang():
    with pytest.raises(ranks.RankFailed, match="rank 1 gives up"):
        ranks.run(2, _fails_on_one)
    assert ranks.run(2, os.getpid)  # and works again


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_is_what_the_config_says(deterministic):
    set_determinism(5, deterministic)
    first = torch.rand(3)
    set_determinism(5, False)
    assert torch.equal(first, torch.rand(3))
    set_determinism(5, deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    set_determinism(0, False)
