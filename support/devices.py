"""The device that computes: its flags, its choice, autocast and memory."""

from support.cli import number

import argparse
import contextlib
import ctypes
import functools
import os
import resource
import shutil
import sys
from pathlib import Path

import torch
import torch.utils.checkpoint

from support import distributed
from support.files import UserError


def add_device_arguments(group):
    group.add_argument("--gpu", type=number(int, 0, 1023), help="number of the CUDA device (default: 0)")
    group.add_argument("--device", help="any PyTorch device, such as cpu (default: CUDA where there is one, else CPU)")


def add_speed_arguments(group):
    group.add_argument("--amp", action="store_true", help="bfloat16 autocast (GPUs and new CPUs are faster so)")
    text = "torch.compile, cell by cell: faster after some minutes"
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "record a step as a CUDA graph (one GPU): it need not wait for Python; same results, more memory"
    group.add_argument("--cuda_graph", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "compute each cell again in the backward pass instead of keeping it: less memory, same results, slower"
    group.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "check the kernels of a training step before the first one; not needed for float32 on the CPU"
    group.add_argument("--self_check", action=argparse.BooleanOptionalAction, default=True, help=text)


def choose_device(args):
    """Return CUDA device --gpu (under torchrun each process its own), else the CPU, or --device; join other processes.

    Raises UserError for a device that cannot be used.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Runs of older versions have --gpu 0 in their arguments, given or not.
    if args.gpu is not None and args.device is None and name == "cpu" and (args.gpu or not getattr(args, "resume", 0)):
        raise UserError(f"--gpu {args.gpu}: there is no CUDA device here; leave it out or give --device cpu")
    if name == "cuda":
        name = f"cuda:{distributed.local_rank(args.gpu or 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # read, since a tensor on the device meta has no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    set_up(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if args.amp and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(f"{torch.cuda.get_device_name(device)} does not compute with bfloat16: leave --amp out")
    if args.compile and device.type == "cpu" and not has_compiler():
        raise UserError("--compile needs a C++ compiler here, g++ or what CXX names: install it or give --no-compile")
    distributed.join_process_group(device)
    return device


def has_compiler():
    """Tell whether the C++ compiler is installed that torch.compile takes for the CPU."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")) is not None


def set_up(device):
    """Make the libraries below PyTorch fast, with float32 as it is."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # the default rounds what convolutions multiply, though nothing else
    else:
        keep_freed_memory()


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor; else a good part of the time on a CPU goes into new pages."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes at the top of the heap that are not given back


def autocast(device, enabled):
    """Compute in bfloat16 where it is safe, or nowhere. Its weight cache holds for one block: one step."""
    if not (enabled or torch.amp.is_autocast_available(device.type)):  # on the meta device, say
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if enabled else None, enabled=enabled)


CHANNELS_LAST = ("cpu", "cuda")  # the devices whose images, feature maps and kernels have this layout


def memory_format(device):
    return torch.channels_last if device.type in CHANNELS_LAST else torch.contiguous_format


@functools.cache
def compiled(function):
    """Return torch.compile(function): one and the same for each function, with a graph for each shape of its inputs."""
    # Cells of several sizes, with and without gradients, and a last, smaller batch: more shapes than the default limit,
    # whose name is recompile_limit in newer versions.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    return torch.compile(function, dynamic=False)


class Recorded:
    """A function of CUDA tensors whose kernels are recorded as a CUDA graph and from then on launched all at once.

    The first two calls compute as ever, so that libraries, compilers and optimizer are ready. Whatever else it
    reads must be tensors that stay where they are, or never change. Inputs of other shapes than the first ones are
    computed without the graph.
    """

    def __init__(self, function):
        self.function, self.calls = function, 0
        self.graph, self.inputs, self.stream = None, None, torch.cuda.Stream()

    def __call__(self, *inputs):
        """Return what the function does: one tensor, a copy of its own."""
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
        if any(x.shape != own.shape for x, own in zip(inputs, self.inputs, strict=True)):
            return self.function(*inputs)
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x)
        self.calls += 1
        if self.calls <= 2:
            return self.on_own_stream()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Meanwhile another thread may pin the memory of the next images.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        self.graph.replay()
        return self.output.clone()

    def on_own_stream(self):
        """Compute as ever but on a stream of its own: gradients belong to the stream of their first backward pass."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output.clone()


def cell_function(function, compile=False, checkpoint=False):
    """Return `function`, of a cell, compiled; with `checkpoint` the backward pass computes it again.

    Then only its arguments are kept. Among them may be modules, whose running statistics move the first time alone. The
    function draws no random numbers.
    """
    function = compiled(function) if compile else function
    if not checkpoint:
        return function

    def recomputed(*args):
        modules = [arg for arg in args if isinstance(arg, torch.nn.Module)]
        return torch.utils.checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), resting_statistics(modules)),
        )

    return recomputed


@contextlib.contextmanager
def resting_statistics(modules):
    """Let BatchNorms in train mode leave their buffers as they are, and yet save what they save otherwise."""
    norms = [norm for module in modules for norm in module.modules() if getattr(norm, "track_running_stats", False)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, values in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = values


def describe_device(device):
    if device.type == "cuda":
        return f"running on {torch.cuda.get_device_name(device)} ({device})"
    return f"running on the {device.type.upper()}, {torch.get_num_threads()} threads"


def total_memory(device) -> int:
    """Return the bytes of memory that a device has: a GPU's own, else the machine's, or the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not Linux, the other version of cgroups, or "max"
            sizes.append(int(Path(path).read_text()))
    return min(sizes)


def peak_memory_mb(device):
    """Return the peak memory in MiB: of the GPU's allocator, or of this whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
