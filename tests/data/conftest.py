"""A corpus and a cache that the tests of this folder share, and the config of a run on them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import make_config, write_corpus

from deepv3.config.schema import Config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 240 text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts", 240)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for tests that do not look into it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def configure(tmp_path: Path, corpus: Path, cache: Path) -> Callable[..., Config]:
    """make_config on the shared corpus and cache, unless told otherwise."""

    def make(**fields) -> Config:
        if "sources" not in fields:
            fields.setdefault("path", corpus)
        return make_config(fields.pop("cache", cache), tmp_path / "run", **fields)

    return make


@pytest.fixture
def silent() -> Callable[[str], None]:
    """Takes lines for the user and drops them."""
    return lambda text: None
