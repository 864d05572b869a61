"""What backward keeps of a forward tensor: the tensor itself, or how to make it again (V3 3.2.3), and what travels
beside autograd because it is FP8.

Cheap tensors that are large (norm outputs, up-projected queries and keys, rows sorted by expert, SwiGLU outputs) are
dropped after forward and made again from what is kept anyway. A `Remade` is made once per backward however many GEMMs
want it, because every user announces itself in forward, and it is dropped after the last one took it. Recomputation
repeats the same calls on the same values, so gradients are equal bit for bit.

Given up: a graph with remade tensors can be walked backward once only, as autograd's graphs by default.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepv3.precision.formats import Columns, Format, Rows, rows_of


class Kept:
    """A value that stays in memory: a tensor, or codes with their scales."""

    def __init__(self, value: Any) -> None:
        self.value = value.detach() if isinstance(value, Tensor) else value

    def reserve(self) -> "Kept":
        return self

    def __call__(self) -> Any:
        return self.value


class Remade:
    """A value made again on first use in backward: ``make(*values of its parents)``.

    `make` must hold no tensor that wants a gradient: those come through parents or detached.
    """

    def __init__(self, make: Callable[..., Any], *parents: "Kept | Remade") -> None:
        self._make: Callable[..., Any] | None = make
        self._parents = parents
        self._users = 0
        self._value: Any = None

    def reserve(self) -> "Remade":
        """Announce one later call. Parents hear of it once, since the value is made once."""
        if self._users == 0:
            for parent in self._parents:
                parent.reserve()
        self._users += 1
        return self

    def __call__(self) -> Any:
        """The value, for one of the announced users."""
        assert self._users > 0, "a recomputed tensor was asked for more often than announced, or backward ran twice"
        if self._make is not None:
            with torch.no_grad():
                self._value = self._make(*(parent() for parent in self._parents))
            self._make, self._parents = None, ()
        self._users -= 1
        value = self._value
        if self._users == 0:
            self._value = None
        return value


class Stored(NamedTuple):
    """Columns made in backward by `make` of tensors that an autograd function saves as its own."""

    make: Callable[..., Columns]
    tensors: tuple[Tensor, ...]


class Operand(NamedTuple):
    """Input of one or several GEMMs. `again` is None where backward keeps `value` itself.

    In FP8, rows: its codes, made once for all users; columns: where weight gradients find its other codes; `value` may
    be a `formats.placeholder` then. An FP8 product makes what is None for itself.
    """

    value: Tensor
    again: Remade | None = None
    rows: Rows | None = None
    columns: Remade | Stored | None = None

    def source(self) -> "Kept | Remade":
        """Where backward finds the value; what other recomputed values may build on."""
        return Kept(self.value) if self.again is None else self.again

    def rows_source(self, format: Format) -> "Kept | Remade":
        """Where backward finds the row codes."""
        if self.again is None:
            return Kept(self.rows)
        return Remade(lambda value: rows_of(value, format), self.again)


def used_here(*tensors: object) -> None:
    """Tell the allocator that tensors of another stream are read on this one; tuples are looked into."""
    for tensor in tensors:
        if isinstance(tensor, tuple):
            used_here(*tensor)
        elif isinstance(tensor, Tensor) and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())


def operand(x: "Tensor | Operand") -> Operand:
    """A bare tensor as an operand that is kept."""
    return x if isinstance(x, Operand) else Operand(x)


class Passed:
    """A gradient in FP8 on its way from the backward of one autograd function to that of the next: autograd itself
    carries a placeholder, because a gradient must have its tensor's format."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self._rows: Rows | None = None

    def put(self, rows: Rows) -> None:
        assert self._rows is None, "the FP8 gradient before this one was not taken"
        self._rows = rows

    def take(self, gradient: Tensor) -> Rows:
        """What the function before put; where it put nothing, `gradient` [R, D] in FP8."""
        rows, self._rows = self._rows, None
        if rows is None:
            return rows_of(gradient.contiguous(), self.format)
        used_here(rows)
        return rows
