"""What backward keeps of a forward tensor: the tensor itself, or how to make it again (V3 3.2.3).

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


class Kept:
    """A value that stays in memory."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()

    def reserve(self) -> "Kept":
        return self

    def __call__(self) -> Tensor:
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


class Operand(NamedTuple):
    """Input of one or several GEMMs. `again` is None where backward keeps `value` itself."""

    value: Tensor
    again: Remade | None = None

    def source(self) -> "Kept | Remade":
        """Where backward finds the value; what other recomputed values may build on."""
        return Kept(self.value) if self.again is None else self.again


def operand(x: "Tensor | Operand") -> Operand:
    """A bare tensor as an operand that is kept."""
    return x if isinstance(x, Operand) else Operand(x)
