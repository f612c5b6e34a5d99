"""What a finished search knows of its result: random architectures, the benchmark's baselines, the front of costs."""

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
    TinySupernet,
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

pytestmark = pytest.mark.usefixtures("quick_report", "tiny_supernet")
FILES = ("pareto.json", "baselines.json")
SEARCH = dict(epochs=2, pop_size=6, seed=20)  # a seed whose front has more than one architecture


def contents(run):
    return [(run / name).read_bytes() for name in FILES]


def loaded(run):
    return [json.loads(content) for content in contents(run)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_reports, tiny_supernet):
    return search(tmp_path_factory.mktemp("finished"), "--plain", **SEARCH, baselines=5)


# ---- fronts


@pytest.mark.parametrize("seed", range(6))
def test_non_dominated_is_the_front_of_brute_force(seed):
    points = torch.randint(5, (60, 2 + seed % 2), generator=torch.Generator().manual_seed(seed)).double()
    rows = points.tolist()
    expected = [not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in rows) for a in rows]
    assert non_dominated(points).tolist() == expected


def point(row):
    """Return [-fitness, parameters, mult-adds] of a row of pareto.json: smaller is better in each."""
    return [-row["fitness"], row["parameters_M"], row["mult_adds_M"]]


def test_front_of_a_run_is_what_nothing_dominates(finished):
    pareto = loaded(finished)[0]
    points = [point(row) for row in pareto["individuals"]]
    best = [a for a in points if not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in points)]
    assert sorted(point(row) for row in pareto["front"]) == sorted(best)


def test_front_of_a_run_is_sorted_by_fitness(finished):
    fitness = [row["fitness"] for row in loaded(finished)[0]["front"]]
    assert fitness == sorted(fitness, reverse=True)
    assert len(fitness) > 1


def test_pareto_file_has_each_cell_of_population_and_archive_once(finished):
    last = populations(finished)[-1][0]
    archive = load_checkpoint(finished / "checkpoint.pt")["archive"]
    cells = {str(encoding.genotype(alphas)) for alphas in [*last, *archive.values()]}
    assert len(loaded(finished)[0]["individuals"]) == len(cells)


def test_winner_is_the_first_individual_and_the_saved_cell(finished):
    pareto, result = loaded(finished)
    assert result["winner"].items() >= pareto["individuals"][0].items()
    assert result["winner"]["genotype"] == json.loads((finished / "genotype.json").read_text())


def test_archive_holds_the_front_of_each_generation(finished):
    archive = load_checkpoint(finished / "checkpoint.pt")["archive"]
    fixed, choices = train_search.s1_table(4, 4, 10, (3, 8, 8))
    expected = {}
    for alphas, fitness in populations(finished):
        counts = [fixed + choices[one_hot.bool()].sum(0) for one_hot in encoding.decode(alphas)]
        points = torch.cat([-fitness.unsqueeze(1), torch.stack(counts).double()], dim=1)
        for individual in alphas[non_dominated(points)]:
            expected[str(encoding.genotype(individual))] = individual
    assert archive.keys() == expected.keys()
    assert len(archive) <= search_state.ARCHIVED
    assert all(torch.equal(archive[cell], expected[cell]) for cell in archive)


def test_full_archive_keeps_the_newest_and_fittest(tmp_path, monkeypatch):
    monkeypatch.setattr(search_state, "ARCHIVED", 1)
    run = search(tmp_path, "--plain", epochs=1, baselines=0)
    (kept,) = load_checkpoint(run / "checkpoint.pt")["archive"].values()
    alphas, fitness = populations(run)[-1]
    assert fitness[[torch.equal(kept, individual) for individual in alphas]].tolist() == [fitness[0]]


@pytest.mark.parametrize("pick", [1, 2])
def test_pick_retrains_that_architecture_of_the_front(finished, tmp_path, monkeypatch, pick):
    class Seen(Exception):
        """Ends the retraining when its cell is known."""

    def stop(args, cell):
        seen.append(cell)
        raise Seen

    for name in FILES:
        shutil.copy(finished / name, tmp_path)
    picked = loaded(finished)[0]["front"][pick - 1]["genotype"]
    seen = []
    monkeypatch.setattr(train, "load_splits", stop)
    with pytest.raises(Seen):
        train.main(["--dataset", "digits", "--dir", str(tmp_path), "--pick", str(pick), "--device", "cpu"])
    assert genotype_files.to_json(seen[0]) == json.loads(json.dumps(picked))


