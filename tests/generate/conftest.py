"""The export tests' small runs, here too."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "export"))
from small_run import Run, save_run  # noqa: E402


@pytest.fixture
def make_run(tmp_path):
    """make_run(**fields of ModelConfig) -> a run folder in tmp_path with one checkpoint."""

    def make(step: int = 7, average: bool = False, **fields) -> Run:
        return save_run(tmp_path / "run", step, average, **fields)

    return make
