"Nets and loaders from elsewhere: images from whatever holds them, what is refused, and nets in training as files."

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from micronet_nb.activations import activation_quantisers, calibrate, quantise_activations
from micronet_nb.core import MicronetError
from micronet_nb.layers import image_batches, labelled_batches
from micronet_nb.lowering import lower
from micronet_nb.own_nets import _opened, _sealed, check, load_net, save_net
from micronet_nb.packing import pack
from micronet_nb.pruning import mask_of, prune
from micronet_nb.scoring import FREE
from micronet_nb.training import estimate_norms, evaluate
from micronet_nb.weights import bit_table, quantise_weights, quantiser_of, width_table

IMAGES, LABELS = torch.linspace(-1, 1, 7 * 3 * 8 * 8).view(7, 3, 8, 8), torch.arange(7)


class Stored(Dataset):
    "One image and its label at a time, as plain Python has them."

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return IMAGES[i], int(LABELS[i])


class Streamed(IterableDataset):
    "One dict at a time."

    def __iter__(self):
        yield from (dict(pixel_values=x, target=y) for x, y in zip(IMAGES, LABELS))


def sources():
    yield "pair", (IMAGES, LABELS)
    yield "tuples", [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]
    yield "lists", ([x, y, "more"] for x, y in zip(IMAGES.split(2), LABELS.split(2)))
    yield "loader", DataLoader(Stored(), batch_size=3)
    yield "dict", dict(label=LABELS, x=IMAGES)
    yield "dicts", [dict(img=IMAGES[:5], labels=LABELS[:5].tolist()), dict(img=IMAGES[5:], labels=LABELS[5:].tolist())]
    yield "stored", Stored()
    yield "tensors", TensorDataset(IMAGES, LABELS)
    yield "streamed", Streamed()


@pytest.mark.parametrize("name, source", [pytest.param(*s, id=s[0]) for s in sources()])
def test_images_and_labels_come_in_order_from_any_source(name, source):
    pairs = list(labelled_batches(source, 2))
    assert torch.cat([x for x, _ in pairs]).equal(IMAGES) and torch.cat([y for _, y in pairs]).equal(LABELS)
    assert max(len(x) for x, _ in pairs) <= 2 and pairs[0][1].dtype == torch.int64
    if name != "lists":  # a generator, used up
        assert torch.cat(list(image_batches(source, 2))).equal(IMAGES)


def test_the_first_known_name_of_a_dict_counts_and_then_the_only_image():
    other = torch.zeros(7, 3, 8, 8)
    for batch in (dict(image=other, pixel_values=IMAGES), dict(input=other, img=IMAGES), dict(a=LABELS, photo=IMAGES)):
        assert next(image_batches(batch)).equal(IMAGES)
    with pytest.raises(MicronetError, match="batch 1 is a dict of 'a', 'b', with 2 tensors of four dimensions"):
        list(image_batches([IMAGES, dict(a=other, b=IMAGES)]))


def spoilt(i):
    images = IMAGES.clone()
    images[i, 1, 2, 3] = torch.nan
    return images


@pytest.mark.parametrize(
    "source, words",
    [
        ((IMAGES * 255).byte(), "normalised and floating point, not torch.uint8"),
        ([IMAGES, spoilt(2)], r"image 2 of batch 1 \(9 in all\) holds NaN or infinity: repair it"),
        ([], "there are no images: the source is empty, or an iterator that has been used up"),
        (iter(()), "there are no images"),
        (IMAGES[:0], "there are no images"),
        (IMAGES[0], r"the batch has the shape \(3, 8, 8\): a batch is \(n, channels, height, width\), one image is"),
        ([IMAGES.flatten(1)], r"batch 0 has the shape \(7, 192\)"),
        (5, "int holds no images: give a tensor"),
        ([["photo.jpg"]], "batch 0 holds a str for images: make it a tensor"),
    ],
)
def test_what_is_no_image_is_refused_with_its_place(source, words):
    with pytest.raises(MicronetError, match=words):
        list(image_batches(source))


