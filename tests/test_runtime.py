"The runner: whatever the net, the batch and the order of calls, it gives the graph's bits."

import copy

import pytest
import torch
from torch import nn

from micronet_nb.activations import quantise_activations
from micronet_nb.core import MicronetError
from micronet_nb.integer import IntConv2d, IntLinear, Quantise, ScaleBias
from micronet_nb.lowering import lower
from micronet_nb.models import create_model
from micronet_nb.packing import pack, unpack
from micronet_nb.pruning import prune
from micronet_nb.runtime import Runner
from micronet_nb.weights import quantise_weights


def lowered(name, weight_bits=4, activation_bits=4, side=16):
    "A seeded net, half of its weights pruned, with quantisers, lowered; and images for it."
    torch.manual_seed(1)
    model, x = create_model(name, 10, small=True), torch.randn(7, 3, side, side)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data, m.bias.data = torch.rand(m.num_features) + 0.5, torch.randn(m.num_features) * 0.3
            m.running_mean, m.running_var = torch.randn(m.num_features) * 0.3, torch.rand(m.num_features) + 0.5
    prune(model.eval(), 0.5)
    quantise_weights(model, weight_bits)
    quantise_activations(model, x, activation_bits)
    return lower(model, x[:2]), x


def assert_same(runner, graph, x):
    with torch.inference_mode():
        assert torch.equal(runner(x), graph(x))


@pytest.mark.parametrize(
    'name, bits',
    [
        ('densenet_bc_10_8', (4, 4)),
        ('densenet_bc_10_8', (8, 8)),
        ('wrn_10_1', (2, 3)),
        ('resnet18', (4, 4)),
        ('mixnet_s', (8, 8)),
        ('mobilenetv3_small_050', (4, 6)),
    ],
)
def test_the_bits_of_the_graph(name, bits):
    graph, x = lowered(name, *bits)
    for int8 in (None, False):
        assert_same(Runner(graph, int8), graph, x)


def test_plans_do_fuse():
    "Else the tests above would be of the graph against itself."
    graph, x = lowered('densenet_bc_10_8')
    runner = Runner(graph)
    runner(x)
    calls = [n for n in graph.graph.nodes if n.op.startswith('call')]
    assert len(runner.tasks) < 0.8 * len(calls) and 2 <= runner.memories < sum(t.work is not None for t in runner.tasks)
    assert sum(bool(t.places) for t in runner.tasks) > 5


def test_batches_and_sizes_change_between_calls():
    graph, x = lowered('densenet_bc_10_8')
    runner, other = Runner(graph, batch=4), torch.randn(3, 3, 32, 32)
    for part in (x[:2], x[:4], x[:1], other, x[3:7], other[:1], x[:4].contiguous(memory_format=torch.channels_last)):
        assert_same(runner, graph, part)
    whole = runner(x)  # in pieces of 4
    assert torch.equal(whole, torch.cat([graph(x[:4]), graph(x[4:])]))
    kept = whole.clone()
    runner(-x)
    assert torch.equal(whole, kept)  # results do not lie in memory that the next call uses


def test_two_runners_share_nothing():
    graph, x = lowered('wrn_10_1')
    first, second = Runner(graph), Runner(copy.deepcopy(graph))
    a = first(x)
    second(-x)
    assert torch.equal(first(x), a)


def test_an_unpacked_file(tmp_path):
    graph, x = lowered('wrn_10_1')
    assert_same(Runner(unpack(pack(graph, tmp_path / 'net.safetensors'))), graph, x)


class ByHand(nn.Module):
    "Values with several readers, concatenations that begin alike and others, views that outlive what they view."

    def __init__(self):
        super().__init__()
        self.stem, self.q, self.relu = ScaleBias(3), Quantise(4), nn.ReLU()
        self.convs = nn.ModuleList([IntConv2d(c, 6, 3, padding=1, weight_bits=4) for c in (3, 6, 12, 15)])
        self.scales = nn.ModuleList([ScaleBias(c) for c in (6, 6, 12, 15)])
        self.bytes = nn.ModuleList([Quantise(b) for b in (4, 8, 3, 4)])
        self.fc, self.last = IntLinear(18, 5, weight_bits=4), ScaleBias(5)
        for m in self.modules():
            if hasattr(m, 'weight_bits'):
                m.weight.data = torch.randint(-8, 8, m.weight.shape).float()
            elif isinstance(m, ScaleBias):
                m.weight.data, m.bias.data = torch.rand(m.weight.shape) * 0.1, torch.randn(m.bias.shape)

    def forward(self, x):
        a = self.convs[0](self.q(self.stem(x)))
        u = self.bytes[1](self.relu(self.scales[1](a)))
        b = self.convs[1](u)
        ab = torch.cat([a, b], 1)
        c = self.convs[2](self.bytes[2](self.scales[2](ab)))
        other = torch.cat([b, c, x], 1)  # begins unlike, and holds the input
        codes = self.bytes[3](self.scales[3](other))
        abc = torch.cat([ab, c], 1)
        view, means = abc[:, 2:8], abc.mean((2, 3))[:, :6]
        d = self.convs[3](codes)
        dd = torch.cat([d, self.scales[0](d)], 1)  # could lie where abc was, but for the view
        return self.last(self.fc(torch.cat([means, (view + u).amax((2, 3)), dd.mean((2, 3))[:, 3:9]], 1).round()))


