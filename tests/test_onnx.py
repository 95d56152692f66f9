"ONNX files: every width and function as the graph answers, refusals by name, files that are whole or absent."

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import fx, nn
from torch.nn import functional as F

from micronet_nb.activations import quantise_activations
from micronet_nb.core import MicronetError
from micronet_nb.integer import IntConv2d, IntLinear, Quantise, ScaleBias
from micronet_nb.lowering import lower
from micronet_nb.models import create_model
from micronet_nb.onnx import RULES, beside_onnx, carrier, onnx_session, to_onnx
from micronet_nb.packing import pack, unpack
from micronet_nb.pruning import prune
from micronet_nb.weights import quantise_weights


def edges(top):
    "Halves, ends and what lies beyond."
    whole = torch.arange(-top - 3.0, top + 4.0)
    return torch.cat([whole, whole + 0.5, (whole + 0.5) * (1 + 1e-7), torch.tensor([-1e9, -0.0, 1e9])])


@pytest.mark.parametrize('form', ['qdq', 'float', 'fused'])
@pytest.mark.parametrize('bits', [*range(1, 9), 11, 16])
def test_quantisers(bits, form, tmp_path):
    for signed in (False, True):
        net = nn.Sequential(Quantise(bits, signed))
        x = edges(min(net[0].top, 300))[None]
        if bits > 9:
            x = torch.cat([x, x + net[0].top], 1)
        run = onnx_session(to_onnx(net, tmp_path / 'q.onnx', form, x.shape[1:]))
        assert torch.equal(run(x), net(x))


@pytest.mark.parametrize('bits', [*range(1, 9), 11, 16])
def test_weights(bits, tmp_path):
    "Every integer that a layer may hold is in the file and comes out again, in the type that is promised."
    low, high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = (
        torch.arange(low, high + 1.0)[:, None] if bits < 10 else torch.tensor([[low], [-1.0], [0.0], [5.0], [high]])
    )
    for layer in (IntLinear(1, len(values), weight_bits=bits), IntConv2d(1, len(values), 1, weight_bits=bits)):
        layer.weight.data = values.view(layer.weight.shape)
        shape = (3, 1) if isinstance(layer, nn.Linear) else (3, 1, 2, 2)
        x = torch.tensor([1.0, 2.0, -3.0]).view(3, *[1] * (len(shape) - 1)).expand(shape)
        path = to_onnx(nn.Sequential(layer), tmp_path / 'w.onnx', input_size=shape[1:])
        assert torch.equal(onnx_session(path)(x), layer(x))
        (w,) = [t for t in onnx.load(path).graph.initializer if t.name == '0.weight']
        assert onnx.TensorProto.DataType.Name(w.data_type) == carrier(bits)
        assert len(w.raw_data) == -(-len(values) * int(carrier(bits)[3:]) // 8)


def compressed(net, x, weight_bits, activation_bits):
    g = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data = torch.rand(m.num_features, generator=g) + 0.5
            m.bias.data = torch.randn(m.num_features, generator=g) * 0.3
    prune(net.eval(), 0.5)
    quantise_weights(net, weight_bits)
    quantise_activations(net, x, activation_bits, 8)
    return lower(net.eval(), x[:2])


@pytest.mark.parametrize(
    'name,bits',
    [('densenet_bc_10_8', 2), ('densenet_bc_10_8', 4), ('wrn_10_1', 3), ('wrn_10_1', 8), ('densenet_bc_10_8', 6)],
)
def test_lowered_nets_agree(name, bits, tmp_path):
    "To the last bit: all sums are of integers, and scales are multiplied and added one by one."
    torch.manual_seed(bits)
    x = torch.randn(12, 3, 16, 16)
    graph = compressed(create_model(name, 10, small=True), x, bits, bits)
    path = to_onnx(graph, tmp_path / 'net.onnx')
    run = onnx_session(path, threads=1)
    with torch.inference_mode():
        expected = graph(x)
    assert torch.allclose(run(x), expected, atol=1e-4 * float(expected.std())), float((run(x) - expected).abs().max())
    assert torch.equal(run(x[:1]), run(x)[:1]) and len(run(x[:0])) == 0  # any batch
    unpacked = unpack(pack(graph, tmp_path / 'net.safetensors'))
    assert to_onnx(unpacked, tmp_path / 'again.onnx').read_bytes() == path.read_bytes()
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == 'n'


class Doubled(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], 1)[:, ::2]


