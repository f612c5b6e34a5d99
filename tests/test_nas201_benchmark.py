"""The readers of NAS-Bench-201: synthetic tables, damaged and hostile files, and real records."""

import bz2
import itertools
import lzma
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from nas201 import benchmark, sources
from nas201.genotypes import to_arch_string
from support.files import UserError

REAL = (0, 11, 284)  # the indices of the sample records
RECORDS = "NATS-tss-v1_0-3ffb9-simple"
ARCHS = [to_arch_string(ops) for ops in itertools.product(range(5), repeat=6)]  # not the benchmark's order
FIGURES = np.round(np.random.RandomState(0).uniform(10, 95, (len(ARCHS), 6)), 3)


@pytest.fixture(scope="module")
def lines():
    """A whole compact table as lines of text; line 0 is the header."""
    header = ",".join(["index", "arch", *sources.COLUMNS])
    return [header] + [f"{i},{arch}," + ",".join(map(str, FIGURES[i])) for i, arch in enumerate(ARCHS)]


def write_lines(lines, path):
    """Write a table, packed if the path ends in .xz; return the path."""
    data = "\n".join(lines).encode()
    path.write_bytes(lzma.compress(data, preset=0) if path.suffix == ".xz" else data)
    return path


@pytest.fixture
def write(tmp_path):
    return lambda lines, name="table.csv": write_lines(lines, tmp_path / name)


@pytest.fixture(scope="module")
def table(lines, tmp_path_factory):
    """The path of a whole table."""
    return write_lines(lines, tmp_path_factory.mktemp("table") / "table.csv")


@pytest.fixture(scope="module")
def packed(lines, tmp_path_factory):
    """The path of a whole table, packed, with its lines in another order."""
    order = [0, *(1 + np.random.RandomState(1).permutation(len(ARCHS)))]
    return write_lines([lines[i] for i in order], tmp_path_factory.mktemp("table") / "table.csv.xz")


@pytest.fixture(scope="module")
def bench(table):
    return benchmark.load(table)


def state(index, arch, offset=0.0):
    """A minimal state of 200-epoch runs with mean FIGURES[index].

    It has two seeds, or one if `offset` is 0.
    """
    return {"arch_index": index, "arch_str": arch, "all_results": results(index, offset)}


def results(index, offset):
    """The runs of `state`."""
    runs = {}
    for delta, seed in {-offset: 777, offset: 888}.items():
        for k, (dataset, metric) in enumerate(sources.METRICS.values()):
            run = runs.setdefault((dataset, seed), {"eval_acc1es": {}})
            run["eval_acc1es"] |= {f"{metric}@11": 1.0, f"{metric}@199": float(FIGURES[index, k] + delta)}
    return runs


def official(states, archs=ARCHS):
    """Content of NAS-Bench-201-v1_1: the 12-epoch runs are `less`, the 200-epoch runs `full`."""
    infos = {index: {"full": full, "less": less} for index, (full, less) in states.items()}
    return {"meta_archs": archs, "arch2infos": infos, "evaluated_indexes": set(infos)}


def assert_accuracies(bench, index, expected):
    """`expected` has six accuracies in the order of the columns."""
    for (dataset, split), value in zip(sources.METRICS, expected, strict=True):
        assert bench.accuracy(index, dataset, split) == pytest.approx(value, abs=1e-9)


def error_of(function, *args):
    """The text of the UserError that a call raises: one line of bounded length."""
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def refused(capsys, *argv):
    """What a refused command prints on stderr, one line."""
    with pytest.raises(SystemExit) as stop:
        benchmark.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ---- compact tables


def assert_whole(bench):
    assert len(bench) == 15625
    assert bench.absent == ()
    assert bench.missing == ()
    for index in (0, 1, 777, 15624, np.int64(5)):
        assert bench.arch(index) == ARCHS[index]
        assert bench.index(ARCHS[index]) == index
        assert_accuracies(bench, index, FIGURES[index])


def test_compact_table_loads(bench):
    assert_whole(bench)


