"""Shared by all tests: one thread per process, because the suite itself runs several processes on few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
