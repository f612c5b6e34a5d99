"""Reference figures of the original networks, and the script that computes such figures from any network.

Weights, images and architecture parameters are made from names and seeds, so that any network with the same parameter
names gets the same ones. `python tests/golden.py` prints the figures of this project's networks as reference.json has
them; tests/README.md says how to run it on others.
"""

import argparse
import hashlib
import importlib
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS.parent))

import encoding  # noqa: E402
import genotypes  # noqa: E402
import model  # noqa: E402
import model_search  # noqa: E402
import nas201.encoding  # noqa: E402
import nas201.model_search  # noqa: E402

REFERENCE = json.loads((TESTS / "reference.json").read_text())


# ---- inputs


def fill(network):
    """Set every weight and buffer of `network` from its name. Returns the network."""
    random = np.random.RandomState()
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        random.seed(zlib.crc32(name.encode()))  # as a new RandomState(seed), which takes longer to make
        shape = tuple(tensor.shape)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith(".weight")):
            values = random.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            values = random.normal(0, 0.1, shape)
        else:
            values = random.normal(0, 1, shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    return network


def images(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).normal(0, 1, shape).astype(np.float32))


def seeded_alphas(seed, shape=(2, 14, 8)):
    """Raw alphas; a leading dimension is drawn from the same stream."""
    return torch.from_numpy(np.random.RandomState(seed).rand(*shape).astype(np.float32))


def s1_alphas(seed):
    """Decoded alphas of step 0, 1, ... of a trajectory: two seeds a step, one a cell."""
    return [
        encoding.decode(torch.cat([seeded_alphas(seed + 2 * step + g, (1, 14, 8)) for g in (0, 1)])) for step in (0, 1)
    ]


def s2_alphas(seed):
    return [nas201.encoding.decode(seeded_alphas(seed + step, (1, 6, 5))) for step in (0, 1)]


# First image seed, decoded alphas and gradient clip of the two trajectories of each supernet.
TRAJECTORIES = {
    "s1_supernet": {"train_traj": (100, s1_alphas(200), 5.0), "train_traj_clip1": (600, s1_alphas(500), 1.0)},
    "s2_supernet": {"train_traj": (300, s2_alphas(4000), 5.0), "train_traj_clip1": (800, s2_alphas(700), 1.0)},
}


# ---- figures, as reference.json has them: {section: {name: figures}}


def names(network):
    """SHA-256 of all names, shapes and types of the state dict, and their number."""
    lines = sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in network.state_dict().items())
    return {"keyhash": hashlib.sha256("\n".join(lines).encode()).hexdigest(), "nkeys": len(lines)}


def millions(network):
    """Parameters without the auxiliary head."""
    return sum(p.numel() for name, p in network.named_parameters() if "auxiliary" not in name) / 1e6


