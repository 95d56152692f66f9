"""Training in several processes, or in a program of its own: `accelerate launch`, and kills during a checkpoint."""

import copy
import json
import os
import pickle
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import pictures
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from micronet_nb import training
from micronet_nb.cli import micronet_imagenet
from micronet_nb.core import MicronetError
from micronet_nb.data import CIFAR100_STATS, dataset_stats, load_dataset, normalise
from micronet_nb.imagenet import STAGES
from micronet_nb.lowering import lower
from micronet_nb.models import densenet_bc
from micronet_nb.packing import pack, unpack
from micronet_nb.runtime import Runner
from micronet_nb.sensitivity import measure_sensitivity
from micronet_nb.training import FitConfig, checkpoints, evaluate, fit, fit_stage, hard_loss, known_stats, normalised
from micronet_nb.weights import bit_table

CONFIG = FitConfig(
    epochs=3,
    epoch_images=12 * 32,
    batch_size=32,
    lr=0.05,
    augment="riair",
    ema=0.9,
    mixup=0.2,
    cutmix=1.0,
    label_smoothing=0.1,
)


IMAGENET = "--untrained --size 32 --resize 36 --workers 0 --calibration 8 --batch 8 --epochs 1".split()
IMAGENET += "--stage wq --teacher mixnet_s --epoch-images 16".split()


def data():
    return load_dataset("digits", "train"), load_dataset("digits", "valid")


def normless():
    "A net without batch norm: what an image gives does not depend on the others."
    torch.manual_seed(0)
    first = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()
    second = nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU()
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def dense(dropout=0.0):
    torch.manual_seed(0)
    net = densenet_bc(10, 8, 10)
    net.head_drop = nn.Dropout(dropout)
    return net


class Watch:
    "What a callback sees: the net's own class, and the same dice in every process."

    def __init__(self):
        self.kinds, self.dice = set(), []

    def on_step(self, run):
        self.kinds.add(type(run.model).__name__)
        self.dice.append(torch.rand(()).item())


def poisoned(logits, target, teacher_logits, config):
    "A loss that is NaN in the second process alone."
    return hard_loss(logits, target, teacher_logits, config) * (float("nan") if int(os.environ.get("RANK", 0)) else 1.0)


def message(work):
    try:
        work()
    except MicronetError as e:
        return str(e)


def figures(run):
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_share")} for row in run.history]


