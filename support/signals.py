"""Ctrl-C, SIGTERM and SIGHUP: the first signal lets a run save, and a second one stops it at once.

After the first signal, the run still finishes its current step or batch.
"""

import signal
import threading
from types import FrameType

import torch

from support import distributed

received: int | None = None  # the first signal that arrived while a run is open


class Interrupted(Exception):
    """Raised when a signal ends a loop over batches. The text says where the loop ended."""


def catch() -> dict:
    """Install the signal handlers, if this is the main thread.

    Returns the old handlers, for `release`.
    """
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
        # Under torchrun, restore only the handler of Ctrl-C. When a process is lost, torchrun sends
        # SIGTERM to the other processes, which must still be able to print their messages.
        if number == signal.SIGINT or distributed.world_size() == 1:
            signal.signal(number, handler)


def _receive(number: int, frame: FrameType | None) -> None:
    global received
    # torchrun passes on signals that its processes have already received, and it sends SIGTERM when
    # a process is lost. So under torchrun only a second Ctrl-C means that the user does not want to
    # wait.
    if received and (number == signal.SIGINT or distributed.world_size() == 1):
        raise KeyboardInterrupt
    received = received or number


def stop_requested(device: torch.device, at_meeting_point: bool = True) -> bool:
    """Return whether to stop now because a process of the run has received a signal.

    Several processes have to stop at the same step, so each process tells the others whether it has
    received a signal. Processes only do this if `at_meeting_point`, which must be True at a step
    where all processes wait for each other anyway. At other steps this function returns False.
    """
    if distributed.world_size() == 1:
        return received is not None
    if not at_meeting_point:
        return False
    return distributed.sum_over_ranks(torch.tensor(float(received is not None), device=device)).item() > 0