def test_packed_table_loads_with_its_lines_in_any_order(packed):
    assert_whole(benchmark.load(packed))


def test_columns_of_12_epochs_do_not_stand_in_for_200(lines, write, capsys):
    path = write([lines[0].replace("cifar10_valid_200", "cifar10_valid_12"), *lines[1:]])
    bench = benchmark.load(path)
    assert bench.absent == ("cifar10_valid_200",)
    assert bench.accuracy(3, "cifar10", "valid") is None
    assert bench.accuracy(3, "cifar10", "test") == FIGURES[3, 1]
    benchmark.print_architecture(bench, ARCHS[3])
    assert "absent" in capsys.readouterr().out


def test_table_with_no_column_of_200_epochs_is_refused(lines, write):
    header = lines[0].replace("cifar10_valid_200", "cifar10_valid_12")
    only = [",".join(line.split(",")[:3]) for line in [header, *lines[1:]]]
    assert "200 epochs" in error_of(benchmark.load, write(only))


@pytest.mark.slow
def test_exported_table_equals_its_source(lines, write, tmp_path, capsys):
    source = write([line.rpartition(",")[0] for line in lines])
    destination = tmp_path / "out.csv.xz"
    benchmark.main(["export", str(source), str(destination)])
    assert "ImageNet16_120_test_200" in capsys.readouterr().err
    exported = benchmark.load(destination)
    assert exported.absent == ("ImageNet16_120_test_200",)
    np.testing.assert_array_equal(exported.table[:, :-1], FIGURES[:, :-1])
    assert exported.archs == ARCHS


def test_saved_table_equals_its_source(bench, tmp_path):
    benchmark.save(bench, tmp_path / "out.csv")
    saved = benchmark.load(tmp_path / "out.csv")
    np.testing.assert_array_equal(saved.table, bench.table)
    assert saved.archs == bench.archs


@pytest.mark.parametrize("by", ["arch string", "index"])
def test_query_prints_accuracy_and_rank(bench, capsys, by):
    winner = int(FIGURES[:, 1].argmax())
    benchmark.print_architecture(bench, ARCHS[winner] if by == "arch string" else str(winner))
    assert re.search(rf"cifar10 +test +{FIGURES[winner, 1]:.2f} +1\n", capsys.readouterr().out)


def test_best_prints_the_best_of_each_column(table, capsys):
    benchmark.main(["best", str(table)])
    out = capsys.readouterr().out
    for (dataset, split), values in zip(sources.METRICS, FIGURES.T, strict=True):
        assert re.search(rf"{dataset} +{split} +{values.max():.2f} +index +{values.argmax()} ", out)


@pytest.mark.parametrize("argv", [[], ["export"], ["query", "a.csv"], ["best"], ["baselines"], ["worst", "a.csv"]])
def test_incomplete_command_is_refused(capsys, argv):
    assert "--help" in refused(capsys, *argv)


@pytest.mark.parametrize("name", ["export", "query", "best", "baselines"])
def test_each_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([name, "--help"])
    assert stop.value.code == 0
    assert f"nas201.benchmark {name}" in capsys.readouterr().out


@pytest.mark.parametrize("index", [-1, 15625])
def test_impossible_index_is_refused(bench, index):
    assert "0..15624" in error_of(bench.accuracy, index, "cifar10", "test")
    assert "0..15624" in error_of(bench.arch, index)
    assert "0..15624" in error_of(benchmark.index_of, bench, str(index))


def test_impossible_index_is_refused_by_the_command(table, capsys):
    assert "0..15624" in refused(capsys, "query", table, 15625)


def test_unknown_names_are_refused(bench):
    assert "cifar10-valid" in error_of(bench.accuracy, 0, "cifar10-valid", "valid")
    assert "train" in error_of(bench.accuracy, 0, "cifar10", "train")
    assert "'foo'" in error_of(bench.index, ARCHS[0].replace("none~2", "foo~2"))
    assert "3<-2" in error_of(bench.index, ARCHS[0].replace("none~2|", ""))


