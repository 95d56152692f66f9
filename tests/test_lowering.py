"Lowering: whatever the layers, their widths and their arguments, graph, Runner and integer run give the quantised net's answers, or say why not."
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet_nb.activations import quantise_activations
from micronet_nb.adders import accumulator_ranges, adder
from micronet_nb.core import MicronetError
from micronet_nb.deployment import (IntConv2d, IntLinear, IntWeights, Quantise, Runner, ScaleBias, SideBySide, _widen, capture, check_finite, holds,
                                    in_evaluation, int_sums, lower, powers, run_integer, sum_widths)
from micronet_nb.packing import as_graph, pack, unpack
from micronet_nb.pruning import prune
from micronet_nb.scoring import score
from micronet_nb.weights import quantise_weights, specs_of


def images(n=3, channels=3, side=7, seed=0): return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def compressed(net, x, weight_bits=4, activation_bits=4):
    "A net in evaluation mode with seeded norms and quantisers; None: floats."
    g = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data, m.bias.data = torch.rand(m.num_features, generator=g) + .5, torch.randn(m.num_features, generator=g)*.3
            m.running_mean, m.running_var = torch.randn(m.num_features, generator=g)*.3, torch.rand(m.num_features, generator=g) + .5
    net.eval()
    if weight_bits: quantise_weights(net, weight_bits, per='layer' if weight_bits > 8 else 'kernel')
    if activation_bits: quantise_activations(net, x, activation_bits)
    return net


def compare(net, x, scales=torch.float16):
    "Runner, integer run and graph give the same bits; returns the graph, its output, and the net's own in float64."
    graph = lower(net, x, scales)
    with torch.inference_mode():
        got, want = graph(x), copy.deepcopy(net).double()(x.double())
        for int8 in (None, False): assert torch.equal(Runner(graph, int8)(x), got)
    assert torch.equal(run_integer(graph, x), got)
    assert got.isfinite().all() and want.std() > 0
    return graph, got.double(), want


def assert_exact(net, x):
    "The graph in float64 gives the net's answers, and in float32 the three ways of running it agree."
    graph = lower(net, x, torch.float64)
    with torch.inference_mode(): want = copy.deepcopy(net).double()(x.double())
    assert float((graph(x.double()) - want).abs().max()) <= 1e-9*float(want.abs().max())
    assert torch.equal(run_integer(graph, x.double()), graph(x.double()))
    return compare(net, x)


class Conv(nn.Module):
    "Two convolutions, the second as asked for, and a classifier."
    def __init__(self, channels=8, between=nn.ReLU, **second):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.between = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), between()
        self.second, self.fc = nn.Conv2d(channels, 8, **dict(kernel_size=3) | second), nn.Linear(8, 5)
    def forward(self, x): return self.fc(self.second(self.between(self.norm(self.first(x)))).mean((2, 3)))


# ---- scales beyond FP16

@pytest.mark.parametrize('size', [1., 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize('bits', [4, 8, 12, 16])
def test_wide_and_small_weights_keep_their_answers(bits, size):
    "Scales of the last layer go down to 1e-25; the biases are as small, so that they are no answer by themselves."
    x, net = images(), Conv()
    for m in (net.first, net.second, net.fc):
        m.weight.data *= size
        if m.bias is not None: m.bias.data *= size**2
    net.norm.running_var.fill_(size**2); net.norm.weight.data.fill_(1.)   # so that 12 and 16 bits see no flips of 4-bit steps
    quantise_weights(net.eval(), bits, per='layer')
    quantise_activations(net, x, bits, first_bits=None)
    graph, got, want = compare(net, x)
    assert float((got - want).abs().max()) <= (2e-3 if bits > 8 else .2)*float(want.std())
    for m in graph.modules():
        if isinstance(m, ScaleBias): assert torch.equal(m.weight.half().float(), m.weight) and torch.equal(m.bias.half().float(), m.bias)


def test_a_scale_out_of_reach_is_named():
    x, net = images(), compressed(Conv(), images())
    net.first.input_quantiser.scale.fill_(1e-38)
    with pytest.raises(MicronetError, match=r'first_input_scale holds 1e\+38, which torch.float16 cannot.*scales=torch.float32'): lower(net, x)