PICK = ["--dataset", "digits", "--device", "cpu", "--pick"]


def test_pick_beyond_the_front_is_refused(finished, tmp_path, fails):
    pareto = loaded(finished)[0]
    write_json(tmp_path / "pareto.json", pareto)
    line = fails(train.main, [*PICK, 99, "--dir", tmp_path])
    assert "--pick 99" in line
    assert str(len(pareto["front"])) in line


def test_pick_without_a_search_is_refused(fails):
    line = fails(train.main, [*PICK, 1])
    assert "--pick" in line
    assert "--dir" in line


@pytest.mark.parametrize(
    "content", [[], {"front": [1]}, {"front": [{"genotype": {"normal": 3}}]}, {"front": [{}]}], ids=str
)
def test_pick_from_a_damaged_front_is_refused(tmp_path, fails, content):
    write_json(tmp_path / "pareto.json", content)
    assert "pareto.json" in fails(train.main, [*PICK, 1, "--dir", tmp_path])


# ---- random architectures


def test_random_architectures_are_measured_with_the_final_weights(finished):
    result = loaded(finished)[1]
    args = train_search.make_parser().parse_args(search_line(**SEARCH))
    train_split, valid, augmentation = datasets.search_splits(args)
    _, loader = search_cli.search_loaders(args, train_split, valid, augmentation, torch.device("cpu"))
    loader.generator = baselines.generator(args, seed_roles.FINAL_VALIDATION_IMAGES)
    network = TinySupernet(2, 10, 2)
    network.load_state_dict(torch.load(finished / "weights/weights.pt", weights_only=True))
    drawn = encoding.random_alphas(5, generator=baselines.generator(args, seed_roles.RANDOM_ARCHITECTURES))
    assert result["random_fitness"] == measure_fitness(network, encoding.decode(drawn), loader, "batch").tolist()
    assert result["random_seed"] == baselines.SEED


def test_winner_is_compared_with_random_architectures(finished):
    result = loaded(finished)[1]
    better = sum(fitness < result["winner"]["fitness"] for fitness in result["random_fitness"])
    assert result["better_than"] == better
    assert len(result["random_fitness"]) == 5
    assert f"better than {better} of 5" in (finished / "log.txt").read_text()


def test_retrain_command_names_the_run_and_the_size(finished):
    command = loaded(finished)[1]["retrain"]
    assert str(finished) in command
    assert "--init_channels 4" in command
    assert "--cutout --cutout_length 4" in command  # half of 8 pixels
    assert "--batch_size 17" in command  # a quarter of 70 images, which are fewer than a batch of the recipe


@pytest.fixture(scope="module")
def loosely_bound(tmp_path_factory, quick_reports, tiny_supernet):
    """The same search with budgets that everything meets, and without random architectures."""
    budgets = dict(max_params=1000, max_mult_adds=1e5)
    return search(tmp_path_factory.mktemp("loosely_bound"), "--plain", **SEARCH, baselines=0, **budgets)


def test_search_is_the_same_without_baselines_and_with_a_loose_budget(finished, loosely_bound):
    lines = history(loosely_bound)
    assert [line.pop("feasible") for line in lines] == [6, 6]
    assert lines == history(finished)
    state, expected = (load_checkpoint(folder / "checkpoint.pt") for folder in (loosely_bound, finished))
    other = {"bound": None, "history": None}
    assert_same(state | other, expected | other)
    individuals, expected = (loaded(run)[0]["individuals"] for run in (loosely_bound, finished))
    assert [row | {"row": None} for row in individuals] == [row | {"row": None} for row in expected]


def test_search_without_baselines_tells_of_no_random_architectures(loosely_bound):
    result = loaded(loosely_bound)[1]
    assert result["random_fitness"] == []
    assert "random" not in result["sentence"]


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], AT_ONCE])
def test_interrupted_last_measurement_loses_nothing(finished, tmp_path, numbers):
    argv = ["--plain", *search_line(**SEARCH, baselines=5, run_name="run", dir=tmp_path)]
    stop_at("the final weights: batch 1", numbers, train_search.main, argv)
    run = tmp_path / "run"
    assert not any((run / name).exists() for name in FILES)
    states = [load_checkpoint(folder / "checkpoint.pt") | {"history": None} for folder in (run, finished)]
    assert_same(*states)
    train_search.main(["--resume", str(run)])
    assert contents(run)[0] == contents(finished)[0]
    other = {"retrain": None, "seconds": None}
    assert loaded(run)[1] | other == loaded(finished)[1] | other


