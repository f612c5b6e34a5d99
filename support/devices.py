"""The compute device: flags, choice, number formats, compilation, CUDA graphs and memory."""

from support.cli import number

import argparse
import contextlib
import ctypes
import functools
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import nn

from support import distributed
from support.files import UserError


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --gpu and --device."""
    text = "number of the CUDA device to use (default: 0)"
    group.add_argument("--gpu", type=number(int, 0, 1023), metavar="N", help=text)
    text = "PyTorch device to use, such as cpu (default: CUDA if there is a GPU, else the CPU)"
    group.add_argument("--device", help=text)


def add_speed_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --amp, --compile, --cuda_graph, --checkpoint and --self_check."""
    text = "train in bfloat16 autocast (faster on GPUs and recent CPUs)"
    group.add_argument("--amp", action="store_true", help=text)
    text = "compile parts of the network with torch.compile; takes minutes at the start, then runs faster"
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = (
        "on a GPU, record a training step (in one process) and repeated forward passes as CUDA graphs, so that "
        "the GPU does not wait for Python; same results, more memory"
    )
    group.add_argument("--cuda_graph", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = (
        "recompute activations in the backward pass instead of keeping them in memory; "
        "same results, less memory, slower"
    )
    group.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = (
        "before training, compare the kernels of one training step with float64 arithmetic; "
        "not needed in float32 on the CPU, and skipped there"
    )
    group.add_argument("--self_check", action=argparse.BooleanOptionalAction, default=True, help=text)


def choose_device(args: argparse.Namespace) -> torch.device:
    """Return the device that --device and --gpu select, set it up, and join the process group.

    Without --device, the device is CUDA device --gpu if there is a GPU, and otherwise the CPU.
    Under torchrun each process uses its own GPU. Raises UserError for a device or a setting that
    cannot be used.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.gpu is not None and args.device is None and name == "cpu":
        raise UserError(f"--gpu {args.gpu}: this machine has no CUDA device. Leave --gpu out, or give --device cpu")
    if name == "cuda":
        name = f"cuda:{distributed.local_rank(args.gpu or 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # item() fails on the device "meta", whose tensors have no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name} cannot be used ({reason}). Choose another device with --device") from error
    set_up(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if args.amp and not torch.cuda.is_bf16_supported(including_emulation=False):
            gpu = torch.cuda.get_device_name(device)
            raise UserError(f"--amp: {gpu} does not support bfloat16. Leave --amp out")
    if args.compile and device.type == "cpu" and not has_compiler():
        raise UserError(
            "--compile: no C++ compiler found (g++, or what CXX names). Install a compiler, or leave --compile out"
        )
    distributed.join_process_group(device)
    return device


def has_compiler() -> bool:
    """Return whether the C++ compiler that torch.compile needs on the CPU is installed."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")) is not None


def set_up(device: torch.device) -> None:
    """Set up cuDNN or the memory allocator for speed, without rounding float32 to TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # by default, cuDNN rounds the inputs of convolutions to TF32
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor.

    By default glibc returns the memory of large freed tensors to the operating system. The CPU then
    spends much of its time on getting new pages.
    """
    with contextlib.suppress(AttributeError):  # a C library other than glibc has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: do not use mmap for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes to keep at the top of the heap


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Return an autocast context: to bfloat16 if `enabled`, otherwise one without autocast.

    The context caches weights that it has converted to bfloat16. Weights change in each step, so
    enter a new context for each step.
    """
    if not (enabled or torch.amp.is_autocast_available(device.type)):  # on the device "meta", for example
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if enabled else None, enabled=enabled)


CHANNELS_LAST = ("cpu", "cuda")  # devices on which images, feature maps and kernels are channels-last


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format of images, feature maps and kernels on a device."""
    return torch.channels_last if device.type in CHANNELS_LAST else torch.contiguous_format


@functools.cache
def compiled(function: Callable) -> Callable:
    """Return torch.compile(function), which compiles one graph for each shape of the inputs.

    Later calls with the same function return the same object, so its graphs are shared.
    """
    # A network calls the function with many kinds of inputs: several sizes, with and without
    # gradients, and a smaller last batch. So we raise the limit on the number of graphs. Newer
    # versions of PyTorch call this limit recompile_limit.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    return torch.compile(function, dynamic=False)


def can_record(device: torch.device) -> bool:
    """Return whether functions of tensors on a device can be recorded, see `Recorded`."""
    return device.type == "cuda"


class Recorded:
    """A function of CUDA tensors that is recorded as a CUDA graph, so that its kernels are launched
    all at once.

    The first `warm_up` calls run without a graph, so that libraries, compilers and the optimiser are
    initialised before the recording. Besides its inputs, the function may only read tensors that
    keep their addresses, and values that never change. Inputs whose shapes differ from those of the
    first call are computed without the graph.
    """

    def __init__(self, function: Callable[..., torch.Tensor], warm_up: int = 2) -> None:
        self.function = function
        self.warm_up = warm_up
        self.calls = 0
        self.graph = None
        self.inputs = None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the function's result as a new tensor, which later calls do not overwrite."""
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
        if any(x.shape != recorded.shape for x, recorded in zip(inputs, self.inputs, strict=True)):
            return self.function(*inputs)
        for recorded, x in zip(self.inputs, inputs, strict=True):
            recorded.copy_(x)
        self.calls += 1
        if self.calls <= self.warm_up:
            return self.on_side_stream()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # "thread_local", because another thread may pin memory for the next images meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        self.graph.replay()
        return self.output.clone()

    def on_side_stream(self) -> torch.Tensor:
        """Run the function without a graph, on a side stream.

        A gradient is tied to the stream of its first backward pass. The first backward pass must
        not use the default stream, because a CUDA graph cannot be recorded on that stream.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output.clone()


def region_function(function: Callable, compile: bool = False, checkpoint: bool = False) -> Callable:
    """Return `function`, which computes a region of a network, compiled and checkpointed if asked.

    With `checkpoint` only the function's arguments are kept in memory, and the backward pass runs
    the function a second time. The second run leaves the running statistics of modules among the
    arguments unchanged. `function` must not draw random numbers.
    """
    function = compiled(function) if compile else function
    if not checkpoint:
        return function

    def recomputed(*args: object) -> object:
        modules = [arg for arg in args if isinstance(arg, nn.Module)]
        return torch.utils.checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), frozen_statistics(modules)),
        )

    return recomputed


@contextlib.contextmanager
def frozen_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this block, BatchNorms in training mode do not change their running statistics.

    BatchNorms still save the same tensors for the backward pass as outside the block.
    """
    # Momentum 0 keeps the old statistics, and BatchNorm skips a counter that is None.
    norms = [norm for module in modules for norm in module.modules() if getattr(norm, "track_running_stats", False)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = batches


def device_text(device: torch.device) -> str:
    """Return a line for the log that names the device on which the run computes."""
    if device.type == "cuda":
        return f"running on {torch.cuda.get_device_name(device)} ({device})"
    return f"running on the {device.type.upper()}, {torch.get_num_threads()} threads"


def total_memory(device: torch.device) -> int:
    """Return the total memory of a device in bytes.

    For the CPU this is the machine's memory, or the container's limit if that is smaller.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # each version of cgroups has one of the files; "max": no limit
            sizes.append(int(Path(path).read_text()))
    return min(sizes)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of PyTorch on a GPU, or of the whole process on the CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
