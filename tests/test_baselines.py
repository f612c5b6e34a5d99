"""What a finished search says of its result: random architectures, the benchmark's baselines, the front of costs."""

import itertools
import json
import shutil
import signal

import numpy as np
import pytest
import torch

import baselines
import datasets
import encoding
import genotype_files
import nas201.train_search
import search_cli
import search_state
import seed_roles
import train
import train_search
from evolution import non_dominated
from fitness import measure_fitness
from nas201 import benchmark
from reporting import report
from support.files import write_json
from views import VIEWS

from helpers import (
    AT_ONCE,
    S2_ARCHS,
    S2_TRUTH,
    assert_same,
    history,
    load_checkpoint,
    populations,
    s2_search,
    search,
    search_line,
    stop_at,
    write_table,
)

pytestmark = pytest.mark.usefixtures("quick_report")
FILES = ("pareto.json", "baselines.json")
SEARCH = dict(epochs=2, pop_size=6, seed=20)  # a seed whose front has more than one architecture


def contents(run):
    return [(run / name).read_bytes() for name in FILES]


def loaded(run):
    return [json.loads(content) for content in contents(run)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "finish", lambda run, cell: None)  # drawing takes longer than the search
        return search(tmp_path_factory.mktemp("finished"), **SEARCH, baselines=5)


# ---- fronts


@pytest.mark.parametrize("seed", range(6))
def test_a_front_is_that_of_brute_force(seed):
    points = torch.randint(5, (60, 2 + seed % 2), generator=torch.Generator().manual_seed(seed)).double()
    rows = points.tolist()
    expected = [not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in rows) for a in rows]
    assert non_dominated(points).tolist() == expected


def test_the_front_of_a_run(finished):
    pareto, result = loaded(finished)
    names = ["fitness", "parameters_M", "mult_adds_M"]
    rows = [[-row["fitness"], *(row[name] for name in names[1:])] for row in pareto["individuals"]]
    best = [a for a in rows if not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in rows)]
    front = [[-row["fitness"], *(row[name] for name in names[1:])] for row in pareto["front"]]
    assert sorted(front) == sorted(best) and front == sorted(front, key=lambda row: row[0])
    last = populations(finished)[-1][0]
    archive = load_checkpoint(finished / "checkpoint.pt")["archive"]
    cells = {str(encoding.genotype(alphas)) for alphas in [*last, *archive.values()]}
    assert len(pareto["individuals"]) == len(cells) and len(archive) <= search_state.ARCHIVED
    assert result["winner"].items() >= pareto["individuals"][0].items()
    assert result["winner"]["genotype"] == json.loads((finished / "genotype.json").read_text())


def test_the_archive_holds_each_generations_front(finished):
    archive = load_checkpoint(finished / "checkpoint.pt")["archive"]
    fixed, choices = train_search.s1_table(4, 4, 10, (3, 8, 8))
    expected = {}
    for alphas, fitness in populations(finished):
        counts = [fixed + choices[one_hot.bool()].sum(0) for one_hot in encoding.decode(alphas)]
        points = torch.cat([-fitness.unsqueeze(1), torch.stack(counts).double()], dim=1)
        for individual in alphas[non_dominated(points)]:
            expected[str(encoding.genotype(individual))] = individual
    assert archive.keys() == expected.keys() and all(torch.equal(archive[key], expected[key]) for key in archive)


def test_only_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(search_state, "ARCHIVED", 1)
    run = search(tmp_path, epochs=1, baselines=0)
    (kept,) = load_checkpoint(run / "checkpoint.pt")["archive"].values()
    alphas, fitness = populations(run)[-1]
    assert fitness[[torch.equal(kept, individual) for individual in alphas]].tolist() == [fitness[0]]


@pytest.mark.parametrize("pick", [1, 2])
def test_picking_from_the_front(finished, tmp_path, monkeypatch, pick):
    for name in FILES:
        shutil.copy(finished / name, tmp_path)
    picked = loaded(finished)[0]["front"][pick - 1]["genotype"]
    seen = []
    monkeypatch.setattr(train, "load_splits", lambda args, genotype: seen.append(genotype) or exec("raise KeyError"))
    with pytest.raises(KeyError):
        train.main(["--dataset", "digits", "--dir", str(tmp_path), "--pick", str(pick), "--device", "cpu"])
    assert genotype_files.to_json(seen[0]) == json.loads(json.dumps(picked))


def test_bad_picks(finished, tmp_path, fails):
    pareto = loaded(finished)[0]
    write_json(tmp_path / "pareto.json", pareto)
    argv = ["--dataset", "digits", "--device", "cpu"]
    assert f"has {len(pareto['front'])} architectures" in fails(train.main, [*argv, "--dir", tmp_path, "--pick", 99])
    assert "--pick needs --dir" in fails(train.main, [*argv, "--pick", 1])
    for content in ([], {"front": [1]}, {"front": [{"genotype": {"normal": 3}}]}, {"front": [{}]}):
        write_json(tmp_path / "pareto.json", content)
        assert "pareto.json" in fails(train.main, [*argv, "--dir", tmp_path, "--pick", 1])


# ---- random architectures


