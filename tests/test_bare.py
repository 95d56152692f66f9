"On a machine with nothing: no data, checkpoint or network; a wheel outside a checkout; a kernel, an editor, a shell."

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command, toy
from test_repository import NOTEBOOKS, each_notebook, settings

from micronet_nb import cli, core, families, reproduce
from micronet_nb.core import SWIFT, MicronetError, configure_tools, find_file, released_figures, released_schedule

CHECKPOINT = "riair/densenet-100.pth.tar"


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    "No data anywhere, and no network."
    monkeypatch.delenv("MICRONET_DATA", raising=False)
    monkeypatch.setenv("MICRONET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MICRONET_OFFLINE", "1")


# --- data


def test_scales_are_the_released_file_to_the_bit(tmp_path):
    np.save(tmp_path / "scales.npy", np.array(released_schedule()["activation_scale"]))
    assert core.sha256(tmp_path / "scales.npy") == released_figures()["files"]["scales.npy"]["sha256"]


def printed_score(capsys, *args):
    assert cli.micronet_score(["mixnet_s", "--schedule", *args]) == 0
    return capsys.readouterr().out


def test_a_score_needs_no_file_that_may_be_missing(nothing, capsys):
    out = printed_score(capsys, "--accounting", "riair-submitted", "--adder", "fp32")
    assert (
        re.search(r"^operations .* score 0\.143681$", out, re.M) and "57.5000" in out
    )  # with unknown scales: 0.144668
    assert "24,084 " in out and not re.search(r"[1-9][\d,]*\.0000", out)  # a whole count prints as whole


def test_a_size_that_does_not_fit_is_refused(capsys):
    assert cli.micronet_score(["densenet_bc_10_4", "--size", "3x10000000x10000000"]) == 1
    told = capsys.readouterr().err
    assert "--size 3x10000000x10000000" in told and "1,200,000.0 GB" in told and len(told.splitlines()) == 1


def test_a_data_folder_that_is_none_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MICRONET_DATA", str(tmp_path / "tpyo"))
    with pytest.raises(MicronetError, match="tpyo is not a folder"):
        find_file(CHECKPOINT)
    assert cli.micronet_score(["released"]) == 1
    assert f"MICRONET_DATA={tmp_path / 'tpyo'} is not a folder" in capsys.readouterr().err


def test_only_checkpoint_and_data_sets_are_looked_for():
    "Whatever else a number hangs on lies in the repository."
    code = "\n".join(
        "".join(c["source"])
        for path in NOTEBOOKS
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    )
    wanted = set(re.findall(r"(?<!\.)\b(?:find_file|fetch)\((f?['\"][^'\"]+['\"]|\w+)", code))
    assert wanted <= {
        "'riair/densenet-100.pth.tar'",
        "'no/such.file'",
        "'published.json'",
        "f'cifar100/{f}'",
        "'imagenet-sample/n01440764_tench.JPEG'",
        "'fastcore/basics.py'",  # an example of what a package brings
        "w",
        "relative",
        "'m/w.bin'",
        "'m/v.bin'",
        "'m/u.bin'",
        "'m/t.bin'",
        "entry",  # a file of data/published/nets.json, its SHA-256 beside it
        "published_nets",  # the same
        "n",
    }  # the runner: what a notebook has asked for


@pytest.mark.parametrize("stem", ["15_adders", "16_released", "90_benchmarks", "index"])
def test_without_the_checkpoint_a_notebook_says_so_and_shows_no_nonsense(stem, real_run):
    result = json.loads((real_run[0] / "results" / f"{stem}.json").read_text())
    told = result["says"] + json.dumps(result["headline"])
    assert "nan" not in told.lower() and " 1 bits" not in told
    if find_file(CHECKPOINT) or stem == "index":
        return
    assert CHECKPOINT in told and released_figures()["files"]["densenet-100.pth.tar"]["url"] in told
    assert stem == "15_adders" or result["picture"] is None
    assert "times as fast" not in told and "images a second" not in told and "images/s" not in told


# --- wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The wheel of this checkout, built and installed into a folder of its own without network."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("micronet_nb", "data/published"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", str(source), "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out)], check=True
    )
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(out / "site"), str(next(out.glob("*.whl")))],
        check=True,
    )
    return out / "site"


