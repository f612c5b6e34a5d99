"""Time EvNAS-A on one image with PyTorch, torch.export and onnxruntime, on the CPU.

    python benchmarks/export.py [--imagenet] [--rounds 50]

The weights are random.
"""

import argparse
import copy
import io
import sys
from functools import partial
from pathlib import Path

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import genotypes
from benchmarks.common import alternate, describe_machine, print_ratios
from export import Logits, relative_error, to_onnx, to_torch
from model import NetworkCIFAR, NetworkImageNet


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--imagenet",
        action="store_true",
        help="time the ImageNet network (C 48, 14 cells, 224x224), not the CIFAR one (C 36, 20 cells, 32x32)",
    )
    parser.add_argument("--rounds", type=int, default=50, help="how often each runtime is timed (default: 50)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.imagenet:
        C = 48
        layers = 14
        side = 224
        network = NetworkImageNet(C, 1000, layers, False, genotypes.EvNASA)
    else:
        C = 36
        layers = 20
        side = 32
        network = NetworkCIFAR(C, 10, layers, False, genotypes.EvNASA)
    module = Logits(network).eval().requires_grad_(False)
    images = torch.randn(2, 3, side, side)
    x = images[:1]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(to_onnx(module, images, {}), options, providers=providers)
    exported = torch.export.load(io.BytesIO(to_torch(module, images, {}))).module()
    channels_last = copy.deepcopy(module).to(memory_format=torch.channels_last)
    ways = {
        "PyTorch": partial(module, x),
        "PyTorch, channels-last": partial(channels_last, x.contiguous(memory_format=torch.channels_last)),
        "torch.export": partial(exported, x),
        "onnxruntime": lambda: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]),
    }
    print(f"{describe_machine('cpu')}; onnxruntime {onnxruntime.__version__}")
    print(f"EvNAS-A, C {C}, {layers} cells, one image of {side}x{side}, {args.rounds} rounds")
    logits = {name: way() for name, way in ways.items()}
    seconds = alternate(ways, args.rounds, 5, "cpu")
    for name, value in seconds.items():
        error = relative_error(logits[name], logits["PyTorch"])
        print(f"{name:24} {1000 * value:8.2f} ms, median; logits differ by {error:.0e} of PyTorch's largest logit")
    print_ratios(
        {f"PyTorch / {name}": seconds["PyTorch"] / value for name, value in seconds.items() if name != "PyTorch"}
    )


if __name__ == "__main__":
    main()
