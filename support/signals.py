"""Ctrl-C, SIGTERM and SIGHUP: the first one lets a run finish its step or batch and save, a second
one stops it.
"""

import signal
import threading
from types import FrameType

import torch

from support import distributed

received: int | None = None  # the signal that came while a run is open


class Interrupted(Exception):
    """A signal has ended a loop over batches. The text says where."""


def catch() -> dict:
    """Handle the signals from now on, if this is the main thread. Returns what `release` needs."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # A signal that is ignored, as in a background job of a script or under nohup, stays ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, _receive) for number in numbers}


def release(handlers: dict) -> None:
    """Restore the handlers that `catch` returned."""
    global received
    received = None
    for number, handler in handlers.items():
        # Under torchrun only Ctrl-C: torchrun sends SIGTERM when a process is lost, and the others
        # must still be able to print their messages.
        if number == signal.SIGINT or distributed.world_size() == 1:
            signal.signal(number, handler)


def _receive(number: int, frame: FrameType | None) -> None:
    global received
    # torchrun passes signals on, even those that its processes have received already, and sends
    # SIGTERM when a process is lost. So only a second Ctrl-C means that the user does not want to
    # wait.
    if received and (number == signal.SIGINT or distributed.world_size() == 1):
        raise KeyboardInterrupt
    received = received or number


def stop_requested(device: torch.device, at_meeting_point: bool = True) -> bool:
    """Return whether to stop now, because a process has received a signal.

    Several processes have to stop at the same step, so they ask each other. They do that only if
    all of them are `at_meeting_point`, a step at which they wait for each other anyway. At other
    steps the answer is no.
    """
    if distributed.world_size() == 1:
        return received is not None
    if not at_meeting_point:
        return False
    return distributed.sum_over_ranks(torch.tensor(float(received is not None), device=device)).item() > 0
