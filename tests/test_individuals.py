"""individuals.csv: every individual of a search in one table."""

import csv
import json
import shutil

import pytest

import baselines
import encoding
import genotype_files
import individuals
import train_search
from model import NetworkCIFAR
from nas201 import encoding as s2_encoding
from nas201.sources import COLUMNS

from helpers import S2_ARCHS, S2_TRUTH, populations, s2_search, search, write_table

pytestmark = pytest.mark.usefixtures("quick_report", "tiny_supernet")
S1_COLUMNS = ["group", "weights", "generation", "rank", "fitness", "cell", "parameters_M", "mult_adds_M", "latency_ms"]


def read(run):
    with open(run / individuals.NAME, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def s1_run(tmp_path_factory, quick_reports, tiny_supernet):
    return search(tmp_path_factory.mktemp("s1"), "--plain", epochs=2)


@pytest.fixture(scope="module")
def s2_run(tmp_path_factory, quick_reports):
    folder = tmp_path_factory.mktemp("s2")
    table = write_table(folder, absent=["valid"])
    return s2_search(folder, "--epochs", 2, "--api_path", table)


def test_generations_are_the_saved_populations(s1_run):
    rows = [row for row in read(s1_run) if row["group"] == "population"]
    assert list(rows[0]) == S1_COLUMNS
    expected = []
    for generation, (alphas, fitness) in enumerate(populations(s1_run), start=1):
        for rank, (individual, value) in enumerate(zip(alphas, fitness, strict=True), start=1):
            cell = genotype_files.to_dict(encoding.genotype(individual))
            expected.append((generation, rank, value.item(), cell))
    found = [(int(r["generation"]), int(r["rank"]), float(r["fitness"]), json.loads(r["cell"])) for r in rows]
    assert found == expected
    assert {row["weights"] for row in rows} == {"generation"}


def test_costs_are_those_of_the_network(s1_run):
    for row in read(s1_run)[:3]:
        cell = genotype_files.from_dict(json.loads(row["cell"]))
        network = NetworkCIFAR(4, 10, 4, False, cell)  # as in SEARCH_SIZES
        assert float(row["parameters_M"]) == sum(p.numel() for p in network.parameters()) / 1e6
        assert row["latency_ms"] == ""


def test_front_and_baselines_name_their_rows(s1_run):
    rows = read(s1_run)
    pareto = json.loads((s1_run / "pareto.json").read_text())
    baselines = json.loads((s1_run / "baselines.json").read_text())
    for individual in [*pareto["individuals"], baselines["winner"]]:
        row = rows[individual["row"]]
        assert row["weights"] == "final"
        assert row["group"] in (individuals.LAST_POPULATION, individuals.FRONTS)
        assert float(row["fitness"]) == individual["fitness"]
        assert float(row["mult_adds_M"]) == individual["mult_adds_M"]
    for individual in pareto["front"]:
        assert json.loads(rows[individual["row"]]["cell"]) == individual["genotype"]
    drawn = [rows[number] for number in baselines["random_rows"]]
    assert {row["group"] for row in drawn} == {individuals.RANDOM}
    assert [float(row["fitness"]) for row in drawn] == baselines["random_fitness"]
    assert len(rows) == baselines["random_rows"][-1] + 1


def test_rank_with_final_weights_is_the_order_of_fitness(s1_run):
    final = [row for row in read(s1_run) if row["weights"] == "final"]
    ranked = sorted(final, key=lambda row: int(row["rank"]))
    values = [float(row["fitness"]) for row in ranked]
    assert [int(row["rank"]) for row in ranked] == list(range(1, len(final) + 1))
    assert values == sorted(values, reverse=True)


def test_true_accuracies_are_those_of_the_table(s2_run):
    rows = read(s2_run)
    names = [name.removesuffix("_200") for name in COLUMNS if "test" in name]
    assert list(rows[0]) == S1_COLUMNS + names
    columns = [k for k, name in enumerate(COLUMNS) if "test" in name]
    for row in rows:
        expected = S2_TRUTH[S2_ARCHS.index(row["cell"]), columns]
        assert [float(row[name]) for name in names] == expected.tolist()
    alphas, _ = populations(s2_run)[0]
    assert [row["cell"] for row in rows[: len(alphas)]] == [s2_encoding.arch_string(alpha) for alpha in alphas]


@pytest.mark.slow
def test_measured_latency_is_in_its_column(tmp_path):
    run = search(tmp_path, "--plain", epochs=1, max_latency=1e9)
    rows = [row for row in read(run) if row["group"] == "population"]
    assert all(float(row["latency_ms"]) > 0 for row in rows)


def test_random_search_has_fitness_only_where_it_was_measured(tmp_path):
    rows = [row for row in read(search(tmp_path, "--plain", epochs=2, variant="rand")) if row["group"] == "population"]
    measured = {row["generation"]: [] for row in rows}
    for row in rows:
        measured[row["generation"]].append(row["fitness"] != "" and row["rank"] != "")
    assert not any(measured["1"])
    assert all(measured["2"])


# ---- resume


@pytest.fixture
def copy(s1_run, tmp_path):
    """A copy of the finished search."""
    return shutil.copytree(s1_run, tmp_path / "run")


def test_missing_table_of_a_finished_search_is_written_again(copy, s1_run):
    (copy / individuals.NAME).unlink()
    train_search.main(["--resume", str(copy)])
    for name in (individuals.NAME, "pareto.json"):
        assert (copy / name).read_bytes() == (s1_run / name).read_bytes()


def test_table_of_an_interrupted_search_follows_its_checkpoint(copy, s1_run):
    """Here the table is damaged, and has lost rows that the checkpoint counts."""
    (copy / "checkpoint.prev.pt").rename(copy / "checkpoint.pt")  # after generation 1
    (copy / individuals.NAME).write_text("anything\n")
    train_search.main(["--resume", str(copy)])
    assert (copy / individuals.NAME).read_bytes() == (s1_run / individuals.NAME).read_bytes()


def test_damaged_population_is_left_out_and_named(copy, capsys):
    (copy / individuals.NAME).unlink()
    (copy / "population" / "001.npz").write_bytes(b"damaged")
    train_search.main(["--resume", str(copy)])
    assert "001.npz" in capsys.readouterr().out
    generations = {row["generation"] for row in read(copy) if row["group"] == "population"}
    assert generations == {"2"}


def test_search_resumed_before_its_first_generation_has_one_header(tmp_path, monkeypatch):
    """The last measurement writes the whole table, so the table is compared before that."""
    early = search(tmp_path / "early", "--plain", epochs=1)
    (early / "checkpoint.prev.pt").rename(early / "checkpoint.pt")  # before generation 1
    tables = []
    monkeypatch.setattr(baselines, "conclude", lambda *_: tables.append((early / individuals.NAME).read_text()))
    train_search.main(["--resume", str(early)])
    (table,) = tables
    assert table.count("group,weights") == 1
    assert table.count("population,generation,1,") == 4
