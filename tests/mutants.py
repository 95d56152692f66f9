"""Mutants of the library: small wrong versions of it, each with the fast tests that must notice.

`make mutants` applies one after the other, in memory, and runs the tests named beside it: every one of them must fail,
and the library as it is must pass them all. Names may follow: `python tests/mutants.py dynamic tree` runs those that
have one of the words in their name or module.
"""
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds, for one mutant


class Mutant(NamedTuple):
    "A wrong version of one module."
    name: str    # what is wrong
    module: str  # of micronet_nb
    old: str     # text that the module has exactly once
    new: str     # takes its place
    tests: str   # 'definitions::test_grid scoring::test_command': of tests/test_<file>.py, each must fail


MUTANTS = [
]


def source_of(module): return (ROOT/"micronet_nb"/f"{module}.py").read_text(encoding="utf-8")


def mutated(mutant):
    "The module's source with the mutant in it. ValueError where its old text is not there exactly once."
    text = source_of(mutant.module)
    if (n := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name!r}: {mutant.old!r} is {n} times in micronet_nb/{mutant.module}.py: anchor it anew")
    return text.replace(mutant.old, mutant.new)


def node_ids(tests):
    "pytest's names of the tests."
    return [str(ROOT/"tests"/f"test_{t.split('::')[0]}.py") + "::" + t.split("::")[1] for t in tests.split()]


class Swapped(importlib.machinery.SourceFileLoader):
    "Loads a module from another text than its file's; nothing is written."
    def __init__(self, name, path, text):
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname): return compile(self.text, self.path, "exec", dont_inherit=True)


class Finder:
    "Finds the mutated module before Python finds the file."
    def __init__(self, mutant): self.name, self.text = f"micronet_nb.{mutant.module}", mutated(mutant)

    def find_spec(self, name, path=None, target=None):
        if name != self.name: return None
        file = str(ROOT/"micronet_nb"/f"{name.split('.')[1]}.py")
        return importlib.util.spec_from_file_location(name, file, loader=Swapped(name, file, self.text))


class Outcomes:
    "A pytest plugin that keeps what became of each test, its parameters left out: failed where one failed."
    def __init__(self): self.found = {}

    def pytest_runtest_logreport(self, report):
        name = Path(report.fspath).stem.removeprefix("test_") + "::" + report.nodeid.split("::", 1)[1]
        failed = "error" if report.when != "call" and report.failed else report.outcome
        for key in {name, name.split("[")[0]}:
            if report.when == "call" or failed != "passed":
                order = ("passed", "skipped", "error", "failed")
                self.found[key] = max(self.found.get(key, "passed"), failed, key=order.index)


def child(mutant, tests, out):
    "In a process of its own: runs the tests on the mutant (None: the library as it is); leaves their outcomes in a file."
    import pytest
    signal.alarm(LIMIT if mutant else 10*LIMIT)
    with open(out.with_suffix(".log"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if mutant: sys.meta_path.insert(0, Finder(mutant))
    outcomes = Outcomes()
    args = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--durations=15", f"--rootdir={ROOT}"]
    code = pytest.main([*args, *node_ids(tests)], plugins=[outcomes])
    out.write_text(json.dumps(dict(code=int(code), found=outcomes.found)))


def verdict(mutant, status, out):
    "'' where a mutant is caught by every test that it names, else what is wrong."
    tail = out.with_suffix(".log").read_text(errors="replace")[-1500:] if out.with_suffix(".log").exists() else ""
    if os.WIFSIGNALED(status): return f"its tests did not end in {LIMIT} s (signal {os.WTERMSIG(status)})"
    if not out.exists(): return f"its process died:\n{tail}"
    told = json.loads(out.read_text())
    wanted = "failed" if mutant else "passed"
    wrong = [f"{t}: {told['found'].get(t, 'not run')}" for t in mutant.tests.split() if told["found"].get(t) != wanted] \
        if mutant else [f"{t}: {o}" for t, o in told["found"].items() if o != wanted]
    if wrong: return ", ".join(wrong) + ("" if told["code"] in (0, 1) and mutant else f"\n{tail}")
    return "" if told["code"] == (1 if mutant else 0) else f"pytest ended with code {told['code']}:\n{tail}"


def warm_up():
    "What every mutant needs and none changes is imported once, before the first fork; the library is not."
    os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MICRONET_OFFLINE="1")
    os.environ.pop("MICRONET_DATA", None)  # the table is the same on every machine
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT))
    for name in ("torch", "timm", "accelerate", "pandas", "sklearn.datasets", "safetensors.torch", "hypothesis", "nbformat",
                 "onnx", "onnxruntime", "pyarrow.parquet", "matplotlib", "torch.utils.flop_counter", "pytest", "psutil"):
        try: importlib.import_module(name)
        except ImportError: pass
    assert not [m for m in sys.modules if m.split(".")[0] == "micronet_nb"]


def run(jobs, folder, at_once=os.cpu_count() or 1):
    "Yields (mutant, what is wrong, seconds) of jobs (mutant, tests), as each ends; a fork each, some side by side."
    todo, under_way = [*enumerate(jobs)], {}
    while todo or under_way:
        while todo and len(under_way) < at_once:
            i, (mutant, tests) = todo.pop(0)
            out = Path(folder)/f"{i if mutant else 'whole'}.json"
            sys.stdout.flush()
            if not (pid := os.fork()):
                try: child(mutant, tests, out)
                finally: os._exit(0)
            under_way[pid] = mutant, out, time.perf_counter()
        pid, status = os.wait()
        mutant, out, start = under_way.pop(pid)
        yield mutant, verdict(mutant, status, out), time.perf_counter() - start


def main(words):
    "All mutants, or those that have one of the words; 0 where all are caught."
    chosen = [m for m in MUTANTS if not words or any(w in f"{m.name} {m.module}" for w in words)]
    if not chosen:
        print(f"no mutant has one of {words} in its name or module")
        return 2
    try: [mutated(m) for m in MUTANTS]
    except ValueError as e:
        print(e)
        return 2
    start = time.perf_counter()
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
        every = " ".join(dict.fromkeys(t for m in chosen for t in m.tests.split()))
        for _, wrong, seconds in run([(None, every)], folder):
            print(f"{'FAILED' if wrong else 'passed'}   the library as it is ({len(every.split())} tests, {seconds:.0f} s) {wrong}")
            if os.environ.get("DURATIONS"): print((Path(folder)/"whole.log").read_text())
        if wrong: return 1
        left = []
        for m, wrong, seconds in run([(m, m.tests) for m in chosen], folder):
            print(f"{'SURVIVED' if wrong else 'caught  '} {m.module}: {m.name} ({seconds:.1f} s) {wrong}", flush=True)
            if wrong: left.append(m)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutants caught in {time.perf_counter() - start:.0f} s")
    return 1 if left else 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
