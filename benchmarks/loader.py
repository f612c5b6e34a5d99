"""Time the in-memory loader against torchvision's transforms, image by image, in one process.

    python benchmarks/loader.py [--full] [--device cuda]

The loader and the transforms both crop, flip and normalise the images, and apply cutout.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
from benchmarks.common import alternate, describe_machine, print_ratios
from loaders import Loader
from splits import Images


def main() -> None:
    from torchvision.transforms import v2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="load 25,000 images, as a DARTS search does, not 4,096")
    parser.add_argument("--device", default="cpu", help="any PyTorch device, such as cuda (default: cpu)")
    args = parser.parse_args()
    count = 25_000 if args.full else 4_096
    device = torch.device(args.device)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augmentation = datasets.augmentation("cifar10")
    settings = dict(generator=torch.Generator().manual_seed(1), augment=True, cutout=16)
    loader = Loader(
        Images(pixels, torch.zeros(count, dtype=torch.int64), ["none"]), 64, augmentation, device, **settings
    )

    # For comparison: PIL images one by one, each with the transforms of the published recipe.
    photographs = [v2.functional.to_pil_image(image) for image in pixels]

    def cutout(image: Tensor) -> Tensor:
        # One square with its centre anywhere, as DeVries & Taylor (2017) describe it.
        y, x = torch.randint(32, (2,)).tolist()
        image[:, max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 0.0
        return image

    steps = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(augmentation.mean, augmentation.std), cutout]
    transform = v2.Compose(steps)

    def per_image() -> None:
        for start in range(0, count, 64):
            torch.stack([transform(image) for image in photographs[start : start + 64]]).to(device)

    def batched() -> None:
        for _ in loader:
            pass

    print(f"{describe_machine(device)}; {count} images in batches of 64")
    seconds = alternate({"per image": per_image, "batched": batched}, rounds=5, warmup=1, device=device)
    rate = {name: count / value for name, value in seconds.items()}
    for name, value in rate.items():
        print(f"{name:10} {value:12,.0f} images/s")
    print_ratios({"loader": rate["batched"] / rate["per image"]})


if __name__ == "__main__":
    main()
