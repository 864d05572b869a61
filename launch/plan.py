"""What a run needs, how long it takes, what it costs: ``python launch/plan.py +config=NAME cluster=NAME [...]``."""

import sys

from deepv3.config.cli import guarded
from deepv3.planner.command import USAGE, main

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    sys.exit(guarded(lambda: main(sys.argv[1:])))