@pytest.mark.parametrize(
    'middle',
    [nn.ReLU(), nn.ReLU6(), nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), Doubled(), nn.Hardtanh(-7, 7)],
    ids=lambda m: type(m).__name__,
)
def test_quantisers_next_to_anything(middle, tmp_path):
    "onnxruntime fuses 2- and 4-bit quantisers without having kernels for them: the file must not invite it to."
    torch.manual_seed(0)

    def layer(bits):
        m = IntConv2d(4, 4, 1, weight_bits=bits)
        m.weight.data = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), m.weight.shape).float()
        return m

    def scale():
        m = ScaleBias(4)
        m.weight.data, m.bias.data = torch.rand(4) * 0.3, torch.randn(4)
        return m

    x = 5 * torch.randn(2, 4, 5, 5)
    for a, b in (
        ((4, False), (4, True)),
        ((2, True), (2, False)),
        ((3, True), (8, True)),
        ((8, False), (4, False)),
        ((1, False), (3, False)),
    ):
        q, r = Quantise(*a), Quantise(*b)
        for net in (
            [q, middle, r],
            [layer(4), scale(), middle, r, layer(2), scale()],
            [layer(4), scale(), q, middle, layer(8), r, layer(8), q, layer(2)],
        ):
            net = nn.Sequential(*net)
            assert torch.allclose(
                onnx_session(to_onnx(net, tmp_path / 'x.onnx', input_size=x.shape[1:]))(x), net(x), atol=1e-4
            ), (a, b, net)


class Everything(nn.Module):
    "Every function that `lower` writes, with unusual arguments."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 8, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2)
        self.same, self.fc = nn.Conv2d(8, 4, (2, 4), padding='same'), nn.Linear(72, 5)

    def forward(self, x):
        a, b = torch.chunk(F.pad(x, (1, 2, 0, 3)), 2, 1)
        x = torch.cat([F.silu(a), F.hardswish(b), torch.tanh(a) - torch.sigmoid(b)], 1)
        x = F.pad(F.pad(x, (1, 1, 1, 1), 'reflect'), (0, 1, 1, 0), 'replicate')
        x = F.max_pool2d(self.conv(x), 3, 2, 1, ceil_mode=True)
        x = F.gelu(x) * F.hardsigmoid(x.mean((2, 3), keepdim=True)) + F.leaky_relu(F.relu6(x), 0.2)
        x = F.avg_pool2d(self.same(x), 3, 1, 1, count_include_pad=False) + F.avg_pool2d(F.hardtanh(x[:, 2:6]), 3, 1, 1)
        x = F.adaptive_avg_pool2d(x.permute(0, 1, 3, 2)[:, :, :6, :6], (3, 3)).reshape(-1, 2, 18)
        return self.fc(torch.cat([x, F.relu(-x)], 1).flatten(1))


def test_every_function(tmp_path):
    torch.manual_seed(0)
    net, x = Everything().eval(), torch.randn(3, 4, 14, 16)
    graph = lower(net, x, torch.float32)
    with torch.inference_mode():
        expected = net(x)
    for form in ('qdq', 'float', 'fused'):
        assert torch.allclose(onnx_session(to_onnx(graph, tmp_path / 'e.onnx', form))(x), expected, atol=1e-5)


