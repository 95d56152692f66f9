"The definitions of the slides, each by numbers that are worked out by hand."

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet_nb.activations import ActivationQuantiser, quantise_activations
from micronet_nb.data import Dataset
from micronet_nb.distillation import AsTeacher, distil, kl, z_score
from micronet_nb.layers import dense_weight
from micronet_nb.models import densenet_bc, num_params, wrn
from micronet_nb.pruning import Pruner, at_least, erk_rates, magnitude_mask, mask_of
from micronet_nb.pruning import op_sparsity, param_sparsity, prune, sparsity
from micronet_nb.quantisers import fake_quantise, grid, quantise, solve_scale, solve_scales
from micronet_nb.released import prepare, truncate
from micronet_nb.scoring import TRACKS, LayerSpec, Score, average_adds, cifar_root_bits, kernel_adds
from micronet_nb.scoring import root_bits, schedule_specs, score, tree_adds, weight_storage
from micronet_nb.sensitivity import degrade, measure_sensitivity, plan_from_sensitivity, predicted_increase
from micronet_nb.weights import WeightQuantiser, bit_table, choose_bits, quantise_weights, size_bits, weight_integers


def close(a, b, tolerance=1e-6):
    "Equal but for rounding."
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=0, atol=tolerance)


def linear(*weights):
    "A linear layer without bias whose rows are given."
    layer = nn.Linear(len(weights[0]), len(weights), bias=False)
    layer.weight.data = torch.tensor(weights)
    return layer


# ------------------------------------------------------------------ Slide 'Quantization'


def test_grids_are_symmetric_or_from_zero_up():
    assert [grid(b) for b in (1, 2, 4, 8)] == [(-1, 1), (-1, 1), (-7, 7), (-127, 127)]
    assert [grid(b, False) for b in (1, 2, 4, 8)] == [(0, 1), (0, 3), (0, 15), (0, 255)]


def test_rounds_half_to_even_and_clamps():
    x = torch.tensor([-9.0, -0.6, 0.2, 0.6, 1.5, 2.5, 40.0])
    assert quantise(x, 1.0, 4).tolist() == [-7, -1, 0, 1, 2, 2, 7]
    assert quantise(x, 1.0, 4, False).tolist() == [0, 0, 0, 1, 2, 2, 15]
    assert quantise(x, 0.5, 4).tolist() == [-7, -1, 0, 1, 3, 5, 7]
    assert quantise(torch.tensor([-0.1, 0.0, 3.0]), 5.0, 1).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("search", ["plain", "auto", "exact"])
def test_the_scale_is_the_least_squares_one(search):
    "3 bits: the integers of .9, 2.2, 3.1 are 1, 2, 3, and the scale is (.9 + 2*2.2 + 3*3.1)/(1 + 4 + 9)."
    assert close(solve_scale(torch.tensor([[0.9, 2.2, -3.1]]), 3, search=search), [14.6 / 14])
    unsigned = solve_scale(torch.tensor([[-5.0, 0.9, 2.2, 3.1]]), 2, False, search)
    assert close(unsigned, [14.6 / 14])  # what is below 0 has no say


def test_one_signed_bit_has_the_mean_magnitude_of_what_is_not_zero():
    assert solve_scale(torch.tensor([[2.0, -4.0, 0.0, 0.0]]), 1).tolist() == [3.0]


def test_a_scale_a_channel_or_a_tensor():
    "2 bits: the best single scale for 1, 1, 3, 3 is 3, which gains 18; all four at 2 gain 16."
    weight = torch.tensor([[1.0, -1.0], [3.0, 3.0]])
    assert [solve_scales([weight], 2, per=p)[0].tolist() for p in ("channel", "tensor")] == [[1.0, 3.0], [3.0]]
    net = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 1))
    quantise_weights(net, 4, "auto")
    assert [weight_integers(m)[1].numel() for m in net] == [2, 1]  # 'auto': a scale a channel for depthwise layers only
    quantise_weights(net, 4)
    assert [weight_integers(m)[1].numel() for m in net] == [2, 2]


