"The CIFAR-100 track: killed and stopped anywhere it ends as if it had not been; it needs no notebook tools."

import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import micronet_nb as mn
from micronet_nb import cifar100
from micronet_nb.cifar100 import RECIPES, STOPPED, OutOfTime, run_recipe
from micronet_nb.cli import micronet_cifar100
from micronet_nb.core import MicronetError

TIMES = ("seconds",)


def figures_of(rows):
    return [{k: v for k, v in r.figures.items() if k not in TIMES} for r in rows]


def recorded(folder, name):
    "The rows of a record, without what a clock has measured."
    return [
        {k: v for k, v in r.items() if k not in TIMES}
        for r in json.loads((folder / f"{name}.json").read_text())["rows"]
    ]


SHORT = """
from dataclasses import replace
from micronet_nb.cifar100 import RECIPES
from micronet_nb.cli import micronet_cifar100
def cut(step): return replace(step, norms=min(step.norms, 250), fit=replace(step.fit, epochs=2, epoch_images=IMAGES))
RECIPES["embedded"] = {r: [cut(s) for s in steps] for r, steps in RECIPES["embedded"].items()}
"""


@pytest.fixture(scope="module")
def short():
    "Both recipes at `embedded` with a few steps each, everything else as it is."
    kept = RECIPES["embedded"]
    exec(SHORT.replace("IMAGES", "64"), {})
    yield
    RECIPES["embedded"] = kept


def shorten():
    "In a worker: two short steps of one recipe."
    exec(SHORT.replace("IMAGES", "64"), {})
    RECIPES["embedded"] = dict(study=RECIPES["embedded"]["study"][:2])


def shorten_and_die_once(place):
    "A worker that is killed in the middle of its first training, unless another one was."
    shorten()

    class Killer:
        def on_step(self, run):
            if run.step == 1 and not place.exists():
                place.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    real = cifar100.fit_stage
    cifar100.fit_stage = lambda *args, **more: real(*args, **more | dict(callbacks=[*more["callbacks"], Killer()]))


@pytest.fixture(scope="module")
def undisturbed(short, tmp_path_factory):
    "A recipe, run from end to end once: its rows, and the folder of its record."

    @functools.cache
    def run(recipe):
        folder = tmp_path_factory.mktemp("undisturbed")
        return run_recipe("embedded", recipe, root=folder / "stages", folder=folder, quiet=True), folder

    return run


@pytest.mark.parametrize("recipe", ["study", "ours"])
def test_stopped_at_every_stage_it_ends_as_if_it_had_not_been(recipe, undisturbed, tmp_path):
    whole, folder = undisturbed(recipe)
    stops, pieces, rows = set(), 0, None
    while rows is None and pieces < 60:
        pieces += 1
        try:
            rows = run_recipe("embedded", recipe, minutes=1e-6, root=tmp_path / "b", folder=tmp_path / "rb", quiet=True)
        except OutOfTime as e:
            stops.add(str(e))
    assert rows is not None and len(stops) >= len(whole) - 1  # each call trains one step at most
    assert figures_of(rows) == figures_of(whole) and [r.key for r in rows] == [r.key for r in whole]
    for a, b in zip(whole, rows):
        for k, v in a.net.state_dict().items():
            assert torch.equal(v, b.net.state_dict()[k]), (a.step.row, k)
    assert recorded(folder, f"20_cifar100.{recipe}") == recorded(tmp_path / "rb", f"20_cifar100.{recipe}")