def test_refusals(tmp_path):
    path = tmp_path / 'x.onnx'

    def refused(net, words, size=(3, 8, 8), **kwargs):
        with pytest.raises(MicronetError, match=words):
            to_onnx(net, path, input_size=size, **kwargs)
        assert [*tmp_path.iterdir()] == []

    class Sorts(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    refused(Sorts(), 'cumsum cannot be exported to ONNX: there is no rule for cumsum')
    refused(nn.Sequential(nn.BatchNorm2d(3)), '0 cannot be exported to ONNX: there is no rule for BatchNorm2d')
    refused(nn.Sequential(nn.Conv2d(4, 2, 1)), 'does not run on torch.float32 2x3x8x8')
    refused(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode='reflect')), "its padding is 'reflect'")
    refused(nn.Sequential(nn.AvgPool2d(2, divisor_override=3)), 'divisor_override=3')
    refused(nn.Sequential(IntConv2d(3, 1, 1)), 'not whole numbers')
    refused(nn.Sequential(nn.ReLU()), 'give input_size', size=None)
    refused(nn.Sequential(nn.ReLU()), "form is 'qdq', 'float' or 'fused'", form='int')
    with pytest.raises(MicronetError, match='does not exist'):
        onnx_session(path)
    path.write_bytes(b'nothing')
    with pytest.raises(MicronetError, match='cannot open'):
        onnx_session(path)


def test_old_file_stays(tmp_path, monkeypatch):
    path = to_onnx(nn.Sequential(nn.ReLU()), tmp_path / 'x.onnx', input_size=(3,))
    before = path.read_bytes()

    def broken(*args, **kwargs):
        raise onnx.checker.ValidationError('no')

    monkeypatch.setattr(onnx.checker, 'check_model', broken)
    with pytest.raises(MicronetError, match='refuses what was written'):
        to_onnx(nn.Sequential(nn.Tanh()), path, input_size=(3,))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_ones_own_rule(tmp_path):
    from micronet_nb.onnx import RULES, exports

    class Doubles(nn.Module):
        def forward(self, x):
            return torch.special.expit(x)

    try:
        exports(torch.special.expit)(lambda e, input: e('Sigmoid', input))
        x = torch.randn(2, 3)
        assert torch.allclose(onnx_session(to_onnx(Doubles(), tmp_path / 'x.onnx', input_size=(3,)))(x), x.sigmoid())
    finally:
        RULES.pop(torch.special.expit, None)


class Pools(nn.Module):
    "Many pools of one input, their outputs in a row."

    def __init__(self, pools):
        super().__init__()
        self.pools = nn.ModuleList(pools)

    def forward(self, x):
        return torch.cat([p(x).flatten(1) for p in self.pools], 1)


GRID = [
    (k, s, p, ceil)
    for k in (1, 2, 3, (2, 3), (4, 1))
    for s in (1, 2, 3, (3, 1))
    for p in (0, 1, (0, 1))
    for ceil in (False, True)
    if all(2 * a <= b for a, b in zip(*((v, v) if isinstance(v, int) else v for v in (p, k))))
]