@pytest.mark.parametrize(
    "source, words",
    [
        (IMAGES, "the batch has no labels: give tuples"),
        ([dict(image=IMAGES)], "batch 0 has no labels"),
        ([(IMAGES, LABELS[:3])], r"labels torch.int64 \(3,\) for 7 images"),
        ([(IMAGES, torch.zeros(7, 10))], r"labels torch.float32 \(7, 10\) for 7 images: give class numbers"),
        ([(IMAGES, "cats")], "has a str for labels"),
    ],
)
def test_labels_that_are_none_are_refused(source, words):
    with pytest.raises(MicronetError, match=words):
        list(labelled_batches(source))


def small():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Hardswish()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


class Shuffled:
    "A loader that gives another order in each pass; it counts them."

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from IMAGES.roll(self.passes - 1, 0).split(3)


def test_tables_read_a_loader_once():
    net, source = small().eval(), Shuffled()
    table = bit_table(net, source, (4,), quiet=True)
    assert source.passes == 1
    assert table.kl.tolist() == pytest.approx(bit_table(net, IMAGES, (4,), quiet=True).kl.tolist(), abs=1e-6)
    source = Shuffled()
    width_table(net, source, source, (4,), (8,), quiet=True)
    assert source.passes == 1


def test_samples_and_a_dict_of_images_are_told_apart():
    net, batch = small().eval(), dict(image=IMAGES)
    samples = calibrate(net, batch)
    scales = [
        [float(q.scale) for q in quantise_activations(copy.deepcopy(net), s, 4).values()] for s in (samples, batch)
    ]
    assert scales[0] == scales[1]
    graph = lower(net, iter([batch]))
    assert graph.meta["input_size"] == (3, 8, 8)
    judged = evaluate(net, [dict(image=IMAGES, label=LABELS)], lambda x: x)
    assert judged == evaluate(net, [(IMAGES, LABELS)], lambda x: x) and judged["n"] == 7


# --- batch norms


def test_norms_are_those_of_torch_and_modes_and_momenta_stay():
    net = small()
    net[1].momentum, net[2].training = 0.37, False
    twin = copy.deepcopy(net)
    assert estimate_norms(net, DataLoader(Stored(), batch_size=3)) == ["1"]
    update_bn(IMAGES.split(3), twin)
    assert all(v.equal(twin.state_dict()[k]) for k, v in net.state_dict().items())
    assert net[1].momentum == 0.37 and [m.training for m in net] == [True, True, False] + [True] * 5


def test_norms_see_the_net_without_its_dice():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).eval()
    estimate_norms(net, IMAGES)
    assert torch.allclose(net[1].running_mean, IMAGES.mean((0, 2, 3)), atol=1e-6)


def test_norms_stay_where_the_estimate_fails():
    net = small()
    kept = copy.deepcopy(net.state_dict())
    with pytest.raises(MicronetError, match="image 2 of batch 1"):
        estimate_norms(net, [IMAGES, spoilt(2)])
    assert all(v.equal(kept[k]) for k, v in net.state_dict().items()) and net[1].momentum == 0.1 and net[1].training


# --- check


class Odd(nn.Module):
    "Two operations that nobody knows, in a module of its own."

    def forward(self, x):
        return torch.erfc(torch.lgamma(x.abs() + 1))


def odd():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Odd(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10))


def reasons(found, step):
    return list(found.table[(found.table.step == step) & ~found.table.ok].reason)


def test_all_that_is_refused_is_told_at_once_and_the_net_stays():
    net = odd().train()
    kept = copy.deepcopy(net.state_dict())
    dice = torch.get_rng_state()
    found = check(net, IMAGES)
    assert not found.ok
    for step, ops in dict(score=("'lgamma'", "'erfc'"), lower=("'lgamma'", "'erfc'")).items():
        told = reasons(found, step)
        assert all(sum(op in r and "module '" in r for r in told) == 1 for op in ops) and len(told) == len(ops), told
    for step in ("run_integer", "pack", "Runner", "to_onnx"):
        assert reasons(found, step) == ["not tried: it takes what lower makes"]
    assert not any(reasons(found, step) for step in ("prune", "quantise_weights", "quantise_activations", "reach"))
    assert net.training and all(v.equal(kept[k]) for k, v in net.state_dict().items())
    assert type(net[0]) is nn.Conv2d and not net[0]._forward_pre_hooks and torch.get_rng_state().equal(dice)


