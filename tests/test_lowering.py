"Lowering: graph, Runner and integer run give the quantised net's answers, whatever its layers, or say why not."

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrize import register_parametrization

from micronet_nb.activations import ActivationQuantiser, attach_quantiser, quantise_activations, quantise_products
from micronet_nb.adders import _one_by_one, accumulator_ranges, adder, partial_bounds
from micronet_nb.core import MicronetError
from micronet_nb.integer import (
    IntConv2d,
    IntWeights,
    Quantise,
    ScaleBias,
    as_graph,
    int_sums,
    run_integer,
    sum_widths,
)
from micronet_nb.lowering import SideBySide, capture, dtype_holds, lower, powers
from micronet_nb.onnx import to_onnx
from micronet_nb.packing import pack, unpack
from micronet_nb.pruning import prune
from micronet_nb.runtime import Runner
from micronet_nb.scoring import score
from micronet_nb.weights import WeightQuantiser, quantise_weights


def images(n=3, channels=3, side=7, seed=0):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def compressed(net, x, weight_bits=4, activation_bits=4):
    "A net with seeded norms, and quantisers whose scales reach the largest values (no solver); None: floats."
    g = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data = torch.rand(m.num_features, generator=g) + 0.5
            m.bias.data = torch.randn(m.num_features, generator=g) * 0.3
            m.running_mean = torch.randn(m.num_features, generator=g) * 0.3
            m.running_var = torch.rand(m.num_features, generator=g) + 0.5
    return quantised(net, x, weight_bits, activation_bits)


@torch.no_grad()
def quantised(net, x, weight_bits, activation_bits):
    layers = [m for m in net.eval().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for m in layers if weight_bits else ():
        top = m.weight.abs().flatten(1).amax(1).view(-1, *[1] * (m.weight.dim() - 1))
        register_parametrization(m, 'weight', WeightQuantiser(weight_bits, top / max(2 ** (weight_bits - 1) - 1, 1)))
    seen = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args, kwargs: seen.update({m: next(iter((*args, *kwargs.values())))}), with_kwargs=True
        )
        for m in layers
    ]
    net(x)
    for h in hooks:
        h.remove()
    for m, v in seen.items() if activation_bits else ():
        signed = bool((v < 0).any())
        attach_quantiser(
            m,
            ActivationQuantiser(
                activation_bits, float(v.abs().max()) / max(2 ** (activation_bits - signed) - 1, 1), signed
            ),
        )
    return net


def compare(net, x, scales=torch.float16):
    "Runner, integer run and graph give the same bits; returns the graph, its output, and the net's own in float64."
    graph = lower(net, x, scales)
    with torch.inference_mode():
        got, want = graph(x), copy.deepcopy(net).double()(x.double())
        for int8 in (None, False):
            assert torch.equal(Runner(graph, int8)(x), got)
    assert torch.equal(run_integer(graph, x), got)
    assert got.isfinite().all() and want.std() > 0
    return graph, got.double(), want


def assert_exact(net, x):
    "The graph in float64 gives the net's answers, and in float32 the three ways of running it agree."
    graph = lower(net, x, torch.float64)
    with torch.inference_mode():
        want = copy.deepcopy(net).double()(x.double())
    assert float((graph(x.double()) - want).abs().max()) <= 1e-9 * float(want.abs().max())
    assert torch.equal(run_integer(graph, x.double()), graph(x.double()))
    return compare(net, x)


class Conv(nn.Module):
    "Two convolutions, the second as asked for, and a classifier."

    def __init__(self, channels=8, between=nn.ReLU, **second):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.between = between()
        self.second, self.fc = nn.Conv2d(channels, 8, **dict(kernel_size=3) | second), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.second(self.between(self.norm(self.first(x)))).mean((2, 3)))


# ---- scales beyond FP16