INSIDE = torch.tensor([[-0.3, 0.3, 2.6, 9.0]])  # at scale 1 and 3 bits: 0, 0, 3, and 3 at the end of the grid
SCALE_GRADIENT = 0.3 - 0.3 + 0.4 + 3  # LSQ: round(v) - v inside, the end of the grid outside


def test_gradients_go_straight_through_inside_of_the_grid_only():
    x, a = INSIDE.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
    y = fake_quantise(x, a, 3)
    y.sum().backward()
    assert y.tolist() == [[0, 0, 3, 3]] and x.grad.tolist() == [[1, 1, 1, 0]] and close(a.grad, SCALE_GRADIENT)


def test_learned_scales_have_their_gradient_divided_by_the_root_of_n_times_qmax():
    x, q = INSIDE.clone().requires_grad_(), ActivationQuantiser(3, 1.0, signed=True, learn=True)
    y = q(x)
    y.sum().backward()
    assert y.tolist() == [[0, 0, 3, 3]] and x.grad.tolist() == [[1, 1, 1, 0]]
    assert close(q.scale.grad, SCALE_GRADIENT / math.sqrt(4 * 3))
    w, q = torch.cat([INSIDE, INSIDE]).requires_grad_(), WeightQuantiser(3, torch.ones(2, 1), learn=True)
    q(w).sum().backward()
    assert w.grad.tolist() == 2 * [[1, 1, 1, 0]]
    assert close(q.scale.grad, [[SCALE_GRADIENT / math.sqrt(4 * 3)]] * 2)  # 4 weights a scale


# ------------------------------------------------------------------ Slides '... Quantization'


def test_the_layer_that_sees_the_image_has_8_bits_and_a_sign():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), torch.randn(8, 3, 4, 4)
    quantisers = quantise_activations(net, x, 4)
    assert [(q.bits, q.signed) for q in quantisers.values()] == [(8, True), (4, False)]
    assert [q.bits for q in quantise_activations(net, x, 4, first_bits=None).values()] == [4, 4]
    inputs = F.relu(F.conv2d(x, net[0].weight, net[0].bias)).detach()  # in full precision
    assert close(quantisers["2"].scale, solve_scale(inputs.flatten()[None], 4, False)[0], 1e-5)


def test_7_5_4_3():
    "Of 204 weights: none is in larger layers than 100, 100 (49 %) than 60, 160 (78 %) than 30, 190 (93 %) than 10."
    net = nn.ModuleList([linear([1.0] * n) for n in (4, 100, 60, 30, 10)])
    assert list(size_bits(net).values()) == [7, 3, 4, 4, 5]


def test_what_a_mask_hides_has_no_say_in_the_scale_and_stays_zero():
    net = nn.Sequential(linear([0.7, 0.9, 2.2, -3.1]))  # .7 would be 1 and make the step 15.3/15
    prune(net, 0.25)
    quantise_weights(net, 3)
    q, step = weight_integers(net[0])
    assert q.tolist() == [[0, 1, 2, -3]] and close(step, [[14.6 / 14]]) and net[0].weight[0, 0] == 0


def test_widths_keep_to_the_budget():
    "With 4 cells of 0.75 the sizes 1 and 2 take 2 and 3 of them: there is room for the small widths only."
    rows = [dict(layer=n, kind="weight bits", level=b, kl=1 / b, storage=b / 2) for n in "ab" for b in (2, 4)]
    table = pd.DataFrame(rows)
    assert choose_bits(table, 3.0, cells=4) == {"a": 2, "b": 2}
    assert sorted(choose_bits(table, 3.01).values()) == [2, 4] and choose_bits(table, 4.0) == {"a": 4, "b": 4}


