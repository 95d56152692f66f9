"The ImageNet track on folders of small images: the command, killed and resumed, given what is wrong."

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import command, pictures
from PIL import Image
from safetensors.torch import save_file

from micronet_nb import imagenet
from micronet_nb.cli import micronet_imagenet
from micronet_nb.core import MicronetError
from micronet_nb.imagenet import (
    BAR,
    ROLES,
    ROWS,
    STAGES,
    Stream,
    check_images,
    open_images,
    passes,
    real_images,
    rgb,
    slide_rows,
    transforms,
    validate,
    windowed,
)

SMALL = "--untrained --size 32 --resize 36 --workers 0 --calibration 8 --batch 8 --epochs 1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three classes of distinct colours, 20 training and 4 validation images each."
    return pictures(tmp_path_factory.mktemp("images"))


def environment(tmp_path, **more):
    "Of a process whose stages and records are the test's."
    folders = dict(MICRONET_RUNS=str(tmp_path / "runs"), MICRONET_OUT=str(tmp_path / "out"))
    return os.environ | folders | dict(MICRONET_OFFLINE="1", OMP_NUM_THREADS="1") | more


def run(folder, tmp_path, *args):
    return command("--data", folder, *SMALL, *args, module="micronet_nb.imagenet", env=environment(tmp_path))


@pytest.fixture
def here(folder, tmp_path, monkeypatch, capsys):
    "The command in this process, with one thread as in the others: (exit code, stdout, stderr)."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*args, where=tmp_path):
        for name, value in dict(MICRONET_RUNS=where / "runs", MICRONET_OUT=where / "out", MICRONET_OFFLINE=1).items():
            monkeypatch.setenv(name, str(value))
        capsys.readouterr()
        return micronet_imagenet([str(a) for a in ("--data", folder, *args)]), *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


def rows_of(tmp_path, record="21_imagenet.imagenet.untrained"):
    return {r["row"]: r for r in json.loads((tmp_path / "out" / f"{record}.json").read_text())["rows"]}


def test_every_row_of_the_slides(tmp_path, here, monkeypatch):
    "Prune, sweep, quantise: the whole table, one step a row; small nets stand in for two of the teachers."
    monkeypatch.setattr(imagenet, "NETS", imagenet.NETS | {"MixNet-M": "mixnet_s", ROLES[3]: "mobilenetv3_small_050"})
    code, said, wrong = here(*SMALL, "--epoch-images", 8)
    assert code == 0, wrong
    rows = rows_of(tmp_path)
    assert list(rows) == STAGES["all"] and set(rows) == set(ROWS)
    assert all(r["n"] == 12 and r["passes"] == (r["right"] >= 9) for r in rows.values())
    assert rows["Sparse_AQ7_WQ"]["storage"] < rows["Sparse_AQ7"]["storage"] / 2 < rows["Original"]["storage"] / 2
    assert 0 < rows["Sparse"]["param_sparsity"] < rows["Sparse, large layer >= 60 %"]["param_sparsity"]
    for name in ("taught by MixNet-L", "Sparse_AQ6"):
        assert f"{name}: top-1" in said


TWO_ROWS = "imagenet.STAGES['prune'] = imagenet.STAGES['prune'][:2]"


