"What records and stages say about themselves, and what the README says about the records."

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from micronet_nb import core, training
from micronet_nb.core import MicronetError, compare, config_key, load_record, record, stage
from micronet_nb.released import published_nets

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "data" / "results").glob("*/*.json"))
each_record = pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
KEYS = {
    "name",
    "profile",
    "config",
    "seed",
    "dataset",
    "n",
    "measured",
    "commit",
    "python",
    "versions",
    "device",
    "threads",
    "rows",
}
DENSE = {"dense"}
COMPRESSED = {"method", "rate", "weight_bits", "activation_bits", "first_bits", "calibration", "plan", "tune"} | DENSE
CALIBRATED = {"images", "first_bits", "limit", "calibration_seed"} | DENSE
CHAIN = {"recipe", "steps", "trained_on", "accounting"}
LITE = tuple(f"efficientnet-lite{i}" for i in range(2))
NEEDED = {  # what the numbers depend on, by record
    "05_scoring.mixnet_s": {"model", "weights", "schedule", "scales"},
    "06_sensitivity.speed": {"layers", "sparsities", "per"} | DENSE,
    "06_sensitivity.layers": {"per", "n_train", "intact"} | DENSE,
    "06_sensitivity.plans": {"per", "n_train", "measured_on", "intact"} | DENSE,
    "07_pruning.released": {"model", "rates", "weights", "input_size"},
    "07_pruning.plans": {"rate", "by", "tuned"} | DENSE,
    "07_pruning.table": {"plan", "rate", "method", "floors", "large", "tune", "test_n"} | DENSE,
    "07_pruning.methods": {"plan", "rate", "tune", "seeds"} | DENSE,
    "08_distillation.settings": {"teacher", "teacher_train", "plan", "method", "rate", "tune"} | DENSE,
    "08_distillation.teachers": {
        "loss",
        "rate",
        "plan",
        "method",
        "tune",
        "teachers",
        "teachers_seed",
        "seeds",
        "n_test",
    }
    | DENSE,
    "09_quantisers.search": {"rows", "weights", "bits"},
    "09_quantisers.speed": {"model", "bits", "sampled_kernels_a_layer"},
    "10_activations.sampling": {"layer", "inputs", "samples", "images"} | DENSE,
    "10_activations.untuned": CALIBRATED,
    "10_activations.accuracy": {"sparse", "tune"} | CALIBRATED,
    "10_activations.test": {"sparse", "tune"} | CALIBRATED,
    **dict.fromkeys(
        ("11_weights.tuned", "11_weights.mixed", "11_weights.accuracy", "11_weights.test"),
        {"sparse", "activations", "first_bits", "calibration", "tune", "images"} | DENSE,
    ),
    **dict.fromkeys(
        ("13_lowering.answers", "17_packing.ours", "18_onnx.agreement", "18_onnx.sizes", "18_onnx.fused"), COMPRESSED
    ),
    "15_adders.released": {"model", "n_images"},
    "15_adders.scores": {"mixnet", "cifar100"},
    "16_released.accuracy": {"model", "n_images", "n_double"},
    "16_released.score": {"model", "accounting"},
    "16_released.speed": {"model", "n_timed"},
    "16_released.published": {"nets", "members", "n_images", "bits", "files"},
    "17_packing.accuracy": {"model", "pixels", "n_images"},
    "17_packing.bytes": {"model", "n_mutations", "n_forged"},
    "17_packing.speed": {"model", "weights"},
    "18_onnx.kernels": {"channels", "side", "kernel", "batch", "threads"},
    "18_onnx.fused_speed": {"nets", "bits", "affine", "threads"},
    "18_onnx.widths": {"model", "rate", "trained"},
    **dict.fromkeys(
        ("20_cifar100.study", "20_cifar100.ours", "20_cifar100.ours.seed1", "20_cifar100.published"),
        CHAIN | {"last_seed", "seed_of_all_but_the_last"},
    ),
    "20_cifar100.seeds": CHAIN | {"last_seeds"},
    "20_cifar100.files": {"chains", "example"},
    "20_cifar100.losses": {"joint", "before"},
    "22_champion.untuned": {"net", "widths", "calibrated_on", "images", "first_bits"},
    "22_champion.candidates": {"recipes"},
    "22_champion.seeds": {"recipe", "seeds"},
    "22_champion.narrower": {"recipe", "packed"},
    "22_champion.narrower.seeds": {"recipe", "packed", "seeds"},
    "22_champion.reads": {"of", "lowered"},
    **dict.fromkeys(("22_champion.score", "22_champion.accuracy"), {"file", "bytes", "recipe"}),
    **dict.fromkeys(
        (f"23_post_training.{net}" for net in ("student", *LITE, "kaist-v1-60", "osi-ai")),
        {"net", "rows", "solve", "method", "follow", "damp", "limit"},
    ),
    **dict.fromkeys(
        (f"23_post_training.further.{net}" for net in ("student", "efficientnet-lite0", "kaist-v1-60")),
        {"net", "rows", "solve"},
    ),
    "23_post_training.widths": {"net", "weights", "inputs", "solve", "calibrate"},
    **dict.fromkeys(
        (f"24_compressing.{net}" for net in ("efficientnet-lite0", "kaist-v1-60")), {"net", "calls", "n_images"}
    ),
    "23_post_training.cost": {"nets", "images", "bits", "threads"},
    "24_compressing.law": {"net", "every", "moments"},
    **dict.fromkeys(("26_families.sweep", "26_families.again"), {"seconds", "gigabytes", "timm"}),
    "27_clusters.seconds": {"net", "size", "images", "threads"},
    "25_peers.table": {"net", "packages", "calibration", "image_bits", "float_right"},
    "90_benchmarks.speed": {"seconds", "bandwidth", "n_train", "batch_sizes", "images"},
    "21_imagenet.adders": {"model", "weights", "schedule", "input_size"},
    "21_imagenet.speed": {"size", "teacher", "batch"},
    "21_imagenet.sample": {"nets", "resize", "images", "halves"},
    "21_imagenet.eight_bits": {"net", "sha256", "activation_bits", "weight_bits", "affine", "calibration", "score"},
    "21_imagenet.throughput": {"net", "sha256", "size", "threads", "rounds", "images", "timed", "weight_bits"},
    **dict.fromkeys(
        ("21_imagenet.cifar100", "21_imagenet.deployed"),
        {"student", "teachers", "stage", "loss", "tune", "pruned", "plans", "widths", "calibration", "data"} | DENSE,
    ),
    "21_imagenet.collapse": {"net", "train", "data", "calibration", "norms", "loud_is", "loud", "step"},
    "90_benchmarks.allocator": {"model", "threads", "variables"},
    "90_benchmarks.error": {"per", "torch_ao"} | DENSE,
    "90_benchmarks.nets": {"model", "batch", "threads", "rounds"},
    "90_benchmarks.packing": {"best_of", "size", "bits"},
    "90_benchmarks.solver": {"model", "layers", "kernels", "bits"},
    "91_speed.nets": {"sides", "threads", "rounds", "bits", "affine"},
    "91_speed.memory": {"sides", "threads", "images"},
    "91_speed.zeros": {"threads", "images"},
    "index.example": {"model", "classes", "fit", "tune", "plan", "rate", "bits", "calibration", "trained_on"},
}


