"""Pictures are drawn from the run's own files and published whole."""

from deepv3.train.metrics import JsonLines
from deepv3.train.plots import Plotter, draw_load, draw_losses

PNG = b"\x89PNG\r\n\x1a\n"


def fill(run_dir):
    rows, checks, loads = (JsonLines(run_dir / f"{n}.jsonl") for n in ("metrics", "validation", "expert_load"))
    for step in range(1, 4):
        rows.append(
            {"step": step, "tokens": 10 * step, "loss_main": 5.0 - step, "loss_mtp": 6.0, "lr": 1e-3, "max_vio": 0.1}
        )
        loads.append({"step": step, "counts": [[step, 1, 2, 3], [4, 4, 4, 4]]})
    checks.append({"step": 0, "tokens": 0, "val_loss": 7.0})


def test_both_pictures_are_png_files_and_no_partial_file_stays(tmp_path):
    fill(tmp_path)
    for path in (draw_losses(tmp_path), draw_load(tmp_path)):
        assert path.read_bytes().startswith(PNG)
    assert not list(tmp_path.glob(".*.png"))


def test_nothing_is_drawn_without_rows(tmp_path):
    assert draw_losses(tmp_path) is None
    assert draw_load(tmp_path) is None


def test_closing_the_plotter_leaves_the_latest_state(tmp_path):
    fill(tmp_path)
    plotter = Plotter(tmp_path)
    plotter.refresh()
    assert [p.name for p in plotter.close()] == ["loss.png", "expert_load.png"]