def test_the_answers_of_the_whole_net_come_first_in_the_divergence():
    "KL(whole || quantised), nats an image."
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.randn(5, 1, 2, 2)
    p = net(x).softmax(1).detach().double()
    divergence = bit_table(net, x, widths=(2,), quiet=True).kl.iloc[0]
    quantise_weights(net, 2)
    q = net(x).softmax(1).detach().double()
    assert (
        abs(divergence - float((p * (p / q).log()).sum()) / 5) < 1e-6
        and abs(divergence - float((q * (q / p).log()).sum()) / 5) > 1e-4
    )


# ------------------------------------------------------------------ Slide 'Pruning'


def test_the_smallest_magnitudes_go():
    assert magnitude_mask(torch.tensor([3.0, -1.0, 0.5, -2.0]), 0.5).tolist() == [True, False, False, True]
    assert magnitude_mask(torch.tensor([3.0, -1.0, 0.5, -2.0]), 0.4).sum() == 2  # round(1.6) go


def pruned(method, **more):
    "Two weights, the second masked, and the run that a callback would see."
    net = nn.Sequential(linear([1.0, 0.9]))
    pruner = prune(net, 0.5, method, **more)
    config, optimizer = SimpleNamespace(epochs=1), torch.optim.SGD(net.parameters(), 1.0)
    run = SimpleNamespace(model=net, optimizer=optimizer, step=1, steps_an_epoch=8, total=8, config=config)
    return net[0], pruner, run


def test_only_dynamic_pruning_gives_masked_weights_a_gradient():
    grads = {}
    for method in ("static", "progressive", "dynamic"):
        layer, _, _ = pruned(method)
        layer(torch.tensor([[2.0, 3.0]])).sum().backward()
        grads[method] = dense_weight(layer).grad.tolist()
    assert grads == {"static": [[2, 0]], "progressive": [[2, 0]], "dynamic": [[2, 3]]}


def test_when_each_method_renews_its_mask():
    renewed = {}
    for method in ("static", "dynamic", "progressive", "gradual"):
        for moment in ("on_epoch", "on_step"):
            layer, pruner, run = pruned(method, **(dict(start=0.5) if method == "gradual" else {}))
            dense_weight(layer).data[0, 1] = 5.0
            getattr(pruner, moment)(run)
            renewed[method, moment] = mask_of(layer).mask.tolist() == [[False, True]]
    wanted = [("dynamic", "on_step"), ("progressive", "on_epoch"), ("gradual", "on_step")]
    assert [k for k, new in renewed.items() if new] == wanted


@pytest.mark.parametrize("method", ["static", "progressive", "gradual"])
def test_masked_weights_stay_where_they_were(method):
    "An update that moves all of them moves those that are seen."
    layer, pruner, run = pruned(method, **(dict(start=0.5) if method == "gradual" else {}))
    pruner.on_gradients(run)
    dense_weight(layer).data *= 0.5
    pruner.on_update(run)
    assert close(dense_weight(layer), [[0.5, 0.9]])


def test_masked_weights_of_dynamic_pruning_move():
    layer, pruner, run = pruned("dynamic")
    pruner.on_gradients(run)
    dense_weight(layer).data *= 0.5
    pruner.on_update(run)
    assert close(dense_weight(layer), [[0.5, 0.45]])


def test_momentum_of_masked_weights_is_forgotten():
    layer, pruner, run = pruned("progressive")
    run.optimizer.state[dense_weight(layer)]["momentum_buffer"] = torch.tensor([[7.0, 8.0]])
    pruner.on_epoch(run)
    assert run.optimizer.state[dense_weight(layer)]["momentum_buffer"].tolist() == [[7, 0]]


def test_the_gradual_schedule_is_cubic():
    "At half of the ramp 1/8 of the way is left. Zhu and Gupta 2017."
    pruner = Pruner({"a": 0.8}, "gradual", ramp=0.5)
    assert [round(pruner.ramped(t)["a"], 9) for t in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.7, 0.8, 0.8]
    assert round(Pruner({"a": 0.8}, "gradual", {"a": 0.2}, ramp=0.5).ramped(0.25)["a"], 9) == 0.725