def cell(at, value):
    """Change cell `at` of line 100 (index 99)."""

    def change(lines):
        cells = lines[99 + 1].split(",")
        cells[at] = value
        return lines[:100] + [",".join(cells)] + lines[101:]

    return change


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda x: x[:100] + x[101:], ["15624 ", " 99"]),
        (lambda x: [*x, x[7]], ["line 15627", "index 6"]),
        (cell(0, "98"), ["line 101", "index 98"]),
        (cell(0, "15625"), ["line 101", "'15625'"]),
        (cell(0, "x"), ["line 101", "'x'"]),
        (cell(1, ARCHS[5]), ["line 101", "indices 5 and 99"]),
        (cell(1, ARCHS[99].replace("none", "zero")), ["line 101", "'zero'"]),
        (cell(1, ""), ["line 101", "1<-0"]),
        (cell(3, "n/a"), ["line 101", "cifar10_test_200", "'n/a'"]),
        (cell(3, ""), ["line 101", "cifar10_test_200", "''"]),
        (cell(3, "nan"), ["line 101", "cifar10_test_200", "'nan'"]),
        (cell(3, "100.01"), ["line 101", "cifar10_test_200", "'100.01'"]),
        (cell(3, "-1"), ["line 101", "cifar10_test_200", "'-1'"]),
        (lambda x: x[:50] + [x[50] + ",1"] + x[51:], ["line 51", "9 cells"]),
        (lambda x: x[:1], ["15625", " 0"]),
        (lambda x: [], ["column index"]),
        (lambda x: [x[0].replace("arch", "architecture"), *x[1:]], ["column arch"]),
        (lambda x: [x[0].replace("cifar10_valid", "cifar10_test"), *x[1:]], ["two columns"]),
        (lambda x: ["\0" * 200_000], ["line 1"]),
    ],
)
def test_damaged_table_is_refused_with_its_line(lines, write, change, named):
    path = write(change(lines))
    text = error_of(benchmark.load, path)
    for words in [str(path), *named]:
        assert words in text


def test_damaged_table_is_refused_by_the_command(lines, write, capsys):
    path = write(lines[:1])
    assert str(path) in refused(capsys, "best", path)


