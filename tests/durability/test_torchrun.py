"""torchrun's restarts: after a rank's death the job goes on by itself; after the user's mistake it does not."""

import os
import subprocess
import sys
from pathlib import Path

import jobs

SCRIPT = Path(__file__).with_name("under_torchrun.py")


def _torchrun(run_dir: Path, corpus: Path, fault: str, *overrides: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    arguments = [*jobs.SMALL, f"run_dir={run_dir}", f"data.sources=[{{path: {corpus}}}]"]
    arguments += [f"data.cache_dir={corpus.parent}/cache", *overrides]
    command = [sys.executable, *launcher, str(SCRIPT), fault, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


def test_torchrun_restarts_a_job_whose_rank_died_and_nothing_is_lost(tmp_path, corpus):
    done = _torchrun(tmp_path / "run", corpus, "die:rank=1,step=5", "train.steps=8", "checkpoint.every=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in jobs.rows(tmp_path / "run")] == list(range(1, 9))
    kinds = [(row["kind"], row["step"]) for row in jobs.rows(tmp_path / "run", "events.jsonl")]
    assert ("start", 0) in kinds and ("restart", 4) in kinds and ("done", 8) in kinds
    assert jobs.ended(tmp_path / "run")["code"] == 0
    assert "rank 1 died in step" in done.stderr