def same_state(a, b):
    "Whether two nets have the same state, bit for bit."
    return all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def worker(out):
    "Runs in each of the launched processes; leaves what it has seen in a file of its own."
    root, watch = Path(out), Watch()
    alone = fit(normless(), data(), CONFIG, callbacks=[watch], quiet=True)
    rank, report = alone.world.process_index, dict(processes=alone.world.num_processes, backend=alone.world.backend)
    report |= dict(history=alone.history, kinds=sorted(watch.kinds), dice=watch.dice)
    averaged = {k: v.contiguous() for k, v in alone.ema.module.state_dict().items()}
    save_file(averaged, root / f"normless-{rank}.safetensors")

    through = fit(dense(0.2), data(), CONFIG, quiet=True)
    pieces = 0
    while not (piece := fit(dense(0.2), data(), CONFIG, folder=root / "pieces", stop=0.0, every=0.0, quiet=True)).done:
        pieces += 1
    report |= dict(pieces=pieces, dense=through.history[-1]["valid_loss"], in_pieces=figures(piece) == figures(through))
    report["same"] = same_state(through.model, piece.model) and same_state(through.ema.module, piece.ema.module)
    save_file({k: v.contiguous() for k, v in through.model.state_dict().items()}, root / f"dense-{rank}.safetensors")

    uneven = replace(CONFIG, batch_size=33, mixup=0.0, cutmix=0.0)
    report["uneven"] = message(lambda: fit(normless(), data(), uneven, quiet=True))
    report["sync_bn"] = message(lambda: fit(dense(), data(), replace(CONFIG, sync_bn=True), quiet=True))
    report["poisoned"] = message(
        lambda: fit(normless(), data(), CONFIG, loss=poisoned, folder=root / "poisoned", quiet=True)
    )
    nets, eager = (normless(), normless()), replace(CONFIG, compile="eager")
    stored = dict(settings=dict(model="normless"), root=root / "stages", quiet=True)
    results = [fit_stage("launched", net, data(), eager, **stored) for net in nets]
    report |= dict(stage=results[0], found=results[0] == results[1], filled=same_state(*nets))
    report["imagenet"] = micronet_imagenet(["--data", str(root / "images"), *IMAGENET])
    (root / f"{rank}.json").write_text(json.dumps(report))
    alone.world.destroy_process_group()


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What the two processes of one `accelerate launch` have seen, and the folder of what they have written.

    One for all tests: each of its processes imports for some seconds."""
    out = tmp_path_factory.mktemp("launched")
    pictures(out / "images")
    env = os.environ | dict(
        ACCELERATE_USE_CPU="1",
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        MICRONET_OFFLINE="1",
        MICRONET_RUNS=str(out / "runs"),
        MICRONET_OUT=str(out / "records"),
        PYTHONPATH=str(Path(training.__file__).resolve().parent.parent),
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        __file__,
        str(out),
    ]  # --multi_gpu is accelerate's word for several processes here
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "said").write_text(done.stdout)
    return out, [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def through():
    "The net without batch norm, trained from end to end by this process alone."
    return fit(normless(), data(), CONFIG, quiet=True)


def distance(a, b):
    "Relative distance of two state dicts' floating-point values."
    va, vb = (torch.cat([s[k].flatten() for k in sorted(s) if s[k].is_floating_point()]) for s in (a, b))
    return ((va - vb).norm() / va.norm()).item()


def test_two_processes_train_as_one(launched, through):
    "Without batch norm two processes give the weights and figures of one, up to rounding, and both the same."
    out, reports = launched
    assert [t["processes"] for t in reports] == [2, 2] and reports[0]["backend"] == "gloo"
    assert reports[0]["history"] == reports[1]["history"] and len(reports[0]["history"]) == 3
    theirs = [load_file(out / f"normless-{rank}.safetensors") for rank in (0, 1)]
    assert distance(theirs[0], theirs[1]) == 0
    assert distance(through.ema.module.state_dict(), theirs[0]) < 1e-4
    assert distance(normless().state_dict(), theirs[0]) > 1e-2  # it has learnt something
    for a, b in zip(through.history, reports[0]["history"], strict=True):
        assert a["valid_loss"] == pytest.approx(b["valid_loss"], rel=1e-3) and a["lr"] == b["lr"]


def test_callbacks_see_the_net_itself_and_the_same_dice(launched):
    for report in launched[1]:
        assert report["kinds"] == ["Sequential"]
    assert launched[1][0]["dice"] == launched[1][1]["dice"] and len(set(launched[1][0]["dice"])) == 36


def test_batch_norm_sees_its_share_and_the_processes_end_alike(launched):
    "With batch norm two processes differ from one, not from each other; in pieces they end with the same weights."
    out, reports = launched
    ends = [load_file(out / f"dense-{rank}.safetensors") for rank in (0, 1)]
    assert distance(*ends) == 0
    for t in reports:
        assert t["pieces"] >= 3 and t["same"] and t["in_pieces"]
    assert distance(fit(dense(0.2), data(), CONFIG, quiet=True).model.state_dict(), ends[0]) > 1e-3


def test_what_cannot_be_shared_is_refused_in_all_processes(launched):
    for t in launched[1]:
        assert "2 processes cannot share a batch of 33 evenly" in t["uneven"]
        assert "sync_bn needs GPUs" in t["sync_bn"]
        assert "not finite since step 0" in t["poisoned"]
    assert not checkpoints(launched[0] / "poisoned")


def test_a_stage_is_written_once_and_found_by_all(launched):
    out, reports = launched
    assert reports[0]["stage"] == reports[1]["stage"] and all(t["found"] and t["filled"] for t in reports)
    (folder,) = (out / "stages").iterdir()
    assert {p.name for p in folder.iterdir()} - {".lock"} == {"done.json", "model.safetensors"}


def test_two_processes_share_the_work_of_imagenet(launched):
    "One record, every validation image counted once, the rows of a table made."
    out, reports = launched
    assert [t["imagenet"] for t in reports] == [0, 0]
    rows = json.loads((out / "records" / "21_imagenet.imagenet.untrained.json").read_text())["rows"]
    assert [r["row"] for r in rows] == STAGES["wq"] and all(r["n"] == 12 for r in rows)
    assert (out / "said").read_text().count("Sparse_AQ7_WQ: top-1") == 1  # the main process speaks
    assert len(list((out / "runs" / "stages").glob("mixnet-row-*/done.json"))) == 4


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    "Each would train the whole by itself, and all would write the same files."
    fit(
        normless(), data(), CONFIG, quiet=True
    )  # as an Accelerator of one's own would: from here on accelerate sees one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MicronetError, match="2 processes were launched, but each works alone"):
        fit(normless(), data(), CONFIG, quiet=True)


@pytest.mark.parametrize("call", ["save_file", "torch.save", "os.replace"])
def test_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch, call, through):
    "The checkpoint before is still whole, the run goes on from it to the same weights, and the rest is swept away."
    fit(normless(), data(), CONFIG, folder=tmp_path, stop=0.0, quiet=True)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"micronet_nb.training.{call}", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(normless(), data(), CONFIG, folder=tmp_path, every=0.0, quiet=True)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000001"]
    resumed = fit(normless(), data(), CONFIG, folder=tmp_path, every=0.0, quiet=True)
    assert distance(through.model.state_dict(), resumed.model.state_dict()) == 0 and figures(through) == figures(
        resumed
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000036"]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("micronet_nb.training.torch.save", full)
    with pytest.raises(MicronetError, match="cannot write a checkpoint in .*No space left on device"):
        fit(normless(), data(), CONFIG, folder=tmp_path, quiet=True)


def test_trains_without_the_notebook_tools():
    "The library needs no nbdev, fastcore, papermill, matplotlib or IPython."
    code = """
