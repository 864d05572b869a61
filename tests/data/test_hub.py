"""Hub datasets, from a stand-in for the hub that returns what ``load_dataset`` would: real datasets of both kinds."""

import json

import datasets
import pytest
from small_corpus import make_config, make_text

from deepv3.config.schema import SourceConfig
from deepv3.data import streaming
from deepv3.data.corpus import open_source
from deepv3.data.loader import build_data
from deepv3.dist import Grid
from deepv3.errors import DataError

TEXTS = [make_text(i) for i in range(200)]


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """``owner/name`` is two parquet files; returns what was asked for."""
    load, asked = datasets.load_dataset, []
    for part in range(2):
        rows = {"content": TEXTS[part * 100 : part * 100 + 100], "id": list(range(100))}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{part}.parquet", batch_size=20)
    (tmp_path / "hub_cache").mkdir()

    def fake(path, name, *, split, streaming, cache_dir):
        asked.append((path, name, split, streaming))
        files = sorted(map(str, tmp_path.glob("*.parquet")))
        place = str(tmp_path / "hub_cache")
        return load("parquet", data_files={"train": files}, split=split, streaming=streaming, cache_dir=place)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(streaming, "LANES", 12)
    monkeypatch.setattr(streaming, "NOTE_EVERY", 16)
    return asked


def config(tmp_path, **fields):
    source = SourceConfig(path="owner/name", name="en", field="content", **fields)
    return make_config(tmp_path / "cache", tmp_path / "run", sources=[source], validation_fraction=0.1)


def rows(batches):
    return [row for batch in batches for row in batch.tokens.tolist()]


def test_a_hub_dataset_is_tokenised_from_its_arrow_files(tmp_path, hub):
    data = build_data(config(tmp_path), Grid(1, 0))
    assert ("owner/name", "en", "train", False) in hub
    counts = json.loads(next((tmp_path / "cache").glob("tokens/*/summary.json")).read_text())
    assert sum(counts["documents"].values()) == 200
    data.close()


def test_a_hub_stream_resumes_exactly(tmp_path, hub):
    def build():
        return build_data(config(tmp_path, streaming=True), Grid(1, 0)).train

    whole, first, again = build(), build(), build()
    expected = rows(whole.micro_batches(0, 600, 2))
    assert rows(first.micro_batches(0, 250, 1)) == expected[:250]
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rows(again.micro_batches(250, 350, 5)) == expected[250:]
    assert again.state_dict()["streams"][0]["notes"][0]["ordinal"] > 0
    for loader in (whole, first, again):
        loader.close()


def test_a_hub_stream_without_the_field_or_with_no_row_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data.sources\[0\].field=text: the dataset has content, id"):
        open_source(SourceConfig(path="owner/name", streaming=True), "data.sources[0]", tmp_path, False)
    with pytest.raises(DataError, match=r"has no field 'text' but content, id"):
        open_source(SourceConfig(path="owner/name"), "data.sources[0]", tmp_path, False)


def test_a_split_that_the_hub_does_not_have_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"path=owner/name: no file or folder here, and the hub .*test"):
        open_source(SourceConfig(path="owner/name", split="test"), "data.sources[0]", tmp_path, False)
