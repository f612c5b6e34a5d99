"""Time a retraining step of EvNAS-A, as train.py computes it, against a plain step.

    python benchmarks/retrain.py [--device cuda --amp]

The plain step computes in NCHW and float32.
"""

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import genotypes
from benchmarks.common import RECIPE, alternate, describe_machine, print_ratios, recorded
from model import NetworkCIFAR
from support import devices
from training import make_optimizer, train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each step is timed (default: 3)")
    parser.add_argument("--nchw", action="store_true", help="compute the steps of train.py in NCHW, not channels-last")
    devices.add_device_arguments(parser)
    parser.add_argument("--amp", action="store_true", help="use bfloat16 autocast, except in the plain step")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="do not measure the compiled step, because compiling takes minutes",
    )
    args = parser.parse_args()
    device = devices.choose_device(args)
    layout = torch.contiguous_format if args.nchw else devices.memory_format(device)
    torch.manual_seed(0)
    plain = NetworkCIFAR(36, 10, 20, True, genotypes.EvNASA).to(device)
    fast = deepcopy(plain).to(memory_format=layout)
    x = torch.randn(96, 3, 32, 32, device=device)
    y = torch.randint(10, (96,), device=device)

    def step(network: nn.Module, images: Tensor, amp: bool, **settings) -> Callable[[], Tensor]:
        network.drop_path_prob = 0.1
        optimizer = make_optimizer(network.parameters(), RECIPE)

        def loss_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits, logits_aux = network(x, **settings)
            return F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(logits_aux, y), logits

        return partial(train_step, network, optimizer, loss_of, images, y, amp=amp, grad_clip=5.0)

    print(f"{describe_machine(device)}; EvNAS-A, C 36, 20 cells, batch 96, auxiliary head, drop path")
    images = x.contiguous(memory_format=layout)
    functions = {
        "plain": step(plain, x, amp=False),
        "fast": step(fast, images, args.amp),
        "--checkpoint": step(fast, images, args.amp, checkpoint=True),
    }
    if args.compile:
        functions["--compile"] = step(fast, images, args.amp, compile=True)
    if device.type == "cuda":
        functions["--cuda_graph"] = recorded(step(deepcopy(plain).to(memory_format=layout), images, args.amp))
    median = alternate(functions, rounds=args.rounds, warmup=1, device=device)
    for name, value in median.items():
        print(f"{name:12} {1000 * value:9.1f} ms per step; {value * 521:7.1f} s per epoch of 50,000 images")
    names = {"fast": "train_step", "--compile": "compiled", "--cuda_graph": "recorded"}
    print_ratios({names[name]: median["plain"] / median[name] for name in names if name in median})


if __name__ == "__main__":
    main()