def test_killed_and_resumed_gives_the_same(folder, tmp_path, here, monkeypatch):
    "Stopped after a moment, then killed, then left alone: the weights of a run that nobody disturbed."
    monkeypatch.setitem(imagenet.STAGES, "prune", imagenet.STAGES["prune"][:2])
    args = [*SMALL, "--stage", "prune", "--epochs", "2", "--epoch-images", "24", "--teacher", "none"]
    code, told, _ = here(*args, "--minutes", "0.0001")
    assert code == 75 and "stopped after" in told
    code = (
        f"import sys\nfrom micronet_nb import cli, imagenet\n{TWO_ROWS}\nsys.exit(cli.micronet_imagenet(sys.argv[1:]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "--data", str(folder), *args],
        env=environment(tmp_path),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in child.stdout:
        if line.startswith("Original:"):
            break
    time.sleep(2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert here(*args)[0] == 0
    (quiet := tmp_path / "quiet").mkdir()
    assert here(*args, where=quiet)[0] == 0

    def weights(where):
        return {
            f.parent.name: f.read_bytes() for f in (where / "runs" / "stages").glob("mixnet-row-*/model.safetensors")
        }

    assert len(weights(quiet)) == 2 and weights(tmp_path) == weights(quiet)


def test_order_does_not_depend_on_workers_or_processes(folder):
    class Shape:
        def __init__(self, rank=0, n=1):
            from micronet_nb.training import FitConfig

            self.config, self.device = FitConfig(batch_size=8), torch.device("cpu")
            self.epoch, self.steps_an_epoch = 3, 7
            self.world = type("World", (), dict(num_processes=n, process_index=rank))

    def epoch(workers=0, first=0, **share):
        return list(Stream(open_images(folder), 32, workers).stream(Shape(**share), first))

    whole = epoch()
    assert len(whole) == 7 and len({int(x.sum() * 1e3) for x, _ in whole}) == 7
    for (x, y), (x2, y2) in zip(whole[3:], epoch(2, 3), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    for (x, y), (a, ya), (b, yb) in zip(whole, epoch(rank=0, n=2), epoch(rank=1, n=2), strict=True):
        assert torch.equal(x, torch.cat([a, b])) and torch.equal(y, torch.cat([ya, yb]))
    for x, y in whole:
        assert torch.equal(x.mean((2, 3)).argmax(1), y)  # the label is the colour: images and labels belong together


@pytest.mark.parametrize("form", ["tar", "tars", "tar of tars", "parquet"])
def test_forms_hold_the_same(folder, tmp_path, form):
    want = open_images(folder)
    if form == "tar":
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            tar.add(folder / "train", arcname="train")
    elif form == "parquet":
        order = np.random.default_rng(0).permutation(60)
        for k, part in enumerate(np.array_split(order, 2)):
            pq.write_table(
                pa.table({"image": [dict(bytes=b, path="x") for b in want.read(part)], "label": want.labels[part]}),
                tmp_path / f"train-{k:05}-of-00002.parquet",
                row_group_size=7,
            )
    else:
        (inner := tmp_path / "train").mkdir()
        for c in sorted((folder / "train").iterdir()):
            with tarfile.open(inner / f"{c.name}.tar", "w") as tar:
                for f in sorted(c.iterdir()):
                    tar.add(f, arcname=f.name)
        if form == "tar of tars":
            with tarfile.open(tmp_path / "train.tar", "w") as tar:
                for f in sorted(inner.iterdir()):
                    tar.add(f, arcname=f.name)
    got = open_images(tmp_path)
    held, wanted = (sorted(zip(s.labels.tolist(), s.read(range(60)))) for s in (got, want))
    assert len(got.classes) == 3 and held == wanted
    one_by_one = [got.read([i])[0] for i in range(60)]
    assert one_by_one == got.read(range(60)) and got.read([5, 3, 5]) == [one_by_one[i] for i in (5, 3, 5)]
    assert check_images(got).empty


def test_windows_keep_groups_together():
    groups = np.arange(1000) // 10
    order = windowed(groups, 1000, torch.Generator().manual_seed(1), window=100)
    assert sorted(order) == list(range(1000)) and list(order) != sorted(order)
    for part in np.split(order, 10):
        assert len({*groups[part]}) == 10
    assert list(order) != list(windowed(groups, 1000, torch.Generator().manual_seed(2), window=100))


def encoded(image, kind="jpeg", **how):
    image.save(buffer := io.BytesIO(), kind, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "LA"])
def test_odd_modes_are_read(mode):
    image = Image.fromarray(np.full((8, 10, 3), 255, dtype=np.uint8)).convert(mode)
    got = rgb(encoded(image, "jpeg" if mode in ("L", "CMYK") else "png"), "x")
    assert got.mode == "RGB" and got.size == (10, 8) and np.abs(np.asarray(got).astype(int) - 255).max() <= 3


def test_pixels_are_taken_as_they_lie():
    exif = Image.Exif()
    exif[0x112] = 6
    assert rgb(encoded(Image.new("RGB", (10, 8)), exif=exif), "x").size == (10, 8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"words",
        encoded(Image.effect_noise((64, 64), 50))[:700],
        encoded(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "png"),
    ],
    ids=["empty", "text", "truncated", "16 bit"],
)
def test_unreadable_images_are_named(data, folder, tmp_path):
    with pytest.raises(MicronetError, match="strange.jpg is not a readable image"):
        rgb(data, "strange.jpg")
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "good.jpg").write_bytes((folder / "train" / "class0" / "0.jpg").read_bytes())
    (tmp_path / "train" / "a" / "strange.jpg").write_bytes(data)
    bad = check_images(open_images(tmp_path))
    assert len(bad) == 1 and bad.image[0].endswith("strange.jpg")


