"""Compression without training: layers solved in closed form, plans under a budget, and the call in front of both."""

import copy
import itertools
import re
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import micronet_nb as mn
from micronet_nb.compressing import Alone, Report, _Budget, _divergences, _parts, _probes, allocate, compress
from micronet_nb.compressing import option_table, unlower
from micronet_nb.core import MicronetError
from micronet_nb.lowering import capture
from micronet_nb.post_training import METHODS, Grid, Moments, Walk, columns, descend, equalise, learn_rounding
from micronet_nb.post_training import _Learned, blocks_of, reconstruct, reconstruct_blocks, second_order, solve_layer
from micronet_nb.pruning import put_masks
from micronet_nb.training import paired, wilson


def problem(out=6, k=10, groups=1, seed=0):
    "Weights, and second moments of inputs that hang together."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, k, 4 * k, generator=g) + 2 * torch.randn(groups, 1, 4 * k, generator=g)
    return torch.randn(groups, out, k, generator=g), x @ x.mT / (4 * k)


def whole(w, bits=3, keep=None):
    "A grid of scale 0.4."
    return Grid(torch.ones_like(w, dtype=torch.bool) if keep is None else keep, bits, torch.full_like(w[:, :, :1], 0.4))


def error(q, w, h):
    return ((q - w) @ h * (q - w)).sum()


def test_one_pass_is_what_a_plain_loop_gives():
    w, h = problem()
    order = h[0].diagonal().argsort(descending=True).tolist()
    left, want = w[0].double().clone(), torch.zeros_like(w[0], dtype=torch.float64)
    for n, j in enumerate(order):  # Frantar and Alistarh: the inverse of what is left, column after column
        free = order[n:]
        inverse = torch.linalg.inv(h[0].double()[free][:, free])
        want[:, j] = ((left[:, j] / 0.4).round().clamp(-3, 3)) * 0.4
        left[:, free] -= (left[:, j] - want[:, j])[:, None] * inverse[0] / inverse[0, 0]
    assert torch.allclose(second_order(w, h, whole(w))[0].double(), want, atol=1e-5)


def test_blocks_of_columns_change_nothing():
    w, h = problem(k=12)
    for solve in (
        lambda block: second_order(w, h, whole(w), block),
        lambda block: descend(whole(w).nearest(w), w, h, whole(w), block),
    ):
        assert torch.allclose(solve(3), solve(12), atol=1e-4)


def test_no_turn_makes_it_worse_and_the_end_is_a_minimum():
    w, h = problem()
    q, to = whole(w).nearest(w), whole(w)
    errors = [error(q, w, h)]
    for _ in range(10):
        q = descend(q, w, h, to)
        errors.append(error(q, w, h))
    assert all(b <= a + 1e-5 for a, b in zip(errors, errors[1:])) and errors[-1] < 0.9 * errors[0]
    for i, j, step in itertools.product(range(w.shape[1]), range(w.shape[2]), (-0.4, 0.4)):
        other = q.clone()
        other[0, i, j] = (other[0, i, j] + step).clamp(-1.2, 1.2)
        assert error(other, w, h) >= errors[-1] - 1e-4


def test_small_layers_come_near_the_best_of_all_grids():
    w, h = problem(out=1, k=4)
    to = whole(w, bits=2)
    best = min(error(torch.tensor(p)[None, None] * 0.4, w, h) for p in itertools.product((-1.0, 0.0, 1.0), repeat=4))
    found = second_order(w, h, to)
    for _ in range(5):
        found = descend(found, w, h, to)
    assert best - 1e-5 <= error(found, w, h) <= 1.3 * best
    assert error(found, w, h) <= error(to.nearest(w), w, h)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 4, 32])
def test_every_method_stays_on_the_grid_and_keeps_zeros(method, bits):
    w, h = problem(out=4, k=9, groups=3)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    s = solve_layer(w, h, bits, 0.5, method, mask)
    assert bool((s.q[~mask] == 0).all())
    assert int((~s.to.keep).sum()) == round(0.5 * w.numel()) and bool((s.q[~s.to.keep] == 0).all())
    if bits != 32:
        levels = (s.q / s.to.scale)[s.to.keep]
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        assert levels.abs().max() <= max(2 ** (bits - 1) - 1, 1) + 1e-4


def test_learned_rounding_goes_up_or_down_and_no_further():
    w, h = problem()
    to = whole(w, bits=8)
    q = learn_rounding(w, h, to, steps=200)
    assert ((q - w).abs() < 0.4 + 1e-5).all() and error(q, w, h) < error(to.nearest(w), w, h)


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_moments_are_those_of_numpy_however_far_from_zero(shift):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 400, generator=g) + shift, torch.randn(2, 5, 400, generator=g) - shift
    moments = Moments()
    for a, b in zip(x.split(130, 2), y.split(130, 2)):
        moments.add(a, b)
    h, cross, mean = moments.centred()
    for i in range(2):
        both = np.cov(np.concatenate([x[i].double(), y[i].double()]), bias=True)
        assert np.allclose(h[i], both[:5, :5], atol=1e-3) and np.allclose(cross[i], both[5:, :5], atol=1e-3)
    assert torch.allclose(mean, x.mean(2), atol=1e-2)


