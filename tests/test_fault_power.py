"""Power cuts, tried and counted: whatever a disk keeps of a run, it continues or begins anew.

A file system promises little: a file's content is safe after the file was synced, its name after
its folder was. What was not synced can be there, be missing, or be there in part. The tests record
a run's writes, syncs and renames, and make from them what a disk may hold at each moment. They try
a few such states; `make test-faults` tries 200 (EVNAS_FAULTS=full) and prints what came of them.
"""

import importlib
import os
import random
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from support import files, runs, weights

import faults
from faults import ARGUMENTS, COUNTS, FULL, SCRIPTS, few, outcome
from helpers import AT_ONCE, STOP, assert_same_run, load_checkpoint, read_history, stop_at

counted = faults.counted
CHANGES = ("fsync", "replace", "rename", "unlink", "link", "mkdir")
KEPT = (
    "what was synced alone",
    "all names, of the contents what was synced",
    "all names, half of what was not synced",
    "each name and each content by chance",
)


class Disk:
    """Records, while it is a context, what a disk may hold of `root` if the power fails.

    `states` are (changes until then, one of KEPT, {path: content, None for a folder}), equal ones once for each of
    `saved`: (changes until then, completed) after each checkpoint.
    """

    def __init__(self, root):
        self.root, self.states, self.saved, self.changes = root, [], [], 0
        self.descriptors = {}  # of every file seen, by inode, so that no inode gets the number of an earlier one
        self.synced = {}  # inode: content
        self.names = {root: {}}  # folder: {name: inode, None for a folder}, as of its last sync
        self.seen, self.luck = set(), random.Random(7)

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in CHANGES:
            self.patch.setattr(os, name, self.watched(getattr(os, name), name))
        return self

    def __exit__(self, *error):
        self.record()
        self.patch.undo()
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def watched(self, change, name):
        def watch(*args, **kwargs):
            path = Path(os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else os.path.abspath(args[0]))
            if self.root not in (path, *path.parents):
                return change(*args, **kwargs)
            self.record()
            self.changes += 1
            if name != "fsync":
                return change(*args, **kwargs)
            status = os.fstat(args[0])
            if stat.S_ISDIR(status.st_mode):
                self.names[path] = self.listing(path)
            else:
                self.synced[status.st_ino] = self.content(status.st_ino, path)

        return watch

    def listing(self, folder):
        """What a folder holds now: {name: inode, None for a folder}."""
        return {e.name: None if e.is_dir() else self.keep(e.inode(), e.path) for e in os.scandir(folder)}

    def keep(self, inode, path):
        if inode not in self.descriptors:
            self.descriptors[inode] = os.open(path, os.O_RDONLY)
        return inode

    def content(self, inode, path=None):
        """What has been written to a file until now."""
        descriptor = self.descriptors[self.keep(inode, path)]
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return self.synced[inode] if self.synced.get(inode) == content else content  # the same object: less memory

    def record(self):
        for how in KEPT:
            state = dict(self.kept(self.root, how))
            files = tuple(sorted((str(path), content or b"") for path, content in state.items()))
            key = len(self.saved), hash(files)
            if key not in self.seen:
                self.seen.add(key)
                self.states.append((self.changes, how, state))

    def due(self, changes):
        """The generations or epochs that a checkpoint must have after so many changes, or None."""
        return max((completed for until, completed in self.saved if until <= changes), default=None)

    def kept(self, folder, how):
        """Yield (path, content, None for a folder) of what a disk may hold below `folder`."""
        synced, now = self.names.get(folder, {}), self.listing(folder) if folder.exists() else {}
        by_chance = how == KEPT[3]
        for name in sorted({*synced, *now}):
            names = synced if how == KEPT[0] or (by_chance and self.luck.random() < 0.5) else now
            if name not in names:
                continue
            path, inode = folder / name, names[name]
            yield path.relative_to(self.root), None if inode is None else self.kept_content(inode, how, by_chance)
            if inode is None:
                yield from self.kept(path, how)

    def kept_content(self, inode, how, by_chance):
        synced = self.synced.get(inode, b"")
        if how == KEPT[2] or (by_chance and self.luck.random() < 0.5):
            content = self.content(inode)
            start = len(synced) if content.startswith(synced) else 0
            return content[: start + (len(content) - start) // 2] if content != synced else synced
        return synced


def write_state(state, folder):
    """Write what a disk holds below `folder`."""
    folder.mkdir()
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)