def bad_files(table):
    """{name: content} of files that are no benchmark; `table` is the content of a good .csv.xz."""
    return {
        "truncated.csv.xz": table[: len(table) // 2],
        "junk.csv.xz": b"junk",
        "latin.csv": "index,arch\n0,ä".encode("latin-1"),
        "junk.pth": b"junk",
        "empty.pth": b"",
        "junk.txt": b"junk",
        "bomb.csv.xz": lzma.compress(bytes(sources.MAX_BYTES + 1), preset=0),
    }


def test_file_that_is_no_benchmark_is_refused_by_name(packed, tmp_path):
    for name, data in bad_files(packed.read_bytes()).items():
        (tmp_path / name).write_bytes(data)
        assert name in error_of(benchmark.load, tmp_path / name)


def test_source_that_is_not_there_is_refused_by_name(tmp_path):
    for name in ("none.csv", "none.csv.xz", "none.pth"):
        assert name in error_of(benchmark.load, tmp_path / name)
    (tmp_path / "folder").mkdir()
    assert "meta.pickle.pbz2" in error_of(benchmark.load, tmp_path / "folder")


def test_save_refuses_other_suffixes_and_folders_that_are_not_there(bench, tmp_path):
    assert "out.txt" in error_of(benchmark.save, bench, tmp_path / "out.txt")
    assert "nowhere" in error_of(benchmark.save, bench, tmp_path / "nowhere" / "out.csv")


def test_loading_a_table_takes_little_memory_and_no_torch(packed):
    script = (
        "import sys, resource, numpy, nas201.benchmark as b\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "b.load(sys.argv[1])\n"
        "print(peak() - before, 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(benchmark.__file__).rpartition("/nas201/")[0]}
    command = [sys.executable, "-c", script, str(packed)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    megabytes, torch_loaded = run.stdout.split()
    assert float(megabytes) < 50
    assert torch_loaded == "False"


# ---- the official .pth and the NATS-Bench directory, synthetic


@pytest.mark.parametrize("zipped", [pytest.param(True, marks=pytest.mark.slow), False])
def test_official_pth_loads_in_both_formats_of_torch(tmp_path, zipped):
    """The real file has the older format. Numbers of numpy have its old or its new module name.

    A hundred architectures have figures of two seeds. The others share figures to save time.
    """
    shared = {k: results(k, 0.0) for k in range(100, 200)}
    expected = FIGURES.copy()
    states = {}
    for index, arch in enumerate(ARCHS):
        states[index] = (state(index, arch, offset=0.5), {"epochs": 12})
        if index >= 100:
            k = 100 + index % 100
            states[index] = ({"arch_str": arch, "all_results": shared[k]}, {})
            expected[index] = FIGURES[k]
    states[3][0]["flop"] = np.float64(1.5)
    path = tmp_path / "NAS-Bench-201-v1_1.pth"
    torch.save(official(states), path, _use_new_zipfile_serialization=zipped)
    if not zipped:
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    bench = benchmark.load(path)
    assert bench.missing == ()
    assert bench.archs == ARCHS
    np.testing.assert_allclose(bench.table, expected, rtol=0, atol=1e-9)


def write_pbz2(path, value):
    path.write_bytes(bz2.compress(value if isinstance(value, bytes) else pickle.dumps(value, protocol=4), 1))


@pytest.fixture(scope="module")
def three_records(tmp_path_factory):
    """The directory that `nats` copies."""
    folder = tmp_path_factory.mktemp("nats")
    write_pbz2(folder / "meta.pickle.pbz2", {"meta_archs": ARCHS, "total_archs": 15625})
    for index in range(3):
        write_pbz2(folder / f"{index:06d}.pickle.pbz2", {"12": {}, "200": state(index, ARCHS[index])})
    return folder


@pytest.fixture
def nats(tmp_path, three_records):
    """A directory with the records 0, 1 and 2."""
    return shutil.copytree(three_records, tmp_path, dirs_exist_ok=True)


def numbers_in(message):
    """The numbers in a message about a file, except those of its path."""
    return set(re.findall(r"\d+", message.partition(": ")[2]))


def test_incomplete_directory_knows_its_records(nats):
    bench = benchmark.load(nats)
    assert len(bench) == 15625
    assert bench.missing == tuple(range(3, 15625))
    assert_accuracies(bench, 1, FIGURES[1])
    assert bench.accuracy(3, "cifar10", "test") is None


def test_query_of_an_incomplete_directory_notes_how_many_records_are_missing(nats, capsys):
    benchmark.main(["query", str(nats), "2"])
    out, err = capsys.readouterr()
    assert f"{FIGURES[2, 0]:.2f}" in out
    assert "15622" in err


def test_incomplete_directory_is_not_exported(nats, capsys):
    message = refused(capsys, "export", nats, nats / "out.csv").removeprefix("error: ")
    assert {"15622", "3"} <= numbers_in(message)  # the number of missing records, and the first of them
    assert not (nats / "out.csv").exists()


def test_best_of_an_incomplete_directory_is_refused(nats, capsys):
    message = refused(capsys, "best", nats).removeprefix("error: ")
    assert {"15622", "3"} <= numbers_in(message)


@pytest.mark.slow
def test_complete_directory_is_exported(nats):
    for index in range(3, 15625):
        write_pbz2(nats / f"{index:06d}.pickle.pbz2", {"200": state(index, ARCHS[index])})
    benchmark.save(benchmark.load(nats), nats / "out.csv.xz")
    np.testing.assert_allclose(benchmark.load(nats / "out.csv.xz").table, FIGURES, rtol=0, atol=1e-9)


def record_with_accuracy(value):
    """A record of architecture 1 in which one accuracy is `value`."""
    record = state(1, ARCHS[1])
    record["all_results"]["cifar10", 888]["eval_acc1es"]["ori-test@199"] = value
    return {"200": record}


@pytest.mark.parametrize(
    "record, named",
    [
        ({"200": state(1, ARCHS[2])}, ARCHS[2]),
        (record_with_accuracy(101.0), "cifar10 ori-test@199 is 101.0"),
        ({"12": state(1, ARCHS[1])}, "200 epochs"),
        ({"200": {"arch_str": ARCHS[1], "all_results": 3}}, "200 epochs"),
        (["a", "list"], "200 epochs"),
        (b"\x80\x04N", "pickle"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo"),
        (bytes(sources.MAX_BYTES + 1), "16 MB"),
        (b"cnumpy\ndtype\n(X\x0b\x00\x00\x00V2000000000\x89\x88tR.", "V2000000000"),
    ],
)
def test_damaged_record_is_refused_by_name(nats, record, named):
    write_pbz2(nats / "000001.pickle.pbz2", record)
    text = error_of(benchmark.load(nats).accuracy, 1, "cifar10", "test")
    assert named in text
    assert "000001.pickle.pbz2" in text


def test_truncated_record_is_refused_by_name(nats):
    path = nats / "000001.pickle.pbz2"
    path.write_bytes(path.read_bytes()[:-9])
    assert path.name in error_of(benchmark.load(nats).accuracy, 1, "cifar10", "test")


@pytest.mark.parametrize(
    "archs, named", [(ARCHS[:-1], "15624"), ([*ARCHS[:-1], ARCHS[0]], "same architecture"), (None, "meta_archs")]
)
def test_damaged_list_of_architectures_is_refused(nats, archs, named):
    write_pbz2(nats / "meta.pickle.pbz2", {"meta_archs": archs})
    assert named in error_of(benchmark.load, nats)


def test_mean_is_over_the_seeds_that_have_the_metric(nats):
    runs = state(0, ARCHS[0], offset=0.5)
    for (dataset, seed), run in runs["all_results"].items():
        if dataset == "cifar100" or seed == 777:
            del run["eval_acc1es"]["x-valid@199" if dataset != "cifar10" else "ori-test@199"]
    write_pbz2(nats / "000000.pickle.pbz2", {"200": runs})
    bench = benchmark.load(nats)
    assert bench.accuracy(0, "cifar100", "valid") is None
    assert bench.accuracy(0, "cifar10", "test") == pytest.approx(FIGURES[0, 1] + 0.5)  # of the other seed


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def hostile_record(tmp_path):
    """A record that makes the folder `executed` if it is unpickled."""
    yield {"200": state(1, ARCHS[1]) | {"flop": Hostile(tmp_path / "executed")}}
    assert not (tmp_path / "executed").exists()


def test_hostile_record_is_not_executed(nats, hostile_record):
    write_pbz2(nats / "000001.pickle.pbz2", hostile_record)
    text = error_of(benchmark.load(nats).accuracy, 1, "cifar10", "test")
    assert "posix.mkdir" in text
    assert "000001.pickle.pbz2" in text


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pth_is_not_executed(tmp_path, hostile_record, zipped):
    states = {1: (hostile_record["200"], {})}
    torch.save(official(states), tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    text = error_of(benchmark.load, tmp_path / "bad.pth")
    assert "posix.mkdir" in text
    assert "bad.pth" in text


def test_hostile_list_of_architectures_is_not_executed(nats):
    write_pbz2(nats / "meta.pickle.pbz2", Hostile(nats / "executed"))
    assert "posix.mkdir" in error_of(benchmark.load, nats)
    assert not (nats / "executed").exists()


@pytest.fixture(params=[True, False], ids=["zip", "old format"])
def pth(tmp_path, request):
    """A .pth with one record, of index 0."""
    content = official({0: (state(0, ARCHS[0]), {})})
    torch.save(content, tmp_path / "b.pth", _use_new_zipfile_serialization=request.param)
    return tmp_path / "b.pth"


def test_incomplete_pth_loads_and_is_not_exported(pth, tmp_path):
    bench = benchmark.load(pth)
    assert len(bench.missing) == 15624
    assert_accuracies(bench, 0, FIGURES[0])
    assert {"15624", "1"} <= numbers_in(error_of(benchmark.save, bench, tmp_path / "out.csv"))


def test_truncated_pth_is_refused_by_name(pth):
    whole = pth.read_bytes()
    for size in (1, 100, len(whole) // 2, len(whole) - 30):
        pth.write_bytes(whole[:size])
        assert "b.pth" in error_of(benchmark.load, pth)


def test_pth_with_other_content_is_refused_by_name(tmp_path):
    path = tmp_path / "b.pth"
    for content in ([1, 2], {"meta_archs": ARCHS}, {"meta_archs": ARCHS, "arch2infos": {0: {"less": {}}}}):
        torch.save(content, path)
        assert "b.pth" in error_of(benchmark.load, path)


# ---- real data


@pytest.fixture(scope="module")
def real(shared_data):
    return benchmark.load(shared_data(RECORDS))


def test_real_table_has_the_published_optima(shared_data):
    bench = benchmark.load(shared_data("nb201_accuracy.csv.xz"))
    assert set(bench.absent) == {"cifar10_valid_200", "cifar100_valid_200", "ImageNet16_120_valid_200"}
    of_cifar10, of_cifar100, of_imagenet16 = bench.table[:, 1::2].T
    assert round(of_cifar10.max(), 2) == 94.37
    assert of_cifar10.argmax() == 6111
    assert of_cifar10.mean() == pytest.approx(87.06, abs=0.006)
    assert np.median(of_cifar10) == pytest.approx(90.75, abs=0.006)
    assert round(of_cifar100.max(), 2) == 73.51
    assert round(of_imagenet16.max(), 2) == 47.31


def test_real_records_equal_the_table(real, shared_data):
    table = benchmark.load(shared_data("nb201_accuracy.csv.xz"))
    for dataset, figure in (("cifar10", 85.86), ("cifar100", 52.91), ("ImageNet16-120", 26.63)):
        assert round(real.accuracy(0, dataset, "test"), 2) == figure
        for index in REAL:
            assert real.accuracy(index, dataset, "test") == pytest.approx(
                table.accuracy(index, dataset, "test"), abs=1e-4
            )
    assert real.archs == table.archs


def test_real_records_equal_the_package(real, shared_data):
    nats_bench = pytest.importorskip("nats_bench")
    api = nats_bench.create(str(shared_data(RECORDS)), "tss", fast_mode=True, verbose=False)
    names = {"valid": "valid-accuracy", "test": "test-accuracy"}
    for index in REAL:
        for dataset, split in sources.METRICS:
            name = "cifar10-valid" if (dataset, split) == ("cifar10", "valid") else dataset
            info = api.get_more_info(index, name, hp="200", is_random=False)
            assert real.accuracy(index, dataset, split) == pytest.approx(info[names[split]], abs=1e-9)


@pytest.mark.slow
def test_real_records_survive_pth_and_export(real, shared_data, tmp_path):
    """The real records are put into the official structure among synthetic ones, then exported."""
    archs = [real.arch(i) for i in range(15625)]
    states = {i: (state(i, arch), {}) for i, arch in enumerate(archs)}
    for index in REAL:
        data = bz2.decompress((shared_data(RECORDS) / f"{index:06d}.pickle.pbz2").read_bytes())
        record = pickle.loads(data)
        states[index] = record["200"], record["12"]
    torch.save(official(states, archs), tmp_path / "b.pth")
    bench = benchmark.load(tmp_path / "b.pth")
    benchmark.save(bench, tmp_path / "t.csv.xz")
    table = benchmark.load(tmp_path / "t.csv.xz")
    for index in REAL:
        assert_accuracies(bench, index, real.accuracies(index))
        assert_accuracies(table, index, real.accuracies(index))
