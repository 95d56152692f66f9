"The training recipe, by numbers that are worked out by hand: pixels, order, steps, averages, and what is measured."

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from micronet_nb import cifar100, imagenet
from micronet_nb.cifar100 import data_of, steps_of
from micronet_nb.data import Dataset, dataset_stats, load_dataset, normalise
from micronet_nb.layers import dense_weight
from micronet_nb.pruning import mask_of, prune
from micronet_nb.training import FitConfig, augment, crop_flip, cut, epoch_batches, evaluate, fit, fit_stage, hard_loss
from micronet_nb.training import normalised, study_data

PLAIN = FitConfig(epochs=1, batch_size=32, lr=0.1, warmup_epochs=0.0, weight_decay=0.0, momentum=0.0, augment="none")


def images(n, classes=4, side=8):
    "A data set of noise."
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, side, side), generator=g, dtype=torch.uint8)
    return Dataset(x, torch.randint(0, classes, (n,), generator=g), [str(c) for c in range(classes)], "noise", "train")


def net(classes=4):
    "A linear net, seeded."
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))


# ------------------------------------------------------------------ pixels

STATS = (0.5, 0.25, 0.0), (0.25, 0.5, 1.0)


def test_pixels_lose_their_mean_and_are_divided_by_their_deviation():
    x = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    for found in (normalise(x, *STATS), normalised(x / 255, STATS)):
        assert found.flatten().tolist() == [2, 1.5, 1]


def test_statistics_of_two_values():
    "Half of the pixels 0, half 255: mean and deviation .5."
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    two = Dataset(x.contiguous(), torch.zeros(2, dtype=torch.int64), ["a"], "two", "train")
    assert dataset_stats(two) == ((0.5,) * 3, (0.5,) * 3)


def black(x, dim):
    "Rows (dim 2) or columns (dim 3) of each image that are all black."
    return (x.amax((1, 5 - dim)) == 0).sum(1)


def test_crops_reach_an_eighth_of_the_side_and_half_are_mirrored():
    "White images: a crop that is moved by d pixels has d black rows, or columns."
    white, g = torch.full((600, 3, 32, 32), 255, dtype=torch.uint8), torch.Generator().manual_seed(0)
    x = augment(white, "flip", g)
    for dim in (2, 3):
        assert {*black(x, dim).tolist()} == {0, 1, 2, 3, 4}
    for edge in (x[:, :, :4], x[:, :, -4:], x[..., :4], x[..., -4:]):
        assert (edge.amax((1, 2, 3)) == 0).any()
    assert torch.equal(augment(white, "none"), white / 255)
    left = torch.zeros(600, 3, 8, 8)
    left[..., 0] = 1
    x = crop_flip(left, 0, True, g)
    mirrored = x[..., 7].amax((1, 2)) == 1
    assert 240 < int(mirrored.sum()) < 360 and torch.equal(x[~mirrored], left[~mirrored])
    assert torch.equal(crop_flip(left, 0, False, g), left)


def test_a_cut_square_has_its_side():
    grey = (cut(torch.ones(200, 3, 32, 32), 8, torch.Generator().manual_seed(0)) == 0.5).sum((1, 2, 3)) / 3
    assert int(grey.max()) == 64 and int(grey.min()) >= 16  # a quarter, where the point is in a corner


# ------------------------------------------------------------------ order


def seen(config, epoch, skip=0, n=40):
    "The numbers of the images of an epoch, batch by batch."
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 8, 8)
    batches = epoch_batches(x, torch.zeros(n), config, epoch, skip)
    return [(b * 255).round().int()[:, 0, 0, 0].tolist() for b, _ in batches]


def test_each_epoch_and_seed_has_an_order_of_its_own():
    config = replace(PLAIN, batch_size=8)
    orders = [seen(config, 0), seen(config, 1), seen(replace(config, seed=1), 0)]
    for o in orders:
        assert sorted(sum(o, [])) == list(range(40)) and [len(b) for b in o] == [8] * 5
    assert orders[0] != orders[1] != orders[2] != orders[0] and seen(config, 0) == orders[0]