@pytest.mark.parametrize('size', [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize('bits', [4, 8, 12, 16])
def test_wide_and_small_weights_keep_their_answers(bits, size):
    "Scales of the last layer go down to 1e-28; the biases are as small, so that they are no answer by themselves."
    x, net = images(), Conv()
    for m in (net.first, net.second, net.fc):
        m.weight.data *= size
    net.second.bias.data *= size
    net.fc.bias.data *= size**2
    net.norm.running_var.fill_(size**2)
    net.norm.eps = 1e-30
    quantised(net, x, bits, bits)
    graph, got, want = compare(net, x)
    assert float((got - want).abs().max()) <= (0.01 if bits > 8 else 0.2) * float(
        want.std(0).max()
    )  # of what the images make of it
    for m in graph.modules():
        if isinstance(m, ScaleBias):
            assert torch.equal(m.weight.half().float(), m.weight) and torch.equal(m.bias.half().float(), m.bias)


def test_a_scale_out_of_reach_is_named():
    x, net = images(), compressed(Conv(), images())
    net.first.input_quantiser.scale.fill_(1e-38)
    with pytest.raises(
        MicronetError, match=r'first_input_scale holds 1e\+38, which torch.float16 cannot.*scales=torch.float32'
    ):
        lower(net, x)


def test_what_fp16_holds_is_left_alone():
    "No power of two where the scales are ordinary: what was lowered before is lowered alike now."
    graph = lower(compressed(Conv(), images()), images())
    assert not [n for n, m in graph.named_modules() if n.endswith(('_before', '_behind'))]


@pytest.mark.parametrize(
    'scale, bias, found',
    [
        ((0.3, 2e-3), (0.0, 5.0), (0, 0)),
        ((1e-9, 1.0), (0.0, 1.0), (0, 0)),
        ((2.0**-20,), (0.0,), (0, 0)),
        ((3e-7,), (0.0,), (-21, 0)),
        ((2e6,), (0.0,), (21, 0)),
        ((1e38,), (0.0,), None),
    ],
)
def test_powers_by_hand(scale, bias, found):
    s, b = (torch.tensor(v, dtype=torch.float64) for v in (scale, bias))
    assert powers(s, b, torch.ones_like(s), torch.float16) == found


def test_what_is_returned_is_checked():
    "A graph whose numbers were changed after rounding is noticed, and the module named."
    net, x = compressed(Conv(), images()), images().double()
    exact = lower(net, x, torch.float64)
    for name, spoil in (
        ('second_input_scale', lambda m: m.weight.data.mul_(1.01)),
        ('second', lambda m: m.weight.data[0, 0, 0, 0].add_(1)),
        ('fc_scale', lambda m: m.weight.data.zero_()),
    ):
        rounded = copy.deepcopy(exact).float()
        SideBySide(exact, rounded, 2**-10).run(x)
        spoil(rounded.get_submodule(name))
        with pytest.raises(MicronetError, match=f'^{name} is off by'):
            SideBySide(exact, rounded, 2**-10).run(x)


# ---- layers of every kind

GRID = [
    dict(c, **p)
    for c in (
        dict(),
        dict(stride=2),
        dict(dilation=2),
        dict(groups=2),
        dict(groups=8),
        dict(dilation=(1, 2), groups=4),
        dict(kernel_size=(3, 1), stride=(1, 2)),
    )
    for p in (
        dict(),
        dict(padding=1),
        dict(padding=(0, 2)),
        *[dict(padding=1, padding_mode=m) for m in ('reflect', 'circular', 'replicate')],
        dict(padding='same'),
    )
    if not (p.get('padding') == 'same' and 'stride' in c)
]


@pytest.mark.parametrize('kind', GRID, ids=str)
def test_convolutions_of_every_kind(kind):
    x = images()
    graph, *_ = assert_exact(compressed(Conv(**kind), x), x)
    assert [m.weight_bits for m in graph.modules() if isinstance(m, IntWeights)] == [4] * 3


@pytest.mark.parametrize('kind', GRID, ids=str)
def test_integer_sums_against_float64(kind):
    "Also of a layer that pads by itself, as one built by hand or read from a file does."
    torch.manual_seed(0)
    for bits in (4, 16):
        layer = IntConv2d(8, 8, **dict(kernel_size=3) | kind, weight_bits=bits)
        x = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, 8, 7, 7), dtype=torch.int32)
        layer.weight.data = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), layer.weight.shape).float()
        want = copy.deepcopy(layer).double()(x.double())
        assert torch.equal(int_sums(layer, x).double(), want)
        graph = as_graph(nn.Sequential(Quantise(bits, True), layer))
        assert torch.equal(
            run_integer(graph, x.clamp(min=1 - 2 ** (bits - 1)).float()).double(),
            copy.deepcopy(layer).double()(x.clamp(min=1 - 2 ** (bits - 1)).double()),
        )
        layer.wide = bits > 8
        assert torch.equal(layer(x.float()), want.float())