def mult_adds(network, side):
    """Millions of multiply-adds of one image."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e6


def full_network(Network, sizes, auxiliary, arch=genotypes.EvNASA):
    """The network of the published figures, without memory for its weights."""
    with torch.device("meta"):
        return Network(sizes["C"], sizes["classes"], sizes["layers"], auxiliary, arch)


def full_size(Network, sizes):
    network = full_network(Network, sizes, auxiliary=True)
    return sizes | names(network) | {"params_M": round(millions(network), 5)}


@torch.no_grad()
def eval_logits(network, *inputs):
    output = network.eval()(*inputs)
    return (output[0] if isinstance(output, tuple) else output).tolist()


def cifar(Network):
    """Figures of a network called as model.NetworkCIFAR is."""
    figures = {}
    for arch in ("EvNASA", "DARTS_V2"):
        network, x = fill(Network(8, 10, 5, True, genotypes.get(arch))), images(7, (4, 3, 32, 32))
        figures[arch] = {"C": 8, "classes": 10, "layers": 5, **names(network), "eval_logits": eval_logits(network, x)}
        logits, logits_aux = network.train()(x)
        targets = torch.tensor([1, 3, 5, 7])
        loss = cross_entropy(logits, targets) + 0.4 * cross_entropy(logits_aux, targets)
        loss.backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in network.parameters()]))
        figures[arch] |= {"train_logits": logits.tolist(), "aux_logits": logits_aux.tolist()}
        figures[arch] |= {"loss": loss.item(), "grad_norm": norm.item()}
    full = {"C": 36, "layers": 20, "classes": 10}
    return {
        "cifar": figures,
        "full_size": {
            "EvNASA-cifar10": full_size(Network, full),
            "EvNASA-cifar100": full_size(Network, full | {"classes": 100}),
        },
        "mult_adds_M": {"EvNASA-cifar10": mult_adds(full_network(Network, full, auxiliary=False), 32)},
    }


def imagenet(Network):
    """Figures of a network called as model.NetworkImageNet is."""
    network = fill(Network(8, 20, 5, True, genotypes.EvNASA))
    logits = eval_logits(network, images(11, (2, 3, 224, 224)))
    full = {"C": 48, "layers": 14, "classes": 1000}
    return {
        "imagenet": {"EvNASA": {"C": 8, "classes": 20, "layers": 5, **names(network), "eval_logits": logits}},
        "full_size": {"EvNASA-imagenet": full_size(Network, full)},
        "mult_adds_M": {"EvNASA-imagenet": mult_adds(full_network(Network, full, auxiliary=False), 224)},
    }


def trajectory(network, image_seed, alphas, clip, nesterov=False):
    """Train `network(x, alphas)` by SGD, one decoded individual a step: logits, loss, norm before clipping of each."""
    network.train()
    parameters, steps = list(network.parameters()), []
    optimizer = torch.optim.SGD(parameters, lr=0.025, momentum=0.9, weight_decay=3e-4, nesterov=nesterov)
    for step, individual in enumerate(alphas):
        logits = network(images(image_seed + step, (8, 3, 32, 32)), individual)
        loss = cross_entropy(logits, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        steps.append({"logits": logits.tolist(), "loss": loss.item(), "grad_norm": norm.item()})
    return steps


def supernet_sizes(network):
    return names(network) | {"params": sum(p.numel() for p in network.parameters())}


def supernet(Network):
    """Figures of a network called as model_search.Network is."""
    with torch.device("meta"):
        full = {"C": 16, "layers": 8, "classes": 10, **supernet_sizes(Network(16, 10, 8))}
    network, x, raw = fill(Network(4, 10, 5)), images(13, (8, 3, 32, 32)), seeded_alphas(5)
    small = {"C": 4, "layers": 5, "classes": 10, **names(network), "alpha_seed": 5}
    small["eval_logits_decoded"] = eval_logits(network, x, encoding.decode(raw))
    small["eval_logits_raw"] = eval_logits(network, x, raw)
    for name, settings in TRAJECTORIES["s1_supernet"].items():
        small[name] = trajectory(fill(Network(4, 10, 5)), *settings)
    return {"s1_supernet": {"full": full, "small": small}}


def supernet_s2(Network):
    """Figures of a network called as nas201.model_search.Network is."""
    full = {"C": 16, "N": 5, "classes": 10, **supernet_sizes(Network(16, 5, 10))}
    network, x, cases = fill(Network(8, 2, 10)), images(17, (4, 3, 32, 32)), []
    small = {"C": 8, "N": 2, "classes": 10, **names(network), "cases": cases}
    for seed in (3000, 3001, 3002):
        raw = seeded_alphas(seed, (1, 6, 5))
        decoded = nas201.encoding.decode(raw)
        cases.append({"seed": seed, "arch": nas201.encoding.arch_string(raw), "onehot": decoded[0].argmax(1).tolist()})
        cases[-1]["eval_logits_raw"] = eval_logits(network, x, raw)
        cases[-1]["eval_logits_decoded"] = eval_logits(network, x, decoded)
    for name, settings in TRAJECTORIES["s2_supernet"].items():
        small[name] = trajectory(fill(Network(8, 2, 10)), *settings, nesterov=True)
    return {"s2_supernet": {"full": full, "small": small}}


def decoding(encoding):
    """Genotypes of seeded alphas, and the (edge, operation) of every 1 in the decoded ones."""
    cases = []
    for seed in range(1000, 1100):
        raw = seeded_alphas(seed)
        genotype, decoded = encoding.genotype(raw), encoding.decode(raw)
        pairs = {kind: [list(pair) for pair in getattr(genotype, kind)] for kind in ("normal", "reduce")}
        cases.append({"seed": seed, **pairs, "onehot": [cell.nonzero().tolist() for cell in decoded]})
    return {"s1_decode": cases}


# What the command line names: how to compute its figures, and this project's own.
SUBJECTS = {
    "cifar": (cifar, model.NetworkCIFAR),
    "imagenet": (imagenet, model.NetworkImageNet),
    "supernet": (supernet, model_search.Network),
    "supernet_s2": (supernet_s2, nas201.model_search.Network),
    "decoding": (decoding, encoding),
}


# ---- comparison


def assert_close(actual, expected, tolerance=1e-4):
    """Equal within `tolerance` * max(1, largest absolute expected value)."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    difference = (actual.detach() - expected).abs().max().item()
    assert difference <= tolerance * max(1, expected.abs().max().item())