def test_erdos_renyi_kernel():
    "Of 104 weights 52 stay: the 2x2 layer whole, and 48 of the 10x10 one."
    rates = erk_rates(nn.Sequential(nn.Linear(2, 2), nn.Linear(10, 10)), 0.5)
    assert rates["0"] == 0 and abs(rates["1"] - 0.52) < 1e-9
    rates = erk_rates(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 6)), 0.5)  # densities e and 2/3 e; 4 e + 8 e = 8
    assert abs(rates["0"] - 1 / 3) < 1e-9 and abs(rates["1"] - 5 / 9) < 1e-9


def test_large_layers_have_a_floor():
    assert at_least(nn.Sequential(nn.Linear(2, 2), nn.Linear(10, 10)), 0.3, 0.5) == {"0": 0.3, "1": 0.5}


def test_sparsity_of_operations_counts_positions():
    "A kernel of one weight works at 16 places, a weight of the linear layer at one."
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(32, 2, bias=False))
    net[0].weight.data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert abs(param_sparsity(net) - 1 / 66) < 1e-9 and abs(op_sparsity(net, (1, 4, 4)) - 16 / 96) < 1e-9
    assert sparsity(net, (1, 4, 4)).macs.tolist() == [32, 64]


# ------------------------------------------------------------------ Slide 'Knowledge Distillation'

P, Q = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)  # (.75, .25) and (.5, .5)
KL_PQ = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
KL_QP = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
PLAIN = SimpleNamespace(label_smoothing=0.0)


def test_divergence_of_student_and_teacher():
    assert close(kl(P, Q), [KL_PQ]) and close(kl(Q, P), [KL_QP])
    target = torch.tensor([1])
    assert close(distil(P, target, Q, PLAIN), KL_PQ)  # RIAIR's: KL(student || teacher)
    assert close(distil(P, target, Q, PLAIN, direction="teacher||student"), KL_QP)
    assert close(distil(P.repeat(3, 1), target.repeat(3), Q.repeat(3, 1), PLAIN), KL_PQ)  # the mean over the batch


def test_temperature_divides_the_logits_and_its_square_multiplies():
    assert close(distil(2 * P, torch.tensor([1]), Q, PLAIN, temperature=2.0), 4 * KL_PQ)


def test_labels_have_their_share():
    target = torch.tensor([1])
    assert close(distil(P, target, Q, PLAIN, hard=0.25), 0.25 * math.log(4) + 0.75 * KL_PQ)
    assert close(distil(P, target, Q, PLAIN, hard=0.25, soft=2.0), 0.25 * math.log(4) + 2 * KL_PQ)


def test_standardised_logits():
    "1, 2, 3 has the standard deviation sqrt(2/3)."
    assert close(z_score(torch.tensor([[1.0, 2.0, 3.0]])), [[-math.sqrt(1.5), 0, math.sqrt(1.5)]])
    student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 30.0, 50.0]])
    assert close(distil(student, torch.tensor([1]), teacher, PLAIN, standardise=True), 0.0)


def test_the_teacher_sees_its_own_normalisation():
    "A pixel of .75 is 1 to the student and 1.75 to the teacher."
    seen = AsTeacher(lambda x: x, ((0.5,) * 3, (0.25,) * 3), ((0.4,) * 3, (0.2,) * 3))(torch.ones(1, 3, 2, 2))
    assert close(seen, torch.full((1, 3, 2, 2), 1.75))


# ------------------------------------------------------------------ Slides 'MicroNet Challenge', 'Scoring'


def test_baselines():
    assert TRACKS == {"imagenet": (6.9e6, 1170e6), "cifar100": (36.5e6, 10.49e9)}
    rows = pd.DataFrame([dict(multiplies=1e9, adds=49e7, storage=36.5e5)])
    counted = Score(rows, "cifar100", "official", "tree")
    assert abs(counted.op_score - 1.49 / 10.49) < 1e-12 and abs(counted.param_score - 0.1) < 1e-12
    assert abs(counted.score - (0.1 + 1.49 / 10.49)) < 1e-12