@each_record
def test_record_says_what_it_is(path):
    r = json.loads(path.read_text(encoding="utf-8"))
    assert KEYS <= set(r) and r["rows"] and r["config"]
    assert (r["name"], r["profile"]) == (path.stem, path.parent.name)
    assert re.fullmatch("[0-9a-f]{12}", r["commit"]), "measured by code that nobody has"
    assert r["versions"]["torch"] and r["device"] and r["threads"] and re.match(r"20\d\d-\d\d-\d\dT", r["measured"])
    assert r["dataset"] is None or set(r["dataset"]) >= {"name", "split", "n", "fingerprint"}
    assert r["n"] is None or r["n"] > 0
    assert all(
        re.fullmatch("[0-9a-f]{12}(, [0-9a-f]{12})*|unknown", s["commit"]) for s in (r.get("stages") or {}).values()
    )


@each_record
def test_record_has_all_that_its_numbers_depend_on(path):
    r = json.loads(path.read_text(encoding="utf-8"))
    needed = next(v for k, v in NEEDED.items() if re.fullmatch(re.escape(k) + r"(\.from\d+)?", r["name"]))
    assert needed <= set(r["config"]), needed - set(r["config"])
    if needed & {"dense", "tune", "steps", "before", "chains", "n_double"} and path.stem != "index.example":
        assert "stages" in r


