"""The order of a pair: pieces of one forward and one backward interleaved (V3 3.2.1, Figure 4).

While tokens of one micro-batch travel, the other computes. One round, F of the forward's block and B, W of the
backward's (W are its weight gradients), in the order in which the host issues them::

    communication           DISPATCH(F)  DISPATCH(B)              COMBINE(F)           COMBINE(B)
    computation     MLP(B)               MLP(W)   MLP(F)                     ATTN(B)   ATTN(W)  ATTN(F)

MLP(B) is issued before DISPATCH(F), although on the device they run side by side: a portable dispatch makes the host
wait for the counts, and the computation has something to do meanwhile.
COMBINE(B) and ATTN(F) at a round's end belong to the next block of each. The blocks of the two need not match in number
or kind: a step of the round that the next piece does not fit is passed over, pieces of no block ("other") run where
they come, and what is left of the longer one runs by itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from deepv3.pipeline.stage import ATTN, COMBINE, DISPATCH, MLP, OTHER, Pieces

FORWARD, BACKWARD, WEIGHTS = "F", "B", "W"

ORDER: tuple[tuple[str, str], ...] = (
    (BACKWARD, MLP),
    (FORWARD, DISPATCH),
    (BACKWARD, DISPATCH),
    (WEIGHTS, MLP),
    (FORWARD, MLP),
    (FORWARD, COMBINE),
    (BACKWARD, ATTN),
    (BACKWARD, COMBINE),
    (WEIGHTS, ATTN),
    (FORWARD, ATTN),
)

On = Callable[[str], AbstractContextManager]
"""on(kind): around a piece of that kind: its stream and timer (`lanes`)."""


class Walk:
    """A stage's pieces, one ahead: `kind` is that of the next piece, None at the end."""

    def __init__(self, pieces: Pieces, on: On) -> None:
        self._pieces, self._on = pieces, on
        self.kind: str | None = next(pieces, None)

    def step(self) -> None:
        """Run the next piece."""
        assert self.kind is not None
        with self._on(self.kind):
            self.kind = next(self._pieces, None)

    def advance(self, kind: str) -> bool:
        """Run the next piece if it is of this kind, with any "other" before it. Whether anything ran."""
        ran = False
        while self.kind == OTHER:
            self.step()
            ran = True
        if self.kind == kind:
            self.step()
            ran = True
        return ran

    def finish(self) -> None:
        """Run what is left."""
        while self.kind is not None:
            self.step()


def interleave(forward: Walk, backward: Walk, weights: Callable[[], None]) -> None:
    """Run a pair. weights(): runs the weight gradients that the backward has put off since the last call."""
    while forward.kind is not None and backward.kind is not None:
        for side, kind in ORDER:
            if side == FORWARD:
                forward.advance(kind)
            elif side == BACKWARD:
                backward.advance(kind)
            else:
                weights()
    forward.finish()
    backward.finish()
    weights()
