"""Runs that are stopped, at any moment, and resumed end as if they had not been: bit by bit."""

import functools
import json
import re
import shutil
import signal
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import genotype_files
import genotypes
import nas201.train_search
import train
import train_search
from nas201 import benchmark

from helpers import (
    AT_ONCE,
    S2_SEARCH_LINE,
    STOP,
    TRAIN_SIZES,
    assert_same_run,
    checkpoint_bytes,
    history,
    interrupted_at,
    load_checkpoint,
    search_line,
    start,
    stop_at,
    train_line,
    words_of,
    write_table,
)

pytestmark = pytest.mark.usefixtures("quick_reports")


class Script(NamedTuple):
    """A tiny run of a script."""

    module: ModuleType
    argv: list[str]
    command: str  # as it is in the hint to continue
    unit: str
    steps: int  # of training in a generation or epoch
    measuring: str  # what comes after them
    batches: int  # that are measured on


SCRIPTS = {
    "search": Script(
        train_search,
        search_line(cutout_length=4, num_elites=1, layers=1, baselines=1),
        "train_search.py",
        unit="generation",
        steps=3,
        measuring="fitness",
        batches=2,
    ),
    "NAS-Bench-201": Script(
        nas201.train_search,
        [
            *S2_SEARCH_LINE,
            *"--train_samples 100 --valid_batch_size 40 --cutout --cutout_length 4 --baselines 1".split(),
        ],
        "-m nas201.train_search",
        unit="generation",
        steps=4,
        measuring="fitness",
        batches=3,
    ),
    "retraining": Script(  # drop path draws from torch's global generator
        train,
        train_line("--cutout", drop_path_prob=0.5, layers=1, batch_size=32),
        "train.py",
        unit="epoch",
        steps=3,
        measuring="test",
        batches=12,
    ),
}


class Stop(NamedTuple):
    """A moment at which a run is stopped."""

    event: str  # see helpers.signal_at
    signals: list[int]


def stops(script):
    """The moments at which a run of three generations or epochs is stopped, one after the other."""
    one, two, three = (f"{script.unit} {i}/3" for i in (1, 2, 3))
    last = script.batches - 1
    return [
        Stop("after checkpoint 0", AT_ONCE),
        Stop(f"{one}: batch 0", STOP),
        Stop(f"{one}: batch 1", [signal.SIGINT]),
        Stop("before checkpoint 1", AT_ONCE),  # the line of the history is there already
        Stop("after checkpoint 1", AT_ONCE),
        Stop(f"{two}: batch 1", [signal.SIGINT] * 2),
        Stop(f"{two}: batch 1", STOP),
        Stop(f"{two}: batch {script.steps - 1}", [signal.SIGHUP]),
        Stop(f"{two}, {script.measuring}: batch 0", STOP),
        Stop(f"{two}, {script.measuring}: batch {last}", AT_ONCE),
        Stop(f"{two}, {script.measuring}: batch {last}", [signal.SIGINT]),
        Stop("before checkpoint 2", AT_ONCE),
        Stop(f"{three}: batch 0", STOP),
        Stop(f"{three}, {script.measuring}: batch 0", AT_ONCE),
        Stop("after checkpoint 3", AT_ONCE),
    ]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The path of a NAS-Bench-201 table.

    It is read once, because that takes as long as a run of these tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "load", functools.cache(benchmark.load))
        yield write_table(tmp_path_factory.mktemp("table"))


class Whole(NamedTuple):
    """A script, with all its arguments, and a run of it that was left alone."""

    script: Script
    run: Path  # its directory


# The search on NAS-Bench-201 is slower than the others, and shares its loop with the DARTS space.
@pytest.fixture(scope="module", params=["search", "retraining", pytest.param("NAS-Bench-201", marks=pytest.mark.slow)])
def whole(request, tmp_path_factory, table):
    script = SCRIPTS[request.param]
    if request.param == "NAS-Bench-201":
        script = script._replace(argv=[*script.argv, "--api_path", str(table)])
    folder = tmp_path_factory.mktemp("whole")
    script.module.main([*script.argv, "--dir", str(folder)])
    (run,) = folder.iterdir()
    return Whole(script, run)


def expected_progress(script, stop, before):
    """Return (completed units, steps of the next) of the checkpoint after a stop.

    `before` is what the checkpoint had before the stop.
    """
    place, number = re.fullmatch(r"(.*) (\d+)", stop.event).groups()
    if place == "after checkpoint":
        return int(number), 0
    unit = int(re.search(r"\d+", stop.event)[0]) - 1
    if len(stop.signals) == 1:  # it is saved
        return unit, script.steps if script.measuring in place else int(number) + 1
    return before if before[0] == unit else (unit, 0)


def assert_says_where(errors, script, progress):
    """The error line of a saved stop has the unit and its step."""
    completed, steps = progress
    assert f"{script.unit} {completed + 1}/3, " in errors
    assert f"step {steps}/{script.steps};" in errors or (steps == script.steps and f"{script.measuring};" in errors)


