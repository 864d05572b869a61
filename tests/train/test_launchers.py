"""launch/slurm.sh and launch/kubernetes.yaml: what is started, and what follows each way a run can end."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm.sh"

# A Slurm of shell scripts: srun notes its arguments and ends as FAKE_* say; scontrol notes what it is asked for.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE/srun"
trap 'echo stopped > "$FAKE/signal"; FAKE_WAIT=""' TERM
while [[ -n "$FAKE_WAIT" ]]; do touch "$FAKE/waiting"; sleep 0.05; done
[[ -z "$FAKE_EXIT_JSON" ]] || echo "$FAKE_EXIT_JSON" > "$FAKE/run/exit.json"
exit "$FAKE_STATUS"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo node-1; echo node-2 ;;
    *) echo "$@" >> "$FAKE/scontrol" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(code, status, *arguments, **environment) -> the started script; code: exit.json's, None for no file."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "run").mkdir()

    def start(code: int | None, status: int, *arguments: str, wait: str = "", **more: str) -> subprocess.Popen:
        row = "" if code is None else json.dumps({"code": code, "reason": f"reason {code}", "rank": 0, "step": 7})
        job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "n"}
        fake = {"FAKE": str(tmp_path), "FAKE_EXIT_JSON": row, "FAKE_STATUS": str(status), "FAKE_WAIT": wait}
        environment = os.environ | job | fake | {"DEEPV3_ROOT": str(ROOT)} | more
        environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
        command = ["bash", str(SLURM), "+config=tiny", f"run_dir={tmp_path / 'run'}", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def end(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def requeued(tmp_path: Path) -> bool:
    return (tmp_path / "scontrol").exists() and (tmp_path / "scontrol").read_text() == "requeue 123\n"


@pytest.mark.parametrize(
    ("code", "status", "ended", "again"),
    [
        (0, 0, 0, False),
        (75, 1, 0, True),  # stopped or a fault
        (2, 1, 2, False),  # the user's input
        (1, 1, 1, False),  # a bug
        (None, 137, 0, True),  # killed before it could say anything
        (None, 1, 1, False),  # could not even start
        (0, 1, 1, False),  # rank 0 was done, another rank was not
    ],
)
def test_what_follows_an_end(code, status, ended, again, slurm, tmp_path):
    (tmp_path / "run" / "exit.json").write_text('{"code": 2, "reason": "of an earlier job", "step": 1}')
    returned, said = end(slurm(code, status))
    assert (returned, requeued(tmp_path)) == (ended, again), said
    assert "of an earlier job" not in said


def test_requeues_are_counted_over_the_life_of_the_job(slurm, tmp_path):
    returned, said = end(slurm(75, 1, "--max-requeues=2", SLURM_RESTART_COUNT="2"))
    assert returned == 75 and not requeued(tmp_path) and "--max-requeues=2 is used up" in said


def test_one_torchrun_a_node_meets_at_the_first_node(slurm, tmp_path):
    end(slurm(0, 0, "--max-restarts=5", "seed=3"))
    arguments = (tmp_path / "srun").read_text().splitlines()
    assert {"--nnodes=2", "--nproc_per_node=8", "--max-restarts=5", "--rdzv_endpoint=node-1:20123"} <= set(arguments)
    assert arguments[-3:] == ["+config=tiny", f"run_dir={tmp_path / 'run'}", "seed=3"]


def test_a_signal_reaches_the_run_and_its_end_is_waited_for(slurm, tmp_path):
    process = slurm(75, 1, wait="yes")
    deadline = time.monotonic() + 30
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    returned, said = end(process)
    assert (tmp_path / "signal").exists() and returned == 0 and requeued(tmp_path), said


def test_what_cannot_start_is_refused():
    def call(*arguments: str, **more: str) -> tuple[int, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | more
        done = subprocess.run(["bash", str(SLURM), *arguments], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    assert call("+config=tiny") == (2, "give run_dir=PATH on a file system that all nodes share\n")
    assert call("run_dir=x")[0] == 2 and "not inside a Slurm job" in call("run_dir=x")[1]
    assert "are numbers, not 'many'" in call("run_dir=x", "--max-restarts=many")[1]
    assert "no launch/pretrain.py under /" in call("run_dir=x", SLURM_JOB_ID="1", DEEPV3_ROOT="/")[1]
    assert call("--help")[0] == 0 and "sbatch --nodes=4" in call("--help")[1]


def test_the_kubernetes_job_is_consistent_with_itself():
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    script = container["args"][0]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(re.search(r"--nnodes=(\d+)", script)[1])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(re.search(r"--nproc_per_node=(\d+)", script)[1])
    host, port = re.search(r"--rdzv_endpoint=(\S+):(\d+)", script).groups()
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert container["ports"][0]["containerPort"] == int(port)
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    wait = next(int(e["value"]) for e in container["env"] if e["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert wait < pod["terminationGracePeriodSeconds"]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