class Net(nn.Module):
    "Two convolutions, one of them used twice, a norm, and a linear layer; one layer never runs."

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.twice, self.head, self.never = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 5), nn.Linear(2, 2)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        for _ in range(2):
            y = F.relu(self.twice(y))
        return self.head(y.mean((2, 3)) * 10)


def net_and_images(n=24, seed=0):
    torch.manual_seed(seed)
    net = Net()
    for _ in range(5):
        net(torch.randn(32, 3, 12, 12))
    return net.eval(), torch.randn(n, 3, 12, 12)


def test_means_of_outputs_stay_and_nothing_is_left_behind():
    net, x = net_and_images()
    new = copy.deepcopy(net)
    threads, keys = threading.active_count(), net.state_dict().keys()
    table = reconstruct(new, x, 2, limit=10**6, follow=0.0, quiet=True)
    assert list(table.index) == ["first", "twice", "head"] and "never.weight" in table.attrs["untouched"].index
    with torch.no_grad():
        before, after = (m.norm(m.first(x)).mean((0, 2, 3)) for m in (net, new))
    assert torch.allclose(before, after, atol=1e-4)  # in the norm: the convolution has no bias, and gets none
    assert new.first.bias is None
    assert {k for k in new.state_dict() if "parametrizations" not in k} >= {k for k in keys if "weight" not in k}
    assert threading.active_count() == threads and not any(m._forward_pre_hooks for m in new.modules())
    assert len(new.first.weight[0].unique()) <= 3


def test_a_layer_sees_what_those_before_it_give():
    net, x = net_and_images()
    new, seen = copy.deepcopy(net), {}
    reconstruct(new, x, {"first": 2, "head": 8}, limit=10**6, follow=0.0, quiet=True)
    h = {}
    for name, model in dict(old=net, new=new).items():
        hook = model.head.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
        with torch.no_grad():
            model(x)
        hook.remove()
        c = columns(seen["x"], model.head.weight)
        moments = Moments()
        moments.add(c, c)
        h[name] = moments.centred()[0]
    w = net.head.weight.detach()[None]
    got = new.head.parametrizations.weight.original.detach()[None]
    by_new, by_old = (solve_layer(w, h[k], 8, damp=0.05).q for k in ("new", "old"))
    assert torch.allclose(got, by_new, atol=1e-5) and not torch.allclose(got, by_old, atol=1e-5)


def test_what_went_wrong_before_is_made_good():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5)).eval(), torch.randn(400, 10) @ torch.randn(10, 10)
    errors = []
    for follow in (0.0, 0.5, 1.0):
        new = copy.deepcopy(net)
        reconstruct(new, x, {"0": 2, "1": 12}, follow=follow, damp=1e-4, quiet=True)
        with torch.no_grad():
            errors.append(float((new(x) - net(x)).square().mean()))
    assert errors[2] < 0.9 * errors[1] < 0.8 * errors[0]


def test_masks_stay_and_a_rate_adds_to_them():
    net, x = net_and_images()
    mn.prune(net, {"first": 0.5})
    old = net.first.weight != 0
    reconstruct(net, x, 4, {"first": 0.75}, quiet=True)
    now = net.first.weight != 0
    assert int((~now).sum()) >= round(0.75 * now.numel()) and not bool((now & ~old).any())


def test_the_same_twice_and_in_any_mode():
    nets = []
    for training in (True, False):
        net, x = net_and_images()
        net.train(training)
        reconstruct(net, x, 3, 0.3, quiet=True)
        assert net.training is training
        nets.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(n.values() for n in nets)))


@pytest.mark.parametrize("name", ["ghostnet_050", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "convnext_atto"])
def test_nets_of_timm(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **(dict(img_size=32) if "vit" in name else {})).eval()
    x = torch.randn(8, 3, 32, 32)
    few = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:4]
    table = reconstruct(net, x, dict.fromkeys(few, 3), quiet=True, limit=16)
    assert set(table.index) <= set(few) and len(table) >= 3 and bool((table.error <= table.nearest + 1e-6).all())
    assert torch.isfinite(net(x)).all()


def test_a_net_that_chooses_its_way_is_refused_and_its_threads_end():
    class Chooses(Net):
        def forward(self, x):
            return super().forward(x) if x.mean() > 0 else self.head(self.twice(self.norm(self.first(x))).mean((2, 3)))

    torch.manual_seed(0)
    net, threads = Chooses().eval(), threading.active_count()
    x = torch.cat([torch.ones(4, 3, 8, 8), -torch.ones(4, 3, 8, 8)])
    with pytest.raises(MicronetError, match="may not choose its way by what it sees"):
        reconstruct(net, x, 4, batch_size=4, quiet=True)
    assert threading.active_count() == threads


