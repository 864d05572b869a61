"""Rows from documents that are read and tokenised while training, resumable at the exact token on any number of ranks.

1. The documents of a stream are numbered as they come, endlessly, epoch after epoch: 0, 1, 2, ...
2. They are dealt to LANES lanes: document o goes to lane o % LANES, which packs its documents as packing.py does.
3. Sample n of the run takes the next row of lane n % LANES. Data ranks take samples n % dp, so with dp dividing LANES a
   rank needs its own LANES / dp lanes only, and which rank a lane lives on changes nothing.
4. A lane's state is (document, offset): where its next row begins. A resumed lane tokenises that document again and
   drops ``offset`` tokens. The reader goes back to the newest noted place before the first document that is needed.

Given up: every rank reads (and drops) the text of all lanes; only tokenising, the expensive part, is divided. Documents
come in the stream's order. A stream shorter than a few documents per lane repeats them before others have been seen.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from deepv3.data.corpus import Source
from deepv3.data.encoding import Encoder
from deepv3.data.packing import RowShape
from deepv3.data.reading import Document
from deepv3.data.tokenise import bad_document
from deepv3.errors import ConfigError, DataError

LANES = 768  # 2^8 x 3: divisible by most counts of data ranks; never changed, the order of samples hangs on it
NOTE_EVERY = 256  # documents between two places that the reader can go back to

State = dict[str, Any]


class Reader:
    """The endless numbered documents of one part of a stream: bad, empty and other parts' documents are passed by.

    bad: how many could not be read so far; they are named to ``say``, the first ten and then ever fewer. Raises
    DataError for the first one if ``stop``, and where a whole pass over the stream gives nothing.
    """

    def __init__(
        self, source: Source, encoder: Encoder, part: str, cache_dir: Path, stop: bool, say: Callable[[str], None]
    ):
        self._source, self._encoder, self._part = source, encoder, part
        self._cache_dir, self._stop, self._say = cache_dir, stop, say
        self.bad = 0
        self.passes, self.length = 0, 1  # over the whole stream since this reader was made; documents in the last one
        self._notes: deque[State] = deque()
        self.go_back({"ordinal": 0, "index": 0, "dataset": None})

    @property
    def label(self) -> str:
        """The source's name in the config, with its path."""
        return f"{self._source.label}.path={self._source.config.path}"

    def go_back(self, note: State) -> None:
        """Read on from a place noted earlier."""
        self._ordinal, self._index = note["ordinal"], note["index"]
        self._useful = self._index > 0
        self._dataset = self._source.documents(self._cache_dir)
        if note["dataset"] is not None:
            self._dataset.load_state_dict(note["dataset"])
        self._rows = iter(self._dataset)
        self._notes = deque([note])

    def note(self, ordinal: int) -> State:
        """The newest place from which document ``ordinal`` is still to come; older ones are forgotten."""
        while len(self._notes) > 1 and self._notes[1]["ordinal"] <= ordinal:
            self._notes.popleft()
        return self._notes[0]

    def read(self) -> tuple[int, Document | None]:
        """(its number, the next document), None in place of one that is not for this part."""
        if self._ordinal % NOTE_EVERY == 0 and self._notes[-1]["ordinal"] != self._ordinal:
            self._notes.append({"ordinal": self._ordinal, "index": self._index, "dataset": self._dataset.state_dict()})
        row = next(self._rows, None)
        if row is None:
            self._again()
            row = next(self._rows, None)
            if row is None:
                raise DataError(f"{self._source.label}.path={self._source.config.path}: the stream is empty")
        document = self._source.as_document(row, self._index)
        ordinal = self._ordinal
        self._ordinal += 1
        self._index += 1
        return ordinal, self._usable(document)

    def _again(self) -> None:
        if not self._useful:
            raise DataError(
                f"{self._source.label}.path={self._source.config.path}: a whole pass over the stream gave no document "
                f"for {self._part} ({self._index:,} read, {self.bad:,} bad so far); look at its field, or at "
                "data.validation_fraction"
            )
        self.passes, self.length = self.passes + 1, max(1, self._index)
        self._dataset = self._source.documents(self._cache_dir)
        self._rows, self._index, self._useful = iter(self._dataset), 0, False

    def _usable(self, document: Document) -> Document | None:
        if document["error"]:
            if self._stop:
                raise bad_document(self._source.label, document)
            self.bad += 1
            if self.bad <= 10 or self.bad == 10 ** (len(str(self.bad)) - 1):
                self._say(f"bad document {document['name']}: {document['error']} (number {self.bad:,})")
            return None
        if not document["text"] or self._encoder.part(document["number"]) != self._part:
            return None
        self._useful = True
        return document


def check_lanes(dp_size: int) -> None:
    """Raises ConfigError where lanes cannot be dealt to that many data ranks."""
    if LANES % dp_size:
        raise ConfigError(
            f"a streaming source is dealt to {LANES} lanes, which {dp_size} data ranks do not divide ({LANES} % "
            f"{dp_size} = {LANES % dp_size}); start a number of ranks that does, or set the sources' streaming=false"
        )


