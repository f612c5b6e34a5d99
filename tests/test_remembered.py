"""What commands take over from the run in --dir, and what they say of a directory that is no retraining."""

import json

import pytest

import predict
import remembered
import retrained
import test_cifar
import train
from recipes import CIFAR
from support.files import UserError

from helpers import retrained_run

IMAGES = {"dataset": "folder", "data": "/images", "image_size": 16}


def run_with(folder, kind="search", **args):
    """Return a directory that only has the args.json of a run."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"kind": kind, "args": IMAGES | args}))
    return folder


def parsed(parser, *argv):
    return parser.parse_args(remembered.with_flags_of_run(parser, list(map(str, argv))))


def parser_of_a_test():
    return retrained.make_test_parser("test_cifar.py", "", CIFAR, 96)


@pytest.mark.parametrize("make_parser", [train.make_parser, parser_of_a_test])
def test_images_of_the_run_are_the_default(tmp_path, make_parser, capsys):
    args = parsed(make_parser(), "--dir", run_with(tmp_path / "run"))
    assert (args.dataset, args.data, args.image_size) == ("folder", "/images", 16)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert all(flag in out for flag in ("--dataset=folder", "--data=/images", "--image_size=16"))


def test_flag_wins_over_the_run(tmp_path):
    args = parsed(train.make_parser(), "--image_size", 32, "--dir", run_with(tmp_path / "run"), "--data", "/others")
    assert (args.dataset, args.data, args.image_size) == ("folder", "/others", 32)


def test_other_data_set_takes_nothing_over(tmp_path, capsys):
    args = parsed(train.make_parser(), "--dir", run_with(tmp_path / "run"), "--dataset", "cifar10")
    assert (args.dataset, args.data, args.image_size) == ("cifar10", None, None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("argv", [["--dir", "published"], ["--arch", "EvNASA"], []])
def test_without_a_run_of_ours_the_default_is_the_papers(argv, tmp_path, monkeypatch):
    (tmp_path / "published").mkdir()
    (tmp_path / "published/genotype.pickle").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert parsed(train.make_parser(), *argv).dataset == "cifar10"


def test_resumed_run_keeps_its_own_flags(tmp_path):
    words = ["--resume", "run", "--dir", str(run_with(tmp_path / "run"))]
    assert remembered.with_flags_of_run(train.make_parser(), words) == words


def test_data_set_that_a_script_does_not_offer_is_named(tmp_path):
    run = run_with(tmp_path / "run", dataset="cifar100")
    with pytest.raises(UserError, match="cifar100"):
        remembered.with_flags_of_run(parser_of_a_test(), ["--dir", str(run)])


@pytest.mark.parametrize("content", ["[]", "{}", '{"args": []}', '{"args": {"dataset": 7}}'])
def test_odd_arguments_take_nothing_over(tmp_path, content):
    (tmp_path / "args.json").write_text(content)
    assert parsed(train.make_parser(), "--dir", tmp_path).dataset == "cifar10"


def test_impossible_value_is_refused_by_its_flag(tmp_path, capsys):
    run = run_with(tmp_path / "run", image_size=-3)
    with pytest.raises(SystemExit):
        train.main(["--dir", str(run), "--arch", "EvNASA"])
    assert "--image_size" in capsys.readouterr().err


# ---- directories that are no retraining


@pytest.mark.parametrize(
    "command", [lambda run: predict.main([run, "x.png"]), lambda run: test_cifar.main(["--dir", run])]
)
def test_search_names_the_retrainings_in_it(tmp_path, command, capsys):
    run = run_with(tmp_path / "search", dataset="digits", data=None, image_size=None)
    with pytest.raises(SystemExit) as stopped:
        command(str(run))
    assert stopped.value.code == 2
    assert "train.py --dir" in capsys.readouterr().err
    retrained_run(run / "eval-EXP-1", "cifar", tmp_path)
    with pytest.raises(SystemExit):
        command(str(run))
    assert str(run / "eval-EXP-1") in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        lambda run: predict.main([run, "x.png"]),
        lambda run: test_cifar.main(["--dir", run]),
        lambda run: train.main(["--dir", run]),
    ],
)
def test_missing_directory_is_called_that(tmp_path, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(str(tmp_path / "nowhere"))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nowhere'}: there is no such")
