"""The benchmark's own arithmetic: what it reads from either side and how it groups kernels."""

from types import SimpleNamespace

from torch.autograd import DeviceType

from deepv3.train import bench
from deepv3.train.kernel_table import kernel_table


def test_a_row_gives_median_and_spread():
    row = bench.Side("ours", [10.0, 30.0, 20.0], 80.0, 12.3).row()
    assert row == "| ours | 20 | 10 - 30 | 80.0 | 12 |"


def test_a_failed_side_says_so_in_the_table():
    assert "failed: out of memory" in bench.Side("peer", failure="out of memory").row()


def test_kernels_are_grouped_and_averaged_per_step():
    def event(key: str, us: float, count: int, where=DeviceType.CUDA, note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, self_device_time_total=us, count=count, device_type=where, is_user_annotation=note
        )

    events = [
        event("_adamw_kernel", 8000.0, 2),
        event("nvjet_hsh_128x256", 4000.0, 4),
        event("aten::mm", 4000.0, 4, DeviceType.CPU),  # the same time again, by operator
        event("Optimizer.step#AdamW.step", 8000.0, 2, note=True),
    ]
    table = kernel_table(events, steps=2)
    assert "sum of kernels" in table and "6.00 ms" in table
    assert "optimizer" in table and "dense GEMM" in table and "aten::mm" not in table


def test_on_the_cpu_operators_take_the_place_of_kernels():
    events = [SimpleNamespace(key="aten::mm", self_device_time_total=0.0, self_cpu_time_total=3000.0, count=1)]
    assert "sum of operators" in kernel_table(events, 1, device=False)
    assert "3.000 ms  x1     aten::mm" in kernel_table(events, 1, device=False)
