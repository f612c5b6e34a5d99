"""What all benchmarks share: alternating measurements, the machine in words, the closing JSON line."""

import json
import os
import platform
import sys
import time
from pathlib import Path

import torch


def alternate(functions, rounds, warmup, device):
    """Call the functions of {name: function} in turn, `rounds` times after `warmup` unmeasured turns.

    Taking turns spreads a slow spell of the machine over all of them. Returns {name: [seconds, ...]}.
    """
    device = torch.device(device)
    seconds = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def describe(device):
    """Processor, cores, threads and versions in one line."""
    device = torch.device(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    text = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        text = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; host {text}"
    return f"{text}; torch {torch.__version__}, python {sys.version.split()[0]}"


def finish(ratios):
    """Print the ratios {name: number} as the benchmark's last line, one JSON object."""
    print(json.dumps({name: round(float(ratio), 3) for name, ratio in ratios.items()}), flush=True)
