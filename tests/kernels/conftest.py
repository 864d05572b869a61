"""The interpreter's tests need TRITON_INTERPRET=1 before Triton is imported: test_interpreter.py starts a process."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