@pytest.mark.parametrize('kind', GRID[3::7] + GRID[1::6], ids=str)
def test_the_adders_see_the_same_sums(kind):
    "Bounds and sums of 15_adders pad and spread as the layer does."
    torch.manual_seed(0)
    layer, x = IntConv2d(8, 8, **dict(kernel_size=3) | kind, weight_bits=4), torch.randint(0, 16, (2, 8, 7, 7)).float()
    layer.weight.data = torch.randint(-8, 8, layer.weight.shape).float()
    net, want = nn.Sequential(Quantise(4), layer).train(), layer(x)
    negative = copy.deepcopy(layer)
    negative.weight.data.clamp_(max=0)
    assert torch.equal(partial_bounds(layer, x)[0], negative(x))
    assert torch.equal(
        _one_by_one(layer, x, torch.zeros_like(want), torch.arange(want.numel()), 'saturate', 24), want
    )  # add by add
    row = accumulator_ranges(net, x).iloc[0]
    assert (row.low, row.high) == (float(want.min()), float(want.max())) and row.partial >= max(-row.low, row.high)
    with adder(net, 'saturate', 6):
        assert not torch.equal(net(x), want)
    assert all(m.training for m in net.modules())


def test_widths_of_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.layer = Quantise(4), Quantise(8), IntConv2d(3, 2, 3, dilation=2)

        def forward(self, x):
            return self.layer(self.b(x)).mean((2, 3)) + self.layer(self.a(x)).mean((2, 3))

    net, x = Twice(), images().abs() * 300
    net.layer.weight.data.fill_(7.0)
    row = sum_widths(as_graph(net), x).loc['layer']
    most = int(copy.deepcopy(net.layer)(net.b(x)).max())
    assert (row.inputs, row.seen) == (8, 1 + most.bit_length())


@pytest.mark.parametrize(
    'weight_bits, activation_bits',
    [(16, 16), (8, 16), (12, 8), (4, 16), (1, 1), (2, 16), (16, 1), (4, None), (None, 4), (8, 8)],
)
def test_every_width(weight_bits, activation_bits):
    x = images()
    graph, got, want = assert_exact(compressed(Conv(), x, weight_bits, activation_bits), x)
    wide = [m.wide for m in graph.modules() if isinstance(m, IntWeights)]
    assert any(wide) == (
        (weight_bits, activation_bits) in ((16, 16), (8, 16))
    )  # 72 products of 2^31 or 2^23 pass 2^24; of the others they do not


def test_wide_sums_survive_a_file(tmp_path):
    x = images()
    graph = lower(compressed(Conv(), x, 16, 16), x)
    back = unpack(pack(graph, tmp_path / 'net.safetensors'))
    with torch.inference_mode():
        assert (
            torch.equal(back(x), graph(x))
            and torch.equal(Runner(back)(x), graph(x))
            and torch.equal(run_integer(back, x), graph(x))
        )
    assert score(back, (3, 7, 7)).storage == score(graph, (3, 7, 7)).storage


# ---- a layer is its weight and its arguments