class Lane:
    """One lane: documents waiting to be tokenised, and tokens waiting to be taken."""

    def __init__(self, ordinal: int):
        self.waiting: deque[tuple[int, Document]] = deque()
        self.chunks: deque[tuple[int, np.ndarray]] = deque()
        self.go_back(ordinal, 0)

    def go_back(self, ordinal: int, offset: int) -> None:
        """The next row begins ``offset`` tokens into document ``ordinal``."""
        self.waiting.clear()
        self.chunks.clear()
        self.place = (ordinal, offset)
        self.held = -offset  # tokens at hand, after those that are to be dropped

    def add(self, ordinal: int, tokens: np.ndarray) -> None:
        """Append a tokenised document."""
        self.chunks.append((ordinal, tokens))
        self.held += len(tokens)

    def take(self, shape: RowShape) -> np.ndarray:
        """The next row, [length]; ``held`` must suffice. Moves on by seq_len tokens."""
        offset = self.place[1]
        row, filled = np.empty(shape.length, np.int32), 0
        for i, (_, tokens) in enumerate(self.chunks):
            part = tokens[0 if i else offset :][: shape.length - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
        offset += shape.seq_len
        while offset >= len(self.chunks[0][1]):
            offset -= len(self.chunks.popleft()[1])
        self.held -= shape.seq_len
        self.place = (self.chunks[0][0], offset)
        return row


class Lanes:
    """The training rows of a streaming source for one data rank. rows: unknown."""

    rows = None

    def __init__(self, reader: Reader, encoder: Encoder, shape: RowShape, dp_size: int, dp_rank: int):
        check_lanes(dp_size)
        self._reader, self._encoder, self._shape = reader, encoder, shape
        self._lanes = {number: Lane(number) for number in range(dp_rank, LANES, dp_size)}

    def sample(self, n: int, index: int) -> np.ndarray:
        """The row of sample n of the run, [length]; samples of a lane are asked for in order."""
        lane = self._lanes[n % LANES]
        passes = self._reader.passes
        while lane.held < self._shape.length:
            if not lane.waiting:
                met = self._reader.passes - passes  # after so many passes each document has met each lane that it can
                if met > LANES // gcd(LANES, self._reader.length) + 1:
                    raise DataError(
                        f"{self._reader.label}: {met} passes over the stream gave lane {n % LANES} no document; "
                        "give more that can be used, or set the source's streaming=false"
                    )
                self._read()
                continue
            passes = self._reader.passes
            ordinal, document = lane.waiting.popleft()
            lane.add(ordinal, self._encoder.encode(document["number"], document["text"]))
        return lane.take(self._shape)

    def _read(self) -> None:
        ordinal, document = self._reader.read()
        lane = self._lanes.get(ordinal % LANES)
        if lane is not None and document is not None and ordinal >= lane.place[0]:
            lane.waiting.append((ordinal, document))

    def state(self) -> State:
        """{"lanes": {lane: [document, offset]}, "notes": [places of the reader]} of this rank, JSON values."""
        places = {str(number): list(lane.place) for number, lane in self._lanes.items()}
        return {"lanes": places, "notes": [self._reader.note(min(place[0] for place in places.values()))]}

    def restore(self, state: State) -> None:
        """Go on from ``merge`` of all ranks' states, whatever their number was."""
        for number, lane in self._lanes.items():
            lane.go_back(*state["lanes"][str(number)])
        first = min(lane.place[0] for lane in self._lanes.values())
        notes = [note for note in state["notes"] if note["ordinal"] <= first]
        self._reader.go_back(max(notes, key=lambda note: note["ordinal"]))


def merge(states: Iterable[State]) -> State:
    """The state of the whole stream from those of all ranks; ranks that hold the same lanes agree."""
    lanes: dict[str, list[int]] = {}
    notes: dict[int, State] = {}
    for state in states:
        lanes |= state["lanes"]
        notes |= {note["ordinal"]: note for note in state["notes"]}
    return {"lanes": lanes, "notes": list(notes.values())}


class Head:
    """The first held-out rows of a stream, kept in memory: read as far as they are asked for.

    Reads 1 / validation_fraction documents for each one it keeps, once. Starts over where the stream has ended.
    """

    rows = None

    def __init__(self, reader: Reader, encoder: Encoder, shape: RowShape):
        self._reader, self._encoder, self._shape = reader, encoder, shape
        self._rows: list[np.ndarray] = []
        self._source = self._cut()

    def sample(self, n: int, index: int) -> np.ndarray:
        """Row ``index``, [length]."""
        while len(self._rows) <= index:
            self._rows.append(next(self._source))
        return self._rows[index]

    def _cut(self) -> Iterator[np.ndarray]:
        lane = Lane(0)
        while True:
            while lane.held < self._shape.length:
                ordinal, document = self._reader.read()
                if document is not None:
                    lane.add(ordinal, self._encoder.encode(document["number"], document["text"]))
            yield lane.take(self._shape)