def run_installed(installed, tmp_path, script, *args):
    "A console command of the wheel, in a folder that has nothing, as a newcomer's shell would start it."
    env = {k: v for k, v in os.environ.items() if k not in SWIFT and not k.startswith("MICRONET_")}
    env |= {"PYTHONPATH": str(installed), "HOME": str(tmp_path), "MICRONET_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(installed / "bin" / script), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )


def test_wheel_is_whole_and_alone(installed, tmp_path):
    assert {f.name: f.read_bytes() for f in (installed / "micronet_nb" / "published").iterdir()} == {
        f.name: f.read_bytes() for f in (ROOT / "data" / "published").iterdir()
    }
    templates = {f.name: f.read_bytes() for f in (ROOT / "micronet_nb" / "templates").iterdir()}
    assert {f.name: f.read_bytes() for f in (installed / "micronet_nb" / "templates").iterdir()} == templates
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import micronet_nb.core as c; print(c.__file__); print(c.published_dir()); print(c.project_root())",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed), "HOME": str(tmp_path)},
        check=True,
    )
    assert done.stdout.split() == [
        str(installed / "micronet_nb" / "core.py"),
        str(installed / "micronet_nb" / "published"),
        str(tmp_path / ".cache" / "micronet_nb"),
    ]


def test_commands_of_the_wheel(installed, tmp_path):
    scores = run_installed(
        installed,
        tmp_path,
        "micronet-score",
        "mixnet_s",
        "--schedule",
        "--accounting",
        "riair-submitted",
        "--adder",
        "fp32",
    )
    assert scores.returncode == 0 and "score 0.143681" in scores.stdout, scores.stderr
    released = run_installed(
        installed, tmp_path, "micronet-score", "released"
    )  # the checkpoint is not here: one line that says where it is
    assert (
        released.returncode == 1
        and released_figures()["files"]["densenet-100.pth.tar"]["url"] in released.stderr
        and len(released.stderr.splitlines()) == 1
    )
    (tmp_path / "mine.py").write_text(
        "import os, torch\nfrom micronet_nb.core import SWIFT\n"
        "def net():\n    print(*(os.environ.get(k) for k in SWIFT))\n    torch.manual_seed(0)\n"
        "    conv, linear = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(144, 10)\n"
        "    return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), linear)\n"
    )
    packed = run_installed(
        installed, tmp_path, "micronet-pack", "mine:net", "mine.safetensors", "--size", "3x8x8", "--data", "digits"
    )
    assert packed.returncode == 0 and packed.stdout.splitlines()[0].split() == list(SWIFT.values()), (
        packed.stderr
    )  # the command has started itself again
    measured = run_installed(installed, tmp_path, "micronet-eval", "mine.safetensors", "-n", 20)
    assert measured.returncode == 0 and "of 20 test images of digits" in measured.stdout, measured.stderr
    again = run_installed(installed, tmp_path, "micronet-score", "mine.safetensors")
    assert again.returncode == 0 and "at 3x8x8" in again.stdout, again.stderr
    lost = run_installed(installed, tmp_path, "micronet-reproduce")
    assert lost.returncode == 2 and "run this in a checkout" in lost.stderr and len(lost.stderr.splitlines()) == 1


def test_every_command_is_tried():
    assert {s.split("=")[0] for s in settings()["console_scripts"].split()} == {
        f"micronet-{c}" for c in ("reproduce", "score", "pack", "eval")
    }


# --- declared


def imported(code):
    "Top-level names of the modules that it imports."
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", code, flags=re.M))):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def declared(key):
    return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in settings()[key].split()}


DECLARED = [("micronet_nb", ["nbdev", "cluster"]), ("tests", ["dev"]), ("nbs", ["dev", "bench"])]


