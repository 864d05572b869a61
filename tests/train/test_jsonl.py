"""Files of rows: thinned evenly, the ends kept."""

from deepv3.train.jsonl import JsonLines


def filled(path, steps) -> JsonLines:
    file = JsonLines(path)
    for step in steps:
        file.append({"step": step})
    return file


def test_thinning_keeps_the_ends_and_spreads_the_rest_evenly(tmp_path):
    file = filled(tmp_path / "m.jsonl", range(1, 1001, 5))
    file.thin(50)
    steps = [row["step"] for row in file.read()]
    assert steps[0] == 1 and steps[-1] == 996 and 40 <= len(steps) <= 50
    assert max(b - a for a, b in zip(steps, steps[1:])) <= 2 * (1000 / 49)


def test_thinning_a_file_that_grew_after_the_last_thinning_keeps_its_spread(tmp_path):
    file = filled(tmp_path / "m.jsonl", range(1, 1001))
    file.thin(20)
    for step in range(1001, 3001):
        file.append({"step": step})
    file.thin(20)
    steps = [row["step"] for row in file.read()]
    assert steps[0] == 1 and steps[-1] == 3000 and len(steps) <= 20
    assert max(b - a for a, b in zip(steps, steps[1:])) < 3 * 3000 / 19


def test_a_short_file_stays_as_it_is(tmp_path):
    file = filled(tmp_path / "m.jsonl", (1, 2, 3))
    before = file.path.read_bytes()
    file.thin(3)
    assert file.path.read_bytes() == before
