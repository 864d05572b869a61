"""What ranks tell of themselves once a second, and what follows from everyone's: who is dead, who is behind."""

import json
import linecache
import os
import re
import socket
import sys
import sysconfig
from types import FrameType
from typing import NamedTuple

LIBRARIES = (sysconfig.get_path("stdlib"), "/site-packages/", "/dist-packages/")

# A line of code that waits for other ranks or for the device.
WAITS = re.compile(
    r"\.wait\(|all_reduce|all_gather|all_to_all|reduce_scatter|broadcast|barrier|recv|send\(|synchronize|\.tolist\("
    r"|\.item\(|\.read\(\)|gather\("
)


class Pulse(NamedTuple):
    """One rank's beat. number: beats so far; step: being computed; where: function and line of ours that its main
    thread is in; waits: whether that line waits for others; left: why it left, empty while it is there; host, pid: its
    process."""

    number: int
    step: int
    where: str
    waits: bool
    left: str
    host: str
    pid: int

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self)

    @staticmethod
    def from_json(text: str) -> "Pulse":
        """The inverse."""
        return Pulse(*json.loads(text))


def here(thread: int | None) -> tuple[str, bool]:
    """Where a thread is: (innermost function and line outside of libraries, whether it waits for others there)."""
    frame: FrameType | None = sys._current_frames().get(thread or 0)
    while frame is not None:
        code = frame.f_code
        if not any(library in code.co_filename for library in LIBRARIES):
            line = linecache.getline(code.co_filename, frame.f_lineno)
            short = "/".join(code.co_filename.split("/")[-2:])
            return f"{code.co_name} ({short}:{frame.f_lineno})", bool(WAITS.search(line))
        frame = frame.f_back
    return "nowhere", False


def is_gone(pulse: Pulse) -> bool | None:
    """Whether the process behind a pulse has ended; None where it runs on another node, or cannot be told."""
    if pulse.host != socket.gethostname() or not os.path.isdir("/proc/self"):
        return None
    try:
        with open(f"/proc/{pulse.pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return True if state in "ZX" else None if state in "Tt" else False


def who_died(seen: dict[int, tuple[Pulse, float]], me: int, silent: float, only_silent: bool = False) -> str | None:
    """Who is dead, or left first for a reason of its own, in words; None if nobody.

    seen: rank -> (pulse, seconds since it changed); silent: seconds after which a rank of another node is dead, where
    only its beat tells; only_silent: pass over ranks that left and said so.
    """
    others = {rank: found for rank, found in seen.items() if rank != me}
    dead: dict[int, Pulse] = {}
    for rank, (pulse, age) in others.items():
        gone = is_gone(pulse)
        if not pulse.left and (gone or (gone is None and age > silent)):
            dead[rank] = pulse
    left = {rank: pulse for rank, (pulse, _) in others.items() if pulse.left not in ("", "done", "PeerLost")}
    if dead:
        pulse = dead[min(dead)]
        return f"{_names(list(dead))} died in step {pulse.step}, last seen in {pulse.where}"
    if left and not only_silent:
        return f"rank {min(left)} left in step {left[min(left)].step}: {left[min(left)].left}"
    return None


def who_hangs(pulses: dict[int, Pulse]) -> str:
    """The ranks at the earliest step; among them those that wait for nobody; all, if everyone waits. At least one."""
    first = min(pulse.step for pulse in pulses.values())
    behind = [rank for rank, pulse in pulses.items() if pulse.step == first]
    busy = [rank for rank in behind if not pulses[rank].waits]
    if not busy and len(behind) == len(pulses):
        places = sorted({pulse.where for pulse in pulses.values()})
        return f"all ranks wait for one another in step {first}, in {', '.join(places[:3])}"
    named = busy or behind
    return f"{_names(named)} hangs in step {first}, in {pulses[named[0]].where}"


def _names(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:4])) + more
