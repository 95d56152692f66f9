"The runner, from end to end, on toy notebooks and once on the real ones."

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, assert_one_line, command, toy

from micronet_nb import reproduce


def outcome(folder):
    return json.loads((folder / "status.json").read_text())


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition, what):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited a minute for {what}")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "One run over notebooks that are well and notebooks that fail, each in its own way."
    root = tmp_path_factory.mktemp("mixed")
    table = "pd.DataFrame(dict(net=['<i>toy</i>'], score=[12345678.9]))"
    head = f"import pandas as pd\nfinish('{{stem}}', profile, {table}, says='Six & seven.')"
    toy(root / "nbs", "01_good", end=head)
    toy(root / "nbs", "02_wrong", "x = 1", "#| hide\n\nd = {'<b>': 1}\nd['<u>no</u>']")
    toy(root / "nbs", "03_dead", "os._exit(0)")
    toy(root / "nbs", "04_left", "sys.exit(0)")
    toy(root / "nbs", "05_forgot", end="print('the end')")
    toy(root / "nbs", "06_impostor", end="os.environ['MICRONET_RUN'] = 'older'\nfinish('{stem}', profile)")
    toy(root / "nbs", "07_after", "import micronet_nb.wrong")
    toy(root / "nbs", "08_later", "from micronet_nb.after import x")
    toy(root / "nbs", "09_other", "from micronet_nb import core")
    done = command(
        "--nbs", root / "nbs", "--out", root / "reports", "--jobs", 1
    )  # so that what needs a failed one is always behind it
    return root / "reports" / "embedded", done


def test_each_is_reported_for_what_it_is(mixed):
    folder, done = mixed
    assert done.returncode == 1 and "Traceback" not in done.stderr
    states = {stem: o["status"] for stem, o in outcome(folder).items()}
    assert states == {
        "01_good": "done",
        "02_wrong": "failed",
        "03_dead": "failed",
        "04_left": "failed",
        "05_forgot": "failed",
        "06_impostor": "failed",
        "07_after": "blocked",
        "08_later": "blocked",
        "09_other": "done",
    }
    assert "2 done, 5 failed, 2 not run" in done.stdout


@pytest.mark.parametrize(
    "stem, cell, error",
    [
        ("02_wrong", 5, "KeyError: '<u>no</u>'"),
        ("03_dead", 4, "the kernel died"),
        ("04_left", 4, "SystemExit: 0"),
        ("05_forgot", None, "ended without writing its result file"),
        ("06_impostor", None, "ended without writing its result file"),
    ],
)
def test_cell_and_error_are_named(mixed, stem, cell, error):
    got = outcome(mixed[0])[stem]
    assert got.get("cell") == cell and error in got["error"]
    assert error in next(line for line in mixed[1].stdout.splitlines() if stem in line)


def test_what_needs_a_failed_one_is_not_run(mixed):
    folder, done = mixed
    assert [outcome(folder)[s]["needs"] for s in ("07_after", "08_later")] == ["02_wrong", "02_wrong"]
    assert not list(folder.glob("07_after*")) and not list((folder / "results").glob("07_after*"))


def test_index_page(mixed):
    page = (mixed[0] / "index.html").read_text()
    for shown in (
        "A toy called 01_good",
        "Six &amp; seven.",
        "&lt;i&gt;toy&lt;/i&gt;",
        "12,345,678.90",
        "2 of 9 notebooks done",
        "5 failed",
        "Cell 5: KeyError",
        "Cell 4: the kernel died",
        "not run: needs 02_wrong",
        "d[&#39;&lt;u&gt;no&lt;/u&gt;&#39;]",
        'href="02_wrong.html#cell-id=cell4"',
    ):
        assert shown in page, shown
    assert "<u>" not in page and "<i>" not in page and "http" not in page.replace("http-equiv", "")
    for link in re.findall(r'(?:href|src)="([^"#]*)', page):
        assert (mixed[0] / link).exists(), link
    assert 'http-equiv="refresh"' not in page  # it is not running any more


def test_outputs_are_kept_whole_and_nothing_else(mixed):
    names = {p.name for p in mixed[0].iterdir()}
    ran = [f"{s}{x}" for s, o in outcome(mixed[0]).items() if o["status"] != "blocked" for x in (".ipynb", ".html")]
    assert names == {*ran, "index.html", "status.json", "results", ".lock"}
    assert "KeyError" in (mixed[0] / "02_wrong.html").read_text()  # a failed one shows its error
    assert "https://" not in re.sub(
        r"<a [^>]*>|<style.*?</style>", "", (mixed[0] / "01_good.html").read_text(), flags=re.S
    )


