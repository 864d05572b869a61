"""Pictures are drawn from the run's own files and published whole."""

from small_folder import write

from deepv3.train.plots import draw_load, draw_losses
from deepv3.train.report_series import Series

PNG = b"\x89PNG\r\n\x1a\n"


def test_both_pictures_are_png_files_and_no_partial_file_stays(tmp_path):
    write(tmp_path, steps=4)
    for path in (draw_losses(tmp_path, Series(tmp_path / "metrics.jsonl").update()), draw_load(tmp_path)):
        assert path.read_bytes().startswith(PNG)
    assert not list(tmp_path.glob(".*.png"))


def test_nothing_is_drawn_without_rows(tmp_path):
    assert draw_losses(tmp_path, Series(tmp_path / "metrics.jsonl").update()) is None
    assert draw_load(tmp_path) is None
