"""Fixtures of the export tests; see small_run.py."""

import pytest
from small_run import Run, save_run


@pytest.fixture
def make_run(tmp_path):
    """make_run(**fields of ModelConfig) -> a run folder in tmp_path with one checkpoint."""

    def make(step: int = 7, average: bool = False, **fields) -> Run:
        return save_run(tmp_path / "run", step, average, **fields)

    return make
