"""The exchanges that are timed move what they say, and the table has a row for each."""

import pytest
import ranks
import torch

from deepv3.config.schema import Config
from deepv3.dist import init_distributed
from deepv3.errors import ConfigError
from deepv3.train import exchange_bench
from deepv3.train.exchange_bench import Layer, Shape
from deepv3.train.measure import MEASUREMENTS, read

SMALL = Shape("small", 24, 128, 16, 4)


def _outputs(fp8: bool):
    """A round trip by both dispatchers, and what the wire of each brings."""
    grid = init_distributed(Config())
    found = []
    for shared in (False, True):
        layer = Layer(grid, SMALL, fp8, shared)
        layer.wire()()
        y = layer.forward()
        y.backward(layer.end)
        found.append((y.detach(), layer.u.grad, layer.base.grad, layer.sent()))
    return found


@pytest.mark.parametrize("fp8", [False, True])
def test_both_dispatchers_do_the_same_work(fp8):
    for portable, shared in ranks.run(2, _outputs, fp8):
        assert portable[3] == shared[3] > 0
        assert all(torch.equal(a, b) for a, b in zip(portable[:3], shared[:3]))
        assert float((portable[0] - portable[1]).norm()) > 0


def _report():
    return exchange_bench.report(2, shapes=[SMALL])


def test_the_table_has_a_row_for_each_format_and_dispatcher():
    text, nothing = ranks.run(2, _report)
    assert nothing == "" and text.startswith("2 ranks, CPU, torch ")
    rows = [line.split(" | ") for line in text.splitlines()[4:]]
    assert [row[1:3] for row in rows] == [[f, d] for f in ("bf16", "fp8") for d in ("all_to_all", "symmetric")]
    assert all(float(figure.strip("| ")) >= 0 for row in rows for figure in row[3:])


def test_one_rank_and_unknown_keys_are_refused():
    with pytest.raises(ConfigError, match="2 or more ranks"):
        exchange_bench.report(1)
    with pytest.raises(ConfigError, match="not width=3"):
        MEASUREMENTS["exchange"](*read(["what=exchange", "width=3"]))
