"""Runs that are stopped, at any moment and again and again, and resumed end as if they had not been: bit by bit."""

import json
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import genotype_files
import genotypes
import nas201.train_search
import train
import train_search

from helpers import (
    AT_ONCE,
    S2_SEARCH_LINE,
    STOP,
    assert_same_run,
    checkpoint_bytes,
    history,
    interrupted_at,
    load_checkpoint,
    search_line,
    start,
    stop_at,
    train_line,
    write_table,
)

pytestmark = pytest.mark.usefixtures("quick_report")
ROOT = Path(__file__).resolve().parents[1]
Script = namedtuple("Script", "module argv command unit measuring steps batches")
SCRIPTS = {
    "search": Script(
        *(train_search, search_line(cutout_length=4, num_elites=1), "train_search.py"),
        *("generation", "fitness", 3, 2),
    ),
    "NAS-Bench-201": Script(  # 13 batches an epoch
        nas201.train_search,
        [*S2_SEARCH_LINE, "--cutout", "--cutout_length", "4", "--valid_batch_size", "40"],
        *("-m nas201.train_search", "generation", "fitness", 13, 3),
    ),
    "retraining": Script(  # drop path draws from torch's global generator
        *(train, train_line("--cutout", drop_path_prob=0.5), "train.py", "epoch", "test", 6, 23),
    ),
}


def moments(unit, measuring, steps, batches):
    """[(event, signals)] in an order in which they can follow each other in one run."""
    one, two, three = (f"{unit} {i}/3" for i in (1, 2, 3))
    return [
        ("after checkpoint 0", AT_ONCE),
        (f"{one}: batch 0", STOP),
        (f"{one}: batch 1", [signal.SIGINT]),
        ("before checkpoint 1", AT_ONCE),  # the line of the history is there already
        ("after checkpoint 1", AT_ONCE),
        (f"{two}: batch 1", [signal.SIGINT] * 2),
        (f"{two}: batch 1", STOP),
        (f"{two}: batch {steps - 1}", [signal.SIGHUP]),
        (f"{two}, {measuring}: batch 0", STOP),
        (f"{two}, {measuring}: batch {batches - 1}", AT_ONCE),
        (f"{two}, {measuring}: batch {batches - 1}", [signal.SIGINT]),
        ("before checkpoint 2", AT_ONCE),
        (f"{three}: batch 0", STOP),
        (f"{three}, {measuring}: batch 0", AT_ONCE),
        ("after checkpoint 3", AT_ONCE),
    ]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module", params=SCRIPTS)
def whole(request, tmp_path_factory, table):
    """(script with its whole command line, the directory of an uninterrupted run)."""
    script = SCRIPTS[request.param]
    if request.param == "NAS-Bench-201":
        script = script._replace(argv=[*script.argv, "--api_path", str(table)])
    folder = tmp_path_factory.mktemp("whole")
    script.module.main([*script.argv, "--dir", str(folder)])
    (run,) = folder.iterdir()
    return script, run


def stopped_run(script, folder, stops, capsys):
    """Start a run below `folder`, stop it at one moment after the other, resume it; checks what it left each time."""
    argv, left = [*script.argv, "--dir", folder], None
    for event, numbers in stops:
        stop_at(event, numbers, script.module.main, argv)
        errors = capsys.readouterr().err
        (run,) = folder.iterdir()
        place, number = re.fullmatch(r"(.*) (\d+)", event).groups()
        if place == "after checkpoint":
            left = (int(number), 0)
        else:
            unit = int(re.search(r"\d+", event)[0]) - 1
            left = left if left and left[0] == unit else (unit, 0)
            if len(numbers) == 1:
                left = (unit, script.steps if script.measuring in place else int(number) + 1)
                words = script.measuring if script.measuring in place else f"step {left[1]}/{script.steps}"
                assert f"{script.unit} {unit + 1}/3, {words};" in errors
        checkpoint = load_checkpoint(run / "checkpoint.pt")
        assert (checkpoint["completed"], checkpoint.get("partial", {"steps": 0})["steps"]) == left, event
        torch.manual_seed(12345)  # the global generator of another process
        argv = ["--resume", run, "--report_freq", 1, "--checkpoint"]  # which cannot change the result
    script.module.main([str(word) for word in argv])
    return run


