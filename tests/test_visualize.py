"""The command that draws cells: what it writes where, and bad input is one line."""

import os
import subprocess
import sys

import pytest

import genotype_files
import genotypes
import visualize
from support.files import write_json

from helpers import REPORTED_ARCH


def run(capsys, *argv):
    visualize.main([str(a) for a in argv])
    return capsys.readouterr().out.split("\n")[:-1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_draws_a_named_cell(here, capsys):
    assert run(capsys, "EvNASA") == ["./EvNASA_normal.svg", "./EvNASA_reduce.svg"]
    assert "EvNASA: reduction cell" in (here / "EvNASA_reduce.svg").read_text()


def test_command_draws_a_file_into_output(here, capsys):
    genotype_files.save(genotypes.EvNASB, "mine.json")
    assert run(capsys, "mine.json", "--output", "out/deep") == ["out/deep/mine_normal.svg", "out/deep/mine_reduce.svg"]


def test_command_draws_a_run_into_its_folder(here, capsys):
    (here / "run").mkdir()
    genotype_files.save(genotypes.EvNASB, "run/genotype.pickle")
    assert run(capsys, "run") == ["run/cell_normal.svg", "run/cell_reduce.svg"]


def test_json_takes_precedence_over_pickle(here, capsys):
    (here / "run").mkdir()
    genotype_files.save(genotypes.EvNASB, "run/genotype.pickle")
    write_json("run/genotype.json", {"arch": REPORTED_ARCH})
    assert run(capsys, "run") == ["run/cell.svg"]


def test_command_draws_an_arch_string_like_its_file(here, capsys):
    assert run(capsys, REPORTED_ARCH) == ["./cell.svg"]
    (here / "run").mkdir()
    write_json("run/genotype.json", {"arch": REPORTED_ARCH})
    run(capsys, "run")
    assert (here / "run/cell.svg").read_bytes() == (here / "cell.svg").read_bytes()


def test_png_needs_no_display(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    for path in run(capsys, "AmoebaNet", "--format", "png", "--output", tmp_path):
        data = open(path, "rb").read()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def fails(capsys, *argv):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        visualize.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "argv, named",
    [
        (["EvNASX"], "EvNASA"),  # the names that are known
        (["nowhere/genotype.json"], "nowhere/genotype.json"),
        (["."], "genotype.json"),
        (["--report", "."], "args.json"),
        ([], "--report"),
        (["EvNASA", "--report", "."], "--report"),
        (["EvNASA", "--output", "file/below"], "file"),
    ],
)
def test_command_refuses_bad_arguments(here, capsys, argv, named):
    (here / "file").write_text("")
    assert named in fails(capsys, *argv)


BAD_ARCHS = ["|", "|none~1|", "|conv~0|", "|none~0|+|none~0|", "|none~0|+", "|none~0|none~1|", "|none~٠|"]
OF_SIX_NODES = "+".join("|" + "|".join(f"none~{i}" for i in range(n)) + "|" for n in range(1, 7))


@pytest.mark.parametrize("arch", [*BAD_ARCHS, "+".join(["|none~0|"] * 100_000), OF_SIX_NODES], ids=range(9))
def test_command_refuses_bad_arch_strings(here, capsys, arch):
    assert "arch string" in fails(capsys, arch)


BAD_JSON = ["{", "[]", '{"arch": 3}', '{"arch": "|none~3|"}', '{"normal": []}', "\x00", "[" * 100_000]


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_command_refuses_bad_files_by_name(here, capsys, text):
    (here / "bad.json").write_text(text)
    assert "bad.json" in fails(capsys, "bad.json")


def test_import_of_the_command_is_light():
    code = "import sys, visualize; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_settings_of_matplotlib_do_not_matter(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    environment = {**os.environ, "MPLBACKEND": "module://missing.notebook"}
    environment |= {"MATPLOTLIBRC": str(tmp_path), "PATH": str(tmp_path)}
    command = [sys.executable, visualize.__file__, "EvNASA", "--output", tmp_path / "theirs"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    visualize.main(["EvNASA", "--output", str(tmp_path / "ours")])
    for path in (tmp_path / "ours").iterdir():
        assert path.read_bytes() == (tmp_path / "theirs" / path.name).read_bytes()
