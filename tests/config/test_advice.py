"""The next command after a failure is the one that gets further."""

import pytest

from deepv3.config.advice import command, mended, next_step
from deepv3.config.compose import compose
from deepv3.config.validate import validate
from deepv3.errors import ConfigError

SCRIPT = "launch/pretrain.py"


def reason_of(arguments: list[str]) -> str:
    """What these arguments are refused with."""
    with pytest.raises(ConfigError) as caught:
        validate(compose(arguments), 1)
    return str(caught.value)


@pytest.mark.parametrize(
    "mistake, better",
    [
        ("train.stesp=5", "train.steps=5"),
        ("precision=fp31", "precision=fp32"),
        ("model.n_group=3", "model.n_group=2"),
        ("parallel.pp_size=2", "parallel.pp_size=1"),
        ("model.topk_group=5", "model.topk_group=4"),
        ("data.seq_len=1024", "data.seq_len=512"),
    ],
)
def test_the_mended_command_is_accepted(mistake, better):
    arguments = ["+config=tiny", mistake]
    new = mended(arguments, reason_of(arguments))
    assert new == ["+config=tiny", better]
    validate(compose(new), 1)


def test_a_misspelt_preset_is_mended():
    assert mended(["+config=tinny"], reason_of(["+config=tinny"])) == ["+config=tiny"]


def test_two_mistakes_are_mended_together():
    arguments = ["+config=tiny", "model.topk_group=5", "data.seq_len=1024"]
    new = mended(arguments, reason_of(arguments))
    assert set(new) == {"+config=tiny", "model.topk_group=4", "data.seq_len=512"}


def test_what_no_override_mends_is_left_to_the_user():
    assert mended(["a=1"], "corpus /x holds no documents; give a folder that does") is None
    said = next_step(2, "corpus /x holds no documents", SCRIPT, ["+config=tiny"])
    assert said == "mend that, then python launch/pretrain.py +config=tiny"


def test_a_run_that_may_be_restarted_is_started_by_the_same_command():
    arguments = ["+config=tiny", "data.sources=[{path: /a b}]"]
    assert next_step(75, "set seed=3", SCRIPT, arguments) == (
        "python launch/pretrain.py +config=tiny 'data.sources=[{path: /a b}]'"
    )


def test_the_command_names_its_launcher():
    assert command(SCRIPT, ["a=1"], {}) == "python launch/pretrain.py a=1"
    one = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    assert command(SCRIPT, ["a=1"], one) == "torchrun --nproc_per_node=8 launch/pretrain.py a=1"
    many = {"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}
    assert command(SCRIPT, [], many) == "torchrun --nproc_per_node=8 --nnodes=4 ... launch/pretrain.py on every node"