def test_tree_adder():
    "Five numbers of 8 bits: two adds of 8, one of 9, one of 10."
    assert tree_adds(torch.tensor([5, 1, 0, 2]), 8).tolist() == [35, 0, 0, 8]


def test_other_adders():
    assert [root_bits(torch.tensor([n, 1]), 8) for n in (1, 5, 8, 9)] == [8, 11, 11, 12]  # 8 + ceil(log2 n)
    n = torch.tensor([5, 1, 0])
    assert [kernel_adds(n, 8, a) for a in ("tree", "int", "int16", "fp16", "fp32")] == [
        35 / 32,
        4 * 11 / 32,
        4 * 11 / 32,
        2,
        4,
    ]
    assert kernel_adds(n, 15, "int") == 4 * 18 / 32 and kernel_adds(n, 15, "int16") == 4 * 16 / 32
    assert kernel_adds(n, 8, "fp32", empty=-1) == 3
    assert average_adds(torch.tensor([5, 3]), 8) == 8 / 16 * 2 * 7
    assert cifar_root_bits(4, 27) == 12  # the largest sum is 15*7*27 = 2,835


def test_bitmasks_are_charged():
    assert [weight_storage(100, n, 4, always=True) for n in (30, 90)] == [(100 + 120) / 32, (100 + 360) / 32]
    assert [weight_storage(100, n, 4, always=False) for n in (30, 90)] == [(100 + 120) / 32, 400 / 32]


def small(accounting, signed=False):
    "Kind to (multiplies, adds, storage) of 2 + 1 weights of 4 bits on a vector of 4 inputs of 5 bits."
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 3]])
    net = nn.Sequential(nn.Flatten(), layer)
    specs = {"1": LayerSpec(4, 5, signed)}
    counted = score(net, (4, 1, 1), accounting=accounting, specs=specs).layers.set_index("kind")
    return {k: tuple(counted.loc[k, ["multiplies", "adds", "storage"]]) for k in counted.index}


def test_a_layer_by_the_official_rules():
    "3 multiplies of 5 bits, an add of 4 + 5; a bitmask and 3 weights; 2 scales and 2 biases of 16 bits, 2 adds of 16."
    assert small("official") == {"linear": (15 / 32, 9 / 32, (8 + 12) / 32), "scale": (1, 1, 2)}
    # a signed product has a bit less
    assert small("official", signed=True)["linear"] == (15 / 32, 8 / 32, (8 + 12) / 32)


def test_a_layer_as_its_winner_counted():
    "The same, and a quantiser: 16 bits an input, and its step."
    layer = (15 / 32, 9 / 32, (8 + 12) / 32)
    assert small("riair-submitted") == {"linear": layer, "scale": (1, 1, 2.5), "quantiser": (2, 0, 0.5)}


def test_pools_and_pointwise_work():
    "A mean of 4 is 3 adds and a multiply; relu is a multiply."
    rows = score(nn.Sequential(nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(1, 1, 1)), (1, 4, 4)).layers.set_index("kind")
    assert tuple(rows.loc["pool", ["multiplies", "adds"]]) == (4, 12)
    assert tuple(rows.loc["relu", ["multiplies", "adds"]]) == (4, 0)
    assert tuple(rows.loc["conv", ["multiplies", "adds", "storage"]]) == (4, 0, 1)
    released = [score(nn.AvgPool2d(2), (1, 4, 4), accounting="riair-cifar100", corrected=c) for c in (False, True)]
    assert [s.layers["adds"].sum() for s in released] == [
        4 * (2 - 1) / 2,
        4 * (4 - 1) / 2,
    ]  # as released it has 2 inputs


class Net(nn.Module):
    "A forward function of (net, x), and what it stores."

    def __init__(self, f, **stored):
        super().__init__()
        self.f = f
        for name, v in stored.items():
            setattr(self, name, v)

    def forward(self, x):
        return self.f(self, x)