def test_random_architectures_on_the_same_weights_and_images(finished):
    result = loaded(finished)[1]
    args = search_cli.search_parser("train_search.py", "").parse_known_args(search_line(**SEARCH))[0]
    args.train_portion = 0.5
    train_split, valid, augmentation = datasets.search_splits(args)
    _, loader = search_cli.search_loaders(args, train_split, valid, augmentation, torch.device("cpu"))
    loader.generator = baselines.generator(args, seed_roles.FINAL_VALIDATION_IMAGES)
    network = train_search.Network(2, 10, 2)
    network.load_state_dict(torch.load(finished / "weights/weights.pt", weights_only=True))
    drawn = encoding.random_alphas(5, generator=baselines.generator(args, seed_roles.RANDOM_ARCHITECTURES))
    fitness = measure_fitness(network, encoding.decode(drawn), loader, "batch", train_search.fast_search.Evaluator)
    assert result["random_fitness"] == fitness.tolist() and result["random_seed"] == baselines.SEED
    assert result["better_than"] == (fitness < result["winner"]["fitness"]).sum()
    assert f"better than {result['better_than']} of 5 random architectures" in (finished / "log.txt").read_text()
    assert str(finished) in result["retrain"] and "--init_channels 4" in result["retrain"]


def test_the_search_is_the_same_without_baselines_and_with_a_loose_budget(finished, tmp_path):
    run = search(tmp_path, **SEARCH, baselines=0, max_params=1000, max_mult_adds=1e5)
    lines = history(run)
    assert [line.pop("feasible") for line in lines] == [6, 6] and lines == history(finished)
    state, expected = (load_checkpoint(folder / "checkpoint.pt") for folder in (run, finished))
    other = {"bound": None, "history": None}
    assert_same(state | other, expected | other)
    pareto, result = loaded(run)
    assert result["random_fitness"] == [] and "random architectures" not in result["sentence"]
    assert pareto["individuals"] == loaded(finished)[0]["individuals"]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], AT_ONCE])
def test_an_interruption_of_the_last_measurement_loses_nothing(finished, tmp_path, numbers):
    argv = search_line(epochs=2, pop_size=6, baselines=5, run_name="run", dir=tmp_path)
    stop_at("the final weights: batch 1", numbers, train_search.main, argv)
    run = tmp_path / "run"
    assert not any((run / name).exists() for name in FILES)
    states = [load_checkpoint(folder / "checkpoint.pt") | {"history": None} for folder in (run, finished)]
    assert_same(*states)
    train_search.main(["--resume", str(run)])
    assert contents(run)[0] == contents(finished)[0]
    assert loaded(run)[1] | {"retrain": None} == loaded(finished)[1] | {"retrain": None}


def test_a_finished_search_without_its_last_files_is_measured_on_resume(tmp_path):
    run = s2_search(tmp_path, "--epochs", 2)
    before = loaded(run)
    for name in FILES:
        (run / name).unlink()
    nas201.train_search.main(["--resume", str(run)])
    assert loaded(run)[0] == before[0]


# ---- the benchmark's baselines


def test_the_expected_best_is_exact():
    values = np.random.RandomState(0).randint(0, 50, 9).astype(float)
    for n in (1, 2, 5, 9):
        expected = np.mean([max(drawn) for drawn in itertools.combinations(values, n)])
        assert benchmark.best_of(values, n) == pytest.approx(expected, abs=1e-12)


def test_baselines_of_the_shared_table(shared_data, capsys):
    path = str(shared_data("nb201_accuracy.csv.xz"))
    source = benchmark.load(path)
    rows = benchmark.baselines(source, index=6111)
    assert list(rows) == ["cifar10_test", "cifar100_test", "ImageNet16_120_test"]
    row = rows["cifar10_test"]
    assert round(row["most_parameters"], 2) == 93.76 and row["most_parameters_beaten_by"] == 166
    assert row["beaten_by"] == 0 and row["accuracy"] == row["best"] and round(row["best"], 2) == 94.37
    random = np.random.RandomState(1).choice(source.table[:, 1], (20_000, 10)).max(1)
    assert row["best_of_10"] == pytest.approx(random.mean(), abs=4 * random.std() / 20_000**0.5)
    benchmark.main(["baselines", path, benchmark.MOST_PARAMETERS])
    assert "93.76" in capsys.readouterr().out.splitlines()[1]


def test_what_a_search_of_nas_bench_201_is_worth(tmp_path, capsys):
    table = write_table(tmp_path)
    run = s2_search(tmp_path, "--api_path", table, "--baselines", 8, "--epochs", 2)
    result = loaded(run)[1]
    truth = S2_TRUTH
    index = S2_ARCHS.index(result["winner"]["genotype"])
    for k, row in enumerate(result["accuracy"].values()):
        assert row["accuracy"] == truth[index, k] and row["beaten_by"] == (truth[:, k] > truth[index, k]).sum()
        assert row["mean"] == pytest.approx(truth[:, k].mean())
    out = capsys.readouterr().out
    rank = result["accuracy"]["cifar10_valid"]["beaten_by"] + 1
    assert f"{truth[index, 0]:.2f} % true accuracy (cifar10 valid), rank {rank:,} of 15,625" in out
    tau = result["kendall_tau"]
    assert tau["random architectures"]["architectures"] == 8 and tau["last population"]["architectures"] <= 6
    assert all(-1 <= row[of] <= 1 for row in tau.values() for of in ("fitness", "parameters"))
    shown = (run / "report.html").read_text()
    assert "six 3x3 convolutions" in shown and "mult-adds, M" in shown and "cifar10 valid accuracy" in shown
    whole = {"winner": {}, "sentence": "", "retrain": ""}
    for damaged in ({}, {"winner": 3, "sentence": "x"}, [], whole | {"accuracy": 5}, whole | {"kendall_tau": "x"}):
        write_json(run / "baselines.json", damaged)
        report.write_report(run, VIEWS)
        assert "baselines.json or pareto.json is damaged" in (run / "report.html").read_text()