def test_a_run_stopped_again_and_again_ends_bit_identical(whole, tmp_path, capsys):
    script, expected = whole
    stops = moments(script.unit, script.measuring, script.steps, script.batches)
    if script.module is train_search:  # it has its loop in common with NAS-Bench-201's and is slower
        stops = stops[::3]
    assert_same_run(stopped_run(script, tmp_path, stops, capsys), expected)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(15))
def test_a_run_stopped_once_ends_bit_identical(whole, tmp_path, i, capsys):
    script, expected = whole
    stop = moments(script.unit, script.measuring, script.steps, script.batches)[i]
    assert_same_run(stopped_run(script, tmp_path, [stop], capsys), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_compiled_run_stopped_in_its_last_measurement(name, table, tmp_path, capsys):
    """The graphs are made anew then, and for the shape of another batch first."""
    script = SCRIPTS[name]
    own = ["--compile", "--no-self_check", *(["--api_path", str(table)] if name == "NAS-Bench-201" else [])]
    script = script._replace(argv=[*script.argv, *own])
    script.module.main([*script.argv, "--dir", str(tmp_path / "whole")])
    (expected,) = (tmp_path / "whole").iterdir()
    torch._dynamo.reset()
    stop = (f"{script.unit} 3/3, {script.measuring}: batch 0", STOP)
    assert_same_run(stopped_run(script, tmp_path / "stopped", [stop], capsys), expected)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "search" else name for name in SCRIPTS]
)
def test_a_run_of_an_older_version_keeps_its_random_streams(name, tmp_path):
    """Its files do not say how its seeds were derived; splits and drop path are drawn again from the seed."""
    script = SCRIPTS[name]
    script.module.main([*script.argv, "--seed_scheme", "1", "--dir", str(tmp_path / "whole")])
    (expected,) = (tmp_path / "whole").iterdir()
    run = Path(shutil.copytree(expected, tmp_path / "older"))
    (run / "report.html").unlink()  # with it NAS-Bench-201 takes a search for finished
    state = load_checkpoint(run / "checkpoint.prev.pt")
    about = json.loads((run / "args.json").read_text())
    assert state["bound"]["args"].pop("seed_scheme") == about["args"].pop("seed_scheme") == 1
    older = {name: json.dumps(state[name]) for name in ("bound", "history")}
    (run / "checkpoint.pt").write_bytes(checkpoint_bytes(state | older))
    (run / "args.json").write_text(json.dumps(about))
    torch.manual_seed(12345)
    script.module.main(["--resume", str(run)])
    assert_same_run(run, expected)
    with pytest.raises(SystemExit):
        script.module.main(["--resume", str(run), "--seed_scheme", "2"])


def test_a_resumed_run_keeps_its_own_cell(tmp_path):
    """The search it took the cell from may have gone on, or be elsewhere, since."""
    genotype_files.save(genotypes.EvNASB, tmp_path / "genotype.json")
    argv = train_line(dir=tmp_path)
    i = argv.index("--arch")
    del argv[i : i + 2]
    stop_at("after checkpoint 2", AT_ONCE, train.main, argv)
    run = next(tmp_path.glob("eval-*"))
    genotype_files.save(genotypes.EvNASA, tmp_path / "genotype.json")
    train.main(["--resume", str(run)])
    assert len(history(run)) == 3 and genotype_files.load(run / "genotype.json") == genotypes.EvNASB


# ---- processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole", SCRIPTS, indirect=True)
def test_a_process_interrupted_within_an_epoch_says_how_to_continue(whole, tmp_path, number):
    script, expected = whole
    process = start(*script.command.split(), *script.argv, "--dir", tmp_path, "--report_freq", 1)
    errors = interrupted_at(process, f"{script.unit} 2/3, step 1/{script.steps}", number)
    (run,) = tmp_path.iterdir()
    place = rf"{script.unit} [23]/3, (step \d+/{script.steps}|{script.measuring})"
    how = re.escape(f"continue with: python {script.command} --resume {run}")
    assert re.fullmatch(rf"interrupted in {place}; {how}\n", errors), errors
    assert process.returncode == 128 + number
    assert "partial" in load_checkpoint(run / "checkpoint.pt")
    assert errors.strip() in (run / "log.txt").read_text()
    script.module.main(["--resume", str(run)])
    assert_same_run(run, expected)