def test_command_names_the_broken_image(folder, tmp_path, here):
    import shutil

    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "class1" / "7.jpg").write_bytes(b"no image")
    code, told, _ = here(*SMALL, "--stage", "check", "--data", tmp_path / "data")
    assert code == 1 and "7.jpg is not a readable image" in told and "0.jpg" not in told
    trained = run(tmp_path / "data", tmp_path, "--stage", "prune", "--teacher", "none", "--workers", "2")
    assert trained.returncode == 1 and len(trained.stderr.strip().splitlines()) == 1
    assert "7.jpg is not a readable image" in trained.stderr


def test_without_weights_it_says_what_is_missing(here):
    code, told, wrong = here("--stage", "sweep", "--workers", 0)
    for name in ("mixnet_s", "mixnet_m", "mixnet_l", "legacy_senet154"):
        assert f"Put {name}.safetensors" in told
    assert code == 1 and "there is no student" in wrong and len(wrong.strip().splitlines()) == 1


def test_goes_on_with_the_teachers_that_are_there(tmp_path, here):
    for name in ("mixnet_s", "mixnet_m"):
        save_file(timm.create_model(name, num_classes=3).state_dict(), tmp_path / f"{name}.safetensors")
    args = [*(a for a in SMALL if a != "--untrained"), "--weights", tmp_path]
    code, said, wrong = here(*args, "--stage", "sweep", "--epoch-images", 8)
    assert code == 0, wrong
    rows = rows_of(tmp_path, "21_imagenet.imagenet")
    assert set(rows) == {"taught by labels", "taught by MixNet-S", "taught by MixNet-M"}
    assert "74.40" in said  # the published column stands beside
    assert "MixNet-M teaches instead" in said and "taught by MixNet-L: left out" in said
    # other weights are another experiment: the table that was there stays
    save_file(timm.create_model("mixnet_s", num_classes=3).state_dict(), tmp_path / "mixnet_s.safetensors")
    assert here(*args, "--stage", "evaluate", "--lr", 1e-5)[0] == 0
    assert rows_of(tmp_path, "21_imagenet.imagenet") == rows
    assert len([*(tmp_path / "out").glob("21_imagenet.imagenet.*.json")]) == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--epochs", "0"], "epochs"),
        (["--batch", "100000"], "do not fill a batch"),
    ],
)
def test_mistakes_are_one_line(here, args, words):
    code, _, wrong = here(*SMALL, "--stage", "prune", "--teacher", "none", *args)
    assert code == 1 and len(wrong.strip().splitlines()) == 1 and words in wrong


def test_validation_counts_every_image_once(folder):
    class Colour(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.cat([x.mean((2, 3)), x.new_full((len(x), 5), -9.0)], 1)

    val = open_images(folder, "val")
    r = validate(Colour(), val, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), 32, 36, batch_size=5, workers=0)
    assert (r["right"], r["n"], r["top1"], r["top5"]) == (12, 12, 100.0, 100.0) and passes(r) and 0 <= r["waiting"] <= 1
    assert validate(Colour(), val, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), 32, 36, workers=0, n=6)["n"] == 6


def test_validation_transform_is_resize_then_centre_crop():
    from torchvision.transforms import functional as T

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    want = T.center_crop(T.resize(image, 256, T.InterpolationMode.BICUBIC), 224)
    assert np.array_equal(transforms(False)(image).numpy(), np.asarray(want).transpose(2, 0, 1))
    assert transforms(True)(image).shape == (3, 224, 224) and transforms(True)(image).dtype == torch.uint8


def test_bar_is_a_count():
    assert BAR == (37_500, 50_000) and passes(dict(right=37_500, n=50_000)) and not passes(dict(right=37_499, n=50_000))


def test_published_rows_are_the_slides():
    top1 = {r["row"]: r["top1"] for r in slide_rows()}
    pruned, distilled = ("Sparse, large layer >= 50 %",), ("taught by labels", "taught by MixNet-L")
    names = ("Original", *pruned, *distilled, "Sparse_AQ6", "Sparse_AQ7_WQ")
    assert [top1[n] for n in names] == [75.98, 75.56, 74.4, 75.0, 75.51, 75.05]


