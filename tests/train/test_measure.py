"""The bench's own keys: what cannot be measured is refused in one line, before anything starts."""

import pytest
import torch

from deepv3.errors import ConfigError
from deepv3.train import measure


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("what=nothing", "none of train, profile"),
        ("what=train peer=torchtitan", "needs tokenizer=FOLDER"),
        ("what=train steps=many", "steps = many is no whole number above 0"),
        ("what=layer ranks=0", "ranks = 0 is no whole number above 0"),
        ("what=exchange tokens=-1", "tokens = -1 is no whole number above 0"),
        ("what=exchange depth=1", "not depth=1"),
        ("what=calibration device=abacus", "none of h100"),
    ],
)
def test_what_cannot_be_measured_is_refused(line, said):
    with pytest.raises(ConfigError, match=said):
        own, rest = measure.read(line.split())
        measure.MEASUREMENTS[own["what"]](own, rest)


def test_a_layer_wants_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="measures a CUDA device"):
        measure.layer(*measure.read(["what=layer", "+config=tiny"]))


def test_a_key_that_was_not_given_leaves_the_measurement_its_own_number():
    own, rest = measure.read(["what=profile", "steps=3", "+config=tiny"])
    assert (measure.number(own, "steps", 2), measure.number(own, "rounds", 10), rest) == (3, 10, ["+config=tiny"])