def test_an_error_of_the_net_comes_through():
    class Breaks(Net):
        def forward(self, x):
            self.first(x)
            raise ZeroDivisionError("in the middle")

    walk = Walk(Breaks().eval(), torch.randn(2, 3, 8, 8))
    assert walk.step() == "first"
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        walk.step()


def test_a_damaged_layer_is_named_and_a_foreign_one_is_not_read(tmp_path):
    net, x = net_and_images()
    start = copy.deepcopy(net)
    reconstruct(net, x, 3, folder=tmp_path, quiet=True)
    (other,) = tmp_path.iterdir()
    (other / "0000.safetensors").write_bytes(b"not that")
    with pytest.raises(MicronetError, match="0000.safetensors .first. cannot be read"):
        reconstruct(copy.deepcopy(start), x, 3, folder=tmp_path, quiet=True)
    reconstruct(copy.deepcopy(start), x, 4, folder=tmp_path, quiet=True)  # other settings: another folder
    assert len([*tmp_path.iterdir()]) == 2


class Ways(nn.Module):
    "Norms, a depthwise layer, a shortcut, a gate, a layer used twice, a flattened end; every activation is a ReLU."

    def __init__(self, end=F.relu):
        super().__init__()
        self.stem, self.norm, self.deep = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.twice = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.gate, self.head, self.end = nn.Conv2d(8, 8, 1), nn.Linear(8 * 4, 5), end

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.wide(F.leaky_relu(self.deep(F.pad(x, (1, 0, 0, 1))), 0.1)[:, :, 1:, :-1])
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x = F.relu(self.twice(F.relu(self.twice(self.end(x)))))
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 2).flatten(1))


def ways(**how):
    "Such a net in double precision, its channels of different size, and images."
    torch.manual_seed(0)
    net, x = Ways(**how).double(), torch.randn(12, 3, 14, 14).double()
    for _ in range(5):
        net(x * 3 + 1)
    with torch.no_grad():
        for t in (net.norm.weight, net.norm.bias, net.twice.weight):
            t.mul_(torch.logspace(-1.5, 1, len(t)).view(-1, *[1] * (t.dim() - 1)))
    return net.eval(), x


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_an_equalised_net_answers_the_same(per):
    net, x = ways()
    new = copy.deepcopy(net)
    table = equalise(new, x, per=per)
    other = 5 * torch.randn(20, 3, 14, 14).double()  # for every input, not for these images only
    with torch.no_grad():
        assert (new(other) - net(other)).abs().max() < 1e-9
    assert table.channels.to_dict() == dict(stem=3, deep=8, wide=8, gate=8, twice=8, head=32)
    assert table.scaled.to_dict() == dict(stem=0, deep=8, wide=8, gate=8, twice=8, head=32)
    assert table.why["stem"] == "it is the image" and (table.after[1:] < table.before[1:] + 0.3).all()
    rows = new.stem.weight.detach().flatten(1).abs().amax(1)
    assert bool((rows.max() / rows.min() < 1.01) == (per == "tensor"))  # in front of a norm rows are alike


@pytest.mark.parametrize("end", [F.hardswish, F.relu6, torch.sigmoid, lambda x: x + 1, lambda x: F.softmax(x, 1)])
def test_what_lets_no_scale_through_ends_it(end):
    net, x = ways(end=end)
    new = copy.deepcopy(net)
    table = equalise(new, x)
    with torch.no_grad():
        assert (new(3 * x) - net(3 * x)).abs().max() < 1e-9
    assert table.scaled.to_dict() == dict(stem=0, deep=0, wide=8, gate=0, twice=0, head=0)  # `twice` sees both sides
    assert table.why["deep"] and table.why["twice"]
    assert torch.equal(new.twice.weight, net.twice.weight)


def test_below_a_clip_a_share_of_it_is_left():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1, groups=8)).double().eval(),
        torch.randn(9, 3, 6, 6),
    )
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))
    inside = lambda m: m[0](x.double()).clamp(min=0).amax((0, 2, 3))
    new = copy.deepcopy(net)
    table = equalise(new, x.double(), clips=0.5)
    quiet = inside(net) <= 3
    assert 0 < table.scaled["2"] == int(quiet.sum()) < 8 and table.why["2"] == "a clip is met"
    assert torch.allclose(inside(new)[quiet], torch.full((1,), 3.0).double())  # half of 6, and no louder
    assert torch.equal(inside(new)[~quiet], inside(net)[~quiet])
    assert torch.allclose(new(x.double()), net(x.double()), atol=1e-9)


