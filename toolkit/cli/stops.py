"""How a command is stopped: an interrupt or a request to end raises `Stopped`, once, and not in the midst of an import.

Code in C that imports modules, as numpy's and onnxruntime's does, prints whatever interrupts it and goes on with an
ImportError; so does `exec` of a text with KeyboardInterrupt, after which Python kills itself as it ends. An exception
of its own that waits for the end of an import is neither. And where a signal falls into a finalizer, or into what code
in C asks an object while it clears errors, Python drops the exception: the signal is then sent again.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Final

_AGAIN_S: Final = 0.03
# Where Python's own import runs, in Python's own list of frames.
_IMPORTS: Final = "<frozen importlib"
# Set once a stop has reached who ends the command, or the command is over.
_heard: Final = threading.Event()


class Stopped(BaseException):
    """A signal asked the command to end; `code` is its exit code, as shells count: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number
        self.is_interrupt = number == signal.SIGINT


def heed_stops() -> None:
    """Lets interrupts and requests to end raise `Stopped`; an interrupt that whoever started this has turned off, as a
    shell does for what runs in the background, stays off."""
    _set(_raise_stopped)


def end_at_once() -> None:
    """Lets the next signal end the process without a word: one was heeded, and the last things are being done."""
    _heard.set()
    _set(signal.SIG_DFL)


def ignore_stops() -> None:
    """Lets signals come to nothing: the command is over, and has its exit code."""
    _heard.set()
    _set(signal.SIG_IGN)


def _set(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    """The handler: raises where that is heard, and asks again a little later where it would not be."""
    if _is_importing(frame):
        _begin(_ask_again_soon, number)
        return
    stop = Stopped(number)
    _begin(_ask_again_if_dropped, number, weakref.ref(stop))
    try:
        raise stop
    finally:
        # Its traceback holds this frame: with the name it would outlive its being dropped.
        del stop


def _begin(target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _ask_again_soon(number: int) -> None:
    time.sleep(_AGAIN_S)
    _ask_again(number)


def _ask_again_if_dropped(number: int, stop: weakref.ref[Stopped]) -> None:
    """Waits until the stop was heard; sends its signal again if it was dropped instead, on its way or at once."""
    while not _heard.wait(_AGAIN_S):
        if stop() is None:
            _ask_again(number)
            return


def _ask_again(number: int) -> None:
    """Sends the signal to the main thread, which a wait for the system hears too where there are such signals."""
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTS):
            return True
        frame = frame.f_back
    return False