class Functional(nn.Module):
    "Layers that are functions, or modules that are used twice, or weights that are shared."

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.w = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.v = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.c = nn.Conv2d(3, 4, 3)
        self.d = nn.Conv2d(3, 4, 3, padding=1)
        self.e, self.f = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        if how == 'tied':
            self.d.weight = self.c.weight

    def forward(self, x):
        return getattr(self, self.how)(x)

    def two_weights(self, x):
        return (F.conv2d(x, self.w) - F.conv2d(x, self.v)).mean((2, 3))

    def two_strides(self, x):
        return F.conv2d(x, self.w).mean((2, 3)) - F.conv2d(x, self.w, stride=2).mean((2, 3))

    def two_biases(self, x):
        return (F.conv2d(x, self.w, self.c.bias).relu() - F.conv2d(x, self.w).relu()).mean((2, 3))

    def slices(self, x):
        return torch.cat([F.conv2d(x, self.c.weight[:1]), F.conv2d(x, self.c.weight[1:])], 1).mean((2, 3))

    def inputs(self, x):
        return (F.conv2d(x[:, :2], self.c.weight[:, :2]) + F.conv2d(x[:, 2:], self.c.weight[:, 2:])).mean((2, 3))

    def twice(self, x):
        return (self.c(x) - self.c(x.relu())).mean((2, 3))

    def tied(self, x):
        return self.c(x).mean((2, 3)) - self.d(x).mean((2, 3))

    def linears(self, x):
        return F.linear(x.mean((2, 3)), self.e.weight, self.e.bias).relu() - F.linear(x.mean((2, 3)), self.f.weight)

    def halves(self, x):
        return torch.cat([F.linear(x.mean((2, 3)), self.e.weight[:2]), F.linear(x.mean((2, 3)), self.e.weight[2:])], 1)

    def by_name(self, x):
        return self.e(input=F.relu(input=self.c(input=x)).mean(dim=(2, 3))[:, :3])


WAYS = [n for n in vars(Functional) if n not in ('__init__', 'forward') and not n.startswith('__')]


