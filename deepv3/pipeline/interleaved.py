"""Interleaved 1F1B (Narayanan et al. 2021, 2.2) in Megatron's order: V stages per rank, for plans of others' runs.

Stage c R + r is chunk c of rank r. Micro-batches go in groups of R; a rank runs a group through its chunk 0, then
through chunk 1, and so on, and backwards in the same groups, last chunk first. It warms up with 2 (R-1-r) + (V-1) R
forwards, then runs a forward and a backward in turn. With F, B the times of a whole rank's forward and backward:

    bubble (R-1) (F + B) / V        peak 2 (R-1) + (V-1) R + 1 activations of a stage on rank 0

``paired`` is Megatron's overlap of all-to-alls: one forward more to warm up, so that a forward and the backward after
it need nothing of each other and run as a pair; the peak is one higher. Training does not run these lists: they are in
no configuration's choice, and DualPipeV serves the same end with a smaller bubble.
"""

from collections.abc import Iterator

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import BACKWARD, FORWARD, Action, Pair, Step
from deepv3.pipeline.schedule import Schedule


def _order(ranks: int, count: int, chunks: range) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch) in the order of execution. chunks: in the order in which a group meets them."""
    for first in range(0, count, ranks):
        for chunk in chunks:
            for micro_batch in range(first, first + ranks):
                yield chunk, micro_batch


def interleaved(ranks: int, count: int, virtual: int, paired: bool = False) -> Schedule:
    """The lists of one step.

    ranks: R >= 1. count: micro-batches, a multiple of R. virtual: V >= 1 stages per rank. paired: whether a forward and
    the backward after it overlap. Raises ScheduleError for another count.
    """
    if min(ranks, count, virtual) < 1 or count % ranks:
        raise ScheduleError(
            f"interleaved stages take micro-batches in groups of the pipeline's ranks: {count} micro-batches on "
            f"{ranks} ranks with {virtual} stages each; take a multiple of {ranks} (micro-batches = global batch / "
            "(dp x train.micro_batch_size))"
        )
    ahead, behind = range(virtual), range(virtual - 1, -1, -1)
    lists: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        forwards = [Action(FORWARD, c * ranks + rank, m) for c, m in _order(ranks, count, ahead)]
        backwards = [Action(BACKWARD, c * ranks + rank, m) for c, m in _order(ranks, count, behind)]
        warm = min(len(forwards), 2 * (ranks - 1 - rank) + (virtual - 1) * ranks + int(paired))
        steps: list[Step] = [*forwards[:warm]]
        for forward, backward in zip(forwards[warm:], backwards):
            steps += [Pair(forward, backward)] if paired else [forward, backward]
        lists.append((*steps, *backwards[len(forwards) - warm :]))
    route = tuple(range(ranks)) * virtual
    return Schedule("interleaved", count, (route,), tuple(lists), count)
