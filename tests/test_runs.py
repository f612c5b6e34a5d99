"""A run's directory: checkpoints that do not lie, locks, arguments of a resumed run, and full disks."""

import argparse
import contextlib
import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from nas201 import sources
from support import cli, files, runs, weights
from support.cli import Parser, number
from support.files import UserError, atomic_write, write_json


def make_run(folder, name="search-1", **args):
    run = runs.Run.create(folder, name, argparse.Namespace(**args), "prog.py", kind="search")
    return run


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "network": {"weight": torch.rand(2, 3, generator=generator)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "generators": {"train": generator.get_state()},
    }


def assert_same(a, b):
    """Equal nested dicts and lists, tensors by their bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path)
    yield run
    run.close()


# ---- checkpoints


def test_the_command_that_continues_a_run(tmp_path, monkeypatch):
    """Read by a shell, in the project and elsewhere, it names the right script and the whole path."""
    python, path = tmp_path / "bin dir/python", "a 'b' $(touch c)/run"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf \'%s\\n\' "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    project = Path(runs.__file__).resolve().parents[1]
    for folder in (project, tmp_path):
        monkeypatch.chdir(folder)
        for prog in ("train.py", "python -m nas201.train_search"):
            settings = dict(env={"PATH": f"{python.parent}:{os.environ['PATH']}"}, capture_output=True, text=True)
            done = subprocess.run(["sh", "-c", runs.continue_command(prog, path)], **settings)
            modules, *words = done.stdout.splitlines()
            assert words[-2:] == ["--resume", path] and not done.stderr
            if prog == "train.py":
                assert words[0].endswith("train.py") and Path(words[0]).resolve() == project / "train.py"
            else:
                assert words[:2] == ["-m", "nas201.train_search"] and Path(modules).resolve() == project
    assert list(tmp_path.iterdir()) == [python.parent]


def test_checkpoint_round_trip_keeps_the_one_before(run):
    states = [state(seed) for seed in range(3)]
    for completed, content in enumerate(states):
        run.save_checkpoint(completed, content)
    assert_same(runs.load_checkpoint(run.path / "checkpoint.pt"), {**states[2], "completed": 2})
    assert_same(runs.load_checkpoint(run.path / "checkpoint.prev.pt"), {**states[1], "completed": 1})
    assert sorted(path.name for path in run.path.iterdir()) == [
        ".lock",
        "args.json",
        "checkpoint.prev.pt",
        "checkpoint.pt",
    ]


def test_checkpoints_on_a_file_system_without_links(run, monkeypatch):
    monkeypatch.setattr(os, "link", no_space)
    for completed in range(3):
        run.save_checkpoint(completed, state(completed))
    assert runs.load_checkpoint(run.path / "checkpoint.prev.pt")["completed"] == 1


def test_missing_checkpoint(run):
    path = run.path / "checkpoint.pt"
    with pytest.raises(UserError, match="No such file.*ended before its first checkpoint"):
        runs.load_checkpoint(path)
    run.save_checkpoint(0, state(0))
    run.save_checkpoint(1, state(1))
    path.unlink()
    with pytest.raises(UserError, match="checkpoint.prev.pt"):
        runs.load_checkpoint(path)


# ---- directories, locks, histories


def test_runs_of_the_same_second_get_a_directory_each(tmp_path):
    opened = [make_run(tmp_path / "new/parent") for _ in range(3)]
    assert [run.path.name for run in opened] == ["search-1", "search-1-2", "search-1-3"]
    for run in opened:
        run.close()


def test_lock_keeps_a_second_process_out(run):
    run.save_checkpoint(0, state(0))
    with pytest.raises(UserError, match="search-1 is in use by another process"):
        runs.Run.resume(run.path)
    run.close()
    runs.Run.resume(run.path).close()


def test_a_name_that_was_given_is_kept(tmp_path):
    args = argparse.Namespace()

    def create():
        return runs.Run.create(tmp_path, "mine", args, "test", new_name=False)

    first = create()
    with pytest.raises(UserError, match="in use"):
        create()
    first.close()
    again = create()  # it had no checkpoint
    again.save_checkpoint(0, state(0))
    again.close()
    with pytest.raises(UserError, match="--resume"):
        create()
    (tmp_path / "mine" / "args.json").unlink()
    (tmp_path / "mine" / "checkpoint.pt").rename(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(UserError, match="other files"):
        create()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", [".lock", "log.txt", "history.jsonl"])
def test_nothing_is_written_through_a_link(run, tmp_path, name):
    run.save_checkpoint(0, state(0))
    run.close()
    (tmp_path / "precious").write_text("mine")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "precious")
    with contextlib.suppress(UserError), contextlib.closing(runs.Run.resume(run.path)) as resumed:
        resumed.log("line")
        resumed.record(1, {"generation": 1})
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    path = tmp_path / "table.csv"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for read in (files.read_bytes, files.read_json, weights.load_torch, sources.unpacked):
        with pytest.raises(UserError, match="table.csv.*not a regular file"):
            read(path)


def test_a_failed_resume_leaves_no_lock(run):
    run.close()
    with pytest.raises(UserError) as failure:  # holds the frames, and what they refer to
        runs.Run.resume(run.path)
    run.save_checkpoint(0, state(0))
    runs.Run.resume(run.path).close()
    assert "first checkpoint" in str(failure.value)


def test_history_is_cut_back_to_the_checkpoint(run):
    lines = [{"generation": g, "loss": 1 / (g + 1)} for g in range(4)]
    for g, line in enumerate(lines[:2]):
        run.record(g, line)
    run.save_checkpoint(2, state(0))
    run.record(2, lines[2])
    with open(run.path / "history.jsonl", "a") as file:
        file.write('{"generation": 3, "lo')  # a crash
    run.close()
    resumed = runs.Run.resume(run.path)
    assert resumed.completed == 2 and runs.read_history(run.path) == lines[:2]
    resumed.record(2, lines[3])
    assert runs.read_history(run.path) == [*lines[:2], lines[3]]
    resumed.close()
    (run.path / "history.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="history.jsonl has 1 whole lines, the checkpoint 2"):
        runs.Run.resume(run.path)


def test_log_and_args(run, capsys):
    run.log("first")
    run.log("second")
    assert capsys.readouterr().out == "first\nsecond\n"
    assert [line[20:] for line in (run.path / "log.txt").read_text().splitlines()] == ["first", "second"]
    saved = json.loads((run.path / "args.json").read_text())
    assert saved["args"] == {} and saved["kind"] == "search" and saved["prog"] == "prog.py"
    assert saved["threads"] == torch.get_num_threads() and torch.__version__.startswith(saved["versions"]["torch"])


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = make_run(tmp_path)
    run.log("text")
    run.record(1, {"a": 1})
    run.save_checkpoint(1, state(1))
    run.save_weights(nn.Linear(2, 2), "weights.pt", {})
    run.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# ---- arguments of a resumed run


def parser(prog="prog.py", **defaults):
    parser = Parser(prog=prog)
    parser.add_argument("--resume")
    parser.add_argument("--epochs", type=number(int, 1), default=5)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--cutout", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--report_freq", type=int, default=50)
    parser.set_defaults(**defaults)
    return parser


@pytest.fixture
def saved(tmp_path):
    """A run directory started with --epochs 7 --cutout."""
    args = parser().parse_args(["--epochs", "7", "--cutout"])
    run = make_run(tmp_path, **vars(args))
    run.close()
    return str(run.path)


def test_a_resumed_run_has_the_saved_arguments(saved):
    for defaults in ({}, {"epochs": 9, "dataset": "digits"}):  # also when the defaults have changed since
        args = runs.parse(parser(**defaults), ["--resume", saved])
        assert (args.epochs, args.cutout, args.dataset, args.workers) == (7, True, "cifar10", 4)


def test_arguments_that_change_no_result_are_free(saved):
    given = ["--device", "cpu", "--workers", "0", "--report_freq", "3", "--epochs", "7"]
    args = runs.parse(parser(), ["--resume", saved, *given])
    assert (args.device, args.workers, args.report_freq, args.epochs) == ("cpu", 0, 3, 7)


def test_other_arguments_are_refused(saved):
    with pytest.raises(UserError, match="--epochs 5: .*search-1 was started with 7"):
        runs.parse(parser(), ["--resume", saved, "--epochs", "5"])  # the default, but given
    with pytest.raises(UserError, match="--dataset digits: .* with cifar10"):
        runs.parse(parser(), ["--resume", saved, "--dataset", "digits"])
    with pytest.raises(UserError, match="holds no run of other.py"):
        runs.parse(parser("other.py"), ["--resume", saved])
    newer = parser()
    newer.add_argument("--flag")
    with pytest.raises(UserError, match="another version of the program, which differs in flag"):
        runs.parse(newer, ["--resume", saved])


def test_a_resumed_run_computes_with_as_many_threads(saved, monkeypatch):
    about = json.loads(open(f"{saved}/args.json").read())
    write_json(f"{saved}/args.json", {**about, "threads": 3})
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    runs.parse(parser(), ["--resume", saved])
    assert threads == [3]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"prog": "prog.py"}', '{"prog": "prog.py", "args": []}', "\xff"])
def test_damaged_args(saved, content):
    with open(f"{saved}/args.json", "w", encoding="latin-1") as file:
        file.write(content)
    with pytest.raises(UserError, match="args.json"):
        runs.parse(parser(), ["--resume", saved])


# ---- weights and their side file


def test_weights_carry_a_checksum(run):
    network = nn.Linear(3, 2)
    run.save_weights(network, "weights.pt", {"layers": 4})
    path = run.path / "weights" / "weights.pt"
    assert weights.read_info(path)["layers"] == 4
    copy = nn.Linear(3, 2)
    weights.load_weights(copy, path)
    assert torch.equal(copy.weight, network.weight) and torch.equal(copy.bias, network.bias)

    content = path.read_bytes()
    for damaged in (content[:-1], content + b"x", content.replace(b"bias", b"bios", 1), b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"weights\.pt is damaged or was replaced.*weights\.json"):
            weights.load_weights(copy, path)
    weights.info_path(path).unlink()
    path.write_bytes(content)
    weights.load_weights(copy, path)  # published files have no side file


# ---- a full disk


@pytest.mark.parametrize("how", ["write", "fsync"])
def test_atomic_write_leaves_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch, how):
    path = tmp_path / "file"
    path.write_text("old")

    if how == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="cannot write .*file: No space left on device"), atomic_write(path) as file:
        file.write(b"new")
        if how == "write":
            no_space()
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_write_leaves_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_last_checkpoint(run, monkeypatch):
    run.save_checkpoint(1, state(1))
    network = nn.Linear(2, 2)
    run.save_weights(network, "weights.pt", {})
    weights = (run.path / "weights/weights.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="cannot write .*checkpoint.pt: No space left"):
        run.save_checkpoint(2, state(2))
    with pytest.raises(UserError, match="cannot write .*weights.pt: No space left"):
        run.save_weights(nn.Linear(2, 2), "weights.pt", {})
    assert runs.load_checkpoint(run.path / "checkpoint.pt")["completed"] == 1
    assert (run.path / "weights/weights.pt").read_bytes() == weights
    assert not list(run.path.rglob("*.tmp*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["log.txt", "history.jsonl"])
def test_a_full_disk_while_appending_is_one_line(run, name, monkeypatch):
    monkeypatch.setattr(files, "open_regular", lambda path, *args, **kwargs: open("/dev/full", *args, **kwargs))
    with pytest.raises(UserError, match=f"cannot write .*{name}: No space left on device"):
        run.log("text") if name == "log.txt" else run.record(1, {"a": 1})


def test_any_other_failure_of_the_system_is_one_line(capsys):
    @cli.command
    def main(argv):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "some/file")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: some/file: Read-only file system\n"
