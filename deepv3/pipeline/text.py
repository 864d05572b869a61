"""Schedules as text that one can read, edit and diff: one action a line, a heading per rank.

    schedule dualpipev
    micro_batches 2
    route 0 1 1 0                  one line per direction: the rank of each stage
    reverse_from 2                 first micro-batch of direction 1; = micro_batches if there is none
    forward_only | lowered         only where it holds
    note fewer pairs overlap       any number of lines
    rank 0
    F0.0
    ...

``parse_schedule(format_schedule(s)) == s`` for every schedule. Blank lines and lines that start with ``#`` are dropped.
Parsing checks the form only; ``check`` says whether the lists can run.
"""

from deepv3.errors import ScheduleError
from deepv3.pipeline.actions import Step, parse_step
from deepv3.pipeline.schedule import Schedule


def format_schedule(schedule: Schedule) -> str:
    """The text of a schedule, lowered or not."""
    lines = [f"schedule {schedule.name}", f"micro_batches {schedule.micro_batches}"]
    lines += ["route " + " ".join(map(str, route)) for route in schedule.routes]
    lines.append(f"reverse_from {schedule.reverse_from}")
    lines += [flag for flag in ("forward_only", "lowered") if getattr(schedule, flag)]
    lines += [f"note {note}" for note in schedule.notes]
    for rank, steps in enumerate(schedule.actions):
        lines.append(f"rank {rank}")
        lines += map(str, steps)
    return "\n".join(lines) + "\n"


def _whole(words: str) -> tuple[int, ...]:
    if not all(word.isdecimal() for word in words.split()):
        raise ScheduleError(f"'{words}' holds something else than whole numbers")
    return tuple(int(word) for word in words.split())


_HEADS = ("schedule", "micro_batches", "reverse_from", "forward_only", "lowered")


class _Reader:
    """What has been read so far."""

    def __init__(self) -> None:
        self.heads: dict[str, str] = {}
        self.routes: list[tuple[int, ...]] = []
        self.notes: list[str] = []
        self.actions: list[list[Step]] = []

    def line(self, text: str) -> None:
        head, _, rest = text.partition(" ")
        if head == "rank":
            if rest != str(len(self.actions)):
                raise ScheduleError(f"'{text}' stands where 'rank {len(self.actions)}' is due")
            self.actions.append([])
        elif self.actions:
            self.actions[-1].append(parse_step(text))
        elif head == "route":
            self.routes.append(_whole(rest))
        elif head == "note":
            self.notes.append(rest)
        elif head in _HEADS and head not in self.heads:
            self.heads[head] = rest
        else:
            raise ScheduleError(f"'{text}' is no heading or stands there twice")

    def number(self, head: str) -> int:
        if head not in self.heads or len(numbers := _whole(self.heads[head])) != 1:
            raise ScheduleError(f"the heading '{head} <number>' is missing")
        return numbers[0]


def parse_schedule(text: str) -> Schedule:
    """The inverse of format_schedule. Raises ScheduleError with the number of the line that is wrong."""
    reader = _Reader()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            reader.line(line.strip())
        except ScheduleError as error:
            raise ScheduleError(f"line {number}: {error}") from None
    ranks = len(reader.actions)
    if not reader.routes or len({len(route) for route in reader.routes}) != 1 or len(reader.routes) > 2:
        raise ScheduleError(f"one or two 'route' lines of one length are due, got {len(reader.routes)}")
    routed = sorted({rank for route in reader.routes for rank in route})
    if routed != list(range(ranks)):
        raise ScheduleError(f"the routes name ranks {routed}, the lists are those of ranks 0 to {ranks - 1}")
    return Schedule(
        name=reader.heads.get("schedule", ""),
        micro_batches=reader.number("micro_batches"),
        routes=tuple(reader.routes),
        actions=tuple(map(tuple, reader.actions)),
        reverse_from=reader.number("reverse_from"),
        notes=tuple(reader.notes),
        forward_only="forward_only" in reader.heads,
        lowered="lowered" in reader.heads,
    )