def test_what_is_stored_is_its_elements_once():
    w = nn.Parameter(torch.ones(16, 8, 3, 3))
    halves = Net(lambda net, x: torch.cat([F.conv2d(x, net.w[:4]), F.conv2d(x, net.w[4:])], 1), w=w)
    assert score(halves, (8, 8, 8)).storage == 16 * 8 * 9
    twice = Net(lambda net, x: F.conv2d(F.conv2d(x, net.w), net.w), w=nn.Parameter(torch.ones(8, 8, 1, 1)))
    assert score(twice, (8, 4, 4)).storage == 64
    spread = Net(lambda net, x: x * net.g.expand_as(x), g=nn.Parameter(torch.ones(8, 1, 1)))
    assert score(spread, (8, 6, 6)).storage == 8


def test_a_norm_that_folds_nowhere_is_stored_and_computed():
    "8 scales and 8 biases; a multiply and an add an element."
    row = score(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8)), (8, 1, 1)).layers.iloc[0]
    assert (row.storage, row.multiplies, row["adds"]) == (16, 8, 8)


def test_pools_add_up_what_lies_in_their_windows():
    "Nine windows of 3x3 on 7x7, that overlap: 8 adds each, in five channels. Windows of one number add nothing."
    assert score(nn.AdaptiveAvgPool2d(3), (5, 7, 7)).layers["adds"].sum() == 5 * 9 * 8
    assert score(nn.AdaptiveAvgPool2d(7), (5, 1, 1)).ops == 0


def test_a_convolution_with_made_weights_is_a_product():
    "3 to 8 channels, 3x3, at 16x16 places: 27 multiplies and 26 adds for each output."

    def by_image(net, x):
        return F.conv2d(x, net.make(x.mean((2, 3))).view(8, 3, 3, 3), padding=1)

    row = score(Net(by_image, make=nn.Linear(3, 216)), (3, 16, 16)).layers.set_index("kind").loc["product"]
    assert (row.multiplies, row["adds"], row.storage) == (8 * 256 * 27, 8 * 256 * 26, 0)


@pytest.mark.parametrize("pool, bits", [(nn.MaxPool2d(2), "32w 4a"), (nn.AvgPool2d(2), "32w 32a")], ids=["max", "mean"])
def test_only_what_stays_on_the_grid_stays_narrow(pool, bits):
    "The largest of four 4-bit numbers has 4 bits; their mean lies between the steps."
    net = nn.Sequential(ActivationQuantiser(4, 0.1), pool, nn.Flatten(), nn.Linear(4, 2))
    assert score(net, (1, 4, 4)).layers.set_index("kind").bits["linear"] == bits


def test_a_released_schedule_says_bits_and_signs():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    widths = dict(weight_bits=[7, 5, 3], activation_bits=4, first_layer_activation_bits=8)
    schedule = widths | dict(activation_signed=[None, 0, 1])
    specs = schedule_specs(net, schedule, scales=[0.5, 0.25, 0.125])
    wanted = [LayerSpec(7, 8, False, 1.0), LayerSpec(5, 4, False, 0.25), LayerSpec(3, 4, True, 0.125)]
    assert list(specs.values()) == wanted


# ------------------------------------------------------------------ Slide 'Robust Analysis'


def test_degraded_weights():
    assert degrade(torch.tensor([[3.0, -1.0, 0.5, -2.0]]), "sparsity", 0.5).tolist() == [[3, 0, 0, -2]]
    assert close(
        degrade(torch.tensor([[0.9, 2.2, -3.1]]), "weight bits", 3), torch.tensor([[1.0, 2.0, -3.0]]) * 14.6 / 14
    )


class Zeros(nn.Module):
    "Says 0 for class 0 and the mean pixel, times a weight, for class 1."

    def __init__(self):
        super().__init__()
        self.layer = linear([1.0])

    def forward(self, x):
        y = self.layer(x.mean((1, 2, 3))[:, None])
        return torch.cat([torch.zeros_like(y), y], 1)