def test_a_seed_in_the_name_is_the_seed_of_the_record():
    named = {p.stem: json.loads(p.read_text()) for p in RECORDS if re.search(r"\.seed\d+$", p.stem)}
    assert named and all(
        int(name.rsplit("seed")[-1]) == r["seed"] == r["config"]["steps"][-1]["fit"]["seed"]
        for name, r in named.items()
    )


class Described:
    "A training set that is nothing but its description."

    def __init__(self, description):
        self.description = description

    def describe(self):
        return self.description

    def __len__(self):
        return self.description["n"]


def test_the_keys_of_before_are_still_found():
    dense = [
        json.loads(p.read_text())["config"]["dense"] for p in RECORDS if "dense" in json.loads(p.read_text())["config"]
    ]
    published = [d for d in dense if "sha256" in d]
    assert all(d["key"] == d["sha256"][:16] == published_nets()[d["model"]]["sha256"][:16] for d in published)
    trained = [d for d in dense if "train" in d]
    assert trained and len(published) + len(trained) == len(dense)
    for d in trained:
        config = training._key_config(training.FitConfig(**d["train"]), dict(model=d["model"]), Described(d["data"]))
        assert d["key"] == "0063ee6711b4de40" == config_key(config)


def test_readme_says_what_was_never_run():
    records = [json.loads(p.read_text()) for p in RECORDS]
    never = {
        "GPU path": all(
            device.startswith(("cpu", "unknown"))
            for r in records
            for device in (r["device"], *(s.get("device") or "unknown" for s in (r.get("stages") or {}).values()))
        ),
        "`paper` run": all(r["profile"] != "paper" for r in records),
        "ImageNet run": not any(r["name"].startswith("21_imagenet.imagenet") for r in records),
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    line = next((x for x in readme if x.startswith("**What has not been done.**")), "").replace("No ", "no ")
    assert {name for name in never if f"no {name}" in line} == {name for name, holds in never.items() if holds}


def test_columns_come_from_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "committed_dir", lambda: tmp_path)
    for p, v in (("laptop", 60.0), ("paper", 70.0)):
        record("x.y", [dict(model="toy", top1=v)], p, {}, folder=tmp_path / p, stages=[])
    assert compare("x.y", "model", "top1", folder=tmp_path / "none").loc["toy"].to_dict() == {
        "laptop": 60.0,
        "paper": 70.0,
    }
    (tmp_path / "paper" / "x.y.json").unlink()
    assert "paper" not in compare("x.y", "model", "top1", folder=tmp_path / "none")