class Tied(nn.Module):
    "A weight or a bias that a second function reads, or that the graph does not show to be read."

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), kind

    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.b(y * self.a.bias.view(1, -1, 1, 1) if self.kind == "bias" else y)
        if self.kind == "twice":
            return y + F.conv2d(y.sin(), self.b.weight)
        return y * float(self.b.weight.detach().abs().sum()) if self.kind == "hidden" else y


@pytest.mark.parametrize("kind", ["twice", "bias"])
def test_a_weight_that_serves_twice_stays(kind):
    torch.manual_seed(0)
    x, net = torch.randn(8, 3, 5, 5).double(), Tied(kind).double()
    new = copy.deepcopy(net)
    table = equalise(new, x)
    assert torch.equal(new.a.weight, net.a.weight) and torch.equal(new.b.weight, net.b.weight)
    assert table.scaled["b"] == 0 and table.why["b"]


def test_what_the_graph_hides_is_refused():
    torch.manual_seed(0)
    x, net = torch.randn(8, 3, 5, 5).double(), Tied("hidden").double()
    was = copy.deepcopy(net.state_dict())
    with pytest.raises(MicronetError, match="answers differently"):
        equalise(net, x)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in was.items())


def test_masks_stay_where_channels_are_scaled():
    net, x = ways()
    mn.prune(net, 0.5)
    new = copy.deepcopy(net)
    assert equalise(new, x).scaled["wide"] == 8
    assert torch.equal(new.wide.weight == 0, net.wide.weight == 0)
    assert (new(x) - net(x)).abs().max() < 1e-9


@pytest.mark.parametrize("name, layers", [("resnet10t", 14), ("convnext_atto", 12 + 3 + 1)])
def test_equalised_nets_of_timm(name, layers):
    "All layers but the first; those behind a norm of a token: one a block, those between stages, the head."
    torch.manual_seed(0)
    net, x = timm.create_model(name).eval().double(), torch.randn(2, 3, 64, 64).double()
    new = copy.deepcopy(net)
    table = equalise(new, x)
    with torch.no_grad():
        assert (new(x) - net(x)).abs().max() < 1e-9
    assert int((table.scaled > 0).sum()) == layers


def table_of(rows, rest=0.0):
    t = pd.DataFrame(rows, columns=["layer", "rate", "weight_bits", "input_bits", "error", "nonzero", "kl", "cost"])
    t.attrs["rest"] = rest
    return t


CHOICES = [
    (n, 0.0, b, 8, 0.0, 1, k, c)
    for n, ks in dict(a=(9, 3, 1), b=(2, 1, 0.5)).items()
    for b, k, c in zip((2, 3, 4), ks, (2.0, 3.0, 4.0))
]


@pytest.mark.parametrize("budget", [4.01, 5.01, 6.01, 7.01, 8.01])
def test_plans_are_the_best_of_all(budget):
    t = table_of(CHOICES, rest=0.0)
    plan = allocate(t, budget)
    pairs = itertools.product(*(t[t.layer == n].itertuples() for n in "ab"))
    best = min(x.kl + y.kl for x, y in pairs if x.cost + y.cost <= budget)
    assert plan.kl.sum() == best and plan.cost.sum() <= budget and list(plan.index) == ["a", "b"]


def test_budgets_mend_the_price_that_a_plan_knows_nothing_of():
    made = []

    def make(plan):
        made.append(plan)
        return plan

    work = _Budget(make, lambda plan: plan.cost.sum() + 2.0, table_of(CHOICES), 8.01)
    plan, got = work.price()
    assert got <= 8.01 and plan.cost.sum() == 6.0 and len(made) == 2
    with pytest.raises(MicronetError, match="out of reach"):
        _Budget(make, lambda plan: plan.cost.sum() + 5.0, table_of(CHOICES), 8.01).price()
    plan, lost = _Budget(make, lambda plan: plan.kl.sum(), table_of(CHOICES), 4.0).damage(turns=12)
    assert lost <= 4.0 and plan.cost.sum() == min(x for x, k in ((6.0, 4.0), (7.0, 2.0)) if k <= 4.0)
    with pytest.raises(MicronetError, match="the widest choices lose 1.5, and 1 are allowed"):
        _Budget(make, lambda plan: plan.kl.sum(), table_of(CHOICES), 1.0).damage()