def test_score_is_asked_although_lower_refuses(monkeypatch):
    monkeypatch.setattr("micronet_nb.scoring.FREE", FREE | {"lgamma", "erfc"})
    found = check(odd(), IMAGES)
    assert not reasons(found, "score") and len(reasons(found, "lower")) == 2


def test_a_net_that_goes_through_and_one_that_has_quantisers():
    found = check(small(), DataLoader(Stored(), batch_size=3))
    steps = ["score", "reach", "prune", "quantise_weights", "quantise_activations", "lower", "run_integer", "pack"]
    assert found.ok and list(found.table.step) == [*steps, "Runner", "to_onnx"]
    net = small().eval()
    quantise_weights(net, 3)
    assert check(net, IMAGES).ok and {quantiser_of(net[0]).bits} == {3}
    assert "Sequential: every step takes it" in check(net, IMAGES)._repr_html_()


def test_weights_out_of_reach_do_not_pass():
    net = nn.Sequential(nn.Conv3d(3, 4, 2), nn.Conv2d(4, 4, 1), nn.Flatten())
    assert "0.weight (Conv3d)" in reasons(check(net, IMAGES), "reach")[0]
    assert "there is nothing to prune" in reasons(check(nn.Flatten(), IMAGES), "reach")[0]


def test_blocks_that_are_alike_share_a_line():
    found = check(nn.Sequential(*[Odd() for _ in range(4)], nn.Conv2d(3, 2, 1)), IMAGES)
    told = reasons(found, "lower")
    assert len(told) == 2 and all(r.endswith("(and 3 more like it)") for r in told)


def test_no_net_makes_it_raise_but_no_image_does():
    uncopied = small()
    uncopied.log = (i for i in ())
    for net, words in (
        (nn.Conv2d(5, 2, 1), "5 channels"),
        (uncopied, "cannot be copied"),
        (nn.LazyConv2d(2, 1), "lazy"),
    ):
        assert any(words in r for r in check(net, IMAGES).table.reason)
    with pytest.raises(MicronetError, match="holds NaN"):
        check(small(), spoilt(1))
    with pytest.raises(MicronetError, match="check wants an nn.Module, not a function"):
        check(lambda x: x, IMAGES)


# --- files


def compressed(seed=0):
    torch.manual_seed(seed)
    net = small()
    quantise_activations(net, IMAGES, {"0": 8, "3": 5}, affine=True, learn=True)
    quantise_activations(net, IMAGES, 6, before=(nn.Hardswish,))
    prune(net, {"0": 0.5, "3": 0.7}, "dynamic")
    quantise_weights(net, {"0": 3, "3": 4, "7": 2}, learn=True)
    net.input_stats = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    net[7].bias.requires_grad_(False)
    return net


def steps(net, n, state=None):
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    if state:
        optimiser.load_state_dict(copy.deepcopy(state))
    for _ in range(n):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(IMAGES), LABELS).backward()
        optimiser.step()
    return optimiser.state_dict()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(v.equal(b[k]) for k, v in a.items())


def test_a_fresh_net_gets_all_and_goes_on_as_the_other(tmp_path):
    net = compressed()
    state = steps(net, 3)
    path = save_net(net, tmp_path / "net.safetensors")
    again = load_net(small(), path)
    assert equal(net, again) and again(IMAGES).equal(net(IMAGES))
    assert again.input_stats == net.input_stats and again.no_weight_decay() == net.no_weight_decay()
    said = [[(n, p.requires_grad) for n, p in m.named_parameters()] for m in (net, again)]
    assert said[0] == said[1] and ("7.bias", False) in said[0]
    assert mask_of(again[3]).dense_gradient and quantiser_of(again[3]).bits == 4
    for m in (net, again):
        steps(m, 4, state)
    assert equal(net, again)
    files = [pack(lower(m, IMAGES), tmp_path / f"{i}").read_bytes() for i, m in enumerate((net, again))]
    assert files[0] == files[1]


def test_a_learned_scale_below_zero_comes_back(tmp_path):
    net = compressed()
    activation_quantisers(net)["0"].scale.data.neg_()
    again = load_net(small(), save_net(net, tmp_path / "net"))
    assert activation_quantisers(again)["0"].scale < 0 and again(IMAGES).equal(net(IMAGES))


