"""The model tests' small models, and models over ranks, here too."""

import sys
from pathlib import Path

for folder in ("model", "pipeline"):
    sys.path.append(str(Path(__file__).parents[1] / folder))
