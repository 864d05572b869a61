"""The experts plan as a user meets it: tables, the placement file, the report's deployments, refusals."""

import json
import random

import pytest

from deepv3.config.compose import compose, to_yaml
from deepv3.errors import ConfigError, DataError
from deepv3.planner.experts import Layout, balance
from deepv3.planner.experts_report import main

ROWS = {"tiny": (8, 16), "v3_671b": (59, 256)}  # MoE layers with MTP's, experts


def make_run(folder, preset, config=True):
    """A run folder as training leaves it: resolved config and uneven loads. Returns the loads."""
    rng, (layers, width) = random.Random(preset), ROWS[preset]
    counts = [[round(1000 * rng.lognormvariate(0, 0.5)) for _ in range(width)] for _ in range(layers)]
    (folder / "expert_load.jsonl").write_text(json.dumps({"step": 20, "counts": counts}) + "\n")
    if config:
        (folder / "config.yaml").write_text(to_yaml(compose([f"+config={preset}"])))
    return counts


def plan(folder, **keys):
    """The placement that the command leaves in its file."""
    assert main({"experts": str(folder), **{key: str(value) for key, value in keys.items()}}) == 0
    return json.loads((folder / "expert_placement.json").read_text())


def test_the_file_holds_the_balancers_placement_and_its_inverse(tmp_path):
    counts = make_run(tmp_path, "tiny")
    found = plan(tmp_path, replicas=8, ranks=8, nodes=2)
    layout = Layout(16, 24, 8, nodes=2, groups=4)
    assert found["phy2log"] == [balance(row, layout) for row in counts]
    sizes = [found[key] for key in ("experts", "redundant", "slots", "ranks", "slots_per_rank", "nodes", "groups")]
    assert sizes == [16, 8, 24, 8, 3, 2, 4]
    assert found["layers"] == [1, 2, 3, 4, 5, 6, 7, 8] and found["method"] == "hierarchical"
    assert found["shared_expert"] is None
    for phy2log, log2phy, logcnt in zip(found["phy2log"], found["log2phy"], found["logcnt"]):
        for expert, (slots, n) in enumerate(zip(log2phy, logcnt)):
            assert slots[:n] == [slot for slot, e in enumerate(phy2log) if e == expert]
            assert set(slots[n:]) <= {-1}
    assert len({len(slots) for layer in found["log2phy"] for slots in layer}) == 1, "rectangular, as a tensor is"


def test_predicted_loads_are_those_of_the_placement(tmp_path):
    counts = make_run(tmp_path, "tiny")
    found = plan(tmp_path, replicas=8, ranks=8, nodes=2)
    for row, placed, ratio in zip(counts, found["phy2log"], found["max_over_mean"]["after"]["layers"]):
        share = [row[e] / placed.count(e) for e in placed]
        loads = [sum(share[r * 3 : r * 3 + 3]) for r in range(8)]
        assert ratio == pytest.approx(max(loads) / (sum(loads) / 8), abs=1e-5)
    for row, ratio in zip(counts, found["max_over_mean"]["before"]["layers"]):
        loads = [sum(row[r * 2 : r * 2 + 2]) for r in range(8)]
        assert ratio == pytest.approx(max(loads) / (sum(loads) / 8), abs=1e-5)
    assert found["max_over_mean"]["after"]["worst"] < found["max_over_mean"]["before"]["worst"]
    assert found["max_over_mean"]["after_global"]["mean"] <= found["max_over_mean"]["after"]["mean"]


def test_prefill_is_the_reports_nine_experts_on_each_of_32_gpus(tmp_path, capsys):
    make_run(tmp_path, "v3_671b")
    found = plan(tmp_path, deployment="prefill")
    assert (found["slots"], found["ranks"], found["slots_per_rank"], found["nodes"]) == (288, 32, 9, 4)
    assert (found["redundant"], found["method"], found["layers"]) == (32, "hierarchical", list(range(3, 62)))
    text = capsys.readouterr().out
    assert "8 groups % 4 nodes = 0" in text and "61 (MTP)" in text


def test_decode_is_the_reports_one_expert_a_gpu_with_the_shared_one_among_the_last_64(tmp_path, capsys):
    counts = make_run(tmp_path, "v3_671b")
    found = plan(tmp_path, deployment="decode")
    assert (found["slots"], found["ranks"], found["slots_per_rank"], found["redundant"]) == (320, 320, 1, 64)
    assert (found["method"], found["shared_expert"]) == ("global", 256)
    for row, placed, logcnt in zip(counts, found["phy2log"], found["logcnt"]):
        assert placed[:256] == list(range(256)) and placed[256] == 256, "no re-arrangement, report 3.4.2"
        assert sum(logcnt) == 320 and logcnt[256] > 8
        per_copy = [load / n for load, n in zip([*row, sum(row) / 8], logcnt)]
        relieved = [load / (n - 1) for load, n in zip([*row, sum(row) / 8], logcnt) if n > 1]
        assert min(relieved) >= max(per_copy) * (1 - 1e-9), "every copy went where the load per copy was largest"
    assert "shared" in capsys.readouterr().out


