"""Every impossible combination is refused with both sides and the fix, before any work."""

import pytest

from deepv3.config.compose import compose, layer, parse_overrides, to_dict
from deepv3.config.ranges import BELOW_ONE, CHOICES, FRACTIONS, ZERO_ALLOWED
from deepv3.config.schema import Config
from deepv3.config.typed import build, field_paths
from deepv3.config.validate import ramp_sizes, validate
from deepv3.errors import ConfigError

YARN = "model.rope_scaling={factor: 2, original_max_position_embeddings: 256, "


TINY = to_dict(compose(["+config=tiny"]))


def tiny(*overrides: str) -> Config:
    """tiny(*overrides), without reading the files again."""
    return build(Config, TINY, *map(layer, parse_overrides(overrides)))


def refusal(overrides: list[str], world_size: int = 1) -> list[str]:
    """The lines that tiny with ``overrides`` is refused with."""
    with pytest.raises(ConfigError) as caught:
        validate(tiny(*overrides), world_size)
    return str(caught.value).splitlines()


COMBINATIONS = [
    (
        ["model.n_routed_experts=10"],
        "model.n_routed_experts = 10 is not divisible by model.n_group = 4 (10 = 2 x 4 + 2); set model.n_group=2 or 5",
    ),
    (["model.num_experts_per_tok=9"], "num_experts_per_tok = 9 exceeds the 8 experts a token may reach"),
    (["model.n_group=16", "model.topk_group=8"], "n_group = 16 leaves 1 of model.n_routed_experts = 16 per group"),
    (["model.topk_group=5"], "model.topk_group = 5 exceeds model.n_group = 4; set model.topk_group=4 or less"),
    (["model.qk_rope_head_dim=15"], "model.qk_rope_head_dim = 15 is odd, and rotary dimensions come in pairs"),
    (["model.first_k_dense_replace=9"], "first_k_dense_replace = 9 exceeds model.num_hidden_layers = 8"),
    (["data.seq_len=1024"], "data.seq_len = 1024 is beyond the rope's reach model.max_position_embeddings = 512"),
    ([YARN + "mscale: 0.7}"], "mscale = 0.7 differs from mscale_all_dim = 1"),
    ([YARN + "beta_fast: 1}"], "beta_fast = 1 is not above beta_slow = 1"),
    (
        [YARN + "beta_slow: 2}", "model.max_position_embeddings=1024"],
        "2 x 256 = 512; set model.max_position_embeddings",
    ),
    (["optim.lr_schedule=[{shape: square, tokens: 1, to: 1}]"], "lr_schedule[0].shape = 'square' is none of constant"),
    (["optim.mtp_loss_schedule=[{shape: linear, tokens: 1}]"], "mtp_loss_schedule[0] is linear but has no value to go"),
    (["optim.bias_update_schedule=[{tokens: 0}]"], "bias_update_schedule[0].tokens = 0 is no length"),
    (["optim.lr_schedule=[{tokens: 1, to: -1}]"], "lr_schedule[0].to = -1 is not a finite value of 0 or more"),
    (["parallel.pp_size=9"], "parallel.pp_size = 9 exceeds model.num_hidden_layers = 8, and a stage needs a layer"),
    (["parallel.ep_size=3"], "model.n_routed_experts = 16 is not divisible by parallel.ep_size = 3 (16 = 5 x 3 + 1)"),
    (["parallel.ep_size=2"], "the data-parallel size (world size 1 / parallel.pp_size 1) = 1 is not divisible by"),
    (
        ["parallel.pp_size=2"],
        "the world size = 1 is not divisible by parallel.pp_size = 2 (1 = 0 x 2 + 1); start a mult",
    ),
    (
        ["parallel.dispatcher=symmetric", "model.hidden_size=66"],
        "model.hidden_size x 4 bytes = 264 is not divisible by the unit of shared rows in bytes = 16",
    ),
    (["train.global_batch_size=18"], "train.global_batch_size = 18 is not divisible by train.micro_batch_size x data"),
    (["train.eval_sequences=6"], "train.eval_sequences = 6 is not divisible by train.micro_batch_size x data"),
    (["logging.profile_steps=[6,5]"], "logging.profile_steps = [6, 5] is no window; give [first,last]"),
    (["logging.profile_memory=true"], "logging.profile_memory = true without logging.profile_steps"),
    (["logging.profile_steps=[1,2]", "logging.profile_ranks=[-1]"], "logging.profile_ranks = [-1] names no rank"),
    (["train.global_batch_size=null"], "train.global_batch_size and train.batch_ramp are both null"),
    (["train.steps=null"], "train.steps and train.tokens are both null, so the run has no end"),
    (["train.batch_ramp={start: 8, end: 4}"], "train.batch_ramp.end = 4 is below its start = 8"),
    (["train.finish=[verify, export]"], "verifies an export that does not exist; put export before verify"),
    (["train.finish=[sample, sample]"], "names a stage twice"),
    (["train.finish=[bake]"], "train.finish = 'bake' is none of sample, export, verify"),
    (["train.resume=/no/such/place"], "train.resume = /no/such/place is no folder; give auto, never or the path"),
    (["data.sources=[]"], "data.sources is empty; give e.g. data.sources=[{path: /corpus}]"),
    (["data.sources=[{weight: 2}]"], "data.sources[0].path is empty"),
    (["data.sources=[{path: /a, format: xml}]"], "data.sources[0].format = 'xml' is none of auto, text, parquet"),
    (["data.validation_sources=[{path: /a, weight: 0}]"], "data.validation_sources[0].weight = 0 is not positive"),
    (["data.tokenizer_vocab_size=4096"], "data.tokenizer_vocab_size = 4096 exceeds model.vocab_size = 2048"),
    (["data.validation_fraction=0", "train.eval_every=50"], "train.eval_every = 50 but data.validation_fraction = 0"),
    (["run_dir=''"], "run_dir is empty"),
]


