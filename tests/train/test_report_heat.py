"""Heat maps: PNGs that decode to the cells they were made of, loads on a scale where half and twice are equally far."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from deepv3.train.report_heat import DEAD, HEAT, LOAD, layer_name, load_levels, over_time, png


@pytest.mark.parametrize("shape", [(1, 1), (9, 16), (59, 97)])
def test_a_png_decodes_to_its_cells(shape):
    cells = np.random.default_rng(sum(shape)).integers(0, 16, shape).astype(np.uint8)
    pixels = imread(io.BytesIO(png(cells, HEAT)), format="png")[..., :3]
    assert np.array_equal((pixels * 255).round().astype(int), np.array(HEAT)[cells])


def test_the_mean_is_neutral_and_half_and_twice_are_equally_far_from_it():
    levels = load_levels(np.array([[100.0, 50, 200, 0, 150]]))[0]  # mean 100
    assert levels[0] == 7 and levels[2] - 7 == 7 - levels[1] and levels[3] == DEAD
    assert LOAD[7] == (247, 247, 247)


def test_loads_beyond_the_scale_take_its_ends():
    levels = load_levels(np.array([[1.0, 1e6, 1, 1, 1, 1, 1, 1]]))[0]  # a millionth of the mean and 8 x the mean
    assert levels.tolist() == [0, 14, 0, 0, 0, 0, 0, 0]


def test_columns_over_time_hold_the_newest_record_of_their_time():
    steps, values = np.array([1, 10, 100]), np.array([0, 1, 2])
    columns = over_time(steps, values, columns=100)
    assert columns[0] == 0 and columns[8] == 0 and columns[9] == 1 and columns[98] == 1 and columns[99] == 2
    assert over_time(np.array([5]), np.array([7])).tolist() == [7]


def test_layers_are_named_as_in_the_model():
    assert [layer_name(i, 4, mtp=1, first=3) for i in range(4)] == ["layer 3", "layer 4", "layer 5", "MTP 1"]