def test_again_only_what_is_not_done_runs_and_fresh_runs_all(mixed, tmp_path):
    toy(tmp_path / "nbs", "01_a", f"open({str(tmp_path / 'log')!r}, 'a').write('a')")
    toy(tmp_path / "nbs", "02_b", f"open({str(tmp_path / 'log')!r}, 'a').write(str(n))")
    run = lambda *more: command("--nbs", tmp_path / "nbs", "--out", tmp_path / "out", *more)
    log = lambda: (tmp_path / "log").read_text()
    assert run("--only", "b").returncode == 0 and log() == "7"
    second = run()
    assert second.returncode == 0 and log() == "7a" and "02_b done before" in second.stdout
    assert run("--set", "n=8", "--only", "02").returncode == 0 and log() == "7a8"  # another parameter is another result
    (tmp_path / "out" / "embedded" / "01_a.html").unlink()
    assert run("-p", "n=8", "--only", "01_a,b").returncode == 0 and log() == "7a8a"
    assert run("-p", "n=8", "--fresh").returncode == 0 and sorted(log()[4:]) == ["8", "a"]  # two at a time
    toy(tmp_path / "nbs", "01_a", "changed = True")
    assert command("--nbs", tmp_path / "nbs", "--out", tmp_path / "out", "--only", "b", "-p", "n=8").returncode == 0
    assert (
        "before the sources, parameters or files changed" in (tmp_path / "out" / "embedded" / "index.html").read_text()
    )