@pytest.fixture(scope="module", autouse=True)
def drawings(request):
    request.getfixturevalue("quick_reports")


class Recorded(NamedTuple):
    """A run that was interrupted in its second generation or epoch, then killed, and continued."""

    main: Callable
    run: Path  # the directory of a run to compare with
    argv: list[str]  # the command line of a new run, without its parent directory
    disk: Disk


@pytest.fixture(scope="module", params=SCRIPTS)
def recorded(request, tmp_path_factory):
    script, root = request.param, tmp_path_factory.mktemp("recorded")
    main = importlib.import_module(script).main
    unit = "generation" if script == "train_search" else "epoch"
    argv = [*ARGUMENTS[script], *(["--run_name", "run"] if script == "train_search" else [])]
    (root / "parent").mkdir()
    with pytest.MonkeyPatch.context() as patch, Disk(root / "parent") as disk:
        save = runs.Run.save_checkpoint

        def saving(run, completed, state):
            save(run, completed, state)
            disk.saved.append((disk.changes, completed))

        patch.setattr(runs.Run, "save_checkpoint", saving)
        stop_at(f"{unit} 2/3: batch 1", STOP, main, [*argv, "--dir", disk.root])
        (run,) = disk.root.iterdir()
        stop_at("after checkpoint 2", AT_ONCE, main, ["--resume", run])
        main(["--resume", str(run)])
    if FULL:  # test_resume.py has that it makes no difference
        main([*argv, "--dir", str(root / "whole")])
        run = next((root / "whole").iterdir())
        assert_same_run(next(disk.root.iterdir()), run)
    return Recorded(main, run, argv, disk)


@pytest.mark.slow
def test_run_after_a_power_cut_continues_or_begins_anew_and_ends_bit_identical(recorded, tmp_path):
    """It begins anew if the disk has no checkpoint."""
    disk = recorded.disk
    assert {how for _, how, _ in disk.states} == set(KEPT)
    tried = random.Random(8).sample(disk.states, few(100, 3))
    for i, (change, how, state) in enumerate(tried):
        folder = tmp_path / f"{i}"
        write_state(state, folder)
        runs_before = [path for path in folder.iterdir() if (path / "checkpoint.pt").exists()]
        if not runs_before:
            assert disk.due(change) is None
            assert not list(folder.glob("*/checkpoint.prev.pt"))
        argv = ["--resume", *runs_before] if runs_before else [*recorded.argv, "--dir", folder]
        assert outcome(recorded.main, *argv) == "accepted", f"before change {change}, {how}"
        (run,) = (path for path in folder.iterdir() if (path / "checkpoint.pt").exists())
        assert_same_run(run, recorded.run)
        assert not [path for path in run.rglob("*") if re.search(r"\.(tmp|link)\d+$", path.name)]
        COUNTS["power cut"]["continued, bit-identical" if runs_before else "before the first checkpoint"] += 1
    assert COUNTS["power cut"]["continued, bit-identical"] > 0


@pytest.mark.slow
def test_every_state_of_the_disk_can_be_read(recorded, tmp_path):
    """Neither checkpoints nor weights are damaged, and no checkpoint that was saved is lost."""
    disk = recorded.disk
    assert [completed for _, completed in disk.saved] == [0, 1, 1, 2, 3]
    for i, (change, _, state) in enumerate(disk.states[:: few(1, 10)]):
        folder = tmp_path / f"{i}"
        write_state(state, folder)
        found = {path.name: load_checkpoint(path)["completed"] for path in folder.glob("*/checkpoint*.pt")}
        assert disk.due(change) is None or found["checkpoint.pt"] >= disk.due(change)
        for path in folder.glob("*/weights/*weights.pt"):
            weights.read_info(path)
        for path in folder.glob("*/history.jsonl"):
            read_history(path.parent)


def test_the_disk_keeps_only_what_was_synced(tmp_path):
    """Without the sync of a file, or of its folder, there are states that lack it."""
    root = tmp_path / "root"
    root.mkdir()

    def kept(write):
        with Disk(root) as disk:
            write()
            return {dict(disk.kept(root, how)).get(Path("file")) for how in KEPT[:3]}

    def write(sync):
        with open(root / "new", "w") as file:
            file.write("whole")
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(root / "new", root / "file")

    assert kept(lambda: write(sync=False)) == {None, b"", b"wh"}
    assert kept(lambda: write(sync=True)) == {None, b"whole"}
    assert kept(lambda: (write(sync=True), files.sync_folder(root))) == {b"whole"}