# --- one trained net

LITE = "--model", "tf_efficientnet_lite0", "--size", 32, "--workers", 0


@pytest.fixture
def lite(tmp_path):
    "Writes weights of lite0 that are always sure of one class; returns the file."

    def write(classes, sure_of, name="lite0.safetensors"):
        net = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
        net.classifier.bias.data[sure_of] = 1e6
        save_file(net.state_dict(), tmp_path / name)
        return tmp_path / name

    return write


def test_a_net_is_judged_on_validation_images(here, lite):
    code, told, wrong = here(*LITE, "--weights", lite(3, 1))
    assert code == 0, wrong
    assert "top-1 33.33 % (4 of 12, 95 % interval 13.8 to 60.9)" in told and "validation images" in told
    assert "(2 of 6," in here(*LITE, "--weights", lite(3, 1), "--limit", 6)[1]


def test_the_sample_is_never_called_imagenet_accuracy(here, lite, tmp_path):
    (folder := tmp_path / "sample").mkdir()
    from timm.data import ImageNetInfo

    for number in ImageNetInfo().label_names():
        Image.new("RGB", (8, 8)).save(folder / f"{number}_thing.png")
    code, told, wrong = here(*LITE, "--data", folder, "--weights", lite(1000, 250), "--limit", 4)
    assert code == 0, wrong
    assert "(1 of 4," in told and "training set, which the net has seen: this is no ImageNet accuracy" in told


def test_images_that_calibrate_do_not_judge(folder, tmp_path):
    import shutil

    _, calibrate, judge = real_images(folder, True)
    assert calibrate.files == open_images(folder).files and judge.files == open_images(folder, "val").files
    shutil.copytree(folder / "val", tmp_path / "only" / "val")
    which, calibrate, judge = real_images(tmp_path / "only", True)
    names = [{part.name(i) for i in range(len(part.labels))} for part in (calibrate, judge)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 12 and "every second" in which
    assert set(judge.labels) == {0, 1, 2} and real_images(tmp_path / "only", False)[1] is None


def test_compression_is_judged_beside_the_net(here, lite, monkeypatch):
    given = {}

    def compress(net, images, budget, labels, path, track):
        given.update(path=path, track=track, shape=images.shape, budget=budget, labels=labels, low=float(images.min()))
        other = timm.create_model("tf_efficientnet_lite0", num_classes=3)
        other.classifier.bias.data[2] = 1e6
        return types.SimpleNamespace(net=other, report="a report")

    monkeypatch.setitem(sys.modules, "micronet_nb.compressing", types.SimpleNamespace(compress=compress))
    args = *LITE, "--weights", lite(3, 1), "--calibration", 6
    code, told, wrong = here(*args, "--compress", "bytes=1.5e6", "--file", "net.safetensors")
    assert code == 0, wrong
    assert given["shape"] == (6, 3, 32, 32) and given["budget"] == {"bytes": 1.5e6} and -1 <= given["low"] < 0
    assert given["path"] == "net.safetensors" and given["track"] == "imagenet"
    assert given["labels"].tolist() == [0, 0, 1, 1, 2, 2]  # of the training images
    assert "a report" in told and "agree on 0.00 %" in told and "4 are right before alone, 4 after alone" in told
    assert here(*args, "--compress", "8-bit")[0] == 0 and given["budget"] == "8-bit"


@pytest.mark.parametrize(
    "args, words",
    [
        (["--weights", "random"], "an untrained net's answers mean nothing"),
        (["--weights", "no/such.pth"], "no/such.pth does not exist"),
        (["--model", "resnet18", "--weights", "package"], "no package has the weights of resnet18"),
        (["--stage", "prune"], "leave them out beside --model"),
        (["--limit", "0"], "at least one image"),
        (["--file", "net.safetensors"], "give both, or neither"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_with_one_net_are_one_line(here, args, words):
    code, _, wrong = here(*LITE, *args)
    assert code == 1 and len(wrong.strip().splitlines()) == 1 and words in wrong


def test_weights_run_no_code(here, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"classifier.bias": Evil()}, tmp_path / "evil.pth", pickle_module=pickle)
    code, _, wrong = here(*LITE, "--weights", tmp_path / "evil.pth")
    assert code == 1 and "evil.pth does not fit" in wrong and not (tmp_path / "ran").exists()