def test_killed_in_a_step_the_same_command_goes_on(short, tmp_path, monkeypatch, capsys):
    out, runs, other, elsewhere = (tmp_path / n for n in ("out", "runs", "other", "elsewhere"))
    code = SHORT.replace("IMAGES", "64") + "import sys\nsys.exit(micronet_cifar100())"
    run = subprocess.Popen(
        [sys.executable, "-c", code, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
        env=os.environ | {"MICRONET_RUNS": str(runs)},
    )
    for line in run.stdout:
        if line.startswith("DenseNet-100"):
            break  # the student is done, the first step of compression is under way
    time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert 2 <= len(recorded(out / "results", "20_cifar100.study")) < 7

    def again(folder, *more):
        code = micronet_cifar100(["--out", str(folder), *more])
        return code, capsys.readouterr().out

    monkeypatch.setenv("MICRONET_RUNS", str(runs))
    code, said = again(out, "--minutes", "1e-6")
    assert code == STOPPED and "the same command goes on" in said
    code, said = again(out)
    assert code == 0 and "all 7 steps are done" in said

    monkeypatch.setenv("MICRONET_RUNS", str(elsewhere))  # never killed
    assert again(other)[0] == 0
    assert recorded(out / "results", "20_cifar100.study") == recorded(other / "results", "20_cifar100.study")
    told = json.loads((out / "results" / "20_cifar100.study.json").read_text())["rows"]
    third = tmp_path / "third"  # a machine that has only the stages of the first
    shutil.copytree(runs / "stages", third / "stages")
    shutil.rmtree(runs)
    monkeypatch.setenv("MICRONET_RUNS", str(third))
    assert again(out)[0] == 0
    # seconds of training, too: nothing was trained anew
    assert json.loads((out / "results" / "20_cifar100.study.json").read_text())["rows"] == told


@pytest.mark.parametrize("recipe", ["study", "ours"])
def test_what_is_under_way_goes_on_elsewhere(recipe, undisturbed, tmp_path, monkeypatch, capsys):
    "A machine a piece: each has only the stages of the one before, and the end is as if one had done it all."
    whole, _ = undisturbed(recipe)
    fit_stage = cifar100.fit_stage
    # one batch a machine
    monkeypatch.setattr(cifar100, "fit_stage", lambda *args, **kwargs: fit_stage(*args, **kwargs | dict(stop=0.0)))
    out, code, machines = tmp_path / "out", STOPPED, 0
    while code == STOPPED and machines < 60:
        machines += 1
        machine = tmp_path / f"machine{machines}"
        if machines > 1:
            shutil.copytree(tmp_path / f"machine{machines - 1}" / "stages", machine / "stages")
            shutil.rmtree(tmp_path / f"machine{machines - 1}")
        monkeypatch.setenv("MICRONET_RUNS", str(machine))
        code = micronet_cifar100(["--recipe", recipe, "--out", str(out), "--minutes", "1e-6"])
    assert code == 0 and machines >= 2 * len(whole), capsys.readouterr().err
    stages = tmp_path / f"machine{machines}" / "stages"
    there = run_recipe("embedded", recipe, root=stages, folder=tmp_path / "rt", quiet=True)
    assert [r.key for r in there] == [r.key for r in whole] and figures_of(there) == figures_of(whole)
    for a, b in zip(whole, there):
        for k, v in a.net.state_dict().items():
            assert torch.equal(v, b.net.state_dict()[k]), (a.step.row, k)


BLOCKED = """
import sys
gone = "nbdev papermill nbconvert nbformat execnb IPython ipykernel matplotlib sklearn onnx onnxruntime".split()
sys.modules.update(dict.fromkeys(gone))   # as if they were not installed
import torch
from micronet_nb import cifar100, cli
from micronet_nb.data import Dataset, fingerprint
from micronet_nb.training import FitConfig
assert cli.micronet_cifar100(["--recipe", "theirs"]) == 1
def noise(seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=g)
    labels, classes = torch.arange(32) % 4, list("abcd")
    key = fingerprint(images, labels, classes)
    return Dataset(images=images, labels=labels, classes=classes, name="noise", split="train", fingerprint=key)
fit = FitConfig(epochs=1, batch_size=16, augment="flip")
steps = cifar100.our_recipe(("densenet_bc_10_2", fit), ("densenet_bc_10_2", fit), fit, fit, norms=32)
rows = []
for s in steps: rows.append(cifar100.run_step(s, rows, (noise(0), noise(1)), ((.5,)*3, (.3,)*3), quiet=True))
print("steps done:", len(rows))
"""


def test_it_needs_no_notebook_tools(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"MICRONET_RUNS": str(tmp_path)},
    )
    assert done.returncode == 0 and "steps done: 4" in done.stdout, done.stderr[-2000:]