def test_a_net_made_by_hand():
    torch.manual_seed(0)
    net, x = ByHand().eval(), torch.randn(5, 3, 9, 9) * 20
    runner = Runner(net)
    assert_same(runner, net, x)
    assert_same(runner, net, x[:2] * 3)


class Overwrites(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.relu = how, nn.ReLU(inplace=True)

    def forward(self, x):
        v = x + 1
        return {
            'module': self.relu,
            'function': lambda v: torch.nn.functional.relu(v, True),
            'method': lambda v: v.relu_(),
            'view': lambda v: v[:, :2].mul_(2) + v.mean(),
        }[self.how](v)


@pytest.mark.parametrize('how', ['module', 'function', 'method', 'view'])
@torch.inference_mode()
def test_nets_that_overwrite_are_refused(how):
    with pytest.raises(MicronetError, match='overwrites its input'):
        Runner(Overwrites(how))(torch.randn(2, 3))


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 1


def test_a_net_of_two_results_is_refused():
    with pytest.raises(MicronetError, match='one tensor to one tensor'):
        Runner(Pair())


def test_inputs_that_are_refused():
    graph, x = lowered('wrn_10_1')
    for bad in (x.double(), x[:0], x.numpy(), torch.zeros(3)):
        with pytest.raises(MicronetError, match='takes float32'):
            Runner(graph)(bad)
    with pytest.raises(MicronetError, match='does not run on torch.float32 2x5x16x16'):
        Runner(graph)(torch.randn(2, 5, 16, 16))
    with pytest.raises(MicronetError, match='float64'):
        Runner(copy.deepcopy(graph).double())


class Halves(nn.Module):
    "A gate of one half of the channels, whose kernel sees how the half lies in memory; pieces of other layouts beside."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 64), nn.Linear(32, 16), nn.Conv2d(16, 32, 1)

    def forward(self, x):
        gate, value = self.a(x.permute(0, 2, 3, 1)).chunk(2, -1)
        x = self.b(nn.functional.gelu(gate) * torch.exp(value))
        x = self.c(x.permute(0, 3, 1, 2))
        x = torch.cat(
            [torch.tanh(x[:, 4:20]), nn.functional.gelu(x[:, ::2]), torch.sigmoid(x[..., 1:])[..., :1] + x], 1
        )
        return nn.functional.gelu(x[:, 8:40]).flatten(1)


@pytest.mark.parametrize('bits', [None, 8])
def test_floats_of_a_part_have_the_bits_of_the_graph(bits):
    torch.manual_seed(0)
    net, x = Halves().eval(), torch.randn(5, 3, 8, 8)
    if bits:
        quantise_weights(net, bits), quantise_activations(net, x, bits)
    graph = lower(net, x, torch.float32)
    runner = Runner(graph)
    for n in (2, 5, 1):
        assert runner(x[:n]).equal(graph(x[:n])) and Runner(graph)(x[:n]).equal(graph(x[:n]))


def test_parts_with_the_images_in_the_middle():
    "A plan is made with two images; what lies outside of them lies further apart where there are more."

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 64), nn.Linear(32, 3)

        def forward(self, x):
            gate, value = self.a(x.transpose(0, 1)).chunk(2, -1)  # (tokens, n, channels)
            return self.b(nn.functional.gelu(gate) + value).transpose(0, 1)

    torch.manual_seed(0)
    x = torch.randn(7, 5, 4)
    graph = lower(Turned().eval(), x)
    runner = Runner(graph)
    for n in (3, 7, 2, 1):
        assert runner(x[:n]).equal(graph(x[:n]))


def test_a_graph_that_was_lowered_in_inference_mode_runs():
    class Places(Halves):
        "With a stored tensor that is a value of the graph."

        def forward(self, x):
            return super().forward(x + self.b.weight[:2].reshape(1, 8, 8))

    x = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        graph = lower(Places().eval(), x)
        want = graph(x)
        assert Runner(graph)(x).equal(want)
    assert Runner(graph)(x).equal(want)
