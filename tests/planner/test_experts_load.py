"""Expert loads of a run: averaged, named by layer, and refused where they are damaged or of another model."""

import json

import pytest

from deepv3.config.compose import compose, to_yaml
from deepv3.errors import ConfigError, DataError
from deepv3.planner.experts_load import read


def write(folder, *records, tail=""):
    """A file of records; `tail` follows as it is."""
    file = folder / "expert_load.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return file


def record(step, *rows):
    return {"step": step, "counts": [list(row) for row in rows]}


def test_the_last_records_are_averaged(tmp_path):
    write(tmp_path, record(1, [100, 0]), record(20, [2, 4]), record(40, [4, 8]))
    loads = read(tmp_path, last=2)
    assert (loads.counts, loads.steps, loads.layers, loads.model) == ([[3.0, 6.0]], [20, 40], [0], None)
    assert read(tmp_path, last=9).steps == [1, 20, 40]


def test_a_file_is_read_like_its_folder(tmp_path):
    file = write(tmp_path, record(1, [1, 2], [3, 4]))
    assert read(file, 1) == read(tmp_path, 1)


def test_a_torn_last_line_is_left_out_and_takes_no_records_place(tmp_path):
    write(tmp_path, record(1, [1, 1]), record(2, [3, 3]), tail='{"step": 3, "cou')
    assert read(tmp_path, 2).steps == [1, 2]


def test_rows_are_named_after_the_models_layers(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["+config=tiny"])))
    write(tmp_path, record(1, *[[1] * 16] * 8))
    loads = read(tmp_path, 1)
    assert loads.layers == [1, 2, 3, 4, 5, 6, 7, 8], "one dense layer before, MTP's after the last"


def test_loads_of_another_model_are_refused_with_both_sides(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["+config=tiny"])))
    write(tmp_path, record(1, *[[1] * 12] * 8))
    with pytest.raises(DataError, match="8 layers x 12 experts, config.yaml beside it 8 x 16"):
        read(tmp_path, 1)


def test_there_must_be_something_to_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no .*expert_load.jsonl; give the folder of a run"):
        read(tmp_path, 1)
    file = write(tmp_path)
    with pytest.raises(DataError, match="holds no record yet"):
        read(file, 1)
    with pytest.raises(ConfigError, match="last = 0"):
        read(file, 0)


@pytest.mark.parametrize(
    "line, message",
    [
        ("oops", "line 2: not of the form"),
        ("[1]", "line 2: not of the form"),
        ('{"step": 2}', "line 2: not of the form"),
        ('{"counts": 3}', "line 2: not of the form"),
        ('{"counts": [[1, "a"]]}', "line 2: a load is not a finite number >= 0"),
        ('{"counts": [[1, -1]]}', "line 2: a load is not a finite number >= 0"),
        ('{"counts": [[1, NaN]]}', "line 2: a load is not a finite number >= 0"),
        ('{"counts": [[1, null]]}', "line 2: a load is not a finite number >= 0"),
        ('{"counts": []}', "line 2: no layer with experts"),
        ('{"counts": [[1], [1, 2]]}', r"line 2: layers of \[1, 2\] experts"),
        ('{"counts": [[], []]}', r"line 2: layers of \[0\] experts"),
        ('{"counts": [[1, 2, 3]]}', "of different models"),
    ],
)
def test_damaged_lines_are_refused_and_named(tmp_path, line, message):
    write(tmp_path, record(1, [1, 2]), tail=line + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path, 2)