def test_harm_is_beside_the_intact_net():
    "White images of class 1: the intact net loses log(1 + 1/e), without its weight log 2, and class 0 wins the tie."
    x, y = torch.full((8, 3, 2, 2), 255, dtype=torch.uint8), torch.ones(8, dtype=torch.int64)
    white = Dataset(x, y, ["a", "b"], "white", "valid")
    options = dict(
        sparsities=(0.0, 1.0), weight_bits=(), activation_bits=(), stats=((0.0,) * 3, (1.0,) * 3), quiet=True
    )
    none, all_ = (row for _, row in measure_sensitivity(Zeros(), (white, white), **options).iterrows())
    intact = math.log(1 + math.exp(-1))
    assert none["drop"] == 0 and all_["drop"] == 100 and abs(none["increase"]) < 1e-6
    assert abs(all_["increase"] - (math.log(2) - intact)) < 1e-6 and abs(all_["loss"] - math.log(2)) < 1e-6


def sensitive(levels, kind="sparsity"):
    "A sensitivity table of layers '0' and '1': kind, level to the loss that it adds."
    rows = [(n, kind, v, more) for n, harm in levels.items() for v, more in harm.items()]
    return pd.DataFrame(rows, columns=["layer", "kind", "level", "increase"])


def test_a_plan_buys_the_cheapest_pieces_up_to_its_budget():
    "20 weights, 10 a layer. Half of layer 0 costs .1, half of layer 1 .2; the other halves .3 and 1.8."
    net = nn.Sequential(linear([1.0] * 10), linear([1.0] * 10))
    table = sensitive({"0": {0.5: 0.1, 1.0: 0.4}, "1": {0.5: 0.2, 1.0: 2.0}})
    for budget, want in ((0.25, [0.5, 0]), (0.375, [0.5, 0.25]), (0.5, [0.5, 0.5]), (0.75, [1, 0.5])):
        plan = plan_from_sensitivity(table, net, budget, most=1.0)
        assert [*plan] == ["0", "1"] and close([*plan.values()], want), (budget, plan)
    assert abs(predicted_increase(table, {"0": 0.75, "1": 0.25}) - (0.25 + 0.1)) < 1e-9


def test_a_plan_of_widths_keeps_to_the_mean():
    "A mean of 5 bits: 8 + 2; of 4: 6 of the 12 bits a pair of weights goes, first those that cost less."
    net = nn.Sequential(linear([1.0] * 10), linear([1.0] * 10))
    table = sensitive({"0": {8: 0.0, 4: 0.1, 2: 0.2}, "1": {8: 0.0, 4: 3.0, 2: 9.0}}, "weight bits")
    assert plan_from_sensitivity(table, net, 5.0, "weight bits") == {"0": 2, "1": 8}
    assert plan_from_sensitivity(table, net, 8.0, "weight bits") == {"0": 8, "1": 8}
    assert plan_from_sensitivity(table, net, 3.0, "weight bits") == {"0": 2, "1": 4}


# ------------------------------------------------------------------ models, released net


def test_nets_have_the_published_sizes():
    "DenseNet-BC-100-12 and WRN-28-10 for 100 classes: 0.8 and 36.5 million parameters."
    with torch.device("meta"):
        nets = densenet_bc(100, 12, 100), wrn(28, 10, 100)
    assert [num_params(n) for n in nets] == [800_032, 36_536_884]


def test_the_8_bit_round_trip_drops_some_values_by_one():
    "Every value of every channel, beside the same arithmetic in numpy."
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (np.float32(v).reshape(3, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    p = np.arange(256, dtype=np.float32)
    want = ((((p * np.float32(1 / 255) - mean) / std) * std + mean) * np.float32(255)).astype(np.uint8)
    pixels = truncate(images).view(3, 256).numpy()
    assert (pixels == want).all() and {*(np.arange(256) - pixels).ravel().tolist()} == {0, 1}


def test_pixels_as_the_released_net_wants_them():
    x = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    wanted = [(1 - 0.4914) / 0.2470 / 255, (1 - 0.4822) / 0.2435 / 255, (1 - 0.4465) / 0.2616 / 255]
    assert close(prepare(x).flatten(), wanted, 1e-9)
