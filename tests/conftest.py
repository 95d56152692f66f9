"What the tests share: scratch folders instead of the user's, toy notebooks, and one real run of all notebooks."

import json
import os
import subprocess
import sys
from pathlib import Path

# jsonschema, which nbformat imports, takes a second to build a grammar of addresses: no notebook's schema asks for it
sys.modules.setdefault("rfc3987_syntax", None)

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = dict(os.environ)  # before the tests move its folders


@pytest.fixture(scope="session", autouse=True)
def scratch_folders(tmp_path_factory):
    "Stages and decoded data of the tests are their own: nothing that an earlier run has left can make a test pass."
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MICRONET_RUNS", "MICRONET_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        for name in ("MICRONET_OUT", "MICRONET_RUN"):
            patch.delenv(name, raising=False)
        yield


def toy(folder, stem, *middle, parameters="profile = 'embedded'\nn = 7", end="finish('{stem}', profile, says='Fine.')"):
    "Writes a small notebook: heading, imports, parameters, `middle`, and `end`; returns its path."
    start = (
        f"#| default_exp {stem.split('_', 1)[-1]}\nimport os, sys, time\nfrom micronet_nb.core import finish, record"
    )
    cells = [nbformat.v4.new_markdown_cell(f"# A toy called {stem}\n\n> It shows something.")]
    cells += [nbformat.v4.new_code_cell(c) for c in (start, parameters, *middle, end.replace("{stem}", stem))]
    cells[2].metadata["tags"] = ["parameters"]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell{i}"
    nb = nbformat.v4.new_notebook(
        cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, Path(folder) / f"{stem}.ipynb")
    return Path(folder) / f"{stem}.ipynb"


# `python -m`, without the second of jsonschema
RUN = (
    "import runpy, sys; sys.modules['rfc3987_syntax'] = None; runpy.run_module(sys.argv.pop(1), None, '__main__', True)"
)


def command(*args, module="micronet_nb.reproduce", **more):
    "Runs a console command to its end, from another folder than the checkout."
    return subprocess.run(
        [sys.executable, "-c", RUN, module, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=more.pop("cwd", "/"),
        **more,
    )


def assert_one_line(done, *words):
    "A mistake is one line on stderr that names what is wrong, and a non-zero exit."
    assert done.returncode not in (0, 1) and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def pictures(root):
    "Three classes of distinct colours, 20 training and 4 validation images each; returns the folder."
    import numpy as np
    from PIL import Image

    dice = np.random.default_rng(0)
    for split, n in (("train", 20), ("val", 4)):
        for c in range(3):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(n):
                pixels = dice.integers(0, 80, (40, 48, 3), dtype=np.uint8)
                pixels[..., c] += 150
                Image.fromarray(pixels).save(root / split / f"class{c}" / f"{i}.jpg")
    return root


@pytest.fixture(autouse=True)
def runners_do_their_tasks(monkeypatch):
    "No clock decides what is tested: the first way of each task, on 8-bit units where they are exact; never the graph."
    from micronet_nb import runtime

    monkeypatch.setattr(runtime, "_milliseconds", lambda ways, values: {name: i for i, name in enumerate(ways)})


@pytest.fixture(scope="session")
def real_run(tmp_path_factory):
    """All notebooks of this checkout at `embedded`: the folder of their reports, and the finished command.

    `make test` runs them just before, into the folder that MICRONET_TEST_REPORTS names: there each is found done."""
    before = OUTSIDE.get("MICRONET_TEST_REPORTS")
    out = Path(before or tmp_path_factory.mktemp("reports"))
    done = command("--out", out, env=OUTSIDE if before else os.environ)
    return out / "embedded", done


def pytest_terminal_summary(terminalreporter):
    "What each notebook of this run took, and went without, among the durations of the tests."
    status = Path(OUTSIDE.get("MICRONET_TEST_REPORTS", "")) / "embedded" / "status.json"
    if not status.exists():
        return
    outcomes = json.loads(status.read_text())
    terminalreporter.section("seconds of the notebooks", sep="-")
    for stem, o in sorted(outcomes.items(), key=lambda item: -item[1].get("seconds", 0)):
        missing = [name for name, size in o.get("files", {}).items() if size is None]
        terminalreporter.write_line(
            f"{o.get('seconds', 0):6.1f} s {stem} {o['status']}{', without ' + ', '.join(missing) if missing else ''}"
        )
    terminalreporter.write_line(f"{sum(o.get('seconds', 0) for o in outcomes.values()):6.1f} s all together")
