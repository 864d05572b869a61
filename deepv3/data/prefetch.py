"""An iterator that works ahead in a thread."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

POLL_SECONDS = 0.2  # how soon a thread with a full queue learns that it is to stop


class Prefetch:
    """``items``, made up to ``ahead`` in advance; an error in there is raised here, where the item is asked for.

    ahead 0: no thread. device: CUDA device that the thread works for, if any. The thread ends with ``close``, when this
    object is dropped, or with the interpreter.
    """

    def __init__(self, items: Iterator, ahead: int, device: torch.device | None = None):
        self._items = items
        self.close: Callable[[], Any] = lambda: None
        if ahead:
            made: queue.Queue = queue.Queue(ahead)
            stop = threading.Event()
            thread = threading.Thread(target=_fill, args=(items, made, stop, device), name="data", daemon=True)
            thread.start()
            self._items = iter(made.get, None)
            self.close = weakref.finalize(self, _stop, thread, stop, made)

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item


def _fill(items: Iterator, made: queue.Queue, stop: threading.Event, device: torch.device | None) -> None:
    """The thread: items, or the error that ended them, into the queue until told to stop."""
    if device is not None:
        torch.cuda.set_device(device)  # a thread starts on device 0, and pinning would open a context there
    while not stop.is_set():
        try:
            item = next(items)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                made.put(item, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _stop(thread: threading.Thread, stop: threading.Event, made: queue.Queue) -> None:
    stop.set()
    with suppress(queue.Empty):  # lets a thread go that waits for room
        while True:
            made.get_nowait()
    if thread is not threading.current_thread():  # dropped by a collection that happened to run in there
        thread.join()