@pytest.mark.parametrize('size', [(7, 8), (5, 9), (4, 6)])
@pytest.mark.parametrize('kind', ['max', 'max, dilated', 'average', 'average without the padding'])
def test_every_pool(kind, size, tmp_path):
    "Kernel, stride, padding and ceil_mode in all combinations answer as torch does."
    made = {
        'max': lambda k, s, p, c: nn.MaxPool2d(k, s, p, 1, ceil_mode=c),
        'max, dilated': lambda k, s, p, c: nn.MaxPool2d(k, s, p, 2, ceil_mode=c),
        'average': lambda k, s, p, c: nn.AvgPool2d(k, s, p, c),
        'average without the padding': lambda k, s, p, c: nn.AvgPool2d(k, s, p, c, False),
    }[kind]
    torch.manual_seed(0)
    x, pools, sizes = torch.randn(2, 2, *size) - 3, [], []  # below 0, so that a padded 0 would show
    for arguments in GRID:
        try:
            sizes.append(made(*arguments)(x)[0].numel())
        except RuntimeError:
            continue  # torch has no such pool: its output would be empty
        pools.append(made(*arguments))
    assert len(pools) > 40
    net = Pools(pools)
    with torch.no_grad():
        found, expected = onnx_session(to_onnx(net, tmp_path / 'p.onnx', input_size=x.shape[1:]), threads=1)(x), net(x)
    assert found.shape == expected.shape
    wrong = [
        p
        for p, a, b in zip(pools, found.split(sizes, 1), expected.split(sizes, 1))
        if not torch.allclose(a, b, atol=1e-6)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize('mode', ['reflect', 'replicate', 'circular'])
def test_padding_modes(mode, tmp_path):
    "A lowered net pads by a node of its own; a convolution that pads otherwise than with zeros is refused by name."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)
    ).eval()
    x = torch.randn(3, 2, 5, 6)
    with pytest.raises(MicronetError, match=f"its padding is '{mode}': lower the net first"):
        to_onnx(nn.Sequential(net[0]), tmp_path / 'x.onnx', input_size=(2, 5, 6))
    assert not list(tmp_path.iterdir())
    graph = lower(net, x, torch.float32)
    assert torch.allclose(onnx_session(to_onnx(graph, tmp_path / 'x.onnx'))(x), net(x), atol=1e-5)


def test_non_finite_input_is_refused(tmp_path):
    "The net says NaN, integers cannot: a number would stand for it."
    net = nn.Sequential(Quantise(4), IntConv2d(3, 4, 1), ScaleBias(4))
    net[1].weight.data = torch.ones_like(net[1].weight)
    run, x = onnx_session(to_onnx(net, tmp_path / 'x.onnx', input_size=(3, 4, 4))), torch.zeros(2, 3, 4, 4)
    assert torch.equal(run(x), net(x))
    for bad in (float('nan'), float('inf'), -float('inf')):
        y = x.clone()
        y[1, 2, 3, :2] = bad
        with pytest.raises(MicronetError, match='the input holds 2 numbers that are NaN or infinite'):
            run(y)
    for wrong in (x.double(), x[:, :2], x[0]):
        with pytest.raises(MicronetError, match='x.onnx does not run on torch.float'):
            run(wrong)


def test_modes_are_left_as_they_were(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Dropout(), nn.ReLU()), nn.BatchNorm2d(4))
    net[1].eval()
    modes = [m.training for m in net.modules()]
    to_onnx(net[:2], tmp_path / 'x.onnx', input_size=(3, 4, 4))
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(MicronetError, match='no rule for BatchNorm2d'):
        to_onnx(net, tmp_path / 'y.onnx', input_size=(3, 4, 4))
    graph = fx.symbolic_trace(net)
    before = {k: v.clone() for k, v in graph.state_dict().items()}
    with pytest.raises(MicronetError, match='no rule for BatchNorm2d'):
        to_onnx(graph, tmp_path / 'y.onnx', input_size=(3, 4, 4))
    assert (
        [m.training for m in net.modules()] == modes
        and graph.training
        and all(torch.equal(v, before[k]) for k, v in graph.state_dict().items())
    )


class Does(nn.Module):
    "A function, with a layer and numbers that it may use."

    def __init__(self, f):
        super().__init__()
        self.f = f
        self.conv = nn.Conv2d(4, 4, 3)
        self.k = nn.Parameter(torch.tensor(3.0))
        self.whole = nn.Parameter(torch.arange(4).view(4, 1, 1), False)

    def forward(self, x):
        return self.f(self, x)


