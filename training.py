"""Train a network for a step or an epoch, hold the state that checkpoints save, and evaluate a network.

Searches and retrainings use the same functions for a step and for an epoch. `make_optimizer` is the
only function that names an optimiser. You can replace the optimiser there, and checkpoints adapt to
it.
"""

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from support import devices, distributed, signals
from support.clock import Clock, EveryMinute, Work
from support.files import UserError

CHECKPOINT_IS_KEPT = (
    "the last checkpoint is from before that; start a new run with a smaller --learning_rate or --grad_clip"
)
FORWARD = 1 / 3  # duration of a forward pass relative to a training step, until it has been timed
TRAIN_AGAIN = "these weights are unusable; train again with a smaller --learning_rate or --grad_clip"


def make_optimizer(
    parameters: Iterable[nn.Parameter], args: argparse.Namespace, *, nesterov: bool = False
) -> torch.optim.Optimizer:
    """Make the optimiser of searches and retrainings.

    The optimiser is SGD with one parameter group, so weight decay acts on every parameter. `args`
    has learning_rate, momentum and weight_decay. If the momentum is 0, `nesterov` is ignored,
    because PyTorch refuses Nesterov momentum of 0.
    """
    parameters = list(parameters)
    return torch.optim.SGD(
        parameters,
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=nesterov and args.momentum > 0,
        fused=parameters[0].device.type == "cuda",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group of `optimizer` this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@dataclass(frozen=True)
class TrainingSettings:
    """The command line's settings for a training step and an epoch."""

    amp: bool = False  # bfloat16 autocast
    grad_clip: float | None = 5.0  # largest gradient norm; None does not clip
    cuda_graph: bool = False  # record the step as a CUDA graph, on one GPU
    report_freq: int = 50  # steps between two reports

    @classmethod
    def of(cls, args: argparse.Namespace) -> "TrainingSettings":
        """Take the settings from the arguments of a command line."""
        return cls(args.amp, args.grad_clip, args.cuda_graph, args.report_freq)


# ---- what a checkpoint holds


@dataclass
class Progress:
    """Progress within an epoch. Each process has its own row in `sums` and `buffers`.

    While an epoch runs, `add` adds to `own_sums`, the row of this process. `gather` collects the
    rows of all processes in `sums` and `buffers`, and a checkpoint within an epoch holds these
    rows.
    """

    steps: int = 0  # batches that have been trained on
    # float64 (processes, 3): sum of the losses, number of correct answers, number of images
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 3, dtype=torch.float64))
    buffers: torch.Tensor | None = None  # (processes, elements): running statistics; None before the first `gather`
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter() - self.seconds
        self.own_sums = torch.zeros(3, dtype=torch.float64)  # on the CPU: not every device computes in float64

    def state_dict(self) -> dict:
        """Return the fields that a checkpoint saves. `Progress(**fields)` restores them."""
        seconds = time.perf_counter() - self.start
        return {"steps": self.steps, "sums": self.sums, "buffers": self.buffers, "seconds": seconds}

    def check(self, steps: int, network: nn.Module) -> None:
        """Raise ValueError unless this progress is possible in an epoch of `steps` steps with `network`.

        A field of the wrong type can also raise an error of Python or torch: AttributeError,
        TypeError or RuntimeError.
        """
        processes = len(self.sums)
        elements = sum(buffer.numel() for buffer in running_statistics(network))
        if self.sums.dtype != torch.float64 or self.sums.shape != (processes, 3) or processes == 0:
            raise ValueError("the sums of an interrupted epoch do not have one row for each process")
        if self.buffers is not None:
            if self.buffers.shape != (processes, elements) or not self.buffers.isfinite().all():
                raise ValueError("the running statistics of an interrupted epoch do not fit the network")
        if type(self.steps) is not int or not 0 <= self.steps <= steps:
            raise ValueError(f"an epoch of {steps} steps cannot be interrupted after {self.steps}")

    def restore_own_sums(self) -> None:
        """Set `own_sums` to this process's row of `sums`.

        If the number of processes has changed, the first process takes the total and the others
        start from 0.
        """
        if len(self.sums) == distributed.world_size():
            self.own_sums = self.sums[distributed.rank()].clone()
        else:
            self.own_sums = self.sums.sum(0) * (distributed.rank() == 0)

    def restore_buffers(self, buffers: Sequence[torch.Tensor]) -> None:
        """Copy this process's row of running statistics into `buffers`, the running statistics of the network.

        If the number of processes has changed, every process takes the mean of the rows.
        """
        if self.buffers is None:
            return
        if len(self.sums) == distributed.world_size():
            row = self.buffers[distributed.rank()]
        else:
            row = self.buffers.mean(0)
        distributed.fill(buffers, row)

    def add(self, results: Sequence[Sequence[float]]) -> None:
        """Add the results of steps to `own_sums`: each step's mean loss, correct answers and images."""
        for loss, correct, images in results:  # one by one, so that the rounding does not depend on --report_freq
            self.own_sums += torch.tensor([loss * images, correct, images], dtype=torch.float64)

    def gather(self, buffers: Sequence[torch.Tensor]) -> None:
        """Collect the sums and running statistics of all processes."""
        self.sums = distributed.stack_over_ranks([self.own_sums])
        self.buffers = distributed.stack_over_ranks(buffers)

    def report(self) -> str:
        """Return, as text, the mean loss and the accuracy of this process so far in the epoch."""
        loss, correct, images = self.own_sums.tolist()
        return f"loss {loss / images:.4f}, top-1 {100 * correct / images:.2f} %"

    def means(self) -> dict[str, float]:
        """Return the mean loss and the top-1 accuracy, in percent, over all images."""
        loss, correct, images = self.sums.sum(0).tolist()
        return {"train_loss": loss / images, "train_top1": 100 * correct / images}


