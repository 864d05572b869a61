"""Builds every distinct rank's part of a model without memory and says what it needs:
``python launch/dry_run.py +config=v3_671b cluster=h800_2048``.
"""

import sys

from deepv3.config.cli import guarded
from deepv3.config.compose import compose
from deepv3.config.validate import validate


def dry_run(argv: list[str]) -> None:
    """Refuse what cannot run on the cluster's number of ranks, else print the table of roles."""
    from deepv3.planner.layout import Layout
    from deepv3.train.dryrun import main as table

    cfg = compose(argv)
    validate(cfg, Layout.of(cfg).cluster.count, training=False)
    table(cfg)


if __name__ == "__main__":
    sys.exit(guarded(lambda: dry_run(sys.argv[1:])))
