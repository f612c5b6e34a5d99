"""Latency of the exported EvNAS-A at batch 1: onnxruntime beside PyTorch, on the CPU. Weights are random.

python benchmarks/export.py [--imagenet] [--rounds 50]
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
from benchmarks.common import alternate, describe, finish
from export import Logits, difference, to_onnx, to_torch
from model import NetworkCIFAR, NetworkImageNet


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", action="store_true", help="C 48, 14 cells, 224 pixels; else C 36, 20 cells, 32")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    network, C, layers, classes, side = NetworkCIFAR, 36, 20, 10, 32
    if args.imagenet:
        network, C, layers, classes, side = NetworkImageNet, 48, 14, 1000, 224
    module = Logits(network(C, classes, layers, False, genotypes.EvNASA)).eval().requires_grad_(False)
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
    print(f"{describe('cpu')}; onnxruntime {onnxruntime.__version__}")
    print(f"EvNAS-A, C {C}, {layers} cells, one image of {side}x{side}, {args.rounds} rounds")
    logits = {name: way() for name, way in ways.items()}
    seconds = alternate(ways, args.rounds, 5, "cpu")
    for name, value in seconds.items():
        apart = difference(logits[name], logits["PyTorch"])  # relative to the largest
        print(f"{name:24} {1000 * value:8.2f} ms, median; logits differ by {apart:.0e}")
    finish({f"PyTorch / {name}": seconds["PyTorch"] / value for name, value in seconds.items() if name != "PyTorch"})


if __name__ == "__main__":
    main()