class TrainingState:
    """The state that changes from epoch to epoch. A checkpoint holds this state.

    Subclasses list further attributes to save in `saved`. `progress` is the progress of the running
    epoch. `partial` is the progress of an epoch that a signal interrupted in an earlier run of the
    program, or None. `trained` is the module that is called in training: the network, or a
    DistributedDataParallel around the network. `clock` estimates how long the run will still take.
    """

    saved: tuple[str, ...] = ()

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_loader: Iterable,
        settings: TrainingSettings,
        **generators: torch.Generator,
    ):
        self.network = network
        self.trained = network
        self.optimizer = optimizer
        self.train_loader = train_loader
        self.settings = settings
        self.generators = {"train": train_loader.generator, **generators}
        self.progress = Progress()
        self.partial: Progress | None = None
        self.clock = Clock(training=Work(left=0))

    def generator_states(self) -> dict[str, torch.Tensor]:
        """Return the states of all random number generators by name."""
        return {name: generator.get_state() for name, generator in self.generators.items()}

    def begin_epoch(self) -> None:
        """Start a new epoch, or continue the one that was interrupted."""
        self.progress = self.partial or Progress()
        self.partial = None
        self.generators_before = self.generator_states()

    def state_dict(self) -> dict:
        """Return the content of a checkpoint between two epochs."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {name: getattr(self, name) for name in self.saved}
        return state | {"generators": self.generator_states()}

    def unfinished_state_dict(self) -> dict:
        """Return the content of a checkpoint within an epoch.

        A resumed run continues training after the last step of `progress`. A measurement that was
        interrupted starts again. The generators have their states from the start of the epoch,
        because a resumed epoch draws its random numbers again.
        """
        return self.state_dict() | {"generators": self.generators_before, "partial": self.progress.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned.

        The optimiser keeps its current settings, which come from the command line. If `state` is
        not a state of this network and optimiser, raises ValueError, or an error of dict or torch.
        """
        self.network.load_state_dict(state["network"])
        check_optimizer_state(self.optimizer, state["optimizer"]["state"])
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        for name in self.saved:
            setattr(self, name, state[name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        self.partial = Progress(**state["partial"]) if "partial" in state else None
        if self.partial:
            self.partial.check(len(self.train_loader), self.network)


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, dict]) -> None:
    """Check that a saved state fits the optimiser, by comparing it with the state of a fresh optimiser.

    `state` is {number of a parameter: {name: value}}. A parameter without a state is allowed: it
    has not had a gradient yet. Raises ValueError for a state that this optimiser cannot have, and
    KeyError for a parameter that does not exist.
    """
    expected = fresh_optimizer_state(optimizer)
    for i, values in state.items():
        if values.keys() != expected[i].keys():
            raise ValueError(f"the optimiser keeps {', '.join(expected[i])} of parameter {i}, not {', '.join(values)}")
        for name, value in expected[i].items():
            if torch.is_tensor(value) and values[name].shape != value.shape:
                raise ValueError(f"{name} of parameter {i} does not have the shape {tuple(value.shape)}")
            if type(values[name]) is not type(value):
                raise ValueError(f"{name} of parameter {i} is not a {type(value).__name__}")


