"""Which sample comes when: pure functions of the seed and the sample's number, without state and without tables.

Sample n of a run never depends on ranks or micro-batches, and any n is found at once, so resuming is setting n.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

_MASK = (1 << 64) - 1
_ROUNDS = 6  # half rounds; four make a Feistel network pseudo-random (Luby and Rackoff 1988), six leave a margin

# Samples n, n + 1, ... are dealt to sources in groups; inside a group the order is turned by a seeded amount, else two
# sources of equal weight would alternate, and with two data ranks each rank would read one source only.
GROUP = 64


def draw(*words: int) -> int:
    """64 hashed bits of integers (splitmix64's finaliser over a running sum)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def chance(share: float, *words: int) -> bool:
    """True for this share of all words."""
    return draw(*words) < share * 2.0**64


def permuted(index: int, size: int, *key: int) -> int:
    """Where ``index`` goes under the key's permutation of range(size): a bijection, in constant memory.

    A Feistel network over the next power of two, walked until it lands inside (less than two turns on average).
    """
    bits = (size - 1).bit_length()
    if bits < 2:  # at most two rows: a turn by the key
        return (index + draw(*key)) % size
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    seed = draw(*key)
    while True:
        low, high = index & low_mask, index >> low_bits
        for turn in range(0, _ROUNDS, 2):
            high ^= draw(seed, turn, low) & high_mask
            low ^= draw(seed, turn + 1, high) & low_mask
        index = high << low_bits | low
        if index < size:
            return index


class _Split(NamedTuple):
    """Of t items, round(t x part / whole) go left."""

    part: int
    whole: int
    left: "_Split | int"
    right: "_Split | int"

    def to_the_left(self, t: int) -> int:
        return (2 * t * self.part + self.whole) // (2 * self.whole)


class Blend:
    """Deals sample numbers to weighted sources, exactly and evenly.

    A balanced tree halves the sources; at each fork the left side has round(t x share) of the first t samples, in
    exact arithmetic. So after any whole number of GROUPs a source's count differs from n x weight by at most half a
    sample for each of the log2(sources) forks, and never drifts, whatever the weights.

        weights 3 : 1, t = 0 1 2 3 4 5 6 7   source 0 0 1 0 0 0 1 0   (before the turn inside a group)
    """

    def __init__(self, weights: Sequence[float], seed: int):
        shares = [Fraction(repr(float(weight))) for weight in weights]  # the decimal number that was written
        self._root = _tree(list(enumerate(shares)))
        self._seed = seed

    def locate(self, n: int) -> tuple[int, int]:
        """(source, how many samples it has given before) of sample n."""
        node = self._root
        if isinstance(node, int):
            return node, n
        group, place = divmod(n, GROUP)
        t = group * GROUP + (place + draw(self._seed, 0xB1E4D, group)) % GROUP
        while not isinstance(node, int):
            left = node.to_the_left(t)
            if node.to_the_left(t + 1) > left:
                node, t = node.left, left
            else:
                node, t = node.right, t - left
        return node, t


def _tree(shares: list[tuple[int, Fraction]]) -> _Split | int:
    if len(shares) == 1:
        return shares[0][0]
    middle = len(shares) // 2
    left, right = shares[:middle], shares[middle:]
    share = sum((s for _, s in left), Fraction()) / sum((s for _, s in shares), Fraction())
    return _Split(share.numerator, share.denominator, _tree(left), _tree(right))