import sys
ABSENT = 'nbdev fastcore papermill matplotlib IPython ipykernel nbformat nbconvert execnb'.split()
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ABSENT: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from micronet_nb.training import FitConfig, fit
from micronet_nb.data import load_dataset
from torch import nn
data = load_dataset('digits', 'train'), load_dataset('digits', 'valid')
run = fit(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), data, FitConfig(epochs=1, augment='digits'))
print(run.done, len(run.history))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "True 1", done.stderr[-3000:]


def flat(*more):
    "A net that trains in no time, with a batch norm."
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), *more, nn.Linear(32, 10))


SHORT = FitConfig(epochs=2, batch_size=32, lr=0.05, augment="none")


def by_hand(net, images, stats):
    "Top-1 in % and cross-entropy of a copy in evaluation mode, one image at a time."
    net, x = copy.deepcopy(net).eval(), normalise(images.images, *stats)
    with torch.no_grad():
        logits = torch.cat([net(one[None]) for one in x])
    return 100 * float((logits.argmax(1) == images.labels).float().mean()), float(
        nn.functional.cross_entropy(logits, images.labels)
    )


def test_evaluate_takes_the_statistics_that_the_net_was_trained_with(tmp_path):
    train, valid = data()
    stats, net = dataset_stats(train), flat()
    with pytest.raises(
        MicronetError, match=r"which pixel statistics was Sequential trained with\?.*pass stats=\(mean, std\)"
    ):
        evaluate(net, valid)
    run = fit(net, (train, valid), replace(SHORT, ema=0.5), quiet=True)
    top1, loss = by_hand(net, valid, stats)
    assert known_stats(torch.compile(net, backend="eager")) == stats
    for known in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert evaluate(known, valid) == evaluate(net, valid, stats) and evaluate(known, valid)[
            "top1"
        ] == pytest.approx(top1)
    assert evaluate(net, valid)["loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluate(run.ema.module, valid)["loss"] == run.history[-1]["valid_loss"]
    assert evaluate(net, valid, CIFAR100_STATS)["loss"] != pytest.approx(loss, rel=1e-2)  # what is named counts
    fit(other := flat(), (train, None), SHORT, stats=CIFAR100_STATS, quiet=True)
    assert evaluate(other, valid) == evaluate(other, valid, CIFAR100_STATS)
    for given in (None, CIFAR100_STATS):
        for _ in ("made", "found"):
            made = fit_stage(
                "stats", net := flat(), (train, valid), SHORT, dict(stats=given), root=tmp_path, quiet=True, stats=given
            )
            assert evaluate(net, valid)["loss"] == made["loss"] == evaluate(net, valid, given or stats)["loss"]


def test_a_packed_net_knows_its_pixels(tmp_path):
    train, valid = data()
    fit(net := flat(), (train, None), SHORT, quiet=True)
    x = normalised(train.images[:8] / 255, net.input_stats)
    graph = lower(net.eval(), x)
    unpacked = unpack(pack(graph, tmp_path / "net.safetensors"))
    wanted = evaluate(graph, valid, net.input_stats)
    for known in (graph, copy.deepcopy(graph), unpacked, Runner(unpacked, timed=False)):
        assert evaluate(known, valid) == wanted
    assert wanted != evaluate(graph, valid, CIFAR100_STATS)


class Counted(torch.utils.data.Dataset):
    "Sixty images that are told apart by one pixel; each draws noise, and is counted."

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 60

    def __getitem__(self, i):
        self.asked.append(i)
        return torch.full((1, 2, 2), float(i % 2)) + 0.1 * torch.randn(1, 2, 2), i % 2


def two_ways():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("form", ["loader", "set", "tensors", "batches", "dict"])
def test_own_data_are_learned_in_any_form(form):
    own = Counted()
    x, y = map(torch.stack, zip(*((own[i][0], torch.tensor(own[i][1])) for i in range(60))))
    train = dict(
        loader=DataLoader(own, 10, shuffle=True),
        set=own,
        tensors=(x, y),
        batches=list(zip(x.split(10), y.split(10))),
        dict=dict(pixel_values=x, labels=y),
    )[form]
    config = FitConfig(epochs=4, batch_size=10, lr=0.5, warmup_epochs=0, augment="riair")
    run = fit(net := two_ways(), (train, train), config, quiet=True)
    assert run.step == 24 and run.history[-1]["valid_top1"] == 100 and not hasattr(net, "input_stats")
    assert evaluate(net, train, stats=lambda images: images)["top1"] == 100


class ByEpoch(torch.utils.data.Sampler):
    "An order that depends on the epoch alone, as that of several processes does."

    epoch = -1

    def __len__(self):
        return 60

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(60, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def of_a_generator(own):
    return DataLoader(own, 10, shuffle=True, generator=torch.Generator().manual_seed(7))


def of_a_sampler(own):
    dice = torch.Generator().manual_seed(7)
    return DataLoader(own, 10, sampler=torch.utils.data.RandomSampler(own, generator=dice))


def of_batches(own):
    order = torch.utils.data.RandomSampler(own, generator=torch.Generator().manual_seed(7))
    return DataLoader(own, batch_sampler=torch.utils.data.BatchSampler(order, 10, False))


def of_epochs(own):
    return DataLoader(own, 10, sampler=ByEpoch())


@pytest.mark.parametrize("form", [lambda own: own, of_a_generator, of_a_sampler, of_batches, of_epochs])
def test_own_data_are_shuffled_anew_in_each_epoch_and_the_same_in_each_run(form):
    orders = []
    for _ in range(2):
        own = Counted()
        fit(two_ways(), (form(own), None), FitConfig(epochs=2, batch_size=10, lr=0.1), quiet=True)
        orders.append(own.asked[10:])  # behind the batch that is looked at before the run
    first, second = orders[0][:60], orders[0][60:]
    assert orders[0] == orders[1] and first != second and sorted(first) == sorted(second) == list(range(60))


@pytest.mark.parametrize("form", [lambda own: own, of_a_generator, of_a_sampler, of_batches, of_epochs])
@pytest.mark.parametrize("at", [4, 6, 9])  # in an epoch, before its first step, in the last
def test_a_killed_run_draws_the_noise_of_its_own_data_again(tmp_path, at, form):
    config = FitConfig(epochs=2, batch_size=10, lr=0.1)

    def kill(run):
        if run.step == at:
            raise KeyboardInterrupt

    through, again = two_ways(), two_ways()
    start = copy.deepcopy(through.state_dict())
    again.load_state_dict(start)
    fit(through, (form(Counted()), None), config, quiet=True)
    how = dict(folder=tmp_path, every=0.0, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        fit(again, (form(Counted()), None), config, callbacks=[types.SimpleNamespace(on_step=kill)], **how)
    again.load_state_dict(start)
    fit(again, (form(Counted()), None), config, **how)
    assert all(torch.equal(a, b) for a, b in zip(through.state_dict().values(), again.state_dict().values()))


def test_a_pixel_is_scaled_where_statistics_are_given():
    x, y = torch.arange(64, dtype=torch.uint8).view(16, 1, 2, 2).repeat(1, 3, 1, 1), torch.arange(16) % 2
    seen = []

    class Watch(nn.Flatten):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    net = nn.Sequential(Watch(), nn.Linear(12, 2))
    stats = (0.5,) * 3, (0.25,) * 3
    fit(net, (DataLoader(TensorDataset(x, y), 16), None), FitConfig(epochs=1, batch_size=16), stats=stats, quiet=True)
    assert torch.allclose(seen[0], (x / 255 - 0.5) / 0.25) and net.input_stats == stats


X, Y = torch.zeros(40, 1, 2, 2), torch.arange(40) % 2


@pytest.mark.parametrize(
    "train, settings, words",
    [
        ((X, Y + 1), {}, "labels run from 1 to 2, but the net has 2 logits"),
        ((X, Y.float()), {}, "training batch 0 has no labels"),
        (DataLoader(TensorDataset(X, Y.float()), 10), {}, "give class numbers"),
        (DataLoader(TensorDataset(X.byte(), Y), 10), {}, "training batch 0 holds images of whole numbers"),
        (iter([(X, Y)]), {}, "does not say how many batches it has"),
        (None, {}, "there are no training data"),
        ((X[:5], Y[:5]), {}, "do not fill a batch of 10"),
        ((X, Y), dict(mixup=0.2), "names of all classes"),
    ],
)
def test_own_data_that_make_no_sense_are_refused(train, settings, words):
    config = FitConfig(epochs=1, batch_size=10, **settings)
    with pytest.raises(MicronetError, match=words):
        fit(two_ways(), (train, None), config, quiet=True)


def test_a_loader_that_ends_early_is_named():
    class Short:
        def __len__(self):
            return 5

        def __iter__(self):
            return iter([(X, Y)])

    with pytest.raises(MicronetError, match="end after 1 batches, and 5 were announced"):
        fit(two_ways(), (Short(), None), FitConfig(epochs=1, batch_size=10), quiet=True)
    with pytest.raises(MicronetError, match="a stage is found again by what it was trained on"):
        fit_stage("own", two_ways(), ([(X, Y)], None), FitConfig(epochs=1), quiet=True)


def test_what_is_normalised_already_is_not_normalised_again():
    train, valid = data()
    fit(net := flat(), (train, None), SHORT, quiet=True)
    seen = normalised(valid.images / 255, net.input_stats), valid.labels
    with pytest.raises(MicronetError, match="are normalised already.*stats=lambda x: x"):
        evaluate(net, seen)
    assert evaluate(net, seen, stats=lambda x: x)["loss"] == pytest.approx(evaluate(net, valid)["loss"], rel=1e-6)
    assert evaluate(net, (valid.images / 255, valid.labels)) == evaluate(net, valid)  # pixels in [0,1]
    with pytest.raises(MicronetError, match="images are torch.uint8 where the net wants floats"):
        evaluate(net, valid, stats=lambda x: x)


class Mirrored(torch.utils.data.Dataset):
    "A data set that keeps its pixels where ours does, and gives something else."

    def __init__(self, of):
        self.images, self.labels = of.images, of.labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i].flip(-1) / 255, int(self.labels[i])


def test_a_data_set_of_torch_says_itself_what_an_image_is():
    train, valid = data()
    fit(net := flat(), (train, None), SHORT, quiet=True)
    turned = valid.images.flip(-1) / 255, valid.labels
    assert evaluate(net, Mirrored(valid)) == evaluate(net, turned) != evaluate(net, valid)
    watched = []
    step = types.SimpleNamespace(on_step=lambda run: watched.append(run.stream is not None))
    fit(flat(), (Mirrored(train), None), SHORT, stats=net.input_stats, callbacks=[step], quiet=True)
    assert watched and all(watched)


def test_a_run_goes_on_with_its_own_loader_only(tmp_path):
    config, loaders = FitConfig(epochs=2, batch_size=10), [DataLoader(Counted(), 10), DataLoader(Counted(), 20)]
    fit(two_ways(), (loaders[0], None), config, folder=tmp_path, stop=0.0, quiet=True)
    with pytest.raises(MicronetError):
        fit(two_ways(), (loaders[1], None), config, folder=tmp_path, quiet=True)
    with pytest.raises(MicronetError, match="epoch_images draws from a `Dataset`"):
        fit(two_ways(), (loaders[0], None), replace(config, epoch_images=20), quiet=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda data, folder: fit(flat(), data, SHORT, quiet=True),
        lambda data, folder: fit_stage("one", flat(), data, SHORT, root=folder, quiet=True),
        lambda data, folder: measure_sensitivity(flat(), data, quiet=True),
    ],
    ids=["fit", "fit_stage", "measure_sensitivity"],
)
def test_one_data_set_is_no_pair(call, tmp_path):
    train, _ = data()
    for given, words in ((train, "one Dataset"), ((train, None, None), "3 data sets")):
        with pytest.raises(MicronetError, match=rf"data is {words}, .*give \(train, valid\)"):
            call(given, tmp_path)


def test_sensitivity_takes_the_statistics_that_the_net_was_trained_with():
    train, valid = data()
    fit(net := flat(), (train, None), SHORT, stats=CIFAR100_STATS, quiet=True)
    few = dict(sparsities=(0.5,), weight_bits=(), activation_bits=(), quiet=True)
    own, named, of_train = (
        measure_sensitivity(net, (train, valid), stats=s, **few) for s in (None, CIFAR100_STATS, dataset_stats(train))
    )
    assert own.equals(named) and not own.equals(of_train)


def test_evaluate_evaluates():
    "As a copy in evaluation mode answers, image by image; each module keeps its mode, after an error too."
    train, valid = data()
    few, stats = valid.subset(40), dataset_stats(train)
    net = flat(nn.Dropout(0.5))
    fit(net, (train, None), SHORT, quiet=True)
    net.train()[2].eval()  # a frozen norm
    modes, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    found = evaluate(net, few, batch_size=7)
    assert (found["top1"], found["loss"], found["n"]) == (
        pytest.approx(by_hand(net, few, stats)[0]),
        pytest.approx(by_hand(net, few, stats)[1], rel=1e-5),
        40,
    )
    net.append(nn.Linear(11, 10))
    with pytest.raises(RuntimeError):
        evaluate(net, few)
    del net[-1]
    assert [m.training for m in net.modules()] == modes and all(
        torch.equal(v, state[k]) for k, v in net.state_dict().items()
    )
    assert (
        evaluate(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10)), valid.subset(1), stats)["n"] == 1
    )  # a batch of one