@pytest.mark.parametrize(
    'f',
    [
        lambda m, x: 1 - x,
        lambda m, x: 2 * x + 1,
        lambda m, x: x - 3,
        lambda m, x: x + True,
        lambda m, x: torch.sub(x, 2, alpha=3),
        lambda m, x: x * m.k,
        lambda m, x: x * m.whole,
        lambda m, x: m.conv(input=x),
        lambda m, x: F.pad(x, (2, 3, 1, 0), 'circular'),
        lambda m, x: x,
    ],
)
def test_numbers_and_names(f, tmp_path):
    torch.manual_seed(0)
    net, x = Does(f).eval(), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        assert torch.allclose(
            onnx_session(to_onnx(net, tmp_path / 'x.onnx', input_size=x.shape[1:]))(x), net(x), atol=1e-5
        )


class Defaults(nn.Module):
    def forward(self, x, factor=2.0):
        return x * factor


@pytest.mark.parametrize(
    'net, words',
    [
        (Does(lambda m, x: (x, x)), 'not one tensor'),
        (Does(lambda m, x: {'y': x}), 'not one tensor'),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), 'indices|not one tensor'),
        (nn.Sequential(nn.Conv2d(4, 4, 1)).double(), 'is torch.float64'),
        (nn.Sequential(nn.Conv2d(4, 4, 1)).bfloat16(), 'is torch.bfloat16'),
        (Defaults(), 'the input factor has a default value'),
    ],
)
def test_clear_refusals(net, words, tmp_path):
    with pytest.raises(MicronetError, match=words):
        to_onnx(net, tmp_path / 'x.onnx', input_size=(4, 6, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 3, (2, 5)])
def test_averages_over_windows_of_different_sizes(size, tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(size)).eval(), torch.randn(2, 3, 9, 10)
    graph = lower(net, x)
    out = onnx_session(to_onnx(graph, tmp_path / "net.onnx", input_size=(3, 9, 10)))(x)
    assert torch.allclose(out, net(x), atol=1e-5) and out.shape == net(x).shape


def normed():
    "A norm, a gate and a softmax, each with a quantiser behind it, and layers of whole numbers between."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Softmax(-1), nn.Linear(16, 4)
    )
    x = torch.randn(64, 16)
    net = net.eval()
    quantise_weights(net, 4), quantise_activations(net, x, 8)
    return lower(net, x), torch.randn(2000, 16)


@pytest.mark.parametrize('form', ['qdq', 'float', 'fused'])
def test_quantisers_behind_floats_make_the_integers_of_the_graph_or_their_neighbours(form):
    graph, x = normed()
    table = beside_onnx(graph, x, form)
    assert table.integers.tolist() == [2000 * 16] * 3 and int(table.other.sum()) < 50
    assert table.attrs['off'] < 1e-6


def test_a_runtime_that_computes_otherwise_is_found(monkeypatch):
    "A norm with another epsilon: refused. With any neighbour allowed: what lies behind is exact for these integers."
    graph, x = normed()

    def other(e, m, x):
        weight, bias = m.weight, m.bias
        return e('LayerNormalization', x, weight, bias, axis=-1, epsilon=0.01)

    monkeypatch.setitem(RULES, nn.LayerNorm, other)
    with pytest.raises(MicronetError, match='onnxruntime makes .* of 32,000 integers that are not those of the graph'):
        beside_onnx(graph, x)
    table = beside_onnx(graph, x, slack=8.0)
    assert table.other.iloc[0] > 1000 and int(table.other.iloc[1:].sum()) < 50


def fusable(size, *modules):
    "A net of random integers, its scales of both signs; its input."
    torch.manual_seed(0)
    net = nn.Sequential(*modules)
    for m in net.modules():
        if isinstance(m, IntConv2d):
            top = 2 ** (m.weight_bits - 1) - 1
            m.weight.data = torch.randint(-top, top + 1, m.weight.shape).float()
        if isinstance(m, ScaleBias) and len(m.weight) > 1:
            m.weight.data = (torch.rand(4) + 0.5) * torch.tensor([0.01, -0.01, 0.01, 0.01])
            m.bias.data = 5 * torch.randn(4)
        elif isinstance(m, ScaleBias):
            m.weight.data.fill_(1.7)
    return net, 40 * torch.randn(size)