def test_plans_are_mended_by_what_choices_do_together():
    rows = [(n, w, a) for n in "ab" for w in (4, 8) for a in (4, 8)]
    t = pd.DataFrame(rows, columns=["layer", "weight_bits", "input_bits"]).assign(rate=0.0, error=0.0, nonzero=1)
    t["kl_weights"], t["kl_input"] = t.weight_bits.map({4: 3.0, 8: 0.0}), t.input_bits.map({4: 1.0, 8: 0.0})
    t = t.assign(kl=t.kl_weights + t.kl_input, cost=t.weight_bits + t.input_bits)
    t.attrs["rest"], seen = 0.0, []

    def together(plan):
        "Two inputs of 4 bits do 50 times what each does, weights what they do alone."
        w, a = (
            3.0 * (plan.weight_bits == 4).sum(),
            (50.0 if (plan.input_bits == 4).all() else 1.0) * plan.kl_input.sum(),
        )
        seen.append(plan)
        return w + a, w, a

    work = _Budget(lambda plan: plan, lambda plan: plan.cost.sum(), t, 24.0, together)
    plan, got = work.price()
    assert (seen[0].input_bits == 4).all() and (plan.input_bits == 8).all() and (plan.weight_bits == 4).all()
    assert got == 24.0 and work.turns[0] == {"got": 24.0, "predicted": 2.0, "kl": 100.0} and work.turns[-1]["kl"] == 6.0
    assert len(seen) == 2  # the third plan is the second again


class Split(nn.Module):
    "Two ways that meet, between single layers."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.d, self.e = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.d(self.b(x) + self.c(x)))
        return self.e(x.mean((2, 3)))


def test_one_plan_takes_errors_alike():
    "Alone, layer a does ten times what b does at the same error; in company it does as much."
    errors = {3: 0.3, 4: 0.1, 5: 0.0}
    rows = [dict(layer=n, weight_bits=w, error=e) for n in "ab" for w, e in errors.items()]
    t = pd.DataFrame(rows).assign(rate=0.0, input_bits=8, nonzero=1, kl_input=0.0)
    t["kl_weights"] = t.error * t.layer.map({"a": 10.0, "b": 1.0})
    t = t.assign(kl=t.kl_weights, cost=t.weight_bits.astype(float))
    t.attrs["rest"] = 0.0

    def together(plan):
        kl = float(plan.weight_bits.map(errors).sum())
        return kl, kl, 0.0

    work = _Budget(lambda plan: plan, lambda plan: plan.cost.sum(), t, 8.0, together)
    plan, got = work.price()
    assert plan.weight_bits.to_dict() == {"a": 4, "b": 4} and got == 8.0
    assert work.turns[0]["kl"] == pytest.approx(0.3)  # 5 and 3 bits, by what each does alone


def test_blocks_end_where_one_tensor_carries_everything():
    graph, _ = capture(Split().eval(), torch.randn(2, 3, 6, 6))
    of = lambda least: [
        [n.meta["layer"] for n in b if n.meta["op"] in ("conv2d", "linear")] for b in blocks_of(graph, least)
    ]
    assert of(1) == [["a"], ["b", "c"], ["d"], ["e"]]
    assert of(3) == [["a"], ["b", "c", "d"], ["e"]]


def test_a_block_is_learned_and_nothing_else_is_touched():
    torch.manual_seed(0)
    net, x = Split().eval(), torch.randn(32, 3, 6, 6)
    small = copy.deepcopy(net)
    mn.quantise_activations(small, x, 5)
    put_masks(small, {"c": torch.rand(4, 4, 3, 3) > 0.5})
    reconstruct(small, x, 3, original=net, quiet=True)
    new, keys = copy.deepcopy(small), set(small.state_dict())
    table = reconstruct_blocks(new, x, net, 40, quiet=True)
    assert table.layers.to_list() == [1, 3, 1] and table.taken.any() and (table.after <= table.before).all()
    first = lambda m: F.relu(m.norm(m.a(x))).detach()
    for m, told in ((small, table.before), (new, table.after)):  # the first block's error, by hand
        assert float((first(m) - first(net)).square().mean() / first(net).var()) == pytest.approx(
            told.iloc[0], rel=1e-3
        )
    hidden = ~new.c.parametrizations.weight[0].mask
    assert not new.c.weight[hidden].any() and not _Learned(new.c, net.c)()[hidden].any()  # soft rounding, too
    for m in (new.a, new.c):
        integers = m.weight / m.parametrizations.weight[-1].scale
        assert torch.allclose(integers, integers.round(), atol=1e-4) and integers.abs().max() <= 3.001
    assert keys == set(new.state_dict()) and all(p.grad is None for m in (new, net) for p in m.parameters())
    again = copy.deepcopy(small)
    reconstruct_blocks(again, x, net, 40, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), again.state_dict().values()))


def test_alone_is_what_the_whole_net_gives():
    net, x = net_and_images()
    other = copy.deepcopy(net)
    other.twice.weight.data = other.twice.weight.data * 0.7
    (got,) = Alone(net, x, 7).divergence("twice", [dict(weight=other.twice.weight.detach())])
    with torch.no_grad():
        p, q = net(x).double().log_softmax(1), other(x).double().log_softmax(1)
    assert got == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    shifted = Alone(net, x, 7).divergence("head", [dict(shift=torch.ones(5))])
    assert shifted[0] == pytest.approx(0, abs=1e-5)  # all logits by the same