def test_a_resumed_epoch_goes_on_with_the_batches_that_are_left():
    config = replace(PLAIN, batch_size=8)
    for skip in range(6):
        assert seen(config, 1, skip) == seen(config, 1)[skip:]
    x, y = images(256).images, images(256).labels
    config = replace(config, augment="riair")
    whole, rest = (list(epoch_batches(x, y, config, 1, skip, 4)) for skip in (0, 6))
    for (a, b), (c, d) in zip(whole[6:], rest, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


class Stop(Exception):
    "A run that is broken off."


class Breaks:
    "A callback that breaks a run off at a step."

    def __init__(self, step):
        self.step = step

    def on_update(self, run):
        if run.step == self.step:
            raise Stop


@pytest.mark.parametrize("step", [3, 8, 13])
def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(step, tmp_path):
    data, config = (images(256), images(64)), replace(PLAIN, epochs=2, momentum=0.9, ema=0.5, augment="riair")
    whole = fit(net(), data, config, quiet=True)
    with pytest.raises(Stop):
        fit(net(), data, config, callbacks=[Breaks(step)], folder=tmp_path, every=0.0, quiet=True)
    rest = fit(net(), data, config, folder=tmp_path, quiet=True)
    for a, b in ((whole.model, rest.model), (whole.ema.module, rest.ema.module)):
        for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(v, w)
    assert [r["valid_loss"] for r in whole.history] == [r["valid_loss"] for r in rest.history]


# ------------------------------------------------------------------ steps


class Number(nn.Module):
    "One weight of 3; its logits' mean is the weight, whose gradient is 1."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x):
        return self.w * torch.ones(len(x), 4)


class Rates:
    "A callback that notes the learning rate and the weight of each step."

    def __init__(self):
        self.lr, self.w = [], []

    def on_step(self, run):
        self.lr.append(run.lr)

    def on_update(self, run):
        self.w.append(run.model.w.item())


def mean(logits, target, teacher_logits, config):
    return logits.mean()


def test_a_step_is_nesterovs_with_decay_on_all_parameters():
    "With decay .1 the gradient is 1.3, the velocity too, and the step .1 (1.3 + .9 1.3): 3 - .247; and so on."
    told, config = Rates(), replace(PLAIN, lr=0.1, weight_decay=0.1, momentum=0.9)
    fit(Number(), (images(64), None), config, callbacks=[told], loss=mean, quiet=True)
    v = 1.3
    w = 3 - 0.1 * (1.3 + 0.9 * v)
    g = 1 + 0.1 * w
    v = 0.9 * v + g
    assert told.w == pytest.approx([w, w - told.lr[1] * (g + 0.9 * v)], rel=1e-6) and w == pytest.approx(2.753)