def test_mistakes_are_one_line(capsys):
    for args, told in (
        (["--recipe", "theirs"], "choose study or ours"),
        (["--profile", "huge"], "unknown profile 'huge'"),
        (["run", "--minutes", "0"], "more than 0"),
    ):
        assert micronet_cifar100(args) == 1
        said = capsys.readouterr().err.strip()
        assert told in said and len(said.splitlines()) == 1


def test_a_step_that_cannot_be_is_named(short):
    data, _, stats = cifar100.data_of("embedded")
    steps = RECIPES["embedded"]["study"]
    with pytest.raises(MicronetError, match="names no model"):
        cifar100.run_step(steps[2], [], data, stats)
    with pytest.raises(MicronetError, match="no row before it"):
        cifar100.run_step(replace(steps[1], teacher="nobody"), [], data, stats)


def test_a_step_goes_on_from_a_packed_net(tmp_path, monkeypatch):
    def small(seed):
        torch.manual_seed(seed)
        row = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.Hardswish()
        return torch.nn.Sequential(*row, torch.nn.Conv2d(8, 6, 3), torch.nn.Hardswish(), torch.nn.Flatten(1)).eval()

    x, first = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), small(1)
    mn.quantise_weights(first, 8)
    mn.quantise_activations(first, x, 8, 8, affine=True)
    graph = mn.lower(first, x[:4])
    file = mn.pack(graph, tmp_path / "first.safetensors")
    widths = [{"0": 6, "3": 6}, {"0": 8, "3": 8}]
    monkeypatch.setattr(cifar100, "packed_net", lambda name: file)
    monkeypatch.setattr(cifar100, "_stage", lambda *args: widths)
    (step,) = cifar100.narrower_recipe(0.003)
    train = SimpleNamespace(images=(40 * x + 128).clamp(0, 255).to(torch.uint8))
    stats = (128 / 255,) * 3, (40 / 255,) * 3
    answers = {}
    for name, asked in (("packed", step), ("own", replace(step, packed=""))):
        net = small(2)
        callbacks = cifar100.build(net, asked, "", train, stats, quiet=True)
        with torch.no_grad():
            answers[name] = net.eval()(x)
    with torch.no_grad():
        wanted = graph(x)
    far = {name: float((a - wanted).std() / wanted.std()) for name, a in answers.items()}
    assert far["packed"] < 0.1 < 0.5 < far["own"]
    assert [type(c).__name__ for c in callbacks] == ["Pruner", "FrozenNorms"]  # norms keep what the file implies
    key = cifar100._key_settings(step, {}, [])
    assert key["packed"] == "kaist-v1-60" and key["frozen_norms"] and "packed" not in cifar100._key_settings(
        replace(step, packed=""), {}, []
    )


def test_seeds_in_workers_are_those_of_one_process_and_a_lost_one_is_taken_up(short, tmp_path):
    kept, context = RECIPES["embedded"], multiprocessing.get_context("spawn")
    RECIPES["embedded"] = dict(study=kept["study"][:2])
    try:
        here = cifar100.run_seeds("embedded", seeds=[0, 3], root=tmp_path / "a", folder=tmp_path / "ra")
    finally:
        RECIPES["embedded"] = kept
    where = dict(root=tmp_path / "b", folder=tmp_path / "rb")
    deadly = dict(initializer=shorten_and_die_once, initargs=(tmp_path / "dead",), mp_context=context)
    with pytest.raises(MicronetError, match="a worker process has ended"), ProcessPoolExecutor(2, **deadly) as pool:
        cifar100.run_seeds("embedded", seeds=[0, 3], executor=pool, **where)
    assert (tmp_path / "dead").exists()
    with ProcessPoolExecutor(2, mp_context=context, initializer=shorten) as pool:
        there = cifar100.run_seeds("embedded", seeds=[0, 3], executor=pool, **where)
    same = [c for c in here if c not in TIMES]
    assert here[same].equals(there[same]) and here.seed.tolist() == [0, 0, 3, 3]
    assert here.key[0] == here.key[2] and here.key[1] != here.key[3]  # the first step is shared
    assert sorted(f.name for f in (tmp_path / "rb").iterdir()) == sorted(f.name for f in (tmp_path / "ra").iterdir())
