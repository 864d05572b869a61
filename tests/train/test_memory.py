"""A full GPU is explained in the user's terms."""

import torch

from deepv3.config.schema import Config
from deepv3.train.memory import GIB, explain


def test_the_message_names_what_holds_the_memory_and_the_knobs():
    cfg = Config()
    cfg.train.micro_batch_size, cfg.train.recompute, cfg.data.seq_len = 4, "none", 4096
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")
    text = str(explain(error, cfg, {"weights": 10 * GIB, "moments": 20 * GIB}))
    for part in (
        "weights 10.0",
        "moments 20.0",
        "train.micro_batch_size=2",
        "train.recompute=selective",
        "data.seq_len=2048",
    ):
        assert part in text


def test_no_knob_is_offered_that_is_already_turned():
    cfg = Config()
    cfg.train.micro_batch_size, cfg.train.recompute = 1, "full"
    text = str(explain(torch.OutOfMemoryError("out of memory"), cfg, {}))
    assert "micro_batch_size" not in text and "recompute" not in text