class Heads(nn.Module):
    "Returns whatever it is told to, in training or always."

    def __init__(self, how, always):
        super().__init__()
        self.body, self.how, self.always = flat(), how, always

    def forward(self, x):
        return self.how(self.body(x)) if self.training or self.always else self.body(x)


@pytest.mark.parametrize(
    "how, what",
    [
        (lambda z: (z, z), "a tuple"),
        (lambda z: {"logits": z}, "a dict"),
        (lambda z: [z], "a list"),
        (lambda z: None, "a NoneType"),
        (lambda z: z[:, :, None, None], r"a tensor of shape \(\d+, 10, 1, 1\)"),
        (lambda z: z[0], r"a tensor of shape \(10,\)"),
    ],
)
def test_what_is_no_logits_is_named(how, what):
    train, valid = (d.subset(64) for d in data())
    stats, few = dataset_stats(train), dict(sparsities=(0.5,), weight_bits=(), activation_bits=(), quiet=True)
    with pytest.raises(MicronetError, match=f"Heads returns {what} in training mode, not logits"):
        fit(Heads(how, False), (train, None), SHORT, quiet=True)
    assert evaluate(Heads(how, False), valid, stats)["n"] == 64  # the heads of training are not there
    measure_sensitivity(Heads(how, False), (train, valid), **few)
    for call in (
        lambda net: evaluate(net, valid, stats),
        lambda net: measure_sensitivity(net, (train, valid), **few),
        lambda net: bit_table(net, torch.rand(4, 3, 8, 8), (4,), quiet=True),
        lambda net: fit(flat(), (train, None), SHORT, teacher=net, loss=lambda *args: hard_loss(*args), quiet=True),
    ):
        with pytest.raises(MicronetError, match=f"Heads returns {what} in evaluation mode, not logits"):
            call(Heads(how, True))


