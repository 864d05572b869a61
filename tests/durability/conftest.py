"""A corpus for all runs of this folder, and no process left behind."""

import multiprocessing as mp
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import jobs  # noqa: E402


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return jobs.make_corpus(tmp_path_factory.mktemp("durability") / "corpus")


@pytest.fixture(autouse=True)
def nothing_left_running():
    others = {process.pid for process in mp.active_children()}  # such as the pool of tests/ranks.py
    yield
    for process in mp.active_children():
        if process.pid not in others:
            process.kill()