def test_the_rate_climbs_and_falls_as_half_a_cosine():
    told, config = Rates(), replace(PLAIN, epochs=4, warmup_epochs=1.0)
    fit(Number(), (images(64), None), config, callbacks=[told], loss=mean, quiet=True)
    cosine = [0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert told.lr == pytest.approx([0.001, 0.001 + 0.099 / 2, *cosine[2:]])  # two steps of warm-up, from a hundredth


def test_the_average_is_what_is_measured_and_kept(tmp_path):
    "Decay .5: the weight falls from 3 to 2.9 to 2.85; its average is (3 + 2.9)/2, then (2.95 + 2.85)/2 = 2.9."
    data, config = (images(64), images(32)), replace(PLAIN, ema=0.5)
    told, net = Rates(), Number()
    run = fit(net, data, config, callbacks=[told], loss=mean, quiet=True)
    average = (3 + told.w[0]) / 2
    average = (average + told.w[1]) / 2
    assert average == pytest.approx(2.9) and run.ema.module.w.item() == pytest.approx(average)
    assert run.model.w.item() == pytest.approx(told.w[1])
    kept = Number()
    found = fit_stage("s", kept, data, config, root=tmp_path, loss=mean, quiet=True)
    assert kept.w.item() == pytest.approx(average)
    (file,) = tmp_path.glob("*/model.safetensors")
    assert load_file(file)["w"].item() == pytest.approx(average) and found["steps"] == 2


def test_labels_are_smoothed_and_soft_ones_are_not():
    "Of .1 two classes get .05 each: logits log 3 and 0 have the losses log 4/3 and log 4."
    logits, config = torch.tensor([[math.log(3), 0.0]]), SimpleNamespace(label_smoothing=0.1)
    want = 0.95 * math.log(4 / 3) + 0.05 * math.log(4)
    assert float(hard_loss(logits, torch.tensor([0]), None, config)) == pytest.approx(want)
    assert float(hard_loss(logits, torch.tensor([[1.0, 0.0]]), None, config)) == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("method", ["static", "dynamic", "progressive"])
def test_what_training_does_to_masks_and_to_what_they_hide(method):
    "Static: nothing, whatever momentum and decay would do. Dynamic and progressive: other weights are seen in the end."
    model = net()
    pruner, layer = prune(model, 0.5, method), model[1]
    mask, before = mask_of(layer).mask.clone(), dense_weight(layer).detach().clone()
    config = replace(PLAIN, epochs=3, momentum=0.9, weight_decay=0.0 if method == "dynamic" else 0.01)
    fit(model, (images(256), None), config, callbacks=[pruner], quiet=True)
    now, w = mask_of(layer).mask, dense_weight(layer).detach()
    assert int(now.sum()) == int(mask.sum()) == 384 and not torch.equal(w[mask], before[mask])
    assert torch.equal(now, mask) == (method == "static")
    if method == "static":
        assert torch.equal(w[~mask], before[~mask])
    if method == "dynamic":
        assert (w != before)[~mask].float().mean() > 0.9  # not by decay: by gradients of their own


# ------------------------------------------------------------------ what is measured


class Evaluated(nn.Module):
    "Class 1 while it trains, class 0 in evaluation; its batch norm remembers what it has seen."

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.tensor([0.0, 1.0] if self.training else [1.0, 0.0]).repeat(len(self.norm(x)), 1)


def test_nets_are_evaluated_in_evaluation_mode():
    x = images(50, 2)
    zeros = Dataset(x.images, torch.zeros(50, dtype=torch.int64), x.classes, "noise", "test")
    model = Evaluated().train()
    before = model.norm.running_mean.clone()
    found = evaluate(model, zeros, STATS, batch_size=20)
    assert found == dict(top1=100.0, loss=pytest.approx(math.log(1 + math.exp(-1))), n=50)
    assert model.training and model.norm.training and torch.equal(model.norm.running_mean, before)


def test_the_teacher_is_in_evaluation_mode():
    told = []

    def loss(logits, target, teacher_logits, config):
        told.append(teacher_logits)
        return logits.mean()

    fit(Number(), (images(64), None), PLAIN, teacher=Evaluated().train(), loss=loss, quiet=True)
    assert all(torch.equal(t, torch.tensor([[1.0, 0.0]]).repeat(32, 1)) for t in told) and len(told) == 2


def test_accuracy_is_the_share_of_right_answers():
    x = images(8, 4)
    some = Dataset(x.images, torch.tensor([0, 1, 2, 3, 3, 3, 0, 0]), x.classes, "noise", "test")
    three = net()  # says 3, whatever it sees
    three[1].weight.data.zero_()
    three[1].bias.data = torch.tensor([0.0, 0.0, 0.0, 1.0])
    found = evaluate(three, some, STATS, batch_size=3)
    assert found["top1"] == 37.5 and evaluate(three, some, STATS, n=6)["top1"] == 50.0
    assert found["loss"] == pytest.approx(math.log(3 + math.e) - 3 / 8)


def test_studies_train_validate_and_test_on_different_images():
    (train, valid), test, stats = study_data("embedded")
    assert [d.split for d in (train, valid, test)] == ["train", "valid", "test"] and stats == dataset_stats(train)
    (whole, none), unseen, _ = data_of("embedded", whole=True)
    assert none is None and whole.describe() == load_dataset("digits", "trainvalid").describe()
    assert len(whole) == len(train) + len(valid) and unseen.describe() == test.describe()


def test_a_seed_reaches_every_step():
    assert {s.fit.seed for s in steps_of("embedded", "study", 3)} == {3}
    assert [s.fit.seed for s in steps_of("embedded", "study", 3, 5)][-2:] == [3, 5]


def test_the_bar_of_the_challenge():
    assert imagenet.passes(dict(right=37_500, n=50_000)) and not imagenet.passes(dict(right=37_499, n=50_000))
    assert not imagenet.passes(dict(right=374, n=500)) and imagenet.passes(dict(right=375, n=500))


def test_still_batch_norms_learn_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    cifar100.FrozenNorms().on_step(SimpleNamespace(model=model))
    assert not model[0].training and model[1].training
