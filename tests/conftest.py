"""Shared by all tests: one thread per process, seeds from the test's id, GPU tests only where there is a GPU, and the
seconds each folder of tests took.

One thread, because the suite itself runs several processes on few cores. GPU tests are deselected, not skipped, where
there is no device: a skip would look like something that ought to have run.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import random  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402
from collections import defaultdict  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

SECONDS: dict[str, float] = defaultdict(float)


@pytest.fixture(autouse=True)
def seeds_from_test_id(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers whichever tests ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect GPU tests on a machine without a GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's set-up, call and tear-down to its folder."""
    parts = Path(report.nodeid.split("::")[0]).parts[1:]  # below tests/
    SECONDS[parts[0] if len(parts) > 1 else "."] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds per folder of tests/."""
    terminalreporter.section("seconds per folder")
    for folder, seconds in sorted(SECONDS.items(), key=lambda entry: -entry[1]):
        terminalreporter.write_line(f"{seconds:8.1f}  tests/{'' if folder == '.' else folder}")