def test_training_has_the_commit_of_its_own(tmp_path, monkeypatch):
    "Trained in two pieces under two commits, found and recorded under a third."
    data = [training.load_dataset("digits", s).subset(96) for s in ("train", "valid")]
    config = training.FitConfig(epochs=1, batch_size=32, augment="none", warmup_epochs=0.0)

    def train(commit, **kwargs):
        monkeypatch.setattr(core, "commit", lambda: commit)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        return training.fit_stage("tiny", net, data, config, dict(model="tiny"), root=tmp_path, quiet=True, **kwargs)

    with pytest.raises(training.Stopped):
        train("a" * 12 + "+", stop=0.0)
    result = train("b" * 12)
    assert train("c" * 12) == result
    value = record("x.y", [dict(top1=result["top1"])], "embedded", {}, folder=tmp_path / "out", stages=[result["key"]])
    (quoted,) = value["stages"].values()
    assert (value["commit"], quoted["commit"], quoted["pieces"]) == ("c" * 12, "a" * 12 + "+, " + "b" * 12, 2)
    assert quoted["seconds"] >= result["seconds"] and quoted["finished"]
    assert quoted["versions"]["torch"] and quoted["device"].startswith("cpu")
    unasked = record("x.z", [], "embedded", {}, folder=tmp_path / "out")
    assert result["key"] in "".join(unasked["stages"])
    assert load_record("x.y", "embedded", tmp_path / "out") == value
    again = train("d" * 12, version=2)
    assert again["key"] != result["key"]  # other code, another net
    monkeypatch.setattr(training, "FIT_VERSION", 2)
    assert train("d" * 12)["key"] not in (result["key"], again["key"])


def test_a_record_keeps_what_it_was_given(tmp_path):
    given = dict(config={"lr": 0.1}, seed=7, dataset={"name": "toy"}, n=3)
    record("x.y", [{"top1": torch.tensor(50.0), "bad": float("nan")}], "embedded", **given, folder=tmp_path, stages=[])
    kept = json.loads((tmp_path / "x.y.json").read_text())
    assert {k: kept[k] for k in given} == given and kept["rows"] == [{"top1": 50.0, "bad": None}]
    assert KEYS <= set(kept) and kept["commit"] == core.commit() and kept["stages"] == {}


def test_a_stage_of_before_says_that_nobody_knows(tmp_path):
    folder = tmp_path / f"old-{config_key({'n': 1})}"
    folder.mkdir()
    (folder / "done.json").write_text(json.dumps(dict(config={"n": 1}, upstream=[], result=7)))
    assert stage("old", {"n": 1}, lambda f: 1 / 0, root=tmp_path) == 7
    told = record("x.y", [], "embedded", {}, folder=tmp_path, stages=[config_key({"n": 1})])
    assert [s["commit"] for s in told["stages"].values()] == ["unknown"]
    with pytest.raises(MicronetError, match="no stage with the key"):
        record("x.y", [], "embedded", {}, folder=tmp_path, stages=["none"])


def test_a_killed_piece_leaves_its_commit(tmp_path, monkeypatch):
    "A kill leaves no time to write: what began is on the disk from its first moment."
    monkeypatch.setattr(core, "commit", lambda: "a" * 12)
    seen = []

    def run(folder):
        seen.extend(json.loads((folder / "pieces.json").read_text()))
        return 1

    stage("killed", {}, run, root=tmp_path)
    assert [(p["commit"], p["seconds"]) for p in seen] == [("a" * 12, None)]


@pytest.mark.parametrize(
    "path, text, dirty",
    [
        ("nbs/a.ipynb", '{"cells": [{"cell_type": "code", "source": ["2"], "metadata": {}, "outputs": []}]}', True),
        ("nbs/a.ipynb", '{"cells": [{"cell_type": "code", "source": ["1"], "metadata": {}, "outputs": ["x"]}]}', False),
        ("micronet_nb/a.py", "2", True),
        ("micronet_nb/b.py", "", True),
        ("tests/a.py", "2", False),
    ],
)
def test_the_mark_of_a_changed_checkout(path, text, dirty, tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@x", *args], cwd=tmp_path, check=True, capture_output=True
        )

    files = {
        "nbs/a.ipynb": '{"cells": [{"cell_type": "code", "source": ["1"], "metadata": {}, "outputs": []}]}',
        "micronet_nb/a.py": "1",
        "tests/a.py": "1",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(core, "project_root", lambda: tmp_path)
    clean = core.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / path).write_text(text)
    assert core.commit() == clean + "+" * dirty