@pytest.mark.parametrize("overrides, words", COMBINATIONS, ids=[" ".join(c[0])[:60] for c in COMBINATIONS])
def test_an_impossible_combination_is_refused_with_both_sides_and_the_fix(overrides, words):
    message = refusal(overrides)
    assert len(message) == 1, "one mistake, one line"
    assert words in message[0]


def test_shared_memory_ends_at_the_node():
    overrides = ["parallel.dispatcher=symmetric", "parallel.ep_size=2", "parallel.ranks_per_node="]
    (message,) = refusal([*overrides[:2], overrides[2] + "1"], world_size=2)
    assert (
        message.startswith("parallel.ep_size = 2 exceeds parallel.ranks_per_node = 1, and") and "all_to_all" in message
    )
    validate(tiny(*overrides[:2], overrides[2] + "2"), 2)


def test_each_size_of_a_batch_ramp_has_to_fit_the_grid():
    overrides = ["train.global_batch_size=null", "train.micro_batch_size=1", "train.eval_every=0"]
    ramp = "train.batch_ramp={start: 4, end: 12, increment: 3, tokens: 1000}"
    message = refusal([*overrides, ramp], world_size=4)
    assert [line.split(" is not")[0] for line in message] == [
        "train.batch_ramp's step of 7 sequences = 7",
        "train.batch_ramp's step of 10 sequences = 10",
    ]
    validate(tiny(*overrides, ramp.replace("increment: 3", "increment: 4")), world_size=4)


def test_a_ramp_passes_through_its_start_and_its_end():
    assert ramp_sizes(compose(["+config=v3_671b"]).train.batch_ramp) == list(range(3072, 15361, 128))


def test_all_mistakes_are_told_at_once():
    assert len(refusal(["train.steps=null", "data.sources=[]", "model.n_routed_experts=10"])) == 3


@pytest.mark.parametrize("path", sorted(CHOICES))
def test_an_unknown_choice_is_refused_with_the_known_ones(path):
    value = "[other]" if path == "train.finish" else "other"
    (line,) = refusal([f"{path}={value}"])
    assert line == f"{path} = 'other' is none of {', '.join(CHOICES[path])}"


@pytest.mark.parametrize("path", sorted(ZERO_ALLOWED))
def test_zero_is_allowed_where_it_means_something_and_less_is_not(path):
    cfg = tiny(f"{path}=0", "data.validation_sources=[{path: /a}]")
    validate(cfg, 1)
    (line,) = refusal([f"{path}=-1"])
    assert line.startswith(f"{path} = -1") and "0 or more" in line


@pytest.mark.parametrize("path", ["model.hidden_size", "train.micro_batch_size", "optim.eps", "data.seq_len"])
def test_zero_is_refused_elsewhere(path):
    (line,) = refusal([f"{path}=0"])
    assert line.startswith(f"{path} = 0") and "above 0" in line


@pytest.mark.parametrize("path", [*FRACTIONS, *BELOW_ONE])
def test_shares_stay_within_one(path):
    (line,) = refusal([f"{path}=1.5"])
    assert line.startswith(f"{path} = 1.5 is out of range")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_field_takes_a_number_that_is_not_finite(value):
    (line,) = refusal([f"optim.lr={value}"])
    assert line == f"optim.lr = {float(value)} is not a finite number"


def test_every_field_of_the_tables_exists():
    assert {*CHOICES, *ZERO_ALLOWED} <= set(field_paths(Config))


def test_a_plan_on_paper_needs_neither_data_nor_checkpoint():
    validate(compose(["+config=v3_671b_32k"]), 2048, training=False)


def test_a_batch_that_does_not_divide_names_the_grid_that_fits():
    cfg = compose(["+config=v3_671b_128k", "data.sources=[{path: x}]", "parallel.ep_size=64"])
    with pytest.raises(ConfigError, match=r"480 = 3 x 128 \+ 96.* data-parallel size of 120 \(1920 ranks; .*ep_size"):
        validate(cfg, 2048)
    cfg.parallel.ep_size, cfg.train.global_batch_size = 32, 64 * 3
    with pytest.raises(ConfigError, match="data-parallel size of 96 .1536 ranks"):
        validate(cfg, 2048)