def kernels(path):
    "What onnxruntime runs after its own changes to the graph, and what the file holds."
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path) + '.optimised', 3
    onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return [Counter(n.op_type for n in onnx.load(p).graph.node) for p in (options.optimized_model_filepath, path)]


class Padded(nn.Module):
    def forward(self, x):
        return F.pad(x, (0, 1, 2, 0))


class Apart(nn.Module):
    "A convolution, its scale and a ReLU, one of which somebody else reads, too."

    def __init__(self, where):
        super().__init__()
        self.quantise, self.conv, self.scale = Quantise(8), conv(kernel=1), ScaleBias(4)
        self.then, self.last, self.where = Quantise(8, True), conv(kernel=1), where

    def forward(self, x):
        sums = self.conv(self.quantise(x))
        scaled = self.scale(sums)
        cut = F.relu(scaled)
        q = self.then(cut)
        return self.last(q) + {'sums': sums, 'scaled': scaled, 'cut': cut, 'integers': q}[self.where]


def conv(bits=8, kernel=3, **kwargs):
    return IntConv2d(4, 4, kernel, weight_bits=bits, **kwargs)


FUSABLE = {  # modules between two layers, and how many of the layers run on integers
    'scale': ([ScaleBias(4)], 1),
    'scales': ([ScaleBias(4), ScaleBias(1), ScaleBias(4), ScaleBias(1)], 1),
    'relu': ([ScaleBias(4), nn.ReLU()], 1),
    'relu6': ([ScaleBias(4), nn.ReLU6(), ScaleBias(1)], 1),
    'cuts': ([ScaleBias(4), nn.Hardtanh(-30, 17.3), ScaleBias(1), nn.Hardtanh(-2, 40)], 1),
    'pool': ([ScaleBias(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), ScaleBias(1)], 1),
    'pooled_sums': ([nn.MaxPool2d(2, 1), ScaleBias(1)], 1),
    'no_scale': ([], 1),
    'scale_behind_a_cut': ([ScaleBias(4), nn.ReLU(), ScaleBias(4)], 0),  # its bias is added after the cut
    'negative_scale_behind_a_pool': ([nn.MaxPool2d(2, 1), ScaleBias(4)], 0),
    'hardswish': ([ScaleBias(4), nn.Hardswish(), ScaleBias(1)], 0),
}


@pytest.mark.parametrize('case', FUSABLE)
@pytest.mark.parametrize('bits', [8, 5, 2])
def test_fused_layers_run_on_integers(case, bits, tmp_path):
    "Between two quantisers of any range, and every integer is the graph's, or its neighbour for a tenth of a step."
    between, want = FUSABLE[case]
    for q in (Quantise(bits), Quantise(bits, True), Quantise(bits, low=-(2**bits) // 3)):
        modules = [ScaleBias(1), Quantise(8), conv(), *copy.deepcopy(between), q, conv(), ScaleBias(4)]
        net, x = fusable((3, 4, 9, 9), *modules)
        found, written = kernels(to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:]))
        assert found['QLinearConv'] == want
        assert written['Mul'] == 1 if want else written['Mul'] > 1  # the last scale alone
        table = beside_onnx(net, x, 'fused', slack=0.11)
        assert int(table.other.sum()) < 0.05 * int(table.integers.sum()) and table.attrs['off'] < 1e-5