@pytest.mark.parametrize("how, jobs", [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_killed_half_way_it_leaves_no_process_and_continues(tmp_path, how, jobs):
    log, go, waits = (
        tmp_path / "log",
        tmp_path / "go",
        f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)",
    )
    names = ["01_first", "02_second", "03_third"][: jobs + 1]
    for name in names:
        toy(
            tmp_path / "nbs",
            name,
            f"open({str(log)!r}, 'a').write(f'{name} {{os.getpid()}}\\n')",
            waits if name != "01_first" else "0",
        )
    args = ["--nbs", tmp_path / "nbs", "--out", tmp_path / "out", "--jobs", jobs]
    runner = subprocess.Popen(
        [sys.executable, "-m", "micronet_nb.reproduce", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's background job would ignore it
    try:
        wait_for(lambda: log.exists() and all(name in log.read_text() for name in names), "the last notebook")
        wait_for(
            lambda: outcome(tmp_path / "out" / "embedded")["01_first"]["status"] == "done", "the first notebook to end"
        )
        kernels = [
            psutil.Process(int(line.split()[1])) for line in log.read_text().splitlines() if not line.startswith("01")
        ]
        runner.send_signal(how)
        stderr = runner.communicate(timeout=60)[1]
    finally:
        runner.kill()
    assert len(kernels) == jobs and runner.returncode == (-how if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert "the same command continues" in stderr and "Traceback" not in stderr
    wait_for(lambda: not any(map(alive, kernels)), "the kernels to end")
    for name in names[1:]:
        assert (
            not (tmp_path / "out" / "embedded" / "results" / f"{name}.json").exists()
            and not (tmp_path / "out" / "embedded" / f"{name}.ipynb").exists()
        )
    go.write_text("")
    again = command(*args)
    assert again.returncode == 0 and "01_first done before" in again.stdout
    assert sorted(line.split()[0] for line in log.read_text().splitlines()) == sorted([*names, *names[1:]])
    assert not [f for f in (tmp_path / "out" / "embedded").iterdir() if f.name.startswith(".") and f.name != ".lock"]


def test_two_at_a_time_share_the_cores(tmp_path):
    "Each waits for the other to begin: one after the other would never end. The third finds the second's error."
    meet = (
        "open({here!r}, 'w').write(os.environ['OMP_NUM_THREADS'])\n"
        "for _ in range(1200):\n"
        "    if os.path.exists({there!r}): break\n"
        "    time.sleep(0.05)\n"
        "else: raise SystemExit"
    )
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    toy(
        tmp_path / "nbs",
        "01_a",
        meet.format(here=here, there=there),
        f"while 'failed' not in open({str(tmp_path / 'out' / 'embedded' / 'status.json')!r}).read(): time.sleep(0.05)",
    )
    toy(tmp_path / "nbs", "02_b", meet.format(here=there, there=here), "1/0")
    toy(tmp_path / "nbs", "03_c", "import micronet_nb.b")
    done = command(
        "--nbs",
        tmp_path / "nbs",
        "--out",
        tmp_path / "out",
        "--jobs",
        2,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )
    told = outcome(tmp_path / "out" / "embedded")
    assert {s: o["status"] for s, o in told.items()} == {"01_a": "done", "02_b": "failed", "03_c": "blocked"} and list(
        told
    ) == sorted(told), done.stdout
    assert [line.split()[1] for line in done.stdout.splitlines()[:3]] == ["02_b", "03_c", "01_a"]  # as they ended
    assert (
        (tmp_path / "here").read_text()
        == (tmp_path / "there").read_text()
        == str(max(1, len(os.sched_getaffinity(0)) // 2))
    )


def test_a_result_depends_on_the_files_that_were_looked_for(tmp_path):
    "What was missing and is there now, or the other way round, runs the notebook again; it is told what was missing."
    data, log = tmp_path / "data", tmp_path / "log"
    end = (
        "import subprocess\ncode = 'from micronet_nb.core import find_file; find_file(\"sub/b.bin\")'\n"
        "subprocess.run([sys.executable, '-c', code], check=True)"
    )
    toy(tmp_path / "nbs", "01_a", f"open({str(log)!r}, 'a').write('a')")
    toy(
        tmp_path / "nbs",
        "02_b",
        f"open({str(log)!r}, 'a').write('b')",
        "from micronet_nb.core import find_file\nfind_file('sub/a.bin')",
        end,
    )
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "b.bin").write_bytes(b"12")

    def run():
        return command(
            "--nbs", tmp_path / "nbs", "--out", tmp_path / "out", env=os.environ | dict(MICRONET_DATA=str(data))
        ).stdout

    said = run()
    assert sorted(log.read_text()) == ["a", "b"] and re.search(r"02_b done in .*, without sub/a.bin\n", said)
    assert outcome(tmp_path / "out" / "embedded")["02_b"]["files"] == {"sub/a.bin": None, "sub/b.bin": 2}
    assert "without sub/a.bin" in (tmp_path / "out" / "embedded" / "index.html").read_text()
    assert "02_b done before" in run() and len(log.read_text()) == 2
    (data / "sub" / "a.bin").write_bytes(b"123")
    said = run()
    assert log.read_text()[2:] == "b" and "without" not in said and "01_a done before" in said
    (data / "sub" / "b.bin").unlink()
    assert "without sub/b.bin" in run() and log.read_text()[2:] == "bb"


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    toy(tmp_path / "nbs", "01_a")
    with reproduce._alone(reproduce.report_folder(tmp_path / "out", "embedded", tmp_path / "nbs")):
        assert_one_line(command("--nbs", tmp_path / "nbs", "--out", tmp_path / "out"), "another run is working in")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--profile", "huge"], ["unknown profile 'huge'", "embedded, laptop, paper"]),
        (["--only", "a,scorign"], ["no notebook called 'scorign'", "01_a"]),
        (["--only", ","], ["--only names no notebook", "01_a"]),
        (["--set", "n=3O"], ["n=3O", "01_a has a number there (n = 7)"]),
        (["--set", "m=3"], ["no notebook of this run has a parameter 'm'", "n"]),
        (["--set", "nn=3"], ["'nn'", "did you mean 'n'?"]),
        (["-p", "b=1", "--only", "01"], ["parameter 'b'"]),
        (["--set", "profile=laptop"], ["--profile"]),
        (["--set", "n"], ["name=value", "'n'"]),
        (["--jobs", "0"], ["--jobs 0"]),
        (["--frsh"], ["--frsh", "--help"]),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, args, words):
    "In this process: nothing is run."
    toy(tmp_path / "nbs", "01_a")
    toy(tmp_path / "nbs", "02_b", parameters="profile = 'embedded'\nb = 2")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    try:
        code = reproduce.main(["--nbs", str(tmp_path / "nbs"), "--out", str(tmp_path / "out"), *args])
    except SystemExit as e:
        code = e.code
    told = capsys.readouterr().err
    assert code == 2 and len(told.strip().splitlines()) == 1, told
    for word in words:
        assert word in told
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(tmp_path):
    toy(tmp_path / "nbs", "01_a")
    (tmp_path / "file").write_text("")
    nbs = ["--nbs", tmp_path / "nbs"]
    assert_one_line(
        command(*nbs, "--out", tmp_path / "file" / "reports"), "cannot write to", "--out"
    )  # permission bits would not bind root
    assert_one_line(command(*nbs, "--out", tmp_path / "nbs" / "reports"), "lies inside", "--out")
    assert_one_line(command("--nbs", tmp_path / "none", "--out", tmp_path / "out"), "no notebooks in", "--nbs")
    (tmp_path / "nbs" / "02_broken.ipynb").write_text('{"cells": [')
    assert_one_line(command(*nbs, "--out", tmp_path / "out"), "02_broken.ipynb", "not valid JSON")


def test_parameters_reach_only_those_that_have_them(tmp_path):
    toy(tmp_path / "nbs", "01_a", "assert n == [1, 'x'], n")
    toy(tmp_path / "nbs", "02_b", "assert b is None and 'n' not in globals()", parameters="profile = 'embedded'\nb = 2")
    done = command("--nbs", tmp_path / "nbs", "--out", tmp_path / "out", "--set", "n=[1, 'x']", "--set", "b=None")
    assert done.returncode == 0, done.stdout


def test_help_teaches():
    done = command("--help")
    assert done.returncode == 0
    for taught in (
        "--only scoring,released",
        "--set seed=1",
        "--fresh",
        "index.html",
        "Exit code",
        *("embedded", "laptop", "paper"),
    ):
        assert taught in done.stdout


def test_record_leaves_nothing_to_export_or_clean(tmp_path):
    cells = [
        "import warnings\nfrom micronet_nb.core import progress\nwarnings.warn('a passing remark')\n"
        "for _ in progress(range(3)): pass\nprint(object())",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()",
        "#| export\ndef twice(x): return 2*x",
        "record('01_good.sums', [dict(sum=twice(n))], profile, config={})\ntwice(n)",
    ]
    nb, wrong = toy(tmp_path / "nbs", "01_good", *cells), toy(tmp_path / "nbs", "02_wrong", "print('before')", "1/0")
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    reproduce._generate(tmp_path)
    before = wrong.read_bytes()
    done = command("--nbs", tmp_path / "nbs", "--out", tmp_path / "reports", "--record", "--set", "n=8")
    assert done.returncode == 1 and "recorded: 01_good.ipynb, 01_good.sums.json" in done.stdout
    outputs = [c["outputs"] for c in json.loads(nb.read_text())["cells"] if c["cell_type"] == "code"]
    assert (
        len(outputs) == 7
        and [o["output_type"] for o in outputs[2]] == ["stream"]
        and outputs[2][0]["text"] == ["<object object>\n"]
    )
    assert (
        "image/png" in outputs[3][0]["data"]
        and outputs[5][0]["data"]["text/plain"] == ["16"]
        and "injected" not in nb.read_text()
    )
    assert reproduce.out_of_sync(tmp_path) == []
    assert wrong.read_bytes() == before  # a failed one is not recorded
    committed = tmp_path / "data" / "results" / "embedded"
    assert [p.name for p in committed.iterdir()] == ["01_good.sums.json"] and json.loads(
        (committed / "01_good.sums.json").read_text()
    )["rows"] == [{"sum": 16}]


def test_out_of_sync_names_the_file_and_changes_none(tmp_path):
    toy(tmp_path / "nbs", "01_good", "#| export\ndef twice(x): return 2*x")
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    reproduce._generate(tmp_path)
    assert reproduce.out_of_sync(tmp_path) == []
    nb = tmp_path / "nbs" / "01_good.ipynb"
    nb.write_text(
        nb.read_text().replace("return 2*x", "return x + x").replace('"execution_count": null', '"execution_count": 3')
    )
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert [line.split()[0] for line in reproduce.out_of_sync(tmp_path)] == ["micronet_nb/good.py", "nbs/01_good.ipynb"]
    assert files == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_plain_papermill_from_any_folder(tmp_path):
    done = command(
        ROOT / "nbs" / "00_core.ipynb",
        tmp_path / "out.ipynb",
        "-p",
        "profile",
        "laptop",
        module="papermill",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(
        (reproduce.Path(os.environ["MICRONET_RUNS"]) / "results" / "laptop" / "00_core.json").read_text()
    )
    assert (result["status"], result["profile"]) == ("done", "laptop")


def test_every_notebook_runs_at_embedded(real_run):
    folder, done = real_run
    assert done.returncode == 0, done.stdout + done.stderr
    stems = [nb.stem for nb in reproduce.find_notebooks()]
    assert list(outcome(folder)) == stems and {o["status"] for o in outcome(folder).values()} == {"done"}
    page = (folder / "index.html").read_text()
    for stem in stems:
        assert (folder / f"{stem}.html").stat().st_size > 10_000 and f'href="{stem}.ipynb"' in page
        assert json.loads((folder / "results" / f"{stem}.json").read_text())["profile"] == "embedded"


def test_no_notebook_leaves_files_where_it_runs(real_run):
    "Whatever a notebook writes belongs to its results, its stages or the cache, never to the folder it runs in."
    stems = {nb.stem for nb in reproduce.find_notebooks()}
    assert {p.name for p in real_run[0].iterdir()} == {"index.html", "status.json", "results", ".lock"} | {
        f"{s}{x}" for s in stems for x in (".ipynb", ".html")
    }


def papermill(tmp_path, path, *given):
    "Plain papermill; the finished command, and the result file if there is one."
    done = command(
        path,
        tmp_path / "out.ipynb",
        *given,
        module="papermill",
        cwd=tmp_path,
        env=os.environ | {"MICRONET_OUT": str(tmp_path / "results")},
    )
    return done, tmp_path / "results" / f"{path.stem}.json"


def test_plain_papermill_under_a_misspelt_parameter_gives_no_result(tmp_path):
    done, result = papermill(
        tmp_path, toy(tmp_path / "nbs", "01_a", "n += 1"), "-p", "profile", "embedded", "-p", "nn", "8"
    )
    assert done.returncode == 1 and not result.exists()
    assert (
        "this notebook has no parameter 'nn'" in done.stderr and "'profile'" not in done.stderr.split("no parameter")[1]
    )


@pytest.mark.parametrize(
    "parameters, middle",
    [
        ("profile = 'embedded'\nn = 7", "n"),  # as all notebooks here
        (
            "# Parameters\nprofile: str = 'embedded'\nn = 7  # a number",
            "# Parameters\nm = 2",
        ),  # someone's own, whose cells begin as papermill's does
        ("# Parameters\nprofile = 'embedded'\nn, m = 7, [\n    1]", "import os\nk = 1"),
    ],
)
def test_plain_papermill_under_known_parameters_does(tmp_path, parameters, middle):
    path = toy(tmp_path / "nbs", "01_a", middle, "assert n == 8", parameters=parameters)
    done, result = papermill(tmp_path, path, "-p", "n", "8")
    assert done.returncode == 0, done.stderr
    assert json.loads(result.read_text())["status"] == "done"


def test_on_a_cluster_notebooks_run_as_here(tmp_path):
    "Two workers that see the same folder: what each notebook comes to is told as without them."
    distributed = pytest.importorskip("distributed")
    head = "import os\nimport pandas as pd\nfinish('{stem}', profile, pd.DataFrame(dict(process=[os.getppid()])))"
    toy(tmp_path / "nbs", "01_first", "import time; time.sleep(1)", end=head)
    toy(tmp_path / "nbs", "02_second", "import time; time.sleep(1)", end=head)
    toy(tmp_path / "nbs", "03_wrong", "1 / 0")
    quiet = dict(silence_logs="CRITICAL", dashboard_address=None)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **quiet) as cluster:
        args = ["--nbs", tmp_path / "nbs", "--out", tmp_path / "out", "--scheduler", cluster.scheduler_address]
        done = command(*args)
        again = command(*args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    folder = tmp_path / "out" / "embedded"
    states = outcome(folder)
    assert {stem: o["status"] for stem, o in states.items()} == {
        "01_first": "done",
        "02_second": "done",
        "03_wrong": "failed",
    }
    assert "ZeroDivisionError" in states["03_wrong"]["error"]
    results = [json.loads((folder / "results" / f"{stem}.json").read_text()) for stem in ("01_first", "02_second")]
    assert {r["status"] for r in results} == {"done"}
    assert again.stdout.count("done before") == 2


def test_a_scheduler_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip("distributed")
    toy(tmp_path / "nbs", "01_first")
    args = ["--nbs", tmp_path / "nbs", "--out", tmp_path / "out", "--scheduler"]
    assert_one_line(command(*args, "nonsense://here"), "no Dask scheduler answers at nonsense://here")


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_kernel_that_dies_at_its_start_is_started_once_more(deaths, tmp_path, monkeypatch):
    import papermill

    toy(tmp_path, "01_toy", "print('here')", end="1 + 1")
    real, calls = papermill.execute_notebook, []

    def dying(*args, **options):
        calls.append(args)
        if len(calls) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return real(*args, **options)

    monkeypatch.setattr(papermill, "execute_notebook", dying)
    job = dict(source=str(tmp_path / "01_toy.ipynb"), part=str(tmp_path / "part.ipynb"), parameters={})
    fault = reproduce._papermill(job, lambda **told: None)
    assert len(calls) == 2
    assert fault == {} if deaths == 1 else "kernel_info" in fault["error"]
