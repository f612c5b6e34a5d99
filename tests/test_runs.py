"""A run's directory: checkpoints that do not lie, locks, saved arguments, and full disks."""

from support.cli import Parser, number

import argparse
import contextlib
import copy
import errno
import itertools
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from nas201 import sources
from run_settings import SETTINGS
from support import cli, distributed, files, provenance, resume_args, runs, weights
from support.files import UserError, atomic_write, write_json

from helpers import (
    RUN_DATA,
    RUN_INPUTS,
    assert_same,
    checkpoint_bytes,
    load_checkpoint,
    new_run,
    read_history,
    resumed_run,
)


class Trained:
    """What `Run.restore` restores."""

    def __init__(self, content):
        self.content = content

    def state_dict(self):
        return dict(self.content)

    def load_state_dict(self, content):
        self.content = content


def resume_whole(path, **args):
    """A resumed run whose files are those of its checkpoint."""
    run = resumed_run(path, **args)
    run.restore(Trained(state(0)))
    return run


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "network": {"weight": torch.rand(2, 3, generator=generator)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "generators": {"train": generator.get_state()},
    }


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def run(tmp_path):
    run = new_run(tmp_path)
    yield run
    run.close()


# ---- checkpoints


def test_command_that_continues_a_run_names_script_and_path(tmp_path, monkeypatch):
    """A shell that reads it finds script and path, in the project and elsewhere."""
    python, path = tmp_path / "bin dir/python", "a 'b' $(touch c)/run"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf \'%s\\n\' "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    project = provenance.PROJECT
    for folder in (project, tmp_path):
        monkeypatch.chdir(folder)
        for prog in ("train.py", "python -m nas201.train_search"):
            settings = dict(env={"PATH": f"{python.parent}:{os.environ['PATH']}"}, capture_output=True, text=True)
            done = subprocess.run(["sh", "-c", provenance.shell_command(prog, "--resume", path)], **settings)
            modules, *words = done.stdout.splitlines()
            assert done.stderr == ""
            assert words[-2:] == ["--resume", path]
            if prog == "train.py":
                assert words[0].endswith("train.py")
                assert Path(words[0]).resolve() == project / "train.py"
            else:
                assert words[:2] == ["-m", "nas201.train_search"]
                assert Path(modules).resolve() == project
    assert list(tmp_path.iterdir()) == [python.parent]


def test_checkpoint_round_trip_keeps_the_one_before(run):
    states = [state(seed) for seed in range(3)]
    for completed, content in enumerate(states):
        if completed:
            run.record(completed, {"generation": completed})
        run.save_checkpoint(completed, content)
    for name, completed in (("checkpoint.pt", 2), ("checkpoint.prev.pt", 1)):
        loaded = load_checkpoint(run.path / name)
        assert loaded.pop("bound") == {
            "args": {},
            "threads": torch.get_num_threads(),
            "kind": "search",
            "data": RUN_DATA,
        }
        assert loaded.pop("history") == [{"generation": i + 1} for i in range(completed)]
        assert_same(loaded, {**states[completed], "completed": completed})
    names = [".lock", "args.json", "checkpoint.prev.pt", "checkpoint.pt", "history.jsonl", "runs"]
    assert sorted(path.name for path in run.path.iterdir()) == names


def test_checkpoints_are_copied_on_a_file_system_without_links(run, monkeypatch):
    monkeypatch.setattr(os, "link", no_space)
    for seed in range(3):
        before = (run.path / "checkpoint.pt").read_bytes() if seed else None
        run.save_checkpoint(0, state(seed))
    assert (run.path / "checkpoint.prev.pt").read_bytes() == before
    assert load_checkpoint(run.path / "checkpoint.prev.pt")["completed"] == 0


