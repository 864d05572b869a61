"""Each preset is the run it claims to be, and fits the machine it names."""

import math

import pytest

from deepv3.arithmetic import parameters
from deepv3.config.compose import CONFIG_DIR, compose, groups, headline
from deepv3.config.schema import ModelConfig, OptimConfig, RopeScaling
from deepv3.config.validate import validate
from deepv3.optim import ramps

# Ranks each preset is made for.
WORLDS = {
    "tiny": 1,
    "mini": 1,
    "learn_300m": 1,
    "moe_16b": 64,
    "v3_671b": 2048,
    "v3_671b_32k": 2048,
    "v3_671b_128k": 512,
}


@pytest.mark.parametrize("preset", groups()["config"])
def test_a_preset_works_on_its_machine_once_it_has_data_and_its_start(preset, tmp_path):
    cfg = compose([f"+config={preset}", "data.sources=[{path: /corpus}]"])
    if preset.endswith("k"):
        cfg.train.resume = str(tmp_path)
    validate(cfg, WORLDS[preset])
    assert cfg.run_dir == f"runs/{preset}"


@pytest.mark.parametrize("preset", groups()["config"])
def test_a_preset_says_what_it_is(preset):
    assert 20 < len(headline(preset)) <= 100


@pytest.mark.parametrize("group, name", [(g, n) for g, names in groups().items() if g != "config" for n in names])
def test_every_part_composes_and_says_what_it_is(group, name):
    compose([f"{group}={name}"])
    assert (CONFIG_DIR / group / f"{name}.yaml").read_text().startswith("# ")


def test_tiny_has_every_part_of_v3_and_divides_by_four():
    model = compose(["+config=tiny"]).model
    assert model.num_hidden_layers >= 8 and model.num_nextn_predict_layers == 1
    assert model.n_routed_experts % 4 == model.n_group % 4 == 0
    assert model.vocab_size >= 1024
    assert 2.5e6 < parameters(model).stored < 3.5e6
    assert model.first_k_dense_replace and model.q_lora_rank and model.n_shared_experts
    assert model.topk_group < model.n_group


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tiny_runs_on_one_two_or_four_ranks(ranks):
    for override in (["parallel=single"], [f"parallel.ep_size={ranks}"], [f"parallel.pp_size={ranks}"]):
        validate(compose(["+config=tiny", *override]), ranks)


def test_the_curves_of_tiny_end_with_its_run():
    cfg = compose(["+config=tiny"])
    tokens = cfg.train.steps * cfg.train.global_batch_size * cfg.data.seq_len
    for curve in (cfg.optim.lr_schedule, cfg.optim.bias_update_schedule, cfg.optim.mtp_loss_schedule):
        assert sum(segment.tokens for segment in curve) == tokens


def test_mini_is_the_shape_of_the_side_by_side_measurements():
    count = parameters(compose(["+config=mini"]).model)
    assert round(count.total / 1e9, 2) == 5.20 and count.mtp == 0


def test_learn_300m_is_of_that_size_and_its_experts_are_whole_blocks_of_fp8():
    cfg = compose(["+config=learn_300m"])
    count = parameters(cfg.model)
    assert count.total > 300e6 and count.active < 30e6
    assert cfg.model.hidden_size % 128 == cfg.model.moe_intermediate_size % 128 == cfg.model.kv_lora_rank % 128 == 0
    assert cfg.data.fim_rate == 0  # else each seed would tokenise for itself


def test_moe_16b_has_the_active_parameters_of_its_class():
    count = parameters(compose(["+config=moe_16b"]).model)
    assert round(count.total / 1e9, 1) == 16.0
    assert round(count.active_without_head / 1e9, 2) == 2.24


def test_v3_is_the_schema_default_and_the_published_model():
    assert compose(["+config=v3_671b"]).model == ModelConfig()
    assert parameters(ModelConfig()).total == 671_026_404_352


def test_v3_extension_phases_are_v3_with_yarn():
    for preset in ("v3_671b_32k", "v3_671b_128k"):
        model = compose([f"+config={preset}"]).model
        assert model.rope_scaling == RopeScaling() and model.max_position_embeddings == 40 * 4096
        assert parameters(model) == parameters(ModelConfig())


@pytest.mark.parametrize(
    "tokens, lr, gamma, weight, batch",
    [
        (100e9, 2.2e-4, 1e-3, 0.3, 5632),
        (469e9, 2.2e-4, 1e-3, 0.3, 15360),
        (9.99e12, 2.2e-4, 1e-3, 0.3, 15360),
        (10.01e12, 2.2e-4, 1e-3, 0.1, 15360),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2, 1e-3, 0.1, 15360),
        (14.31e12, 2.2e-5, 0.0, 0.1, 15360),
        (14.62e12, 2.2e-5, 0.0, 0.1, 15360),
        (14.64e12, 7.3e-6, 0.0, 0.1, 15360),
        (14.8e12, 7.3e-6, 0.0, 0.1, 15360),
    ],
)
def test_v3_follows_the_curves_of_the_report(tokens, lr, gamma, weight, batch):
    cfg = compose(["+config=v3_671b"])
    assert math.isclose(ramps.learning_rate(cfg.optim, 10_000, tokens), lr, rel_tol=1e-3)
    assert ramps.bias_speed(cfg, tokens) == gamma
    assert ramps.mtp_weight(cfg, tokens) == weight
    assert ramps.batch_size(cfg.train, tokens) == batch


def test_v3_has_every_other_number_of_the_report():
    cfg = compose(["+config=v3_671b"])
    optim = OptimConfig()
    for name in ("beta1", "beta2", "weight_decay", "clip_norm", "warmup_steps", "lr", "moment_dtype"):
        assert getattr(cfg.optim, name) == getattr(optim, name)
    assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.weight_decay, cfg.optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (cfg.train.tokens, cfg.data.seq_len, cfg.data.fim_rate, cfg.data.mask_documents) == (
        14.8e12,
        4096,
        0.1,
        False,
    )
    assert (cfg.parallel.pp_size, cfg.parallel.ep_size, cfg.train.micro_batch_size) == (16, 64, 1)
    assert (cfg.model.aux_loss_alpha, cfg.model.initializer_range) == (1e-4, 0.006)


def test_v3_extension_phases_train_on_the_reported_tokens():
    for preset, length, batch in (("v3_671b_32k", 32768, 1920), ("v3_671b_128k", 131072, 480)):
        cfg = compose([f"+config={preset}"])
        assert (cfg.data.seq_len, cfg.train.global_batch_size, cfg.train.steps) == (length, batch, 1000)
        assert ramps.learning_rate(cfg.optim, 1, 0) == ramps.learning_rate(cfg.optim, 999, 6e10) == 7.3e-6
        assert (ramps.bias_speed(cfg, 0), ramps.mtp_weight(cfg, 0)) == (0.0, 0.1)