def assert_matches(actual, expected, place=""):
    """Counts and names are equal; logits (`assert_close`), losses and norms within 1e-4, along trajectories 1e-3."""
    tolerance = 1e-3 if "train_traj" in place else 1e-4
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_matches(actual[key], value, f"{place} {key}")
    elif isinstance(expected, list) and np.asarray(expected).dtype == np.float64:
        assert_close(actual, expected, tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), place
        for i, value in enumerate(expected):
            assert_matches(actual[i], value, f"{place} {i}")
    elif isinstance(expected, float) and "_M" not in place:  # counts in millions are exact
        assert abs(actual - expected) <= tolerance * abs(expected), place
    else:
        assert actual == expected, place


# ---- command line


def json_lines(value, indent=""):
    """JSON with one array a line."""
    if isinstance(value, dict):
        lines = [f"{indent} {json.dumps(key)}: {json_lines(child, indent + ' ')}" for key, child in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(child, dict) for child in value):
        return "[\n" + ",\n".join(f"{indent} {json_lines(child, indent + ' ')}" for child in value) + f"\n{indent}]"
    return json.dumps(value)


def load(place):
    """What PATH.py:NAME names. Modules in that file's folder go before those of the same name here."""
    path, _, name = place.rpartition(":")
    for module, loaded in list(sys.modules.items()):
        if Path(getattr(loaded, "__file__", None) or "/").parent == TESTS.parent:
            del sys.modules[module]
    sys.path.insert(0, str(Path(path).resolve().parent))
    return getattr(importlib.import_module(Path(path).stem), name)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="golden.py", description="Print the reference figures of networks as JSON.")
    parser.add_argument(
        "subjects",
        nargs="*",
        metavar="SUBJECT[=PATH.py:NAME]",
        default=list(SUBJECTS),
        help=f"{', '.join(SUBJECTS)} (default: all), of this project or of another file",
    )
    merged = {}
    for word in parser.parse_args(argv).subjects:
        subject, _, place = word.partition("=")
        if subject not in SUBJECTS:
            parser.error(f"{subject}: known are {', '.join(SUBJECTS)}")
        figures_of, ours = SUBJECTS[subject]
        for section, figures in figures_of(load(place) if place else ours).items():
            merged[section] = merged[section] | figures if isinstance(merged.get(section), dict) else figures
    print(json_lines(merged))


if __name__ == "__main__":
    main()