@pytest.mark.parametrize('bits', [2, 3, 4, 7, 8])
@pytest.mark.parametrize('kwargs', [dict(groups=4), dict(kernel=1), dict(stride=2, padding=(2, 1)), dict(dilation=2)])
def test_fused_weights_of_any_width_and_shape(bits, kwargs, tmp_path):
    layers = [conv(bits, **kwargs), ScaleBias(4), Quantise(8, low=-99), Padded(), conv(bits, **kwargs), ScaleBias(4)]
    net, x = fusable((2, 4, 16, 16), Quantise(8, True), Padded(), *layers, Quantise(4))
    found, written = kernels(to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:]))
    assert found['QLinearConv'] == 2 and not found['Conv'] and not written['Pad']
    table = beside_onnx(net, x, 'fused', slack=0.11)
    assert int(table.other.sum()) < 0.02 * int(table.integers.sum()) and table.attrs['off'] <= 1 / 15


@pytest.mark.parametrize('where', ['sums', 'scaled', 'cut', 'integers'])
def test_a_value_that_is_read_twice_is_not_folded(where, tmp_path):
    net, x = fusable((2, 4, 6, 6), Apart(where))
    path = to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:])
    assert not kernels(path)[0]['QLinearConv']
    with torch.no_grad():
        assert torch.allclose(onnx_session(path)(x), net(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    'change',
    [
        lambda net: net[2].weight.data[0].zero_(),
        lambda net: net[2].bias.data[0].fill_(3e9),
        lambda net: (net[1].weight.data[0, 0].fill_(-128), net[2].weight.data.fill_(-0.01)),
        lambda net: net[2].weight.data.fill_(3.0),
        lambda net: net.__setitem__(0, Quantise(9)),
        lambda net: net.__setitem__(0, Quantise(1, True)),
        lambda net: net.__setitem__(3, Quantise(9)),
        lambda net: net.__setitem__(3, Quantise(1, True)),
    ],
    ids='zero bias weight step before sign_before behind sign_behind'.split(),
)
def test_what_does_not_fit_stays_in_floats(change, tmp_path):
    "A scale of 0, a bias beyond 32 bits, a weight of 128, a bias between two sums, quantisers that are no bytes."
    net, x = fusable((2, 4, 6, 6), Quantise(8), conv(), ScaleBias(4), Quantise(8), conv(), ScaleBias(4))
    assert kernels(to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:]))[0]['QLinearConv'] == 1
    change(net)
    assert not kernels(to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:]))[0]['QLinearConv']
    assert beside_onnx(net, x, 'fused').attrs['off'] < 1e-5


def test_a_fused_layer_by_hand(tmp_path):
    "5 * 3 and 7 * 3, times -0.5, and 20; 9 at most; one evaluator has no kernels, the other has."
    net = nn.Sequential(ScaleBias(1), Quantise(4), IntConv2d(1, 1, 1, weight_bits=3), ScaleBias(1), Quantise(4, low=-6))
    net[0].weight.data.fill_(2.0)
    net[2].weight.data.fill_(3.0)
    net[3].weight.data.fill_(-0.5)
    net[3].bias.data.fill_(20.0)
    path = to_onnx(net, tmp_path / 'n.onnx', 'fused', (1, 1, 4))
    x = torch.tensor([2.5, 3.4, 20.0, -1.0]).view(1, 1, 1, 4)  # 5, 7 (6.8), 15 and 0
    want = torch.tensor([9.0, 9.0, -2.0, 9.0])  # 12.5, 9.5, -2.5 to even, 20
    (evaluated,) = ReferenceEvaluator(str(path)).run(None, {'x': x.numpy()})
    for y in (torch.from_numpy(evaluated), onnx_session(path)(x), net(x)):
        assert torch.equal(y.flatten(), want)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert stored['2.weight'].item() == -3 * 32 and {-20 * 64, 0.5} & {v.item() for v in stored.values() if not v.shape}


def test_a_fused_end_is_rounded_as_the_graph_rounds_it(tmp_path):
    "ReLU6 behind it ends at 6 * 19.25 = 115.5, which is 116; 6 / (1 / 19.25) is less, and would be 115."
    net, x = fusable((1, 4, 5, 5), Quantise(8), conv(), ScaleBias(4), nn.ReLU6(), ScaleBias(1), Quantise(8), conv())
    net[2].weight.data, net[2].bias.data = torch.full((4,), 0.01), torch.zeros(4)
    net[4].weight.data.fill_(19.25)
    path = to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:])
    stored = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    clips = {t.item() for t in stored if t.dtype == np.uint8}
    assert 116 in clips and 115 not in clips
    assert beside_onnx(net, x, 'fused', slack=0.11).attrs['off'] < 1e-5