def test_missing_checkpoint_is_refused_with_what_to_do(run):
    path = run.path / "checkpoint.pt"
    with pytest.raises(UserError, match=f"{path}: No such file"):
        load_checkpoint(path)
    run.save_checkpoint(0, state(0))
    run.save_checkpoint(1, state(1))
    path.unlink()
    with pytest.raises(UserError, match="checkpoint.prev.pt"):
        load_checkpoint(path)


# ---- directories, locks, histories


def test_runs_of_the_same_second_get_a_directory_each(tmp_path):
    opened = [new_run(tmp_path / "new/parent") for _ in range(3)]
    assert [run.path.name for run in opened] == ["search-1", "search-1-2", "search-1-3"]
    for run in opened:
        run.close()


def test_lock_keeps_a_second_process_out(run):
    run.save_checkpoint(0, state(0))
    with pytest.raises(UserError, match="search-1: in use"):
        resumed_run(run.path)
    run.close()
    resumed_run(run.path).close()


def test_name_that_was_given_is_kept(tmp_path):
    args = argparse.Namespace()

    def create():
        return runs.Run.create(tmp_path, "mine", args, "test", SETTINGS, inputs={}, new_name=False)

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
    with contextlib.suppress(UserError), contextlib.closing(resumed_run(run.path)) as resumed:
        resumed.log("line")
        resumed.record(1, {"generation": 1})
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(tmp_path, kind):
    path = tmp_path / "table.csv"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for read in (files.read_bytes, files.read_json, weights.load_torch, sources.unpacked):
        with pytest.raises(UserError, match="table.csv.*not a regular file"):
            read(path)


def test_failed_resume_leaves_no_lock(run):
    run.close()
    with pytest.raises(UserError) as failure:  # holds the frames, and what they refer to
        resumed_run(run.path)
    run.save_checkpoint(0, state(0))
    resumed_run(run.path).close()
    assert "first checkpoint" in str(failure.value)


@pytest.mark.parametrize("left", ["two rows too many", "fewer", "empty", "none", "of another run"])
def test_history_of_a_resumed_run_is_that_of_its_checkpoint(run, left):
    """Also TensorBoard's; the log goes on in a line of its own."""
    rows = [{"generation": g, "loss": 1 / g} for g in range(1, 5)]
    for row in rows[:2]:
        run.record(row["generation"], row)
    run.log("a line")
    run.save_checkpoint(2, state(0))
    run.record(3, rows[2])
    run.close()
    history, log = run.path / "history.jsonl", run.path / "log.txt"
    lines = history.read_text()
    if left == "none":
        history.unlink()
    else:
        cut_off = '{"generation": 4, "lo'  # a crash
        lefts = {"two rows too many": lines + cut_off, "fewer": lines[:10], "empty": ""}
        history.write_text(lefts.get(left, '{"generation": 1, "loss": 7}\n' * 2))
    log.write_text(log.read_text() + "2026-11-28 12:00:00 a line that a crash cut o")
    events = {path.name for path in (run.path / "runs").iterdir()}
    resumed = resume_whole(run.path)
    assert resumed.completed == 2
    assert resumed.rows == read_history(run.path) == rows[:2]
    assert [line[20:] for line in log.read_text().splitlines()][-3:] == [
        "a line",
        "a line that a crash cut o",
        "continues after generation 2",
    ]
    resumed.record(3, rows[3])
    resumed.save_checkpoint(3, state(0))
    resumed.close()
    assert read_history(run.path) == [*rows[:2], rows[3]]
    assert not events & {path.name for path in (run.path / "runs").iterdir()}
    assert curve(run.path, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]


