"""Ctrl-C, SIGTERM and SIGHUP stop a run at the end of its step or batch and save it; a second one stops at once."""

import signal
import threading

import torch

from support import distributed

received = None  # the signal that came while a run is open


class Interrupted(Exception):
    """A signal ended the loop over the batches; the text says where."""


def catch():
    """Take the signals over, where this is the main thread; returns what `release` needs."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # One that is ignored, as in a background job of a script or under nohup, stays ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, _receive) for number in numbers}


def release(handlers):
    """Give the signals back."""
    global received
    received = None
    for number, handler in handlers.items():
        # Under torchrun Ctrl-C alone: SIGTERM comes when a process is lost, and must not cut short what this one says.
        if number == signal.SIGINT or distributed.world_size() == 1:
            signal.signal(number, handler)


def _receive(number, frame):
    global received
    # torchrun passes signals on, also ones that its processes have got already, and sends SIGTERM for a lost process.
    if received and (number == signal.SIGINT or distributed.world_size() == 1):
        raise KeyboardInterrupt
    received = received or number


def stop_requested(device, at_meeting_point=True):
    """Tell whether to stop now. Several processes have to stop at the same step, so they ask each other, but only
    where all of them are `at_meeting_point`: at steps where they wait for each other anyway. Else the answer is no.
    """
    if distributed.world_size() == 1:
        return received is not None
    if not at_meeting_point:
        return False
    return distributed.sum_over_ranks(torch.tensor(float(received is not None), device=device)).item() > 0