def test_finished_search_without_its_last_files_is_measured_on_resume(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in FILES:
        (run / name).unlink()
    train_search.main(["--resume", str(run)])
    assert loaded(run)[0] == loaded(finished)[0]


# ---- the benchmark's baselines


def test_expected_best_is_that_of_all_draws():
    values = np.random.RandomState(0).randint(0, 50, 9).astype(float)
    for n in (1, 2, 5, 9):
        expected = np.mean([max(drawn) for drawn in itertools.combinations(values, n)])
        assert benchmark.best_of(values, n) == pytest.approx(expected, abs=1e-12)


def test_benchmark_baselines_are_those_of_its_table(shared_data, capsys):
    path = str(shared_data("nb201_accuracy.csv.xz"))
    source = benchmark.load(path)
    rows = benchmark.baselines(source, index=6111)
    assert list(rows) == ["cifar10_test", "cifar100_test", "ImageNet16_120_test"]
    row = rows["cifar10_test"]
    assert round(row["most_parameters"], 2) == 93.76
    assert row["most_parameters_beaten_by"] == 166
    assert row["beaten_by"] == 0
    assert row["accuracy"] == row["best"]
    assert round(row["best"], 2) == 94.37
    random = np.random.RandomState(1).choice(source.table[:, 1], (20_000, 10)).max(1)
    assert row["best_of_10"] == pytest.approx(random.mean(), abs=4 * random.std() / 20_000**0.5)
    benchmark.main(["baselines", path, benchmark.MOST_PARAMETERS])
    assert "93.76" in capsys.readouterr().out.splitlines()[1]


@pytest.fixture(scope="module")
def with_table(tmp_path_factory, quick_reports):
    """A search of NAS-Bench-201 that ended with the baselines of a benchmark table."""
    folder = tmp_path_factory.mktemp("with_table")
    sizes = ["--baselines", 8, "--epochs", 2, "--train_samples", 100]
    return s2_search(folder, "--api_path", write_table(folder), *sizes)


def test_true_accuracy_of_the_winner_is_that_of_the_table(with_table):
    result = loaded(with_table)[1]
    index = S2_ARCHS.index(result["winner"]["genotype"])
    for k, row in enumerate(result["accuracy"].values()):
        assert row["accuracy"] == S2_TRUTH[index, k]
        assert row["beaten_by"] == (S2_TRUTH[:, k] > S2_TRUTH[index, k]).sum()
        assert row["mean"] == pytest.approx(S2_TRUTH[:, k].mean())


def test_true_accuracy_of_the_winner_is_logged_with_its_rank(with_table):
    row = loaded(with_table)[1]["accuracy"]["cifar10_valid"]
    log = (with_table / "log.txt").read_text()
    assert f"{row['accuracy']:.2f} %" in log
    assert f"{row['beaten_by'] + 1:,} of 15,625" in log


def test_rank_correlations_are_those_of_population_and_random_architectures(with_table):
    tau = loaded(with_table)[1]["kendall_tau"]
    assert tau["random architectures"]["architectures"] == 8
    assert tau["last population"]["architectures"] <= 6
    assert all(-1 <= row[of] <= 1 for row in tau.values() for of in ("fitness", "parameters"))


def test_report_shows_what_the_winner_is_worth(with_table):
    page = (with_table / "report.html").read_text()
    for words in ("six 3x3 convolutions", "mult-adds, M", "cifar10 valid accuracy"):
        assert words in page


WHOLE = {"winner": {}, "sentence": "", "retrain": ""}


@pytest.mark.parametrize(
    "damaged", [{}, {"winner": 3, "sentence": "x"}, [], WHOLE | {"accuracy": 5}, WHOLE | {"kendall_tau": "x"}], ids=str
)
def test_report_of_a_damaged_baselines_file_notes_it(with_table, tmp_path, damaged):
    run = shutil.copytree(with_table, tmp_path / "run")
    write_json(run / "baselines.json", damaged)
    report.write_report(run, VIEWS)
    assert "baselines.json is damaged" in (run / "report.html").read_text()