def test_prices_are_those_of_the_scorer():
    net, x = net_and_images()
    t = option_table(
        net, x, "operations", rates=(0.0, 0.5), weight_widths=(4,), input_widths=(8,), n_measured=8, quiet=True
    )
    lean = copy.deepcopy(net)
    mn.quantise_activations(lean, x, 8)
    reconstruct(lean, x, 4, original=net, quiet=True)
    s = mn.score(lean, (3, 12, 12)).layers
    want = s[s.name == "first"].eval("multiplies + adds").sum()
    got = t[(t.layer == "first") & (t.rate == 0)].cost.iloc[0]
    assert got == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("rates", [(0.0, 0.3, 0.5), (0.0,), (0.3, 0.5)])
def test_zeros_and_rounding_have_slopes_of_their_own(rates):
    g = np.random.default_rng(0)
    rows, truth = [], []
    for rate in rates:
        zeros = rate * g.uniform(0.01, 0.02)
        for bits in (3, 4, 8):
            rounding = 2.0 ** (-2 * bits) * g.uniform(1, 2) if bits < 8 or not rate else 0.0
            rows.append(dict(rate=rate, weight_bits=bits, error=zeros + rounding, nonzero=1))
            truth.append(7.0 * zeros + 0.2 * rounding)
    zeros, rounding = _parts(rows)
    probes = _probes(rows, zeros, rounding)
    told = _divergences(rows, {i: truth[i] for i in probes if i is not None}, zeros, rounding, probes)
    assert np.allclose(told, truth, rtol=1e-6) and (probes[0] is None) == (rates == (0.0,))


@pytest.mark.parametrize("price", ["score", "operations"])
def test_what_stands_beside_the_layers_is_priced(price):
    net, x = net_and_images(40)
    t = option_table(net, x, price, rates=(0.0,), weight_widths=(6,), input_widths=(7,), first_bits=7, quiet=True)
    c = compress(net, x, {price: 1e12}, rates=(0.0,), weight_widths=(6,), input_widths=(7,), first_bits=7, quiet=True)
    assert t.cost.sum() + t.attrs["rest"] == pytest.approx(c.report.budget["got"], rel=0.03)


def test_a_layer_costs_its_weights_however_they_are_masked():
    net, x = net_and_images(40)
    put_masks(net, {n: mn.pruning.magnitude_mask(m.weight, 0.6) for n, m in mn.layers.compressible(net).items()})
    few = dict(rates=(0.0, 0.8), weight_widths=(8,), input_widths=(8,), quiet=True)
    t = option_table(net, x, "operations", **few).set_index(["layer", "rate"])
    assert all(t.cost[n, 0.8] < t.cost[n, 0.0] for n in ("first", "twice", "head"))
    c = compress(net, x, dict(operations=1e9), **(few | dict(rates=(0.8,))))
    plain = t.xs(0.8, level="rate")
    assert plain.cost.sum() + t.attrs["rest"] == pytest.approx(c.report.budget["got"], rel=0.05)


def test_one_choice_is_a_plan():
    net, x = net_and_images(40)
    one = dict(rates=(0.0, 0.0), weight_widths=(8, 8), input_widths=(8,), quiet=True)
    c = compress(net, x, dict(disagreement=50), **one)
    assert c.report.budget["got"] <= 50 and {*c.report.layers.weight_bits} == {8}


def test_the_average_is_what_tuning_gives():
    net, x = net_and_images(40)
    seen = {}
    true_fit = mn.training.fit

    def watched(model, *args, **kwargs):
        seen["run"] = run = true_fit(model, *args, **kwargs)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("micronet_nb.compressing.fit", watched)
        patch.setattr("micronet_nb.compressing.NOISE", 1e9)  # the tuned net is kept whatever it does
        config = mn.FitConfig(epochs=3, batch_size=20, lr=0.5, ema=0.9)
        c = compress(net, x, "8-bit", fine_tune=config, data=((x, torch.arange(40) % 5), None), quiet=True)
    average = seen["run"].ema.module.state_dict()
    assert all(torch.equal(v, average[k]) for k, v in c.net.state_dict().items())