def test_keys_override_a_deployments_sizes(tmp_path):
    make_run(tmp_path, "v3_671b")
    found = plan(tmp_path, deployment="decode_2025", nodes=4)
    assert (found["ranks"], found["slots_per_rank"], found["nodes"], found["method"]) == (144, 2, 4, "hierarchical")


@pytest.mark.parametrize("replicas, ranks, nodes", [(8, 8, 1), (32, 16, 2), (4, 4, 1)])
def test_sizes_that_are_not_given_follow_from_the_rest(tmp_path, replicas, ranks, nodes):
    make_run(tmp_path, "tiny")
    found = plan(tmp_path, replicas=replicas)
    assert (found["ranks"], found["nodes"], found["slots"]) == (ranks, nodes, 16 + replicas)


def test_json_is_one_object_on_stdout_and_the_same_as_the_file(tmp_path, capsys):
    make_run(tmp_path, "tiny")
    found = plan(tmp_path, replicas=8, json="true")
    assert json.loads(capsys.readouterr().out) == found


def test_tables_show_each_layer_and_who_lies_where(tmp_path, capsys):
    make_run(tmp_path, "tiny")
    found = plan(tmp_path, replicas=8, layer=8)
    text = capsys.readouterr().out
    assert "Layer 8 (MTP): experts by rank" in text and "expert_placement.json" in text
    assert f"{found['max_over_mean']['after']['worst']:.3f}" in text
    assert " | ".join(str(e) + "*" * (found["logcnt"][7][e] > 1) for e in found["phy2log"][7][:1]) in text


def test_sglangs_file_has_a_row_for_every_main_layer_and_nothing_else(tmp_path):
    make_run(tmp_path, "tiny")
    found = plan(tmp_path, replicas=8, sglang=tmp_path / "sub" / "sglang.json")
    theirs = json.loads((tmp_path / "sub" / "sglang.json").read_text())
    assert list(theirs) == ["physical_to_logical_map"], "any other key stops the engine"
    assert theirs["physical_to_logical_map"][1:] == found["phy2log"][:-1], "MTP has no row"
    assert theirs["physical_to_logical_map"][0] == [slot % 16 for slot in range(24)], "the dense layer's is not read"


def test_loads_alone_suffice_without_a_config(tmp_path):
    make_run(tmp_path, "tiny", config=False)
    found = plan(tmp_path, replicas=8)
    assert (found["layers"], found["groups"]) == (list(range(8)), 1)
    for key in ("shared", "sglang"):
        with pytest.raises(ConfigError, match="no config.yaml beside"):
            plan(tmp_path, replicas=8, ranks=1, **{key: "true"})


def test_an_earlier_placement_is_replaced_and_anything_else_left_alone(tmp_path):
    make_run(tmp_path, "tiny")
    plan(tmp_path, replicas=8)
    assert plan(tmp_path, replicas=16)["redundant"] == 16
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="is not a placement; it is left alone"):
        main({"experts": str(tmp_path), "replicas": "8", "save": str(tmp_path / "config.yaml")})
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"replicas": "3", "ranks": "8"}, "19 % 8 = 3"),
        ({"deployment": "prefill"}, r"16 experts \+ 32 redundant = 48 slots do not fill 32 ranks"),
        ({"deployment": "training"}, "none of none, prefill, decode, decode_2025"),
        ({}, "replicas is needed, or ranks, or a deployment"),
        ({"replicas": "two"}, "replicas='two'.*takes int"),
        ({"replica": "8"}, "Did you mean replicas"),
        ({"replicas": "8", "layer": "0"}, "layer = 0 has no experts; those that have: 1 to 8"),
        ({"replicas": "8", "json": "maybe"}, "not a valid bool"),
        ({"replicas": "16", "shared": "true", "ranks": "32", "sglang": "x.json"}, "sglang places routed experts only"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, keys, message):
    make_run(tmp_path, "tiny")
    with pytest.raises(ConfigError, match=message):
        main({"experts": str(tmp_path), **keys})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "expert_load.jsonl"]


def test_when_one_file_cannot_be_written_neither_is(tmp_path):
    make_run(tmp_path, "tiny")
    with pytest.raises(ConfigError, match="x.json cannot be written .*sglang=PATH"):
        main({"experts": str(tmp_path), "replicas": "8", "sglang": str(tmp_path / "config.yaml" / "x.json")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "expert_load.jsonl"]


def test_without_a_run_the_usage_is_told():
    with pytest.raises(ConfigError, match="(?s)experts is needed.*deployment="):
        main({})


def test_damaged_loads_leave_no_file(tmp_path):
    (tmp_path / "expert_load.jsonl").write_text("oops\n")
    with pytest.raises(DataError, match="line 1"):
        main({"experts": str(tmp_path), "replicas": "8"})
    assert [path.name for path in tmp_path.iterdir()] == ["expert_load.jsonl"]
