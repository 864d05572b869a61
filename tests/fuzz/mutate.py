"""Damage to files and values, by seed: what disks, editors, half-done copies and people do to them.

A case is (target, seed); `trial` runs it and says how it ended: it works, or it stops with an error of ours.
"""

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deepv3.errors import DeepV3Error

SECONDS = 60  # until a case counts as hung


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes after one to three accidents."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice(ACCIDENTS)(data, draw)
    return data


def _place(data: bytes, draw: random.Random) -> int:
    """Anywhere; often near an end, where headers and footers are."""
    where = draw.random()
    if where < 0.3:
        return min(len(data), draw.randrange(64))
    if where < 0.5:
        return max(0, len(data) - draw.randrange(1, 64))
    return draw.randrange(len(data) + 1)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 40))):
        if changed:
            changed[min(len(changed) - 1, _place(data, draw))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _zeros(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + b"\0" * min(draw.choice((1, 8, 512)), len(data) - at) + data[at + 512 :]


def _cut_out(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + data[at + draw.choice((1, 7, 300)) :]


def _insert(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    junk = draw.choice((b"\xff\xfe", b"\x80" * 9, b"\n" * 50, b'"', b"{" * 200, draw.randbytes(30), b"\0"))
    return data[:at] + junk + data[at:]


def _twice(data: bytes, draw: random.Random) -> bytes:
    return data + data


def _empty(data: bytes, draw: random.Random) -> bytes:
    return b""


ACCIDENTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncate, _truncate, _flip, _flip, _flip, _zeros, _cut_out, _insert, _insert, _twice, _empty,
)  # fmt: skip

NUMBERS = (0, 1, -1, 2, 3, 7, 1e-9, 0.5, 1e9, 10**12, 2**63, 2**64, -(2**63), 1e308, float("inf"), float("nan"))
WORDS = (
    "", " ", "auto", "null", "None", "true", "no", "0x10", "1e400", "../../../etc/passwd", "/", "\0", "ü", "😀" * 3,
    "a" * 5000, "${model.vocab_size}", "${nothing}", "${oc.env:HOME}", "[1,2", "{a: 1}", "!!python/object:os.system",
    "%s%n", "'", '"', "\\", "a,b", "a=b", "choice(1,2)", "range(1,5)", "1:2", "-", "--help",
)  # fmt: skip


def odd_value(draw: random.Random) -> object:
    """Something that a field or a JSON file may hold and should not."""
    return draw.choice((
        lambda: draw.choice(NUMBERS),
        lambda: draw.choice(WORDS),
        lambda: draw.choice((None, True, False, [], {}, [[]], {"a": {}}, [None])),
        lambda: draw.randint(-5, 5000),
    ))()  # fmt: skip


@contextmanager
def in_time() -> Iterator[None]:
    """Raise TimeoutError in a case that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def trials(cases: range, case: Callable[[random.Random], str]) -> Counter:
    """Run `case` for every seed. It returns what came of it, or raises DeepV3Error, which is an outcome too.

    Raises AssertionError, with the seeds, for cases that ended in anything else.
    """
    outcomes: Counter = Counter()
    wrong = []
    for seed in cases:
        try:
            with in_time():
                outcomes[case(random.Random(seed))] += 1
        except DeepV3Error as error:
            assert str(error).strip(), f"seed {seed}: an error without words"
            outcomes[type(error).__name__] += 1
        except BaseException as error:  # SystemExit, RecursionError and panics of Rust are BaseExceptions too
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append((seed, f"{type(error).__name__}: {str(error)[:300]}"))
    assert not wrong, f"{len(wrong)} of {len(cases)} cases ended with a foreign error:\n" + "\n".join(
        map(str, wrong[:12])
    )
    print(f"{len(cases)} cases: {dict(outcomes)}")
    return outcomes
