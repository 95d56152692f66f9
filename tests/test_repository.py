"What holds for the repository as a whole: its notebooks, its files, its installation."

import io
import json
import os
import re
import shutil
import subprocess
import tokenize
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT

from micronet_nb import reproduce

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def committed_files():
    "What Git tracks or would track; without Git, all that is not a build product."
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    if listed and listed.returncode == 0:
        return [p for line in listed.stdout.splitlines() if (p := ROOT / line).is_file()]
    products = re.compile(r"^(\.venv|\.git|reports|runs|data/cache|.*\.egg-info)/|__pycache__|_cache/")
    return [p for p in ROOT.rglob("*") if p.is_file() and not products.search(p.relative_to(ROOT).as_posix())]


@each_notebook
def test_notebook_can_be_run_and_committed(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < 1_000_000
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [k for o in outputs for k in o.get("data", {}) if "widget" in k]
    assert not [
        c["id"]
        for c in nb["cells"]
        if c["cell_type"] == "code" and re.search(r"^\s*(\w+\.)?nbdev_export\(\)", "".join(c["source"]), re.M)
    ]
    assert len({c["id"] for c in nb["cells"]}) == len(nb["cells"])  # outputs are matched by cell id


@each_notebook
def test_notebook_takes_a_profile_and_proves_its_end(path):
    nb = reproduce.Notebook(path, json.loads(path.read_text(encoding="utf-8"))["cells"])
    assert re.search(rf"^finish\(\s*'{nb.stem}',\s*profile\b", nb.code[-1], re.M)
    assert reproduce.parameters_of(nb).get("profile") == "'embedded'"
    if nb.stem[0].isdigit():
        assert nb.module == nb.stem.split("_", 1)[1] or nb.module is None


@each_notebook
def test_notebook_says_what_it_is(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S.*\n\n> \S", "".join(first["source"]))


WIDTH = 120
MODULES = [p for p in sorted((ROOT / "micronet_nb").glob("*.py")) if p.name != "_modidx.py"]  # which nbdev writes
PAGES = [*NOTEBOOKS, *MODULES, *sorted((ROOT / "tests").glob("*.py"))]


def code_of(path):
    "(where, source) of a module, or of each code cell of a notebook."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        if path in MODULES:  # nbdev writes the subtitle and the names of a module, on lines of its own making
            text = re.sub(r'(?s)\A""".*?"""$|^__all__ = \[.*?\]$', lambda m: "\n" * m[0].count("\n"), text, flags=re.M)
        return [(path.name, text)]
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return [(f"{path.name}, cell {c['id']}", "".join(c["source"])) for c in cells]


def untidy(source):
    "(line number, what is wrong with it): too wide, or two statements joined by a semicolon."
    wide = [(i, f"{len(line)} characters") for i, line in enumerate(source.split("\n"), 1) if len(line) > WIDTH]
    source = re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", source)  # magics
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return wide  # a cell magic, another language
    ends = {
        tokenize.NEWLINE,
        tokenize.COMMENT,
        tokenize.ENDMARKER,
    }  # behind a last `;` of a cell, which hides its value
    pairs = [(t, after) for t, after in zip(tokens, tokens[1:]) if t.type == tokenize.OP and t.string == ";"]
    return wide + [(t.start[0], "two statements") for t, after in pairs if after.type not in ends]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_lines_fit_the_page_and_hold_one_statement(path):
    wrong = [f"{where}, line {i}: {why}" for where, source in code_of(path) for i, why in untidy(source)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_an_untidy_line_is_found():
    assert untidy("x = 'a; b'  # c; d\ny = 1") == [] and untidy("%matplotlib inline; x\nplot();") == []
    assert untidy("x = 1; y = 2") == [(1, "two statements")]
    assert untidy("\n" + "x" * 121) == [(2, "121 characters")]


def test_conda_and_pip_install_the_same():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(d["pip"] for d in env if isinstance(d, dict))
    wanted = settings()["requirements"].split() + settings()["dev_requirements"].split()
    assert sorted(pip) == sorted([*wanted, "-e ."])
    assert f"python>={settings()['min_python']}" in env


def test_no_machine_path_and_no_large_file():
    here = re.compile("|".join("/" + folder + "/" for folder in ("work", "tmp/wk", "opt", "root", "home/[a-z]+")))
    for path in committed_files():
        assert path.stat().st_size <= 2 * 2**20, f"{path} is over 2 MB: data sets and checkpoints of others stay out"
        if path.suffix in (".png", ".safetensors"):
            continue
        # pictures are base64, which holds anything
        text = re.sub(r'"image/\w+": "[^"]*"', "", path.read_text(encoding="utf-8"))
        assert not (found := here.search(text)), f"{path.relative_to(ROOT)} holds {found[0]!r}: a path of one machine"


STUB = """#!/usr/bin/env bash
files=$(ls -A "$MICRONET_RUNS" "$MICRONET_CACHE" 2>/dev/null | wc -l)
echo "$* data=${MICRONET_DATA-none} offline=${MICRONET_OFFLINE-} in $(pwd) among $files files"
case "$1" in reproduce) exit $REPRODUCE ;; test) echo 'the last word of pytest'; exit $TEST ;; esac
"""


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("codes", [(0, 0), (2, 0), (0, 2), (2, 2)])
def test_ci_script_runs_both_commands_of_the_readme(tmp_path, data, codes):
    "With a stand-in for make: first as a newcomer, then the tests with the data; both run, and either makes it fail."
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(STUB)
    (tmp_path / "bin" / "make").chmod(0o755)
    shutil.copytree(ROOT / ".ci", tmp_path / "clone" / ".ci")
    if data:
        (tmp_path / "shared" / "data").mkdir(parents=True)
    env = os.environ | dict(
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        MICRONET_DATA="elsewhere",
        MICRONET_OFFLINE="0",
        CI="true",
        REPRODUCE=str(codes[0]),
        TEST=str(codes[1]),
    )
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path / "clone", env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    first, second, last = done.stdout.splitlines()
    assert re.fullmatch(f"reproduce OUT=(.*)/reports data=none offline=1 in {tmp_path / 'clone'} among 0 files", first)
    scratch = re.match("reproduce OUT=(.*)/reports", first)[1]
    where = tmp_path / "shared" / "data" if data else "elsewhere"
    assert second == f"test SCRATCH={scratch} data={where} offline=1 in {tmp_path / 'clone'} among 0 files"
    assert last == "the last word of pytest"
    assert bool(done.returncode) == any(codes)
    assert not os.path.exists(scratch) and (ROOT / ".ci" / "run").stat().st_mode & 0o111


def make(folder, *args):
    "make, as if it were called from a shell: what `make test` has set for its own recipes is not handed on."
    of_make = "MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL SCRATCH".split()
    env = {k: v for k, v in os.environ.items() if k not in of_make}
    return subprocess.run(["make", *args], cwd=folder, capture_output=True, text=True, env=env)


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@pytest.fixture
def bare(tmp_path):
    "A checkout's files that `make` reads, without an installation."
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@needs_make
def test_make_alone_tells_what_there_is(bare):
    done = make(bare)
    assert done.returncode == 0
    for target in ("reproduce", "test", "mutants", "lab", "export", "readme", "record", "clean"):
        assert f"make {target}" in done.stdout


@needs_make
def test_make_refuses_an_old_python_in_one_sentence(bare):
    (bare / "python2").write_text("#!/bin/sh\n[ \"$1\" = -V ] && echo Python 2.7.18 || exit 1\n")
    (bare / "python2").chmod(0o755)
    done = make(bare, "reproduce", "PYTHON=./python2")
    assert done.returncode and "Python 3.10 or newer is needed; './python2' is Python 2.7.18" in done.stderr
    assert not (bare / ".venv").exists()


@needs_make
def test_interrupted_installation_is_done_again(bare):
    (bare / ".venv").mkdir()
    assert "pip install" in make(bare, "-n", "reproduce").stdout
    (bare / ".venv" / ".installed").write_text("/another/place")
    assert "pip install" in make(bare, "-n", "reproduce").stdout  # the checkout was moved: its scripts point elsewhere
    (bare / ".venv" / ".installed").write_text(str(bare.resolve()))
    assert "pip install" not in make(bare, "-n", "reproduce").stdout


@needs_make
def test_make_hands_its_variables_on(bare):
    said = make(bare, "-n", "reproduce", "PROFILE=laptop", "ONLY=scoring,released", "SET=a=1 b=x", "FRESH=1").stdout
    assert "--profile 'laptop' --out 'reports' --only 'scoring,released' --set 'a=1' --set 'b=x' --fresh" in said


@needs_make
@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1)])
def test_make_test_runs_the_notebooks_and_then_pytest(bare, codes):
    "With a stand-in for Python: in sync, notebooks, pytest, in this order; what fails stops no other."
    (bare / ".venv" / "bin").mkdir(parents=True)
    (bare / ".venv" / ".installed").write_text(str(bare.resolve()))
    python = bare / ".venv" / "bin" / "python"
    python.write_text(
        '#!/bin/sh\necho "$*; runs=$MICRONET_RUNS reports=$MICRONET_TEST_REPORTS"\n'
        f'case "$*" in *check*) ;; *reproduce*) exit {codes[0]} ;; *pytest*) exit {codes[1]} ;; esac\n'
    )
    python.chmod(0o755)
    done = make(bare, "-s", "test", "SCRATCH=kept")
    told, kept = [line for line in done.stdout.splitlines() if line.startswith("-m")], f"{bare.resolve()}/kept"
    assert done.stdout.splitlines()[-1] == told[-1]  # pytest has the last word
    assert [line.split("; ")[0] for line in told[:2]] == [
        "-m micronet_nb.reproduce --check-sync --readme check",
        f"-m micronet_nb.reproduce --out {kept}/reports",
    ]
    assert len(told) == 3 and told[2].startswith("-m pytest")
    assert told[2].endswith(f"tests; runs={kept}/runs reports={kept}/reports")
    for shown in ("-rs", "--no-fold-skipped", "--durations 15"):
        assert shown in told[2]
    assert bool(done.returncode) == any(codes)
    fresh = next(line for line in make(bare, "-s", "test").stdout.splitlines() if "--out" in line)
    assert not os.path.exists(fresh.split("runs=")[1].split("/runs")[0])  # its own folder, and not for long