def curve(run_dir, name):
    """The (step, value) that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "runs"))
    board.Reload()
    return [(event.step, pytest.approx(event.value)) for event in board.Scalars(name)]


@pytest.mark.parametrize("rows", [[], [{"generation": 2}], [{"generation": 1, "loss": "x"}], {}, 3, [[]], "x"])
def test_forged_history_in_a_checkpoint_is_refused(run, rows):
    content = {**state(0), "completed": 1, "bound": "{}", "history": json.dumps(rows)}
    (run.path / "checkpoint.pt").write_bytes(checkpoint_bytes(content))
    with pytest.raises(UserError, match=rf"{run.path}/checkpoint\.pt: "):
        load_checkpoint(run.path / "checkpoint.pt")


def test_history_that_is_being_written_is_read(run):
    """Readers of a running run get the finished rows, and are not told to edit its file."""
    path, line = run.path / "history.jsonl", json.dumps({"generation": 2, "best_genotype": "é"}).encode()
    for length in range(len(line)):
        path.write_bytes(b'{"generation": 1}\n' + line[:length])
        assert read_history(run.path) == [{"generation": 1}]
    path.write_bytes(b'{"generation": 1}\n{"gen\n{"generation": 3}\n')
    with pytest.raises(UserError, match="line 2: .*--resume"):
        read_history(run.path)


# ---- what crashes leave


def test_temporary_files_of_killed_processes_go_when_a_run_is_opened(run):
    """A process with the same number is not in their way."""
    run.save_checkpoint(0, state(0))
    mine = run.path / "notes.tmp"
    mine.write_text("mine")
    for folder in (run.path, run.path / "weights", run.path / "population"):
        folder.mkdir(exist_ok=True)
        (folder / "weights.pt.tmp123").write_text("half")
    run.close()
    resumed = resume_whole(run.path)
    assert [path for path in run.path.rglob("*") if ".tmp" in path.name] == [mine]
    os.link(run.path / "checkpoint.pt", run.path / f"checkpoint.prev.pt.tmp{os.getpid()}")
    for seed in range(3):
        resumed.save_checkpoint(0, state(seed))
        assert [path for path in run.path.rglob("*") if ".tmp" in path.name] == [mine]
    resumed.close()


def test_checkpoint_that_is_its_own_predecessor_is_replaced(run):
    """After a kill between the two names: then a rename does nothing, and the link stays."""
    run.save_checkpoint(0, state(0))
    os.link(run.path / "checkpoint.pt", run.path / "checkpoint.prev.pt")
    before = (run.path / "checkpoint.pt").read_bytes()
    for seed in (1, 2):
        run.save_checkpoint(0, state(seed))
        assert not list(run.path.glob("*.tmp*"))
    assert (run.path / "checkpoint.prev.pt").read_bytes() != before


def forked(call):
    """The number of a process that makes a call, and has to be killed."""
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(1)
    return child


def test_forked_processes_do_not_hold_the_lock(run):
    """Such as those that read images, which live on for seconds after kill -9."""
    run.save_checkpoint(0, state(0))
    reader, writer = os.pipe()

    def live_on():
        os.write(writer, b"x")
        signal.pause()

    child = forked(live_on)
    os.read(reader, 1)  # by now the child has closed its copy of the lock
    run._lock.close()  # what the kernel does to a process that is killed
    try:
        resumed_run(run.path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


# ---- runs do not mix


def begun_anew(folder):
    args = argparse.Namespace()
    return runs.Run.create(folder, "search-1", args, "prog.py", SETTINGS, inputs=RUN_INPUTS, new_name=False)


def test_run_begun_anew_does_not_continue_the_files_of_the_earlier_one(run, tmp_path):
    for g in (1, 2):
        run.record(g, {"generation": g})
        run.save_weights(nn.Linear(1, 1), "weights.pt", {})
        run.save_checkpoint(g, state(g))
    (run.path / "population").mkdir()
    (run.path / "population/002.npz").write_text("old")
    (run.path / "eval-1").mkdir()
    run.log("old")
    run.close()
    (run.path / "checkpoint.pt").rename(tmp_path / "lost")
    with pytest.raises(UserError, match=r" mv \S*/checkpoint\.prev\.pt \S*/checkpoint\.pt\b") as refused:
        begun_anew(tmp_path)
    assert "--resume" in str(refused.value)
    (run.path / "checkpoint.prev.pt").unlink()
    new = begun_anew(tmp_path)
    assert {path.name for path in new.path.iterdir()} == {".lock", "args.json", "eval-1", "log.txt", "old-1"}
    moved = {path.name for path in (new.path / "old-1").iterdir()}
    assert moved == {"args.json", "history.jsonl", "log.txt", "population", "runs", "weights"}
    assert "old-1" in (new.path / "log.txt").read_text()
    assert read_history(new.path) == []
    new.record(1, {"generation": 1})
    new.close()
    begun_anew(tmp_path).close()  # which ended before its first checkpoint too
    assert [row["generation"] for row in read_history(run.path / "old-2")] == [1]


def test_run_that_only_began_begins_again_in_place(run, tmp_path):
    run.log("first")
    run.close()
    begun_anew(tmp_path).close()
    assert {path.name for path in run.path.iterdir()} == {".lock", "args.json", "log.txt"}
    (run.path / "args.json").unlink()
    (run.path / "log.txt").unlink()
    (run.path / "old-1").mkdir()  # killed while it moved what there was
    begun_anew(tmp_path).close()


# ---- what a run is bound to


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda data: data["classes"].insert(1, "asp"), "data/classes/1 is 'asp' now, but 'bee' in"),
        (lambda data: data["classes"].pop(), "data/classes/1 is None now, but 'bee' in"),
        (lambda data: data["images"].update(valid=3), "data/images/valid is 3 now, but 4 in"),
        (lambda data: data["source"].update(valid="40"), "data/source/valid is '40' now, but '3f' in"),
    ],
)
def test_other_data_are_refused_with_the_first_difference(run, change, says):
    run.save_checkpoint(0, state(0))
    run.close()
    other = copy.deepcopy(RUN_DATA)
    change(other)
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(UserError, match=f"{run.path}: {says}"):
        resumed_run(run.path, found=other)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_fingerprint_holds_all_arguments_except_free_ones(tmp_path):
    args = dict(bn="batch", data="here", device="cpu", dir=".")
    run = new_run(tmp_path, **args)
    run.save_checkpoint(0, state(0))
    run.close()
    (run.path / "history.jsonl").touch()
    assert json.loads((run.path / "args.json").read_text())["args"] == {**args, "data": os.path.abspath("here")}
    resumed_run(run.path, bn="batch", data="there", device="cuda", dir=None, new=3).close()
    with pytest.raises(UserError, match="args/bn is 'running' now, but 'batch' in"):
        resumed_run(run.path, bn="running")


def test_commit_of_a_parent_repository_is_not_recorded(tmp_path, monkeypatch):
    for command in ("init -q", "-c user.name=a -c user.email=b commit -q --allow-empty -m c"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    code = tmp_path / "code"
    code.mkdir()
    monkeypatch.setattr(provenance, "PROJECT", code)
    assert provenance.git_revision() is None
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    assert len(provenance.git_revision()) == 12


def test_log_and_args_have_what_was_written(run, capsys):
    run.log("first")
    run.log("second")
    assert capsys.readouterr().out == "first\nsecond\n"
    assert [line[20:] for line in (run.path / "log.txt").read_text().splitlines()] == ["first", "second"]
    saved = json.loads((run.path / "args.json").read_text())
    assert saved["args"] == {}
    assert saved["kind"] == "search"
    assert saved["prog"] == "prog.py"
    assert saved["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(saved["versions"]["torch"])


def test_only_rank_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "same_everywhere", lambda text: None)
    run = new_run(tmp_path)
    run.log("text")
    run.record(1, {"a": 1})
    run.save_checkpoint(1, state(1))
    run.save_weights(nn.Linear(2, 2), "weights.pt", {})
    run.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# ---- arguments of a resumed run


def parser(prog="prog.py", **defaults):
    parser = Parser(prog=prog)
    parser.add_argument("--resume")
    parser.add_argument("--epochs", type=number(int, 1), default=5)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--cutout", action="store_true")
    parser.add_argument("--bn", choices=["batch", "running"], default="batch")
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--data", default=".")
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--report_freq", type=int, default=50)
    parser.set_defaults(**defaults)
    return parser


def parse(parser, argv):
    return resume_args.parse(parser, argv, SETTINGS)


@pytest.fixture
def saved(tmp_path):
    """A run directory started with --epochs 7 --cutout --no-fold."""
    args = parser().parse_args(["--epochs", "7", "--cutout", "--no-fold"])
    run = new_run(tmp_path, **vars(args))
    run.save_checkpoint(0, state(0))
    run.close()
    return str(run.path)


def test_resumed_run_has_the_saved_arguments(saved):
    for defaults in ({}, {"epochs": 9, "dataset": "digits"}):  # also when the defaults have changed since
        args = parse(parser(**defaults), ["--resume", saved])
        assert (args.epochs, args.cutout, args.dataset, args.workers, args.fold) == (7, True, "cifar10", 4, False)
        assert args.data == os.getcwd()


def test_arguments_that_change_no_result_can_be_changed(saved):
    given = ["--device", "cpu", "--workers", "0", "--report_freq", "3", "--epochs", "7"]
    args = parse(parser(), ["--resume", saved, *given])
    assert (args.device, args.workers, args.report_freq, args.epochs) == ("cpu", 0, 3, 7)


def test_other_arguments_are_refused(saved):
    with pytest.raises(UserError, match="--epochs 5: .*search-1 was started with 7"):
        parse(parser(), ["--resume", saved, "--epochs", "5"])  # the default, but given
    with pytest.raises(UserError, match="--dataset digits: .* with cifar10"):
        parse(parser(), ["--resume", saved, "--dataset", "digits"])
    with pytest.raises(UserError, match="other.py"):
        parse(parser("other.py"), ["--resume", saved])


def test_new_flags_get_defaults_and_unknown_ones_are_refused(saved):
    newer = parser()
    newer.add_argument("--flag", default=3)
    newer.add_argument("--workers2", dest="workers", type=int)
    assert parse(newer, ["--resume", saved]).flag == 3
    with pytest.raises(UserError, match="--flag 4: .* was started with 3"):
        parse(newer, ["--resume", saved, "--flag", "4"])
    edit_args(saved, moment=0.9)
    with pytest.raises(UserError, match="--moment"):
        parse(newer, ["--resume", saved])


def edit_args(run, **values):
    content = json.loads(open(f"{run}/args.json").read())
    write_json(f"{run}/args.json", {**content, "args": {**content["args"], **values}})


@pytest.mark.parametrize(
    "values, says",
    [
        ({"bn": "junk"}, "--bn: .*'junk'"),
        ({"bn": "running"}, "args/bn is 'running' now, but 'batch' in"),
        ({"bn": ["batch"]}, "--bn "),
        ({"bn": None, "epochs": None}, "args/epochs is 5 now, but 7 in"),
        ({"epochs": 0}, "--epochs: 0 "),
        ({"epochs": "many"}, "--epochs: 'many'"),
        ({"epochs": True}, "--epochs: "),
        ({"epochs": False}, "--no-epochs"),
        ({"cutout": 1}, "--cutout: .*'1'"),
        ({"cutout": False}, "args/cutout is False now, but True in"),
        ({"fold": True}, "args/fold is True now, but False in"),
        ({"workers": "x"}, "--workers: .*'x'"),
        ({"help": True}, "--help"),
    ],
)
def test_saved_arguments_pass_the_parser_and_are_those_of_the_checkpoint(saved, values, says):
    edit_args(saved, **values)
    with pytest.raises(UserError, match=says) as refused:
        parse(parser(), ["--resume", saved])
    assert str(refused.value).startswith(saved)


def test_resumed_run_computes_with_as_many_threads(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    run = new_run(tmp_path, **vars(parser().parse_args([])))
    run.save_checkpoint(0, state(0))
    run.close()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    parse(parser(), ["--resume", str(run.path)])
    assert threads == [3]
    content = json.loads((run.path / "args.json").read_text())
    for wrong in (2, "3", 0, [3]):
        write_json(run.path / "args.json", {**content, "threads": wrong})
        with pytest.raises(UserError, match="threads"):
            parse(parser(), ["--resume", str(run.path)])
    assert threads == [3]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"prog": "prog.py"}', '{"prog": "prog.py", "args": []}', "\xff"])
def test_damaged_args_are_refused(saved, content):
    with open(f"{saved}/args.json", "w", encoding="latin-1") as file:
        file.write(content)
    with pytest.raises(UserError, match="args.json"):
        parse(parser(), ["--resume", saved])


# ---- weights and their side file


def test_weights_carry_a_checksum(run):
    network = nn.Linear(3, 2)
    run.save_weights(network, "weights.pt", {"layers": 4})
    path = run.path / "weights" / "weights.pt"
    assert weights.read_info(path)["layers"] == 4
    copy = nn.Linear(3, 2)
    weights.load_weights(copy, path)
    assert torch.equal(copy.weight, network.weight)
    assert torch.equal(copy.bias, network.bias)

    content = path.read_bytes()
    for damaged in (content[:-1], content + b"x", content.replace(b"bias", b"bios", 1), b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"weights\.pt .*weights\.json"):
            weights.load_weights(copy, path)
    weights.info_path(path).unlink()
    path.write_bytes(content)
    weights.load_weights(copy, path)  # published files have no side file


def test_weights_are_described_at_every_moment(tmp_path, monkeypatch):
    """Between the two renames, and after a kill there, the side file belongs to the weights."""
    path, replace = tmp_path / "weights.pt", os.replace
    networks = [nn.Linear(2, 2) for _ in range(4)]
    weights.save_weights(networks[0], path, {"epoch": 0})

    def described():
        epoch = weights.read_info(path)["epoch"]
        weights.load_weights(copy := nn.Linear(2, 2), path)
        assert torch.equal(copy.weight, networks[epoch].weight)
        return epoch

    def killed(source, target):
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)
        assert described() == 0

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        for epoch in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                weights.save_weights(networks[epoch], path, {"epoch": epoch})
            assert described() == 0
    weights.save_weights(networks[3], path, {"epoch": 3})
    assert described() == 3


def test_weights_can_be_read_while_they_are_written(tmp_path):
    path = tmp_path / "weights.pt"
    weights.save_weights(nn.Linear(2, 2), path, {"epoch": 0})

    def write():
        for epoch in itertools.count(1):
            weights.save_weights(nn.Linear(2, 2), path, {"epoch": epoch})

    child = forked(write)
    try:
        epochs = []
        while len(set(epochs)) < 20:
            epochs.append(weights.read_info(path)["epoch"])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert epochs == sorted(epochs)


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
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_leaves_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_last_checkpoint(run, monkeypatch):
    run.save_checkpoint(0, state(1))
    network = nn.Linear(2, 2)
    run.save_weights(network, "weights.pt", {})
    kept = {path: path.read_bytes() for path in (run.path / "weights").iterdir()}
    kept[run.path / "checkpoint.pt"] = (run.path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="cannot write .*checkpoint.*pt: No space left"):
        run.save_checkpoint(0, state(2))
    with pytest.raises(UserError, match="cannot write .*weights.json: No space left"):
        run.save_weights(nn.Linear(2, 2), "weights.pt", {})
    assert len(kept) == 3
    assert {path: path.read_bytes() for path in kept} == kept
    assert not list(run.path.rglob("*.tmp*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["log.txt", "history.jsonl"])
def test_full_disk_while_appending_is_one_line(run, name, monkeypatch):
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
