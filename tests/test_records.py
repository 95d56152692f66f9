"What records, stages and proofs say: the commit that they were made from, all that they depend on, and whose they are."

import json
import subprocess

import pytest
from conftest import ROOT

from micronet_nb import core, reproduce
from micronet_nb.core import MicronetError


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout of one commit, in place of this one; a function that runs git in it."

    def git(*args):
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    for name in ("nbs/01_a.ipynb", "micronet_nb/a.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(core, "project_root", lambda: tmp_path)
    return tmp_path, git


@pytest.mark.parametrize("change", ["nbs/01_a.ipynb", "micronet_nb/a.py", "micronet_nb/new.py"])
def test_a_commit_has_a_plus_where_sources_differ_from_it(checkout, change):
    root, git = checkout
    clean = git("rev-parse", "HEAD")[:12]
    assert core.commit() == clean
    (root / change).write_text("2")
    assert core.commit() == clean + "+" and core.environment()["commit"] == clean + "+"
    git("add", ".")
    git("commit", "-q", "-m", "second")
    assert core.commit() == git("rev-parse", "HEAD")[:12] != clean


def test_outputs_of_a_notebook_leave_a_commit_clean(checkout):
    root, git = checkout

    def cells(source, output):
        cell = dict(cell_type="code", source=source, outputs=[output], metadata={})
        return json.dumps(dict(cells=[cell]))

    (root / "nbs" / "01_a.ipynb").write_text(cells("x = 1", "none"))
    git("commit", "-q", "-a", "-m", "a notebook")
    (root / "nbs" / "01_a.ipynb").write_text(cells("x = 1", "1"))
    assert not core.commit().endswith("+")
    (root / "nbs" / "01_a.ipynb").write_text(cells("x = 2", "1"))
    assert core.commit().endswith("+")


def test_a_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "project_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MICRONET_COMMIT", raising=False)
    assert core.commit() == "unknown"


def test_a_record_holds_all_that_it_was_given(tmp_path):
    given = dict(config=dict(bits=4, rates=[0.5, 0.75]), seed=3, dataset=dict(name="digits", split="test"), n=7)
    core.record("01_a.b", [dict(net="x", top1=1.5, odd=float("nan"))], "embedded", folder=tmp_path, **given)
    found = core.load_record("01_a.b", "embedded", tmp_path)
    assert {k: found[k] for k in given} == given
    assert (found["name"], found["profile"]) == ("01_a.b", "embedded")
    assert found["rows"] == [dict(net="x", top1=1.5, odd=None)]
    assert {"commit", "versions", "device", "measured"} <= found.keys()


def test_each_column_is_of_its_own_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "committed_dir", lambda: tmp_path / "committed")
    rows = dict(laptop=2.0, paper=3.0)
    for profile, top1 in rows.items():
        core.record("01_a", [dict(model="m", top1=top1)], profile, {}, folder=tmp_path / "committed" / profile)
    core.record("01_a", [dict(model="m", top1=4.0)], "embedded", {}, folder=tmp_path / "mine")
    published = [dict(model="m", top1=1.0), dict(model="other", top1=5.0)]
    table = core.compare("01_a", "model", "top1", published, tmp_path / "mine")
    assert table.loc["m"].to_dict() == {"published": 1.0, "laptop": 2.0, "paper": 3.0, "this run (embedded)": 4.0}
    assert table.loc["other", "published"] == 5.0 and table.loc["other"].drop("published").isna().all()
    (tmp_path / "committed" / "paper" / "01_a.json").unlink()
    assert "paper" not in core.compare("01_a", "model", "top1", folder=tmp_path / "mine")


def test_a_stage_is_found_by_its_configuration_and_by_what_it_builds_on(tmp_path):
    ran = []

    def work(name, config=dict(a=1), **more):
        return core.stage("s", config, lambda folder: ran.append(name) or name, root=tmp_path, **more)

    assert work("first", upstream=["x"]) == work("again", upstream=["x"]) == "first"
    assert work("other upstream", upstream=["y"]) == "other upstream"
    assert work("other config", upstream=["x"], config=dict(a=2)) == "other config"
    assert work("fresh", upstream=["x"], fresh=True) == work("after", upstream=["x"]) == "fresh"
    assert ran == ["first", "other upstream", "other config", "fresh"]


def test_a_record_quotes_who_made_its_stages(tmp_path, monkeypatch):
    "Trained under one commit, measured under another, written under a third."
    root, monkey = tmp_path / "stages", monkeypatch.setattr

    def one(name, upstream=()):
        return core.stage(name, {}, lambda folder: name, upstream, root)

    def written(key):
        return core.record("01_a", [], "embedded", {}, folder=tmp_path, stages=[key])

    monkey(core, "_seen", {})  # stages that other tests of this process have read
    monkey(core, "commit", lambda: "trained")
    one("net")
    monkey(core, "commit", lambda: "measured")
    one("net"), one("figures", [core.config_key({})])
    monkey(core, "commit", lambda: "written")
    found = written(core.config_key({}, [core.config_key({})]))
    made = {name.split("-")[0]: stage["commit"] for name, stage in found["stages"].items()}
    assert found["commit"] == "written" and made == {"net": "trained", "figures": "measured"}
    assert all(s["seconds"] > 0 and s["versions"] and s["finished"] for s in found["stages"].values())


