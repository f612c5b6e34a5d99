"""One epoch of training, the evaluation of a network, and the fitness of a population."""

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from support import devices, distributed, signals
from support.files import UserError

SMALLER_STEPS = "the last checkpoint is kept (start a new run with a smaller --learning_rate or --grad_clip)"
UNUSABLE = "these weights are of no use: train with a smaller --learning_rate or --grad_clip"


@dataclass
class Progress:
    """How far an epoch is: steps, seconds, and a row for each process of sums and of buffers.

    The sums, float64 (processes, 3), are those of loss, right answers and images; the buffers (processes, elements) are
    its running statistics. A checkpoint within an epoch holds what `state_dict` returns.
    """

    steps: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 3, dtype=torch.float64))
    buffers: torch.Tensor | None = None
    seconds: float = 0.0

    def __post_init__(self):
        self.sums = torch.tensor(self.sums.tolist(), dtype=torch.float64).view(-1, 3)  # older checkpoints: (3,)
        self.start = time.perf_counter() - self.seconds

    def state_dict(self):
        seconds = time.perf_counter() - self.start
        return {"steps": self.steps, "sums": self.sums, "buffers": self.buffers, "seconds": seconds}

    def resume(self, buffers):
        """Return this process's sums, float64 (3,), and give `buffers` the values that they had in it.

        Where there are more or fewer processes than before, the first one's are the total and the buffers the mean.
        """
        rank, same = distributed.rank(), len(self.sums) == distributed.world_size()
        if self.buffers is not None:
            distributed.fill(buffers, self.buffers[rank] if same else self.buffers.mean(0))
        return self.sums[rank].clone() if same else self.sums.sum(0) * (rank == 0)

    def check(self, steps, network):
        """Raises ValueError, or what torch raises, for what no epoch of `steps` steps of `network` leaves behind."""
        shape = len(self.sums), sum(buffer.numel() for buffer in network.buffers() if buffer.is_floating_point())
        possible = self.buffers is None or (self.buffers.shape == shape and self.buffers.isfinite().all())
        if not possible or type(self.steps) is not int or not 0 <= self.steps <= steps:
            raise ValueError(f"no epoch of {steps} steps is interrupted like that")

    def update(self, steps, sums, buffers):
        self.steps = steps
        self.sums, self.buffers = distributed.stack_over_ranks([sums]), distributed.stack_over_ranks(buffers)

    def means(self):
        loss, correct, images = self.sums.sum(0).tolist()
        return {"train_loss": loss / images, "train_top1": 100 * correct / images}


class TrainingState:
    """What changes from epoch to epoch, and so what a checkpoint holds; subclasses name more attributes in `saved`.

    `progress` is that of the running epoch; `partial`, else None, that of one which a signal interrupted earlier.
    """

    saved = ()

    def __init__(self, network, optimizer, train_loader, **generators):
        self.network, self.optimizer, self.train_loader = network, optimizer, train_loader
        self.generators = {"train": train_loader.generator, **generators}
        self.partial = None

    def generator_states(self):
        return {name: generator.get_state() for name, generator in self.generators.items()}

    def begin_epoch(self):
        self.progress, self.partial = self.partial or Progress(), None
        self.generators_before = self.generator_states()

    def state_dict(self):
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {name: getattr(self, name) for name in self.saved}
        return state | {"generators": self.generator_states()}

    def unfinished_state_dict(self):
        """Return the state within an epoch: it will continue from its steps; what is measured begins anew."""
        return self.state_dict() | {"generators": self.generators_before, "partial": self.progress.state_dict()}

    def load_state_dict(self, state):
        """Take over what `state_dict` returned; the optimizer's settings are the arguments'.

        Raises ValueError, or what a dict and torch raise, for what it cannot have returned.
        """
        self.network.load_state_dict(state["network"])
        momentum, settings = state["optimizer"]["state"], self.optimizer.state_dict()["param_groups"]
        parameters = self.optimizer.param_groups[0]["params"]
        for i, values in momentum.items():
            if values.keys() != {"momentum_buffer"} or values["momentum_buffer"].shape != parameters[i].shape:
                raise ValueError(f"momentum {i} does not have the shape of its parameter")
        self.optimizer.load_state_dict({"state": momentum, "param_groups": settings})
        for name in self.saved:
            setattr(self, name, state[name])
        for name, generator in self.generators.items():
            states = state.get("generators") or {"train": state["generator"]}  # so in older checkpoints of retrainings
            generator.set_state(states[name])
        self.partial = Progress(**state["partial"]) if "partial" in state else None
        if self.partial:
            self.partial.check(len(self.train_loader), self.network)