def test_what_a_net_carries_gives_way_to_what_the_file_has(tmp_path):
    path = save_net(small(), tmp_path / "plain")
    net = load_net(compressed(1), path)
    assert activation_quantisers(net) == {} and [type(m) for m in net][::3] == [nn.Conv2d, nn.Conv2d, nn.Flatten]
    assert equal(net, load_net(small(), path))


def test_tied_weights_and_a_shared_layer(tmp_path):
    def tied():
        net = nn.ModuleDict(dict(a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
        net.b.weight = net.a.weight
        net["c"] = net.a
        return net

    net = tied()
    quantise_weights(net, {"a": 3})
    again = load_net(tied(), save_net(net, tmp_path / "net"))
    assert equal(net, again) and again.c is again.a and again.b.weight is again.a.parametrizations.weight.original


def refused(net, path, *words):
    kept, kinds = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(MicronetError) as e:
        load_net(net, path)
    assert all(w in str(e.value) for w in (str(path), *words)) and "\n" not in str(e.value), str(e.value)
    assert [type(m) for m in net.modules()] == kinds and all(v.equal(kept[k]) for k, v in net.state_dict().items())


def test_another_net_is_refused_and_stays(tmp_path):
    path = save_net(compressed(), tmp_path / "net")
    wider = small()
    wider[0] = nn.Conv2d(3, 5, 3)
    refused(wider, path, "is of another Sequential: 0.weight is (4, 3, 3, 3)", "(5, 3, 3, 3)")
    refused(small()[:7], path, "the net has no 7.bias, 7.weight")
    refused(small().append(nn.Linear(10, 2)), path, "the file has no 8.bias, 8.weight")
    refused(small().half(), path, "torch.float32 in the file and", "torch.float16")
    refused(nn.Linear(2, 2), path, "another net (Sequential, this one is Linear)")


def test_a_damaged_file_is_refused(tmp_path):
    path = save_net(compressed(), tmp_path / "net")
    data = path.read_bytes()
    for i in range(0, len(data), 97):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        refused(small(), path, "damaged")
    for n in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:n])
        refused(small(), path, "damaged")
    refused(small(), pack(lower(small(), IMAGES), tmp_path / "packed"), "is no file that save_net wrote")
    refused(small(), tmp_path / "none", "does not exist")


def forged(path, change):
    "A file with another description and a right checksum."
    about, tensors = _opened(path)
    change(about, tensors)
    path.write_bytes(_sealed(tensors, about))


@pytest.mark.parametrize(
    "change",
    [
        lambda about, tensors: about["weights"]["3"][1].update(bits=40),
        lambda about, tensors: about["weights"]["3"][1].pop("learn"),
        lambda about, tensors: about["inputs"]["0"].update(low=7),
        lambda about, tensors: about["inputs"].update({"9": about["inputs"]["0"]}),
        lambda about, tensors: about["weights"].update({"1": [dict(kind="mask", dense_gradient=True)]}),
        lambda about, tensors: tensors.pop("mask/0"),
        lambda about, tensors: tensors.update({"mask/0": torch.ones(2, dtype=torch.bool)}),
        lambda about, tensors: tensors.update({"scale/3": torch.full((4, 1, 1, 1), torch.nan)}),
        lambda about, tensors: about.pop("order"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path, change):
    path = save_net(compressed(), tmp_path / "net")
    forged(path, change)
    refused(small(), path, "describes no Sequential")


def test_a_newer_file_is_refused(tmp_path):
    path = save_net(small(), tmp_path / "net")
    forged(path, lambda about, tensors: about.update(version=2))
    refused(small(), path, "newer than this micronet_nb")


def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(tmp_path):
    path = save_net(small(), tmp_path / "net")
    before = path.read_bytes()
    broken, strange = small(), compressed()
    broken[3].weight.data[0] = torch.inf
    nn.utils.parametrize.register_parametrization(strange[3], "weight", nn.Tanh(), unsafe=True)
    for net, words in ((broken, "3.weight holds NaN or infinity"), (strange, "Tanh stands on the weight of '3'")):
        with pytest.raises(MicronetError, match=words):
            save_net(net, path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["net"]
