"""The command: tables, JSON, pictures, search, calibration, and what it refuses with which exit code."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from plans import config
from rich.console import Console

from deepv3.config.validate import validate
from deepv3.errors import ConfigError, ResourceError
from deepv3.planner.command import main
from deepv3.planner.hardware import cluster_of
from deepv3.planner.report import show

ROOT = Path(__file__).parents[2]
V3 = ("+config=v3_671b", "cluster=h800_2048", "train.recompute=full")  # fits in any precision
SMALL = ("+config=moe_16b", "cluster=h100", "train.global_batch_size=512", "train.tokens=1e12", "train.eval_every=0")
CONTRACT = ("total_parameters", "mtp_parameters", "active_parameters", "tokens_per_second_per_gpu", "step_seconds",
            "gpu_hours_per_trillion_tokens")  # fmt: skip


def planned(capsys, *argv: str) -> dict:
    main([*argv, "json=true"])
    return json.loads(capsys.readouterr().out)


def test_a_plan_takes_less_than_three_seconds_and_prints_one_object():
    """CPU time of the whole process, start and imports included: other work on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "launch/plan.py", *V3, "json=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert all(isinstance(content[name], int | float) for name in CONTRACT)
    assert all(isinstance(content[f"{name}_range"], list) for name in CONTRACT[3:])
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


@pytest.mark.parametrize(
    "argv, named",
    [
        (["+config=v3_671b", "cluster=moon_base"], "moon_base"),
        (["+config=v3_671b", "cluster=h800_2048", "cluster.devices=2000"], "parallel.pp_size"),
        (["+config=tiny"], "cluster.device"),
        ([*SMALL, "price=-1"], "price"),
        ([*SMALL, "price=much"], "price"),
        ([*SMALL, "calibration=nowhere.json"], "nowhere.json"),
        ([*SMALL, "phases=[nothing]"], "nothing"),
        ([*SMALL, "clustr=1"], "clustr"),
        ([*SMALL, "draw=plan.txt"], "draw"),
    ],
)
def test_bad_input_is_refused_by_name(argv, named, capsys):
    with pytest.raises(ConfigError, match=named.replace("[", r"\[")):
        main(list(argv))


def test_exit_code_of_bad_input_is_two():
    command = [sys.executable, "launch/plan.py", "+config=v3_671b", "cluster=moon_base"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "moon_base" in done.stderr and not done.stdout and "Traceback" not in done.stderr


def test_what_does_not_fit_is_planned_and_then_refused(capsys):
    with pytest.raises(ResourceError, match="activations.*train.micro_batch_size"):
        main([*SMALL, "train.micro_batch_size=8", "train.recompute=none", "json=true"])
    content = json.loads(capsys.readouterr().out)
    assert content["fits"] is False and "GiB" in content["memory"]["does_not_fit"]


def test_a_run_is_continued_by_the_presets_of_its_name(capsys):
    content = planned(capsys, *V3)
    assert [row["name"] for row in content["run"]["phases"]] == ["v3_671b", "v3_671b_32k", "v3_671b_128k"]
    assert content["run"]["phases"][2]["gpus"] == 512
    assert content["run"]["post_training_gpu_hours"] == 5000
    alone = planned(capsys, *V3, "phases=none")
    assert len(alone["run"]["phases"]) == 1 and alone["run"]["post_training_gpu_hours"] == 0


def test_a_later_phase_that_these_machines_cannot_hold_is_left_out_and_said(capsys):
    """Its grid is its own (EP64); asked for by name it is refused, by name."""
    grid = ("parallel.pp_size=16", "parallel.ep_size=8", "parallel.schedule=1f1b")
    argv = ("+config=v3_671b", "cluster=b200_256", "train.global_batch_size=512", "train.batch_ramp=null", *grid)
    content = planned(capsys, *argv)
    assert [row["name"] for row in content["run"]["phases"]] == ["v3_671b"]
    assert "ep_size" in content["run"]["left_out"]["v3_671b_32k"]
    show(content, Console(width=120))
    assert "v3_671b_32k is left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"v3_671b_32k.*ep_size"):
        main([*argv, "phases=[v3_671b_32k]"])


def test_price_and_failures_follow_their_keys(capsys):
    cheap, dear = planned(capsys, *SMALL), planned(capsys, *SMALL, "price=4", "mtbf_hours=25350")
    assert dear["run"]["dollars"] == pytest.approx(2 * cheap["run"]["dollars"])
    assert dear["run"]["failures"]["expected"] == pytest.approx(2 * cheap["run"]["failures"]["expected"])


def test_a_calibration_changes_the_plan(capsys, tmp_path):
    path = tmp_path / "slow.json"
    row = {"kind": "attention", "pass": "forward", "flops": 1e12, "seconds": 1e-2}
    path.write_text(json.dumps({"format": 1, "device": "h100", "rows": [row]}))
    slow, usual = planned(capsys, *SMALL, f"calibration={path}"), planned(capsys, *SMALL)
    assert slow["step_seconds"] > usual["step_seconds"] and slow["calibration"] == "slow"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures_of_time_and_memory_are_drawn(capsys, tmp_path, suffix):
    main(["+config=v3_671b", "cluster=h800_2048", "train.recompute=full", "phases=none", f"draw={tmp_path}/p.{suffix}"])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"p-memory.{suffix}", f"p.{suffix}"]
    head = (tmp_path / files[0]).read_bytes()[:8]
    assert head.startswith(b"<svg" if suffix == "svg" else b"\x89PNG")
    if suffix == "svg":
        text = (tmp_path / files[0]).read_text()
        assert "79.6" in text and text.count("<rect") > 9 * 16


def test_a_search_prints_its_ranking_and_writes_its_preset(capsys, tmp_path):
    found = planned(capsys, *SMALL, "cluster.devices=16", "search=true", f"save={tmp_path}/best.yaml")
    assert found["ranked"][0]["tokens_per_second_per_gpu"] > 0 and found["reasons"]
    assert "ep_size" in (tmp_path / "best.yaml").read_text()


def test_loads_of_a_run_go_to_the_expert_balancer(tmp_path):
    with pytest.raises(Exception, match=str(tmp_path)):
        main([f"experts={tmp_path}", "replicas=32"])


def test_cluster_presets_describe_machines_that_exist():
    for path in sorted((ROOT / "configs" / "cluster").glob("*.yaml")):
        if path.stem == "local":
            continue
        cfg = config("+config=moe_16b", f"cluster={path.stem}", precision="bf16")
        assert cfg.cluster.devices > 0 and cfg.cluster.peak_tflops > 0, path.stem
        assert cluster_of(cfg.cluster).device.bf16 == pytest.approx(cfg.cluster.peak_tflops * 1e12, rel=0.01)


def test_the_presets_are_plannable_as_they_are():
    """What training would refuse on these machines, planning refuses alike; these two it must not."""
    for preset, cluster in (("v3_671b", "h800_2048"), ("moe_16b", "h100")):
        cfg = config(f"+config={preset}", f"cluster={cluster}", precision="bf16")
        validate(cfg, cfg.cluster.devices, training=False)
