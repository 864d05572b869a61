"""Micro-batches for the training loop: blended, sharded over data ranks, made ahead in a thread, resumable anywhere.

Sample n of the run is a function of (seed, n): the blend names its source and its place there (order.py), the source
gives the row (packing.py, streaming.py). Data rank r gets the samples with n % dp == r, ascending, so neither dp nor
the micro-batch size changes what a global batch holds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as naturals
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from deepv3.config.schema import Config
from deepv3.data.encoding import TRAIN, VALIDATION, Encoder
from deepv3.data.order import Blend
from deepv3.data.packing import Packed, RowShape, document_ids
from deepv3.data.prefetch import Prefetch
from deepv3.data.prepare import Prepared, Ready, keep_tokenizer, prepare, say_to_stderr
from deepv3.data.streaming import Head, Lanes, Reader, check_lanes, merge
from deepv3.data.tokenizer import Tokenizer
from deepv3.dist import Grid
from deepv3.errors import ConfigError, DataError

AHEAD = 8  # micro-batches made before they are asked for


class Batch(NamedTuple):
    """tokens: [B, S+1+D] int64. documents: [B, S+1+D] int32, which document of its row a token is of, or None."""

    tokens: Tensor
    documents: Tensor | None


class Feed(Protocol):
    """A source of rows. rows: in one epoch, None where unknown."""

    @property
    def rows(self) -> int | None: ...

    def sample(self, n: int, index: int) -> np.ndarray:
        """[length] tokens: the index-th row drawn from this source, for sample n of the run."""


State = dict[str, Any]


class Loader:
    """The samples of one data rank, from sample 0 on. rows: sequences an epoch, None where a source streams.

    Mapped sources can be read at any sample. Streams go forward only: to jump, ``load_state_dict``.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        blend: Blend,
        shape: RowShape,
        grid: Grid,
        ahead: int = 0,
        eos: int | None = None,
    ):
        """ahead: micro-batches that a thread makes in advance; 0 makes them when asked. eos: if given, ids of documents
        are made too. On CUDA batches lie in page-locked memory."""
        self._feeds, self._blend, self._shape, self._grid = feeds, blend, shape, grid
        self._ahead, self._eos = ahead, eos
        self._lanes = [feed for feed in feeds if isinstance(feed, Lanes)]
        rows = [feed.rows for feed in feeds if feed.rows is not None]
        self.rows: int | None = sum(rows) if len(rows) == len(feeds) else None
        self._tokens = [feed.tokens for feed in feeds if isinstance(feed, Packed)]
        self._next, self._states = 0, [feed.state() for feed in self._lanes]
        self._maker: Prefetch | None = None
        self._making: tuple[int, int] | None = None  # (next sample, micro-batch size) of what the maker gives next

    def micro_batches(self, first_sample: int, count: int, micro_batch_size: int) -> Iterator[Batch]:
        """This rank's share of samples first_sample ... first_sample + count - 1, ascending, in micro-batches.

        Raises ConfigError where count does not divide into them, and whatever making a batch raises.
        """
        per_round = self._grid.dp_size * micro_batch_size
        if count % per_round:
            raise ConfigError(
                f"{count} sequences do not divide into micro-batches of train.micro_batch_size = {micro_batch_size} on "
                f"{self._grid.dp_size} data ranks ({count} % {per_round} = {count % per_round}); take a multiple of "
                f"{per_round}"
            )
        if first_sample != self._next and self._lanes:
            raise DataError(
                f"a streaming source stands at sample {self._next} and cannot jump to {first_sample}; restore the "
                "state that was saved there"
            )
        maker = self._move_to(first_sample, micro_batch_size)
        for first in range(first_sample, first_sample + count, per_round):
            try:
                batch, states = next(maker)
            except BaseException:
                self.close()
                raise
            self._next, self._states = first + per_round, states
            self._making = (first + per_round, micro_batch_size)
            yield batch

    def _move_to(self, first: int, size: int) -> Prefetch:
        """The running maker if it stands there, else a new one."""
        if self._maker is None or self._making != (first, size):
            self.close()
            if self._lanes and self._making is not None:  # what was made ahead is undone
                self._restore(self._states)
            device = self._grid.device if self._grid.device.type == "cuda" else None
            self._maker = Prefetch(self._make(first, size), self._ahead, device)
            self._making = (first, size)
        return self._maker

    def _make(self, first: int, size: int) -> Iterator[tuple[Batch, list[State]]]:
        """Endless (micro-batch, states of the streams after it) from a sample on."""
        step = self._grid.dp_size
        for start in naturals(first + self._grid.dp_rank, step * size):
            tokens = np.empty((size, self._shape.length), np.int64)
            for row, n in zip(tokens, range(start, start + step * size, step)):
                source, index = self._blend.locate(n)
                row[:] = self._feeds[source].sample(n, index)
            documents = None if self._eos is None else torch.from_numpy(document_ids(tokens, self._eos))
            yield self._pinned(Batch(torch.from_numpy(tokens), documents)), [feed.state() for feed in self._lanes]

    def _pinned(self, batch: Batch) -> Batch:
        if self._grid.device.type != "cuda":
            return batch
        documents = None if batch.documents is None else batch.documents.pin_memory()
        return Batch(batch.tokens.pin_memory(), documents)

    def state_dict(self) -> State:
        """Where the loader stands, as JSON values, the same on every rank; with streams all ranks call it together."""
        if not self._lanes:
            return {"next_sample": self._next, "tokens": self._tokens, "streams": []}
        streams = [merge(states) for states in zip(*self._grid.gather(self._states))]
        return {"next_sample": self._next, "tokens": self._tokens, "streams": streams}

    def load_state_dict(self, state: State) -> None:
        """Go on from a ``state_dict`` of any number of data ranks. Raises DataError if the sources have changed."""
        saved, mine = (len(state["streams"]), state["tokens"]), (len(self._lanes), self._tokens)
        if saved != mine:
            raise DataError(
                f"data.sources were {saved[0]} streams and {saved[1]} tokens when the state was saved and are now "
                f"{mine[0]} streams and {mine[1]} tokens, so sample {state['next_sample']} is another one; bring the "
                "files back, or continue from the checkpoint in a new run_dir (train.resume=PATH)"
            )
        self.close()
        self._next, self._making = state["next_sample"], None
        self._restore(state["streams"])

    def _restore(self, states: list[State]) -> None:
        for feed, mine in zip(self._lanes, states):
            feed.restore(mine)
        self._states = [feed.state() for feed in self._lanes]

    def close(self) -> None:
        """Stop the thread. The loader may go on being used; it starts another."""
        if self._maker is not None:
            self._maker.close()
            self._maker = None