@pytest.mark.parametrize("where, extra", DECLARED)
def test_what_is_imported_is_declared(where, extra):
    sources = (
        [c for p in NOTEBOOKS for c in reproduce.Notebook(p, json.loads(p.read_text(encoding="utf-8"))["cells"]).code]
        if where == "nbs"
        else [p.read_text() for p in (ROOT / where).rglob("*.py")]
    )
    own = {"micronet_nb", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
    names = {n for s in sources for n in imported(s)} - set(sys.stdlib_module_names) - own
    extras = [declared(f"{e}_requirements") if f"{e}_requirements" in settings() else {e} for e in extra]
    known = declared("requirements").union(*extras)  # nbdev: only for maintainers, who are told
    distributions = packages_distributions()
    assert not [n for n in names if not {d.lower().replace("_", "-") for d in distributions.get(n, [n])} & known]


def test_scoring_does_not_wait_for_timm():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import micronet_nb.scoring, sys; print('timm' in sys.modules, 'torchvision' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]


# --- started swiftly


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "A prefix and a checkout that were told how to start, save and merge."
    prefix, checkout = tmp_path_factory.mktemp("prefix"), tmp_path_factory.mktemp("checkout")
    subprocess.run(["git", "init", "-q", "-b", "main", str(checkout)], check=True)
    for name in (".gitattributes", "settings.ini"):
        shutil.copy(ROOT / name, checkout)
    return prefix, checkout, configure_tools(prefix, checkout)


def test_kernel_starts_swiftly(told):
    spec = json.loads((told[0] / "share" / "jupyter" / "kernels" / "python3" / "kernel.json").read_text())
    assert spec["env"] == SWIFT and spec["argv"][0] == sys.executable


def test_configure_tools_keeps_what_is_there_and_needs_no_git(tmp_path):
    config = tmp_path / "etc" / "jupyter" / "jupyter_server_config.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"ServerApp": {"port": 1234}, "ContentsManager": {"allow_hidden": true}}')
    configure_tools(tmp_path, tmp_path)
    value = json.loads(config.read_text())
    assert (
        value["ServerApp"] == {"port": 1234}
        and value["ContentsManager"]["allow_hidden"] is True
        and not (tmp_path / ".git").exists()
    )


def test_an_opened_notebook_is_saved_unchanged(told):
    "JupyterLab adds language_info and execution counts; what it writes is the committed file all the same."
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    from traitlets.config import Config

    prefix, checkout, _ = told
    (checkout / "nbs").mkdir(exist_ok=True)
    path = shutil.copy(ROOT / "nbs" / "09_quantisers.ipynb", checkout / "nbs")
    manager = LargeFileManager(
        root_dir=str(checkout),
        config=Config(json.loads((prefix / "etc" / "jupyter" / "jupyter_server_config.json").read_text())),
    )
    model = manager.get("nbs/09_quantisers.ipynb")
    model["content"]["metadata"]["language_info"] = {"name": "python", "version": "3.99.0"}
    for i, c in enumerate(c for c in model["content"]["cells"] if c["cell_type"] == "code"):
        c["execution_count"] = i
    manager.save(model, "nbs/09_quantisers.ipynb")
    assert Path(path).read_bytes() == (ROOT / "nbs" / "09_quantisers.ipynb").read_bytes()


def test_git_merges_notebooks_cell_by_cell(told):
    "Two sides that changed one cell each at neighbouring places, outputs included: without the driver a conflict."
    _, checkout, done = told
    assert "merge.nbdev-merge.driver" in done
    git = lambda *a: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], cwd=checkout, capture_output=True, text=True
    )
    path = toy(checkout / "merged", "01_toy", "a = 1")

    def change(i, text):
        nb = json.loads(path.read_text())
        nb["cells"][i] |= {"source": text, "execution_count": i}
        path.write_text(json.dumps(nb, indent=1, sort_keys=True) + "\n")
        git("commit", "-qam", text)

    git("add", ".")
    git("commit", "-qm", "base")
    git("checkout", "-qb", "theirs")
    change(1, "theirs = 1")
    change(3, "x = 1")
    git("checkout", "-q", "main")
    change(1, "ours = 1")
    change(3, "y = 2")
    merged = git("merge", "theirs")
    nb = json.loads(
        path.read_text()
    )  # a conflict too is a notebook that opens, which the lines of a plain merge are not
    assert merged.returncode and {"theirs = 1", "ours = 1"} <= {"".join(c["source"]) for c in nb["cells"]}


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_installation_tells_them(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    said = subprocess.run(["make", "-n", "lab"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert said.index("pip install") < said.index(".venv/bin/python -m micronet_nb.core") < said.index("jupyterlab nbs")


# --- parameters


@each_notebook
def test_parameters_are_compared_before_anything_runs(path):
    nb = reproduce.Notebook(path, json.loads(path.read_text(encoding="utf-8"))["cells"])
    after = nb.code[
        next(
            i
            for i, c in enumerate(c for c in nb.cells if c["cell_type"] == "code")
            if "parameters" in c["metadata"].get("tags", [])
        )
        + 1 :
    ]
    called = next(i for i, c in enumerate(after) if re.search(r"^check_parameters\(\)", c, re.M))
    assert called == 0 or path.stem == "00_core"
    for name, default in reproduce.parameters_of(nb).items():
        ast.literal_eval(default)  # a default that is no literal has no kind


def test_papermill_with_a_word_for_a_number_ends_in_a_clear_error(tmp_path):
    check = "from micronet_nb.core import check_parameters\ncheck_parameters()"
    path = toy(
        tmp_path,
        "01_toy",
        check,
        "n_images = n_images or 5",
        parameters="profile = 'embedded'\nseed = 0\nn_images: int = None  # images",
    )
    done = command(
        path, tmp_path / "out.ipynb", "-p", "n_images", "many", "-p", "seed", "3", module="papermill", cwd=tmp_path
    )
    assert (
        done.returncode
        and "MicronetError: n_images = 'many': a whole number belongs there (the default is None)" in done.stderr
    )
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    at = next(i for i, c in enumerate(cells) if "check_parameters" in "".join(c["source"]))
    assert len(cells) > at + 2 and not [c for c in cells[at + 1 :] if c.get("execution_count")]


# --- documented examples


def test_examples_of_the_runner_name_parameters_that_there_are():
    notebooks = reproduce.find_notebooks()
    lines = (
        subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True).stdout
        if shutil.which("make")
        else ROOT.joinpath("Makefile").read_text()
    )
    examples = [m.split() for m in re.findall(r'SET="([^"]+)"', lines)]
    examples += [re.findall(r"--set (\S+)", line) for line in reproduce._EXAMPLES.splitlines() if "--set " in line]
    assert len(examples) >= 2
    for texts in examples:
        reproduce.assign(notebooks, "embedded", reproduce.parse_settings(texts))
    for names in re.findall(r"(?:ONLY=|--only )(\w+(?:,\w+)+)", lines + reproduce._EXAMPLES):
        assert reproduce.choose(notebooks, names.split(","))


def commands(text):
    "Command lines in a text: (name, arguments)."
    names = r"micronet-(?:score|pack|eval|reproduce)|(?:python|accelerate launch) -m micronet_nb\.\w+"
    found = re.findall(rf"(?:^|[`\s/])({names})((?: +[^`|#\n]*)?)", text)
    return [(re.sub(r".* -m micronet_nb\.", "", name), re.split(r" {2,}", args)[0].split()) for name, args in found]


def parsers():
    "Command to its parser."
    own = (cli._score_parser, cli._pack_parser, cli._eval_parser, cli._cifar100_parser, cli._imagenet_parser)
    made = [*(make() for make in own), reproduce._parser(), families._parser()]
    return {p.prog.rsplit(".", 1)[-1]: p for p in made}


def documented():
    "What the notebooks' texts, the README and every --help tell people to type."
    texts = [
        "".join(c["source"])
        for p in NOTEBOOKS
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "markdown"
    ]
    texts += [
        (ROOT / "README.md").read_text(encoding="utf-8"),
        *((p.epilog or "") for p in parsers().values()),
    ]
    return [c for t in texts for c in commands(t)]


def test_documented_commands_are_understood():
    parse, lines = parsers(), documented()
    assert {name for name, _ in lines} == {*parse, "core"}
    for name, args in lines:
        if name == "core" or not args or args == ["--help"]:
            continue  # the bare name, in a sentence
        try:
            parse[name].parse_args(args)
        except SystemExit:
            pytest.fail(f"{name} {' '.join(args)} is documented and not understood")
    assert (
        sum(bool(args) and name in ("micronet-pack", "micronet-eval") for name, args in lines) > 6 and len(lines) > 20
    )


@pytest.mark.parametrize(
    "args", [a for n, a in commands(cli._score_parser().epilog) if n == "micronet-score"], ids=" ".join
)
def test_examples_of_score_run(args):
    if "released" in args and find_file(CHECKPOINT) is None:
        pytest.skip(f"{CHECKPOINT} is not below MICRONET_DATA")
    assert cli.micronet_score(args) == 0


def test_papermill_example_of_the_readme_names_a_notebook_and_its_parameters():
    lines = re.findall(r"papermill (\S+) \S+((?: -p \S+ \S+)+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines
    for path, given in lines:
        nb = reproduce.Notebook(ROOT / path, json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"])
        assert set(re.findall(r"-p (\S+)", given)) <= reproduce.parameters_of(nb).keys()