def test_another_version_of_its_code_is_another_stage(tmp_path):
    told = [core.stage("s", {}, lambda folder: v, root=tmp_path, version=v) for v in (1, 2, 1)]
    assert told == [1, 2, 1]


def test_a_stage_that_fails_is_not_done(tmp_path):
    def broken(folder):
        raise MicronetError("no")

    with pytest.raises(MicronetError):
        core.stage("s", {}, broken, root=tmp_path)
    assert core.stage("s", {}, lambda folder: 5, root=tmp_path) == 5


def test_a_file_is_whole_or_as_it_was(tmp_path):
    core.write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), core.atomic_path(tmp_path / "a.json") as tmp:
        tmp.write_text("half of i")
        raise RuntimeError
    assert core.read_json(tmp_path / "a.json") == 1 and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_another_file_under_the_right_name_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of the FIPS 180 example, 'abc'

    def fetched():
        return core.fetch("a.bin", "https://nowhere.invalid", digest, tmp_path)

    assert fetched() == tmp_path / "a.bin"
    (tmp_path / "a.bin").write_bytes(b"abd")
    with pytest.raises(MicronetError, match="has SHA-256"):
        fetched()


def test_a_result_proves_the_run_that_it_belongs_to(tmp_path, monkeypatch):
    monkeypatch.setenv("MICRONET_OUT", str(tmp_path))
    monkeypatch.setenv("MICRONET_RUN", "this")
    core.finish("01_a", "embedded", says="Fine.")
    assert reproduce.proof(tmp_path, "01_a", "this")["says"] == "Fine."
    assert reproduce.proof(tmp_path, "01_a", "earlier") is None and reproduce.proof(tmp_path, "02_b", "this") is None
    core.write_json(tmp_path / "01_a.json", core.read_json(tmp_path / "01_a.json") | dict(status="running"))
    assert reproduce.proof(tmp_path, "01_a", "this") is None
    monkeypatch.delenv("MICRONET_RUN")
    core.finish("01_a", "embedded")
    assert reproduce.proof(tmp_path, "01_a", "this") is None


def notebook(tmp_path, stem, *cells):
    "A notebook of code cells."
    made = [dict(cell_type="code", id=str(i), source=source, metadata={}, outputs=[]) for i, source in enumerate(cells)]
    return reproduce.Notebook(tmp_path / f"{stem}.ipynb", made)


def test_the_key_of_a_run_holds_cells_parameters_and_library(tmp_path):
    def key(source="x = 1", n=7, library="lib"):
        return reproduce.run_key(notebook(tmp_path, "01_a", source), dict(n=n), library)

    assert len({key(), key(n=8), key(library="other"), key("x = 2")}) == 4 and key() == key()


def test_a_notebook_builds_on_what_its_imports_build_on(tmp_path):
    cells = {"01_a": "import os", "02_b": "import micronet_nb.a", "03_c": "from micronet_nb.b import x", "04_d": ""}
    chain = [notebook(tmp_path, stem, f"#| default_exp {stem[3:]}", source) for stem, source in cells.items()]
    assert reproduce.needs(chain) == {"01_a": set(), "02_b": {"01_a"}, "03_c": {"01_a", "02_b"}, "04_d": set()}


def test_records_are_kept_only_from_the_cells_that_ran(tmp_path):
    pytest.importorskip("nbdev")
    nbs, out = tmp_path / "nbs", tmp_path / "out"
    nb = notebook(nbs, "01_a", "x = 1")
    kernel = dict(name="python3", display_name="python3", language="python")
    whole = dict(cells=nb.cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    for c in whole["cells"]:
        c["execution_count"] = None
    core.write_json(nb.path, whole)
    core.write_json(out / "01_a.ipynb", whole)
    core.record("01_a.b", [], "laptop", {}, folder=out / "results")
    assert reproduce.keep_outputs(nb, out, "laptop") == ["01_a.ipynb", "01_a.b.json"]
    assert json.loads((tmp_path / "data" / "results" / "laptop" / "01_a.b.json").read_text())["profile"] == "laptop"
    core.write_json(nb.path, json.loads(json.dumps(whole).replace("x = 1", "x = 2")))
    with pytest.raises(MicronetError, match="has changed since it ran"):
        reproduce.keep_outputs(nb, out, "laptop")


def test_the_results_page_shows_what_unseen_images_say():
    "A published net has seen the validation images: its pruned versions are shown on the test split."
    record = json.loads((ROOT / "data" / "results" / "laptop" / "07_pruning.table.json").read_text())
    cells = json.loads((ROOT / "nbs" / "98_results.ipynb").read_text())["cells"]
    page = "".join("".join(o.get("data", {}).get("text/markdown", [])) for c in cells for o in c.get("outputs", []))
    (table,) = [t for t in page.split("\n\n") if "large layer" in t]
    assert all(f"{row['test_top1']:.2f}" in table for row in record["rows"]), table
    assert not any(f"{row['top1']:.2f}" in table for row in record["rows"]), table
