"""CUDA's multi-process service (MPS), where the machine has it: kernels of several processes run at the same time
instead of in turns. It changes no setting of the device; it is ended with the context."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CONTROL = "nvidia-cuda-mps-control"
PATIENCE = 20  # seconds for the service to start or to end


@contextmanager
def service() -> Iterator[dict[str, str]]:
    """A running service; yields the variables that processes need to use it, none where there is no service."""
    control = shutil.which(CONTROL)
    if control is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in variables.values():
            os.mkdir(path)
        started = _control([control, "-d"], variables, None)
        try:
            yield variables if started else {}
        finally:
            if started:
                _control([control], variables, "quit -t 5\n")


def _control(command: list[str], variables: dict[str, str], words: str | None) -> bool:
    """Whether the command ended well; its output goes nowhere, because the service would hold it open."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, input=words or "", text=True, env=os.environ | variables, timeout=PATIENCE, **quiet
        )  # type: ignore[call-overload]
        return done.returncode == 0
    return False