@pytest.mark.parametrize('weight_bits', [None, 4, 16])
@pytest.mark.parametrize('how', WAYS)
def test_a_layer_is_its_weight_and_arguments(how, weight_bits):
    x, net = images(), Functional(how)
    if weight_bits and how not in ('two_weights', 'two_strides', 'two_biases', 'by_name'):
        for m in (net.c, net.d, net.e, net.f):
            if how == 'tied' and m is net.d:
                continue
            top = m.weight.detach().abs().flatten(1).amax(1).view(-1, *[1] * (m.weight.dim() - 1))
            register_parametrization(m, 'weight', WeightQuantiser(weight_bits, top / (2 ** (weight_bits - 1) - 1)))
    graph, *_ = assert_exact(net.eval(), x)
    layers = [m for m in graph.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == {'twice': 1, 'tied': 2}.get(how, 2)
    if weight_bits and how in ('slices', 'inputs', 'twice', 'linears', 'halves'):
        assert all(m.weight_bits == weight_bits for m in layers)
    if how in ('slices', 'inputs', 'halves'):
        assert sum(m.weight.numel() for m in layers) == (net.e if how == 'halves' else net.c).weight.numel()


def test_a_shared_module_is_stored_once(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.a(self.b(self.a(x).relu()).relu()).mean((2, 3)))

    net, x = Shared(), images()
    prune(net, 0.5)
    graph, *_ = assert_exact(compressed(net, x), x)
    assert [tuple(m.weight.shape) for m in graph.modules() if isinstance(m, IntWeights)] == [(3, 3, 3, 3), (5, 3)]
    back = unpack(pack(graph, tmp_path / 'net.safetensors'))
    with torch.inference_mode():
        assert torch.equal(back(x), graph(x))


class Around(nn.Module):
    "A convolution, and a function of what it gives."

    def __init__(self, f, out=8, **conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.f, self.g = nn.Conv2d(3, out, 3, **conv), f, nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        return self.f(self, self.conv(x)).mean((2, 3))


@pytest.mark.parametrize('bits', [None, 4])
@pytest.mark.parametrize(
    'out, f',
    [
        (8, lambda m, v: v + 1),
        (8, lambda m, v: 2 * v - 3),
        (8, lambda m, v: (1 - v) / 7),
        (8, lambda m, v: v * m.g),
        (1, lambda m, v: v * m.g),
        (1, lambda m, v: m.g * v + m.g),
        (1, lambda m, v: (v - m.g).relu()),
        (1, lambda m, v: m.g - v),
        (1, lambda m, v: v / (2 + m.g.abs())),
        (1, lambda m, v: torch.cat([v * m.g, v], 1)),
        (8, lambda m, v: torch.rsub(input=v, other=1.0, alpha=2)),
        (8, lambda m, v: v.permute(dims=(0, 2, 3, 1)).transpose(dim0=1, dim1=3)),
        (8, lambda m, v: F.hardtanh(v, -0.3, 0.4)),
        (8, lambda m, v: F.leaky_relu(v, 0.2)),
    ],
)
def test_constants_and_names(f, out, bits):
    for bias in (False, True):
        x = images()
        assert_exact(compressed(Around(f, out, bias=bias), x, bits, bits), x)


@pytest.mark.parametrize('bits', [None, 4])
def test_a_constant_of_every_pixel_is_stored(bits, tmp_path):
    net = Around(lambda m, v: 2 - (v + m.p) * m.p).eval()
    net.p = nn.Parameter(torch.randn(1, 1, 5, 5))
    graph, _, _ = assert_exact(compressed(net, images(), bits, bits), images())
    stored = [n for n in graph.graph.nodes if n.op == 'get_attr']
    assert [getattr(graph, n.target).shape for n in stored] == [(1, 1, 5, 5)] * 2
    assert len({n.target for n in stored}) == 1
    assert unpack(pack(graph, tmp_path / 'net'))(images()).equal(graph(images()))


@pytest.mark.parametrize('between, left', [(nn.ReLU6, 0), (lambda: nn.Hardtanh(-1.0, 5.0), 0), (nn.LeakyReLU, 1)])
def test_a_clamp_needs_no_scale_of_its_own(between, left):
    "A clamp between scale and quantiser: absorbed where the quantiser ends first, else done in its scale."
    x = images()
    for factor, kept in ((0.2, left), (9.0, 1)):  # the quantiser ends before the clamp, or behind it
        net = compressed(Conv(between=between), x)
        net.second.input_quantiser.signed = between is nn.LeakyReLU
        net.second.input_quantiser.scale.fill_(factor * 5 / 15)
        graph, *_ = assert_exact(net, x)
        scales, clamps = (
            [n for n in graph.graph.nodes if test(n)]
            for test in (lambda n: 'scale' in n.name, lambda n: n.target in (F.hardtanh, F.leaky_relu))
        )
        assert (len(clamps), len(scales)) == (kept, 4)


# ---- modes, NaN, errors


class Parts(nn.Module):
    "A net of integer and plain modules, one of which drops values in training."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.drop, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.drop(self.relu(self.conv(input=x))).mean((2, 3)))


def test_modes_are_left_as_they_were(tmp_path):
    x = images()
    net = Parts().train()
    net.relu.eval()
    modes = lambda m: [c.training for c in m.modules()]
    before, want = modes(net), copy.deepcopy(net).eval()(x).detach()
    traced = torch.fx.symbolic_trace(net)
    for given in (net, traced):
        kept = modes(given)
        runner = Runner(given)
        for _ in range(2):
            assert torch.equal(runner(x), want) and modes(given) == kept
            given.train()
            kept = modes(given)  # the runner has a mode of its own
        assert torch.equal(run_integer(as_graph(given), x), want)
        pack(given, tmp_path / 'net.safetensors')
        assert modes(given) == kept
        with pytest.raises(MicronetError):
            runner(torch.randn(1, 7, 7, 7))
        with pytest.raises(MicronetError):
            run_integer(as_graph(given), torch.randn(1, 7, 7, 7))
        assert modes(given) == kept
    whole = compressed(Conv(), x).train()
    whole.norm.eval()
    kept, state = modes(whole), copy.deepcopy(whole.state_dict())
    lower(whole, x)
    capture(whole, x)
    with pytest.raises(MicronetError):
        capture(whole, x[:, :2])
    with pytest.raises(MicronetError):
        lower(whole, x[:, :2])
    assert modes(whole) == kept and all(torch.equal(v, state[k]) for k, v in whole.state_dict().items())


def test_integer_runs_and_widths_of_a_graph_in_training_mode():
    x = images()
    graph = lower(compressed(Conv(), x), x)
    want, widths = run_integer(graph, x), sum_widths(graph, x)
    graph.train()
    assert (
        torch.equal(run_integer(graph, x), want)
        and sum_widths(graph, x).equals(widths)
        and all(m.training for m in graph.modules())
    )


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_what_is_not_finite_is_refused(value):
    "The graph passes NaN on, as the net does; where integers are made of it, it would become an ordinary answer."
    x = images()
    net = compressed(Conv(), x)
    graph, bad = lower(net, x), x.clone()
    bad[1, 2, 3, 4] = value
    if value != value:
        with torch.inference_mode():
            assert (
                torch.equal(graph(bad).isnan(), net(bad).isnan())
                and graph(bad)[1].isnan().all()
                and not graph(bad)[0].isnan().any()
            )
    for f in (Runner(graph), lambda x: run_integer(graph, x), lambda x: sum_widths(graph, x), lambda x: lower(net, x)):
        with pytest.raises(MicronetError, match='1 values that are NaN or infinite'):
            f(bad)
    graph.get_submodule('fc_scale').weight.data[0] = value
    with pytest.raises(MicronetError, match='fc_scale.weight holds NaN or infinity'):
        Runner(graph)


class Wrapped(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.net, self.made = Parts(), made

    def forward(self, x):
        return self.made(self, self.net(x))


@pytest.mark.parametrize(
    'made, told',
    [
        (lambda m, y: (y, y), 'returns a tuple: only nets that return one tensor can be lowered; wrap it'),
        (lambda m, y: {'logits': y}, 'returns a dict'),
        (lambda m, y: [y], 'returns a list'),
    ],
)
def test_nets_of_other_results(made, told):
    with pytest.raises(MicronetError, match=told):
        lower(Wrapped(made).eval(), images())
    with pytest.raises(MicronetError, match='one tensor to one tensor'):
        Runner(Wrapped(made).eval())


class TwoInputs(nn.Module):
    "An image and a row beside it."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image, row):
        return self.conv(image).flatten(1) + row


@pytest.mark.parametrize(
    'verb',
    [
        lambda net, x: lower(net, x),
        lambda net, x: lower(net, (x, torch.zeros(2, 1))),
        lambda net, x: score(net, (3, 8, 8)),
        lambda net, x: quantise_activations(net, x, 8),
        lambda net, x: quantise_products(net, x, 8),
        lambda net, x: Runner(net),
        lambda net, x: pack(net, 'net'),
        lambda net, x: to_onnx(net, 'net', input_size=(3, 8, 8)),
        lambda net, x: Runner(fx.symbolic_trace(net))(x),
        lambda net, x: pack(fx.symbolic_trace(net), 'net'),
        lambda net, x: to_onnx(fx.symbolic_trace(net), 'net', input_size=(3, 8, 8)),
    ],
)
def test_a_net_of_several_inputs_is_refused_everywhere(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = r'takes 2 \(image, row\): wrap it in a module that takes one|a Runner takes a graph of one tensor'
    with pytest.raises(MicronetError, match=told):
        verb(TwoInputs().eval(), torch.randn(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_head_for_training_only():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 2)

        def forward(self, x):
            v = self.conv(x).relu().mean((2, 3))
            return (self.fc(v), self.aux(v)) if self.training else self.fc(v)

    net, x = Heads().train(), images()
    graph = lower(net, x)
    net.eval()
    assert float((graph(x) - net(x)).detach().abs().max()) < 1e-6 and not [
        n for n, _ in graph.named_modules() if n.startswith('aux')
    ]


@pytest.mark.parametrize(
    'change, told',
    [
        (
            lambda c: nn.utils.weight_norm(c),
            r"'conv' \(Conv2d\) is made in a hook by weight_norm: call torch.nn.utils.remove_weight_norm",
        ),
        (lambda c: nn.utils.spectral_norm(c), 'by spectral_norm: call torch.nn.utils.remove_spectral_norm'),
        (
            lambda c: torch_prune.l1_unstructured(c, 'weight', 0.5),
            "by torch's pruning: call torch.nn.utils.prune.remove",
        ),
    ],
)
@pytest.mark.filterwarnings('ignore')
def test_weights_made_in_hooks_are_named(change, told):
    net = Parts()
    change(net.conv)
    net(images())
    for f in (lambda: lower(net, images()), lambda: capture(net, images())):
        with pytest.raises(MicronetError, match=told):
            f()


def test_lazy_layers_are_named():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(
        MicronetError,
        match=r"module '0' \(LazyConv2d\) is lazy and has no weights yet: run the model on one batch first",
    ):
        lower(net, images())
    net(images())
    assert_exact(compressed(net, images()), images())


def test_norms_of_weights_that_are_parametrizations():
    x = images()
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        net = Parts().eval()
        norm(net.conv)
        assert_exact(net, x)


def test_a_net_that_raises_is_a_named_error():
    def breaks(m, y):
        raise KeyError('temperature')

    with pytest.raises(MicronetError, match="Wrapped does not run on an example of 3x3x7x7: 'temperature'"):
        lower(Wrapped(breaks).eval(), images())


def test_rounding_to_float32_is_no_reason_to_refuse():
    "Input, scale, bias, product and sum are each rounded: more than one last digit of the scale."
    torch.manual_seed(13)
    net = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 6, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 5)).eval()
    x = torch.randn(4, 3, 9, 9)
    quantise_weights(net, 4)
    quantise_activations(net, x, 8)
    assert torch.allclose(lower(net, x, torch.float32)(x).double(), lower(net, x, torch.float64)(x.double()), atol=1e-6)


def test_a_scale_is_held_as_its_own_channel_needs_it():
    "Small floats beside large integer sums: the sums do not excuse what rounding does to the others."
    scale, bias = torch.tensor([136.0, 4e-6], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    top = torch.tensor([0.93, 2.3e7], dtype=torch.float64)
    assert not dtype_holds(scale, bias, top, torch.float16)  # 4e-6 is subnormal, 0.6 % off
    i, j = powers(scale, bias, top, torch.float16)
    rounded = (scale * 2.0 ** -(i + j)).half().double() * 2.0 ** (i + j)
    assert ((rounded - scale).abs() <= scale * 2.0**-11).all()


class PaddedPool(nn.Module):
    "A pool behind a border of minus infinity, as TensorFlow pads."

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = F.pad(self.first(x), (0, 1, 0, 1), value=float('-inf'))
        return self.last(F.max_pool2d(x, 3, 2)).mean((2, 3))


@pytest.mark.parametrize('scales', [torch.float16, torch.float32])
def test_a_border_of_minus_infinity(tmp_path, scales):
    "It was refused: infinity less infinity is no number."
    torch.manual_seed(0)
    net, x = PaddedPool().eval(), torch.randn(6, 3, 8, 8)
    quantise_activations(net, x, 6)
    quantise_weights(net, 4)
    graph = lower(net, x, scales)
    with torch.no_grad():
        assert torch.allclose(lower(net, x, torch.float64)(x.double()), copy.deepcopy(net).double()(x.double()))
        y = graph(x)
    assert torch.isfinite(y).all() and run_integer(graph, x).equal(y) and Runner(graph)(x).equal(y)
    assert unpack(pack(graph, tmp_path / 'net'))(x).equal(y)


def test_an_infinity_that_only_float32_makes_is_refused():
    "1e30 squared is a number in float64."
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), Squared(), Small())
    net[0].weight.data.fill_(1e30)
    with pytest.raises(MicronetError, match='lost in rounding'):
        lower(net.eval(), torch.rand(2, 1, 2, 2) + 0.5, torch.float32)


class Squared(nn.Module):
    def forward(self, x):
        return x * x


class Small(nn.Module):
    def forward(self, x):
        return torch.tanh(x)