def test_a_transposed_convolution_is_refused_and_pixels_are_no_guess():
    up = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 4, 2, 2), nn.Flatten(), nn.Linear(400, 5)).eval()
    for budget in (dict(bytes=1e4), "8-bit"):
        with pytest.raises(MicronetError, match="'1' is a transposed convolution.*nn.Upsample"):
            compress(up, torch.randn(16, 3, 12, 12), budget, quiet=True)
    with pytest.raises(MicronetError, match="'1' is a transposed convolution"):
        option_table(up, torch.randn(16, 3, 12, 12), quiet=True)
    stretched = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1), *up[2:]).eval()
    assert compress(stretched, torch.randn(16, 3, 12, 12), "8-bit", quiet=True).report.totals.ratio["operations"] > 2
    late = (torch.randn(16, 3, 12, 12), torch.arange(16) % 5), [(torch.randn(4, 3, 12, 12), torch.zeros(4))]
    with pytest.raises(MicronetError, match="validation batch 0 has labels"):  # before the work
        compress(net_and_images()[0], late[0][0], fine_tune=mn.FitConfig(batch_size=8), data=late, quiet=True)
    pixels = torch.zeros(64, 3, 12, 12, dtype=torch.uint8)
    data = mn.data.Dataset(pixels, torch.arange(64) % 5, list("abcde"), "own", "train")
    with pytest.raises(MicronetError, match="does not say how it sees them"):
        compress(net_and_images()[0], torch.randn(16, 3, 12, 12), fine_tune=mn.FitConfig(), data=(data, None))


def test_labels_are_counted_and_intervals_known():
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 100
    b = paired(torch.tensor([True] * 20), torch.tensor([True] * 12 + [False] * 8))
    assert (b["lost"], b["gained"], b["difference"]) == (8, 0, -40.0) and b["p"] == pytest.approx(2 / 2**8)


def test_compress_takes_batches_and_leaves_the_net_alone(tmp_path):
    net, x = net_and_images(40)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = compress(net, [(b, None) for b in x.split(10)], "8-bit", path=tmp_path / "net.safetensors", quiet=True)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert c.file == tmp_path / "net.safetensors" and c.report.agreement["n"] == 10
    assert torch.equal(mn.unpack(c.file)(x), c.graph(x)) and isinstance(c.report, Report)
    assert "never.weight" in c.report.untouched.index and "not reached" in str(c)
    assert set(c.report.layers.columns) >= {"zeros", "weight_bits", "input_bits", "bytes_after", "decibels", "kl"}
    assert c.report.layers.bytes_after.sum() < c.report.layers.bytes_before.sum() / 3


def test_options_count_in_what_is_measured():
    net, x = net_and_images(40)
    few = dict(rates=(0.0,), weight_widths=(4,), input_widths=(6,), quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = compress(net, x, dict(score=1.0), adder="fp32", first_bits=4, **few)
    assert c.report.budget["got"] == mn.score(c.graph, (3, 12, 12), adder="fp32").score
    assert c.report.totals.after["score"] == c.report.budget["got"] > mn.score(c.graph, (3, 12, 12)).score
    assert c.report.layers.input_bits.tolist() == [4, 6, 6]


@pytest.mark.parametrize("worse", [False, True])
def test_a_tuned_net_is_not_told_layer_by_layer_and_not_kept_where_it_is_worse(worse):
    net, x = net_and_images(40)

    def tune(new, original, **how):
        new.head.bias.data += 1  # of all classes alike: no answer moves
        new.head.bias.data[0] += 3 * worse

    how = dict(fine_tune=mn.FitConfig(batch_size=10), data=((x, torch.zeros(40).long()), None), quiet=True)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("micronet_nb.compressing._tune", tune)
        c, plain = compress(net, x, "8-bit", **how), compress(net, x, "8-bit", quiet=True)
    r = c.report
    assert r.tuning["kept"] != worse and (r.tuning["after"] > r.tuning["before"] + 0.1) == worse
    assert r.layers.kl.isna().all() != worse and r.layers.bytes_after.notna().all()
    assert ("so the net before it was kept" in str(r)) == worse and plain.report.tuning is None
    with torch.no_grad():
        assert torch.equal(c.graph(x), plain.graph(x)) == worse
    assert len(r.plot().axes) == (3 if worse else 2)  # one of them for zeros


def test_a_budget_out_of_reach_names_what_the_least_choices_take():
    net, x = net_and_images(40)
    choices = dict(rates=(0.0, 0.5), weight_widths=(4, 6), input_widths=(6,), quiet=True)
    with pytest.raises(MicronetError, match=r"a budget of bytes=100 is out of reach") as e:
        compress(net, x, dict(bytes=100), **choices)
    least = int(re.search(r"takes ([\d,]+)", str(e.value))[1].replace(",", ""))
    assert "weights of 4 bits, inputs of 6 and 50% zeros" in str(e.value)
    assert compress(net, x, dict(bytes=least), **choices).file.stat().st_size == least  # what is named is to be had


def test_images_come_in_any_precision_and_as_pixels():
    net, x = net_and_images(40)
    plain = compress(net, x, "8-bit", quiet=True).graph
    with torch.no_grad():
        assert torch.equal(compress(net, x.double(), "8-bit", quiet=True).graph(x), plain(x))
    pixels = (x[:, :3].sigmoid() * 255).byte()
    data = mn.data.Dataset(pixels, torch.arange(40) % 5, list("abcde"), "own", "train")
    net.input_stats = (0.4,) * 3, (0.2,) * 3
    c = compress(net, data, "8-bit", quiet=True)
    assert c.report.accuracy["n"] == 10 and c.graph.meta["about"]["pixels"] == [[0.4] * 3, [0.2] * 3]
    with torch.no_grad():
        seen = (pixels / 255 - 0.4) / 0.2
        assert torch.equal(c.graph(seen), compress(net, seen, "8-bit", quiet=True).graph(seen))


@pytest.mark.parametrize(
    "name, turns, said",
    [
        ("bytes", 1, ""),
        ("bytes", 3, " (of 3 plans the one that does least to these images)"),
        ("accuracy_loss", 3, " (chosen on these images)"),
    ],
)
def test_a_report_says_where_its_images_have_chosen(name, turns, said):
    totals = pd.DataFrame({"before": [2.0], "after": [1.0], "ratio": [2.0]}, index=["bytes"])
    agreement = dict(same=90.0, low=80.0, high=95.0, n=10, kl=0.1)
    asked = dict(name=name, asked=1.0, got=1.0, turns=[{}] * turns)
    report = mn.compressing.Report(pd.DataFrame(), totals, agreement, budget=asked)
    assert str(report).splitlines()[-1] == f"asked for {name} of at most 1, got 1{said}"


class Gated(nn.Module):
    "A block whose gate reads what a batch norm gives, so that the quantiser's scale is merged with the norm's."

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.deep, self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.gate, self.back = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last, self.third = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)  # with a bias that the norm takes away
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.hardswish(self.first(self.stem(x)))
        y = self.second(self.deep(x))
        x = x + y * torch.sigmoid(self.back(F.hardswish(self.gate(y.mean((2, 3), keepdim=True)))))
        return self.head(self.third(self.last(x)).mean((2, 3)))