@dataclass
class Data:
    """What a run reads. validation: None where nothing is held out. summary: lines for the user."""

    train: Loader
    validation: Loader | None
    tokenizer: Tokenizer
    summary: list[str]

    def close(self) -> None:
        """Stop the background work."""
        self.train.close()
        if self.validation is not None:
            self.validation.close()


def build_data(cfg: Config, grid: Grid) -> Data:
    """Prepare (or find) the data of a run and stand at sample 0. All ranks call it; on each file system one works.

    Rank 0 leaves the tokenizer in run_dir/tokenizer. Raises as ``prepare``, and ConfigError where a streaming source
    cannot be dealt to the data ranks.
    """
    say = say_to_stderr if grid.rank == 0 else _silent
    if any(source.streaming for source in cfg.data.sources):
        check_lanes(grid.dp_size)
    prepared = prepare(cfg, say)
    if grid.rank == 0:
        keep_tokenizer(cfg, prepared.tokenizer)
    eos = prepared.tokenizer.eos if cfg.data.mask_documents else None
    training = [_training_feed(cfg, prepared, i, grid, say) for i in range(len(prepared.train))]
    blend = Blend([ready.source.config.weight for ready in prepared.train], cfg.seed)
    train = Loader(training, blend, prepared.shape, grid, AHEAD, eos)
    validation = validation_loader(cfg, prepared, grid)
    return Data(train, validation, prepared.tokenizer, prepared.describe())


def validation_loader(cfg: Config, prepared: Prepared, grid: Grid) -> Loader | None:
    """The held-out rows, the same for every seed; None where nothing is held out."""
    feeds = [(ready, _validation_feed(cfg, prepared, ready)) for ready in prepared.validation]
    usable = [(ready, feed) for ready, feed in feeds if not isinstance(feed, Packed) or feed.rows]
    if not usable:
        return None
    blend = Blend([ready.source.config.weight for ready, _ in usable], 0)
    eos = prepared.tokenizer.eos if cfg.data.mask_documents else None
    return Loader([feed for _, feed in usable], blend, prepared.shape, grid, 0, eos)


def _training_feed(cfg: Config, prepared: Prepared, i: int, grid: Grid, say: Callable[[str], None]) -> Feed:
    ready = prepared.train[i]
    if ready.folder is not None:
        return Packed(ready.folder, TRAIN, prepared.shape, (cfg.seed, i) if cfg.data.shuffle else None)
    encoder = Encoder(prepared.tokenizer, ready.rules)
    reader = _reader(cfg, ready, encoder, TRAIN, say)
    return Lanes(reader, encoder, prepared.shape, grid.dp_size, grid.dp_rank)


def _validation_feed(cfg: Config, prepared: Prepared, ready: Ready) -> Feed:
    """Held-out rows in an order that depends on nothing but their number: the same sequences for every seed."""
    if ready.folder is not None:
        return Packed(ready.folder, VALIDATION, prepared.shape, (0, 0))
    encoder = Encoder(prepared.tokenizer, ready.rules)
    return Head(_reader(cfg, ready, encoder, VALIDATION, _silent), encoder, prepared.shape)


def _reader(cfg: Config, ready: Ready, encoder: Encoder, part: str, say: Callable[[str], None]) -> Reader:
    stop = cfg.data.bad_documents == "stop"
    return Reader(ready.source, encoder, part, Path(cfg.data.cache_dir), stop, say)


def _silent(text: str) -> None:
    pass
