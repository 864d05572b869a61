"""Interleaved 1F1B: bubble and peak are the formulas, the checker proves every list, and training does not offer it."""

import pytest

from deepv3.config.compose import compose
from deepv3.config.validate import validate
from deepv3.errors import ConfigError, ScheduleError
from deepv3.pipeline.actions import Pair, parts
from deepv3.pipeline.check import check
from deepv3.pipeline.dryrun import Costs
from deepv3.pipeline.interleaved import interleaved
from deepv3.pipeline.schedule import make_schedule

SHAPES = [(1, 1), (1, 3), (2, 8), (3, 2), (4, 4), (8, 2), (8, 4)]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("ranks, virtual", SHAPES)
def test_any_group_count_passes_the_checker_at_any_costs(ranks, virtual, paired):
    for groups in (1, 2, 5):
        for costs in (Costs(), Costs(1.0, 1.5, 0.7, 3.4, message=0.3), Costs(2.0, 1.0, 3.0, 4.0, message=2.0)):
            report = check(interleaved(ranks, groups * ranks, virtual, paired), costs)
            chunks = sum(len(parts(step)) for spans in report.spans for step, *_ in spans)
            assert chunks == 2 * ranks * virtual * groups * ranks


@pytest.mark.parametrize("costs", [Costs(), Costs(1.0, 1.5, 0.7), Costs(49.0, 75.0, 32.0)])
@pytest.mark.parametrize("ranks, virtual", SHAPES)
def test_the_bubble_is_that_of_1f1b_over_the_stages_of_a_rank(ranks, virtual, costs):
    plain = Costs(*(virtual * part for part in (costs.forward, costs.input_grad, costs.weight_grad)))
    whole = check(make_schedule("1f1b", ranks, 4 * ranks), plain)
    report = check(interleaved(ranks, 4 * ranks, virtual), costs)
    assert max(report.busy) == pytest.approx(max(whole.busy))
    assert report.bubble == pytest.approx([max(whole.bubble) / virtual] * ranks)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("ranks, virtual", SHAPES)
def test_the_peak_is_the_formula(ranks, virtual, paired):
    peaks = check(interleaved(ranks, 4 * ranks, virtual, paired)).peaks
    assert peaks[0].kept == 2 * (ranks - 1) + (virtual - 1) * ranks + 1 + paired == max(peak.kept for peak in peaks)


def test_pairs_join_chunks_that_need_nothing_of_each_other():
    for rank in range(4):
        pairs = [step for step in interleaved(4, 16, 4, paired=True).compute(rank) if isinstance(step, Pair)]
        assert len(pairs) > 40
        assert all(pair.forward[1:] != pair.backward[1:] for pair in pairs)


def test_the_first_rank_of_two_runs_the_published_order():
    steps = [str(step) for step in interleaved(2, 4, 2).compute(0)]
    assert steps[:8] == ["F0.0", "F0.1", "F2.0", "F2.1", "F0.2", "B2.0", "F0.3", "B2.1"]


@pytest.mark.parametrize("ranks, count, virtual", [(4, 6, 2), (4, 2, 2), (2, 4, 0)])
def test_counts_that_are_no_whole_groups_are_refused(ranks, count, virtual):
    with pytest.raises(ScheduleError, match="groups of the pipeline's ranks"):
        interleaved(ranks, count, virtual)


@pytest.mark.parametrize("name", ["interleaved", "interleaved_pairs"])
def test_training_does_not_offer_it(name):
    with pytest.raises(ScheduleError, match=f"parallel.schedule={name} is none of 1f1b, zb1p, dualpipe, dualpipev"):
        make_schedule(name, 4, 8)
    with pytest.raises(ConfigError, match=f"parallel.schedule.*{name}.*1f1b"):
        validate(compose(["+config=tiny", f"parallel.schedule={name}"]), 1)