def fresh_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """Return the state that an optimiser with the same settings and parameters has after one step.

    The tensors in the state have shapes but no storage.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters}
    twin = copy.deepcopy(optimizer, dict(shapes))  # the memo makes deepcopy use the shapes as parameters
    twin.state.clear()
    for group in twin.param_groups:
        group["fused"] = False  # fused kernels do not take tensors without storage
    for shape in shapes.values():
        shape.grad = torch.empty_like(shape)
    twin.step()
    return twin.state_dict()["state"]


# ---- training


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable,
    x: torch.Tensor,
    y: torch.Tensor,
    *inputs: torch.Tensor,
    amp: bool = False,
    grad_clip: float | None = None,
) -> torch.Tensor:
    """Train on one batch of images x (B, 3, H, W) and classes y (B,).

    Returns a tensor (3,) with the mean loss, the number of correct answers, and B. The tensor stays
    on the device, so that the step does not wait for the device. loss_of(x, y, *inputs) returns
    (loss, logits), with `amp` in bfloat16 autocast. `grad_clip` is the largest gradient norm.
    """
    optimizer.zero_grad(set_to_none=True)
    with devices.autocast(x.device, amp):
        loss, logits = loss_of(x, y, *inputs)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(network, DistributedDataParallel):  # DDP averages gradients in the backward pass
        distributed.average_over_ranks([p.grad for p in parameters])
    if grad_clip is not None:
        nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()
    loss = loss.detach()
    correct = (logits.detach().argmax(1) == y).sum()
    return torch.stack([loss, correct, torch.full_like(loss, len(y))])


def train_one_epoch(
    state: TrainingState, loss_of: Callable, inputs_of: Callable, *, where: str, log: Callable
) -> dict[str, float]:
    """Train `state.trained` on every batch of its loader once.

    The steps that `state.progress` already counts are left out.

    loss_of(x, y, *inputs_of(step)) returns (loss, logits) of a batch. `step` counts from 0 in each
    epoch. With --cuda_graph on one GPU the step is recorded (see `devices.Recorded`), so `loss_of`
    must depend only on tensors.

    Returns "train_loss", the mean loss of the epoch, and "train_top1", its accuracy in percent.
    `state.progress` is up to date at the end, and when Interrupted is raised after a signal.

    If a loss is not finite, raises UserError in every process. The error names `where` and the
    step. Losses are read from the device only when a report is due, so the error can come up to
    report_freq steps late. Also raises UserError if weights or running statistics are not finite at
    the end.
    """
    settings = state.settings
    progress = state.progress
    loader = state.train_loader
    device = next(state.network.parameters()).device
    buffers = running_statistics(state.network)
    progress.restore_own_sums()
    progress.restore_buffers(buffers)
    step_of_batch = functools.partial(
        train_step, state.trained, state.optimizer, loss_of, amp=settings.amp, grad_clip=settings.grad_clip
    )
    if settings.cuda_graph and devices.can_record(device) and distributed.world_size() == 1:
        step_of_batch = devices.Recorded(step_of_batch)

    loader.skip = progress.steps
    bar = distributed.progress(loader, where, progress.steps)
    minute = EveryMinute()
    state.clock.start()
    unread = []  # results (3,) of the newest steps, still on the device
    stop = False
    for x, y in bar:
        unread.append(step_of_batch(x, y, *inputs_of(progress.steps)))
        progress.steps += 1
        due = progress.steps % settings.report_freq == 0 or progress.steps == len(loader)
        if bar.disable and distributed.world_size() == 1:  # several processes have to meet at the same step
            due = due or minute.due()
        stop = signals.stop_requested(device, at_meeting_point=due)
        if due or stop:
            results = torch.stack(unread).tolist()
            check_losses(results, progress.steps - len(results), where)
            progress.add(results)
            unread = []
            state.clock.add("training", len(results))
            report = ", ".join(filter(None, [progress.report(), state.clock.text()]))
            bar.set_postfix_str(report)
            if bar.disable:
                log(f"{where}, step {progress.steps}/{len(loader)}: {report}")
        if stop:
            break
    progress.gather(buffers)
    # The loss of the last step was computed before that step changed the weights. So a finite loss
    # does not show that the final weights are finite.
    broken = torch.tensor(float(not is_finite(state.network)), device=device)
    if distributed.sum_over_ranks(broken).item():
        raise UserError(f"{where}, step {progress.steps}: the weights are no longer finite; {CHECKPOINT_IS_KEPT}")
    if stop:
        raise signals.Interrupted(f"{where}, step {progress.steps}/{len(loader)}")
    # The running statistics of each process come from its own share of the batches. From here on,
    # all processes use the mean of these statistics.
    distributed.fill(buffers, progress.buffers.mean(0))
    return progress.means()


def check_losses(results: Sequence[Sequence[float]], steps_before: int, where: str) -> None:
    """Raise UserError if a loss among the `results` of the latest steps is not finite.

    If a loss is not finite in one process, the sum over all processes is not finite. So all
    processes stop at the same step.
    """
    losses = torch.tensor([loss for loss, _, _ in results], dtype=torch.float64)
    for step, loss in enumerate(distributed.sum_over_ranks(losses).tolist(), start=steps_before + 1):
        if not math.isfinite(loss):
            raise UserError(f"{where}, step {step}: the loss is {loss}; {CHECKPOINT_IS_KEPT}")


def running_statistics(network: nn.Module) -> list[torch.Tensor]:
    """Return the running means and variances of a network's BatchNorms."""
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]