def stopped_run(script, folder, stops, capsys):
    """Start a run below `folder`, stop it at one moment after the other, and resume it each time.

    Checks what each stop leaves. Returns the directory of the run, which has ended.
    """
    argv, progress = [*script.argv, "--dir", folder], (-1, 0)
    for stop in stops:
        stop_at(stop.event, stop.signals, script.module.main, argv)
        errors = capsys.readouterr().err
        (run,) = folder.iterdir()
        progress = expected_progress(script, stop, progress)
        if len(stop.signals) == 1:
            assert_says_where(errors, script, progress)
        checkpoint = load_checkpoint(run / "checkpoint.pt")
        assert checkpoint["completed"] == progress[0], stop.event
        assert checkpoint.get("partial", {"steps": 0})["steps"] == progress[1], stop.event
        torch.manual_seed(12345)  # the global generator of another process
        argv = ["--resume", run, "--report_freq", 1, "--checkpoint"]  # which cannot change the result
    script.module.main([str(word) for word in argv])
    return run


def test_run_stopped_again_and_again_ends_bit_identical(whole, tmp_path, capsys):
    """A retraining at every second moment; the searches at fewer, because they are slower and share their loop."""
    script, expected = whole
    moments = stops(script)  # moments[10] is in a measurement
    chosen = {train: moments[::2], nas201.train_search: moments[::4], train_search: [moments[10]]}[script.module]
    assert_same_run(stopped_run(script, tmp_path, chosen, capsys), expected)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(15))
def test_run_stopped_once_ends_bit_identical(whole, tmp_path, i, capsys):
    script, expected = whole
    assert_same_run(stopped_run(script, tmp_path, [stops(script)[i]], capsys), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name, images, steps", [("search", 60, 2), ("retraining", 96, 3), ("NAS-Bench-201", 96, 3)])
def test_compiled_run_stopped_in_its_last_measurement_ends_bit_identical(name, images, steps, table, tmp_path, capsys):
    """The graphs are made anew then, and for the shape of another batch first.

    All training batches have one shape: in the DARTS space, compiling for another one takes minutes.
    """
    script = SCRIPTS[name]
    own = ["--compile", "--no-self_check", "--train_samples", str(images)]
    own += ["--api_path", str(table)] if name == "NAS-Bench-201" else []
    script = script._replace(argv=[*script.argv, *own], steps=steps)
    script.module.main([*script.argv, "--dir", str(tmp_path / "whole")])
    (expected,) = (tmp_path / "whole").iterdir()
    torch._dynamo.reset()
    stop = Stop(f"{script.unit} 3/3, {script.measuring}: batch 0", STOP)
    assert_same_run(stopped_run(script, tmp_path / "stopped", [stop], capsys), expected)


@pytest.mark.parametrize(
    "name", ["retraining", *(pytest.param(name, marks=pytest.mark.slow) for name in ("search", "NAS-Bench-201"))]
)
def test_run_of_an_older_version_keeps_its_random_streams(name, tmp_path):
    """Its files do not say how its seeds were derived; splits and drop path are drawn again."""
    script = SCRIPTS[name]
    script.module.main([*script.argv, "--epochs", "2", "--seed_scheme", "1", "--dir", str(tmp_path / "whole")])
    (expected,) = (tmp_path / "whole").iterdir()
    run = Path(shutil.copytree(expected, tmp_path / "older"))
    (run / "report.html").unlink()  # with it NAS-Bench-201 takes a search for finished
    state = load_checkpoint(run / "checkpoint.prev.pt")
    about = json.loads((run / "args.json").read_text())
    assert state["bound"]["args"].pop("seed_scheme") == 1
    assert about["args"].pop("seed_scheme") == 1
    older = {name: json.dumps(state[name]) for name in ("bound", "history")}
    (run / "checkpoint.pt").write_bytes(checkpoint_bytes(state | older))
    (run / "args.json").write_text(json.dumps(about))
    torch.manual_seed(12345)
    script.module.main(["--resume", str(run)])
    assert_same_run(run, expected)
    with pytest.raises(SystemExit):
        script.module.main(["--resume", str(run), "--seed_scheme", "2"])


def test_resumed_run_keeps_its_own_cell(tmp_path):
    """The search it took the cell from may have gone on, or be elsewhere, since."""
    genotype_files.save(genotypes.EvNASB, tmp_path / "genotype.json")
    sizes = {name: value for name, value in TRAIN_SIZES.items() if name != "arch"}
    argv = words_of({**sizes, "epochs": 1, "layers": 1, "batch_size": 32, "dir": tmp_path})
    stop_at("after checkpoint 0", AT_ONCE, train.main, argv)
    run = next(tmp_path.glob("eval-*"))
    genotype_files.save(genotypes.EvNASA, tmp_path / "genotype.json")
    train.main(["--resume", str(run)])
    assert len(history(run)) == 1
    assert genotype_files.load(run / "genotype.json") == genotypes.EvNASB


# ---- processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole", SCRIPTS, indirect=True)
def test_process_interrupted_within_an_epoch_says_how_to_continue(whole, tmp_path, number):
    script, expected = whole
    process = start(*script.command.split(), *script.argv, "--dir", tmp_path, "--report_freq", 1)
    errors = interrupted_at(process, f"{script.unit} 2/3, step 1/{script.steps}", number)
    (run,) = tmp_path.iterdir()
    place = rf"{script.unit} [23]/3, (step \d+/{script.steps}|{script.measuring})"
    how = re.escape(f"python {script.command} --resume {run}")
    assert re.fullmatch(rf"interrupted in {place}; .*{how}\n", errors), errors
    assert process.returncode == 128 + number
    assert "partial" in load_checkpoint(run / "checkpoint.pt")
    assert errors.strip() in (run / "log.txt").read_text()
    script.module.main(["--resume", str(run)])
    assert_same_run(run, expected)
