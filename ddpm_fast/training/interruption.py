"""Ctrl-C during training."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruption:
    """Makes the first Ctrl-C a request, so that no step is left half done; a second is instant.

    Attributes:
        requested: whether Ctrl-C was pressed.
    """

    def __init__(self, handles: bool = True) -> None:
        self.requested = False
        self._handles = handles and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interruption:
        if self._handles:
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