def test_zeros_around_the_answer_stay(tmp_path):
    net, x = fusable((2, 4, 5, 5), Quantise(8), conv(), ScaleBias(4), Quantise(8), Padded())
    run = onnx_session(to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:]))
    assert run(x).shape == net(x).shape and (run(x) - net(x)).abs().max() <= 1


def test_no_pair_of_products_is_cut_off(tmp_path):
    "255 * 127 + 255 * 127 is more than 16 bits hold; without its option onnxruntime cuts it off on some processors."
    net, x = fusable((1, 4, 5, 5), Quantise(8), conv(), ScaleBias(4), Quantise(8), conv())
    net[1].weight.data.fill_(127.0)
    net[2].weight.data = torch.full((4,), 200 / (36 * 255 * 127))
    net[2].bias.data.zero_()
    run = onnx_session(to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:]))
    assert torch.equal(run(x.fill_(255.0)), net(x)) and float(net[:4](x)[0, 0, 1, 1]) == 200


def test_products_of_seven_bits_always_fit(tmp_path):
    "Whatever options a session has, and however much finer the weights are stored."
    for bits in range(2, 8):
        net, x = fusable((1, 4, 5, 5), Quantise(8), conv(bits), ScaleBias(4), Quantise(8), conv(bits))
        top = 2.0 ** (bits - 1)
        net[1].weight.data.fill_(-top)
        net[2].weight.data = torch.full((4,), -200 / (36 * 255 * top))
        net[2].bias.data.zero_()
        path = to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:])
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        (y,) = session.run(None, {'x': x.fill_(255.0).numpy()})
        assert torch.equal(torch.from_numpy(y), net(x)) and kernels(path)[0]['QLinearConv'] == 1


class Twice(nn.Module):
    "One convolution, called twice with scales of two signs, and once more without one."

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = conv(kernel=1), ScaleBias(4), ScaleBias(4)
        self.quantisers = nn.ModuleList(Quantise(8, True) for _ in range(3))

    def forward(self, x):
        a, b, c = self.quantisers
        return self.conv(c(self.two(self.conv(b(self.one(self.conv(a(x))))))))


def test_a_layer_that_is_called_twice_is_stored_for_each_of_its_scales(tmp_path):
    net, x = fusable((2, 4, 6, 6), Twice())
    net[0].two.weight.data = -net[0].one.weight.data
    assert kernels(to_onnx(net, tmp_path / 'n.onnx', 'fused', x.shape[1:]))[0]['QLinearConv'] == 2
    assert beside_onnx(net, x, 'fused', slack=0.11).attrs['off'] < 1e-5


@pytest.mark.parametrize('name,weights,bits', [('wrn_10_1', 8, 8), ('wrn_10_1', 4, 5), ('densenet_bc_10_8', 4, 4)])
def test_fused_nets_answer_nearly_as_the_graph(name, weights, bits, tmp_path):
    torch.manual_seed(bits)
    x = torch.randn(40, 3, 16, 16)
    graph = compressed(create_model(name, 10, small=True), x, weights, bits)
    path = to_onnx(graph, tmp_path / 'net.onnx', 'fused')
    assert kernels(path)[0]['QLinearConv'] > 0
    with torch.inference_mode():
        same = onnx_session(path)(x).argmax(1) == graph(x).argmax(1)
    assert int(same.sum()) >= 36
    table = beside_onnx(graph, x, 'fused', slack=0.11)
    assert int(table.other.sum()) < 0.01 * int(table.integers.sum())