def gated_and_lowered(bits=8):
    torch.manual_seed(3)
    net, x = Gated().eval(), torch.randn(64, 3, 10, 10)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.3, 2)
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
    small = copy.deepcopy(net)
    mn.quantise_weights(small, bits)
    mn.quantise_activations(small, x, 8, 8, affine=True)
    return net, x, mn.lower(small, x[:4])


@torch.no_grad()
def test_a_lowered_net_goes_back_into_its_module(tmp_path):
    net, x, graph = gated_and_lowered(4)
    graph, wanted = mn.unpack(mn.pack(graph, tmp_path / "net.safetensors")), graph(x)
    other = Gated()  # other weights of the same shapes
    norms = {n: m.weight.flatten(1).norm(dim=1) for n, m in other.named_modules() if n in ("stem", "deep", "last")}
    unlower(other, graph, x)
    assert (other(x) - wanted).abs().mean() < 0.02 * wanted.std() < (net(x) - wanted).abs().mean()
    for name, before in norms.items():  # so that a learning rate means what it meant
        assert torch.allclose(other.get_submodule(name).weight.flatten(1).norm(dim=1), before, rtol=1e-4)
    assert (other.train()(x) - wanted).abs().mean() < 0.03 * wanted.std()  # its norms have the statistics of the images
    unlower(other, graph, x)
    mn.quantise_weights(other, 4)
    for name, m in graph.named_modules():
        if hasattr(m, "weight_bits"):  # the same integers, but for the sign that a channel's scale may have
            q = other.get_submodule(name)
            again = q.weight / q.parametrizations.weight[-1].scale
            assert torch.equal(again.round().abs(), m.weight.abs()), name


def test_what_cannot_go_back_is_refused():
    net, x, graph = gated_and_lowered()
    clips = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3), nn.Hardswish())
    clips = clips.append(nn.Flatten()).eval()
    clips[0].bias.data += 5
    small = copy.deepcopy(clips)
    mn.quantise_weights(small, 8)
    mn.quantise_activations(small, x, 8)
    before = {k: v.clone() for k, v in clips.state_dict().items()}
    with pytest.raises(MicronetError, match="the net does not answer like the lowered one"):
        unlower(clips, mn.lower(small, x[:4]), x)  # its 6 has become another number
    assert all(torch.equal(v, before[k]) for k, v in clips.state_dict().items())
    wider = Gated()
    wider.head = nn.Linear(6, 7)
    with pytest.raises(MicronetError, match=r"layer 'head' has weights of \[7, 6\], the lowered one \[5, 6\]"):
        unlower(wider, graph, x)
    wider.more = nn.Linear(2, 2)
    with pytest.raises(MicronetError, match="layer 'more' is not in the lowered net"):
        unlower(wider, graph, x)
    joined = timm.create_model("densenet121", num_classes=5).eval()
    small, x = copy.deepcopy(joined), torch.randn(2, 3, 32, 32)
    mn.quantise_weights(small, 8)
    with pytest.raises(MicronetError, match="stands 'cat', not a scale: this net cannot be taken back"):
        unlower(joined, mn.lower(small, x), x)