def train_one_epoch(loss_of, inputs_of, network, loader, optimizer, args, progress, *, where, log):
    """Train on every batch of `loader` once; `loss_of(x, y, *inputs_of(step))` returns (loss, logits).

    `args` says grad_clip, amp (bfloat16 autocast), cuda_graph (see `Recorded`; `loss_of` must then depend on tensors
    alone) and report_freq, the steps between two calls of `log`. The steps that `progress` counts are left out; it is
    brought up to date at the end, and before Interrupted is raised.

    Returns the mean loss and the top-1 accuracy in percent over the epoch. Raises UserError naming `where` and the step
    if a loss is not finite, at the latest when the next report is due: losses are read from the device only then. Also
    raises it, in every process, if weights or running statistics are not finite where the epoch ends or is interrupted.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    device, steps, stop = parameters[0].device, progress.steps, False
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    sums = progress.resume(buffers)  # on the CPU, since not every device computes with float64
    unread, loader.skip = [], steps
    bar = distributed.progress(loader, where, steps)

    def train_step(x, y, *inputs):
        """Move the weights by one batch; return its mean loss, right answers and images, (3,)."""
        optimizer.zero_grad(set_to_none=True)
        with devices.autocast(device, args.amp):
            loss, logits = loss_of(x, y, *inputs)
        loss.backward()
        if not isinstance(network, DistributedDataParallel):  # which has averaged them during the backward pass
            distributed.average_over_ranks([p.grad for p in parameters])
        if args.grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, args.grad_clip)
        optimizer.step()
        loss = loss.detach()
        return torch.stack([loss, (logits.detach().argmax(1) == y).sum(), torch.full_like(loss, len(y))])

    if args.cuda_graph and device.type == "cuda" and distributed.world_size() == 1:
        train_step = devices.Recorded(train_step)
    for step, (x, y) in enumerate(bar, start=steps):
        unread.append(train_step(x, y, *inputs_of(step)))
        steps = step + 1
        due = steps % args.report_freq == 0 or steps == len(loader)
        stop = signals.stop_requested(device, at_meeting_point=due)
        if due or stop:
            rows = torch.stack(unread).tolist()
            # All processes stop where the loss of one is not finite: the sum over them is then not finite either.
            losses = torch.tensor([loss for loss, _, _ in rows], dtype=torch.float64)
            for i, loss in enumerate(distributed.sum_over_ranks(losses).tolist(), start=steps - len(rows) + 1):
                if not math.isfinite(loss):
                    raise UserError(f"{where}, step {i}: the loss is {loss}; {SMALLER_STEPS}")
            for loss, right, images in rows:  # one by one, so that the sums do not depend on --report_freq
                sums += torch.tensor([loss * images, right, images], dtype=torch.float64)
            unread = []
            loss_so_far, correct, count = sums.tolist()
            report = f"loss {loss_so_far / count:.4f}, top-1 {100 * correct / count:.2f} %"
            bar.set_postfix_str(report)
            if bar.disable:
                log(f"{where}, step {steps}/{len(loader)}: {report}")
        if stop:
            break
    progress.update(steps, sums, buffers)
    # The last step's loss was computed before it moved the weights, so it says nothing about them.
    ruined = torch.tensor(float(not is_finite(network)), device=device)
    if distributed.sum_over_ranks(ruined).item():
        raise UserError(f"{where}, step {steps}: the weights are no longer finite; {SMALLER_STEPS}")
    if stop:
        raise signals.Interrupted(f"{where}, step {steps}/{len(loader)}")
    # Each process has normalised its own shares of the batches: go on, and measure, with the mean statistics.
    distributed.fill(buffers, progress.buffers.mean(0))
    return progress.means()


def is_finite(network: nn.Module) -> bool:
    """Return whether all parameters and buffers are finite. Waits for the device once."""
    tensors = [*network.parameters(), *network.buffers()]
    values = [tensor.detach().flatten() for tensor in tensors if tensor.is_floating_point()]
    return torch.cat(values).isfinite().all().item()


@torch.no_grad()
def evaluate(network, loader, args, *, log, where="test"):
    """Return the mean loss, and top-1 and top-5 accuracy in percent, of a `model.Network*` on all images of `loader`.

    top-5 counts a class among the best min(5, classes). `args` says amp and report_freq, as in training. Raises
    Interrupted between two batches, after a signal, and UserError, in every process, if the loss is not finite.
    """
    network.eval()
    device = next(network.parameters()).device
    sums = [torch.zeros(4, device=device)]  # of a batch: loss, right answers, those among the best five, images
    bar = distributed.progress(loader, where)
    for step, (x, y) in enumerate(bar):
        if signals.stop_requested(device, at_meeting_point=step % args.report_freq == 0):
            raise signals.Interrupted(where)
        if bar.disable and (step + 1) % args.report_freq == 0:
            log(f"{where}, step {step + 1}/{len(loader)}")
        if len(y) == 0:  # under torchrun the last batch can have fewer images than there are processes
            continue
        with devices.autocast(device, args.amp):
            logits = network(x)[0].float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == y.view(-1, 1)
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums.append(torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), torch.full_like(loss, len(y))]))
    total = torch.tensor(torch.stack(sums).tolist(), dtype=torch.float64).sum(0)
    loss, top1, top5, count = distributed.sum_over_ranks(total).tolist()
    if not math.isfinite(loss):
        raise UserError(f"{where}: the loss is {loss}, so the accuracy means nothing; {UNUSABLE}")
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


@contextlib.contextmanager
def batch_norm_mode(network, mode):
    """Measure with "batch" statistics, leaving every BatchNorm buffer as it is, or with the "running" ones."""
    training, tracking = network.training, [m for m in network.modules() if getattr(m, "track_running_stats", False)]
    network.train(mode == "batch")
    try:
        for norm in tracking:
            norm.track_running_stats = mode == "running"
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
        network.train(training)


def plain_forward(network, x, alphas):
    """Train as the reference does, with the interface of `fast_search.forward`."""
    return network(x, alphas)


class PlainEvaluator:
    """The reference way to measure, with the interface of `fast_search.Evaluator`; see `batch_norm_mode` for `bn`."""

    def __init__(self, network, bn):
        self.network = network

    def set_batch(self, x):
        self.x = x

    def logits(self, alphas):
        return self.network(self.x, alphas)


@torch.no_grad()
def measure_fitness(network, alphas, loader, bn, make_evaluator=PlainEvaluator, *, amp=False, where="fitness"):
    """Return the top-1 accuracy in percent, (P,) float64, of each individual of `alphas` (P, G, E, O) on all images.

    A batch is loaded and augmented once and shown to all individuals, so they are compared on the same images; equal
    alphas are measured once. Several processes share the individuals out; every one returns all the figures.
    Raises Interrupted between two batches, after a signal, and UserError, in every process, if the logits of an
    individual are not finite.
    """
    device = next(network.parameters()).device
    distinct, index = unique(alphas)
    mine = range(distributed.rank(), len(distinct), distributed.world_size())
    distinct = distinct.to(device)
    correct = torch.zeros(len(distinct), dtype=torch.int64, device=device)
    broken = torch.zeros(len(distinct), dtype=torch.int64, device=device)  # batches with logits that are not finite
    with batch_norm_mode(network, bn):
        evaluator = make_evaluator(network, bn)
        for x, y in distributed.progress(loader, where):
            if signals.stop_requested(device):
                raise signals.Interrupted(where)
            with devices.autocast(device, amp):
                evaluator.set_batch(x)
                for i in mine:
                    logits = evaluator.logits(distinct[i])
                    correct[i] += (logits.argmax(1) == y).sum()
                    broken[i] += ~logits.isfinite().all()
    correct, broken = distributed.sum_over_ranks(torch.stack([correct, broken])).cpu()
    if broken.any():
        number = index.tolist().index(broken.nonzero()[0].item()) + 1
        raise UserError(f"{where}: individual {number} of {len(index)} has logits that are not finite; {UNUSABLE}")
    return (100 * correct.double() / loader.size)[index]


def unique(alphas):
    """Return the distinct individuals of (P, ...), in order of appearance, and the index (P,) of each one's own."""
    first = {}
    index = [first.setdefault(individual.numpy().tobytes(), len(first)) for individual in alphas.contiguous()]
    return torch.stack([alphas[index.index(i)] for i in range(len(first))]), torch.tensor(index)
