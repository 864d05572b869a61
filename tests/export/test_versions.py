"""Our exports in three releases of transformers, side by side: each is installed into a folder of its own.

Every release runs the whole verification (keys, logits, greedy tokens, tokenizer) on BF16, FP32 and FP8 exports, and
what it saves itself is imported again. ``make test-versions``; the outcome stands in docs/huggingface.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import BLOCKED, save_run

from deepv3.config.schema import RopeScaling
from deepv3.export.hf import export

pytestmark = pytest.mark.versions
CACHE = Path(__file__).parents[2] / ".cache" / "transformers"
VERSIONS = ("4.57.6", "5.17.0", "5.23.0")
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)
SHAPES: dict[str, dict] = {
    "v3": BLOCKED,
    "yarn, no query latent": BLOCKED | {"q_lora_rank": None, "rope_scaling": YARN},
    "two MTP depths, one group": BLOCKED | {"num_nextn_predict_layers": 2, "n_group": 1, "topk_group": 1},
    "whole blocks": BLOCKED | {"qk_rope_head_dim": 128, "num_nextn_predict_layers": 0, "qk_nope_head_dim": 64},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run of every shape, exported in every format."""
    folder = tmp_path_factory.mktemp("runs")
    for name, fields in SHAPES.items():
        save_run(folder / name / "run", 7, False, **fields)
        for dtype in ("bfloat16", "float32", "float8"):
            export(folder / name / "run", folder / name / dtype, dtype)
    return folder


def installed(version: str) -> Path:
    """The folder of a release: transformers, what it needs but torch, and accelerate, without which it reads no FP8."""
    folder = CACHE / version
    if not folder.is_dir():
        beside = folder.with_name(f".{version}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(beside)]
        subprocess.run([*pip, f"transformers=={version}"], check=True, timeout=900)
        subprocess.run([*pip, "--no-deps", "accelerate"], check=True, timeout=300)
        beside.rename(folder)
    return folder


def python(version: str, *arguments: str) -> str:
    """What Python prints with that release in front of the installed one."""
    paths = [str(installed(version)), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module", params=VERSIONS)
def outcome(request, runs, tmp_path_factory) -> dict:
    """What version_child.py prints under one release."""
    child = str(Path(__file__).with_name("version_child.py"))
    found = json.loads(python(request.param, child, str(runs), str(tmp_path_factory.mktemp("work"))).splitlines()[-1])
    assert found["version"] == request.param
    print(json.dumps(found, indent=1))
    return found


def test_every_export_passes_the_verification(outcome):
    assert len(outcome["verified"]) == 3 * len(SHAPES)
    assert max(outcome["verified"].values()) <= 1e-5


def test_what_the_release_saves_is_imported_with_our_weights(outcome):
    spelling = "v4" if outcome["version"].startswith("4.") else "v5"
    for name, found in outcome["saved"].items():
        assert found["same"] and found["spelling"] == spelling and found["names"] > 30, name


def test_the_releases_own_fp8_reader_computes_our_values_or_refuses(outcome):
    if outcome["version"].startswith("4."):
        assert "GPU" in outcome["fp8"]["refused"]  # 4.57 reads FP8 on a GPU only
    else:
        assert outcome["fp8"]["relative_difference"] <= 3e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_generate_and_the_releases_own_mtp_modules_agree_with_ours(version):
    tests = [str(Path(__file__).with_name("test_export_verify.py")), "-k", "own_mtp_module or generate_of_transformers"]
    out = python(version, "-m", "pytest", "-rs", *tests)
    assert ("has no MTP module" in out) == version.startswith("4."), out