def is_finite(network: nn.Module) -> bool:
    """Return whether all parameters and buffers are finite. This call waits for the device once."""
    tensors = [*network.parameters(), *network.buffers()]
    values = [tensor.detach().flatten() for tensor in tensors if tensor.is_floating_point()]
    return torch.cat(values).isfinite().all().item()


def plain_forward(network: nn.Module, x: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Compute the logits of a supernet with the reference code. `fast_search.forward` is the fast alternative."""
    return network(x, alphas)


# ---- evaluation


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Iterable,
    args: argparse.Namespace,
    *,
    log: Callable,
    where: str = "test",
    confusion: torch.Tensor | None = None,
    clock: Clock | None = None,
) -> dict[str, float]:
    """Evaluate a network of model.py or nas201/model.py on all images of `loader`.

    Returns "loss", the mean loss, and the accuracies "top1" and "top5" in percent. With fewer than
    five classes, "top5" is always 100. The images are also counted in `confusion` (classes,
    classes), int64 on the CPU, by true class (row) and predicted class (column). `clock` counts
    batches as "test". `args` has amp and report_freq.

    Raises Interrupted between two batches after a signal, and UserError, in every process, if the
    loss is not finite.
    """
    network.eval()
    device = next(network.parameters()).device
    sums = [torch.zeros(4, device=device)]  # of each batch: loss, top-1 correct, top-5 correct, images
    counts = None if confusion is None else torch.zeros_like(confusion, device=device)
    clock = clock or Clock(test=Work(left=len(loader)))
    clock.start()
    minute = EveryMinute()
    bar = distributed.progress(loader, where)
    for step, (x, y) in enumerate(bar):
        if signals.stop_requested(device, at_meeting_point=step % args.report_freq == 0):
            raise signals.Interrupted(where)
        if bar.disable and (minute.due() or (step + 1) % args.report_freq == 0):
            log(", ".join(filter(None, [where, f"step {step + 1}/{len(loader)}", clock.text()])))
        if len(y) == 0:  # under torchrun the last batch can have fewer images than there are processes
            continue
        with devices.autocast(device, args.amp):
            logits = network(x)[0].float()  # (B, classes)
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5), best first
        correct = best == y.view(-1, 1)
        if counts is not None:
            counts.view(-1).index_add_(0, y * len(counts) + best[:, 0], torch.ones_like(y))
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums.append(torch.stack([loss, correct[:, 0].sum(), correct.sum(), torch.full_like(loss, len(y))]))
        clock.add("test", 1)
    total = torch.tensor(torch.stack(sums).tolist(), dtype=torch.float64).sum(0)
    clock.add("test", 0)  # the time that a GPU has taken since the last batch was given to it
    loss, top1, top5, images = distributed.sum_over_ranks(total).tolist()
    if not math.isfinite(loss):
        raise UserError(f"{where}: the loss is {loss}, so the accuracy means nothing; {TRAIN_AGAIN}")
    if counts is not None:
        confusion += distributed.sum_over_ranks(counts).cpu()
    return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}