if __name__ == "__main__":
    worker(sys.argv[1])


class Refuses:
    "Stands for a step that cannot be captured as a CUDA graph."

    def __call__(self, x, y):
        raise training._CannotCapture("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_captured_goes_on_kernel_by_kernel(monkeypatch):
    config = replace(CONFIG, epochs=1)
    plain = fit(dense(), data(), config, quiet=True).ema.module.state_dict()
    monkeypatch.setattr(training, "_can_capture", lambda run: True)
    monkeypatch.setattr(training, "_Captured", lambda run: Refuses())
    with pytest.warns(UserWarning, match="cannot be captured .* permitted when stream is capturing\\): it goes on"):
        run = fit(dense(), data(), config, quiet=True)
    assert run.captured is None
    assert all(torch.equal(v, plain[k]) for k, v in run.ema.module.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_captured_step_does_what_its_kernels_do(monkeypatch):
    ends = []
    for graphs in "01":
        monkeypatch.setenv("MICRONET_GRAPHS", graphs)
        run = fit(dense(), data(), replace(CONFIG, epochs=1, lr=0.01), quiet=True)
        assert (run.captured is not None) == (graphs == "1")
        ends.append(torch.cat([v.flatten() for v in run.ema.module.parameters()]))
    start = torch.cat([p.flatten() for p in dense().cuda().parameters()])
    assert (ends[0] - ends[1]).norm() < 1e-3 * (ends[0] - start).norm()
