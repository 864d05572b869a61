"""Layers, embedding, head and MTP on stages, and stages on ranks."""

import pytest

from deepv3.config.schema import ModelConfig
from deepv3.errors import ConfigError
from deepv3.pipeline.layout import embedding_ranks, format_layout, place, split, weights
from deepv3.pipeline.schedule import make_schedule


def model(layers: int = 61, mtp: int = 1) -> ModelConfig:
    return ModelConfig(num_hidden_layers=layers, num_nextn_predict_layers=mtp)


def test_v3_on_16_stages_is_four_layers_a_stage_and_one_beside_head_and_mtp():
    assert format_layout(place(model(), 16)) == "E4|" + "4|" * 14 + "1HM"


@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 8, 16, 32, 61])
def test_every_layer_is_in_one_stage_in_order(stages, mtp):
    specs = place(model(mtp=mtp), stages)
    assert [layer for spec in specs for layer in spec.layers] == list(range(61))
    assert all(spec.layers for spec in specs)
    assert [spec.embedding for spec in specs] == [True] + [False] * (stages - 1)
    assert [spec.head for spec in specs] == [False] * (stages - 1) + [True]
    assert [spec.mtp for spec in specs] == [0] * (stages - 1) + [mtp]


@pytest.mark.parametrize("last", [0.0, 0.4, 1.6, 4.3])
@pytest.mark.parametrize(("layers", "stages"), [(8, 3), (10, 4), (61, 16), (12, 12)])
def test_no_other_split_has_a_lighter_heaviest_stage(layers, stages, last):
    counts = split(layers, stages, last)
    heaviest = max(count + last * (stage == stages - 1) for stage, count in enumerate(counts))
    room = sum(max(1, int(heaviest - 1e-9 - last * (stage == stages - 1))) for stage in range(stages))
    assert sum(counts) == layers
    # Strictly below the heaviest weight, either the layers do not fit or a lone layer is what is heaviest.
    assert room < layers or heaviest == 1 + last or heaviest == 1


def test_equal_stages_differ_by_one_layer_at_most_and_the_early_ones_have_less():
    assert split(10, 4) == [2, 2, 3, 3]


def test_weights_are_those_of_the_matrices():
    head, mtp = weights(ModelConfig())
    layer = 187_107_328 - 2_048 + 9 * 44_040_192 + 1_835_008  # attention without latent norms, 8 + 1 experts, gate
    assert head == pytest.approx(926_679_040 / layer)
    assert mtp == pytest.approx(1 + (2 * 7168**2 + 926_679_040) / layer)


def test_weights_without_query_latent():
    plain = ModelConfig(q_lora_rank=None)
    assert weights(plain)[0] < weights(ModelConfig())[0]


@pytest.mark.parametrize(
    "text", ["E4|4|...|4|1HM", "E4|4|...|1HM", "E 4 | 4 | ... | 1HM", "E1|4|...|4HM", "E4|" + "4|" * 14 + "1HM"]
)
def test_layout_text_overrides_the_split(text):
    specs = place(model(), 16, text)
    assert len(specs) == 16 and sum(len(spec.layers) for spec in specs) == 61
    assert place(model(), 16, format_layout(specs)) == specs


def test_first_and_last_stage_may_hold_no_layers():
    specs = place(model(8), 4, "E|4|4|HM")
    assert [len(spec.layers) for spec in specs] == [0, 4, 4, 0] and format_layout(specs) == "E|4|4|HM"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("E4|4", "has 2 stages, the pipeline has 4"),
        ("E4|4|...|...|1HM", "'...' stands once"),
        ("...|4|4|4|HM", "'...' stands once"),
        ("E4|4|4|...|4|4HM", "pipeline has 4, the text names 5"),
        ("E2|2|2|3HM", "places 9 layers, model.num_hidden_layers=8"),
        ("E2|2|2|2H", "stage 3: M belongs in stage 3"),
        ("E2|2M|2|2HM", "stage 1: M belongs in stage 3"),
        ("E2|2|2H|2M", "stage 2: E belongs in stage 0 and H in stage 3"),
        ("2|E2|2|2HM", "stage 0: E belongs in stage 0"),
        ("E4|0|2|2HM", "stage 1 has no layers"),
        ("E2|two|2|2HM", "'two' is no stage"),
        ("E2||4|2HM", "'' is no stage"),
    ],
)
def test_wrong_layout_is_refused(text, message):
    with pytest.raises(ConfigError) as error:
        place(model(8), 4, text)
    assert message in str(error.value) and "parallel.layout=" in str(error.value)


def test_m_without_mtp_modules_is_refused():
    with pytest.raises(ConfigError, match="num_nextn_predict_layers > 0, which is 0"):
        place(model(8, mtp=0), 2, "E4|4HM")


def test_more_stages_than_layers_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="9 pipeline stages > model.num_hidden_layers=8"):
        place(model(8), 9)


@pytest.mark.parametrize(
    ("name", "mtp", "ranks"),
    [
        ("1f1b", 0, (0,)),
        ("1f1b", 1, (0, 3)),
        ("zb1p", 1, (0, 3)),
        ("dualpipe", 0, (0, 3)),
        ("dualpipe", 1, (0, 3)),
        ("dualpipev", 0, (0,)),
        ("dualpipev", 2, (0,)),
    ],
)
def test_embedding_head_and_mtp_meet_on_the_ranks_the_report_puts_them(name, mtp, ranks):
    schedule = make_schedule(name, 4, 8)
    specs = place(model(mtp=mtp), schedule.stages)
    assert embedding_ranks(schedule, specs) == ranks
    if name.startswith("dualpipe"):
        assert all(schedule.chunks(rank) == (0, schedule.stages - 1) for rank in ranks)
