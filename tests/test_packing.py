"Packed files: nets and files that no notebook shows, damaged and forged ones, and the commands."

import importlib
import json
import random
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn import functional as F

from micronet_nb import packing, scoring
from micronet_nb.activations import quantise_activations
from micronet_nb.cli import load_packed, micronet_eval, micronet_pack, micronet_score
from micronet_nb.core import MicronetError, find_file, released_figures
from micronet_nb.integer import IntConv2d, IntLinear, Quantise, ScaleBias, as_graph, run_integer
from micronet_nb.layers import compressible
from micronet_nb.lowering import lower
from micronet_nb.models import create_model
from micronet_nb.packing import (
    FORMAT,
    bill,
    compare_charges,
    compress,
    contents,
    decode,
    encode,
    half_scales,
    pack,
    parts_of,
    seal,
    unpack,
)
from micronet_nb.pruning import prune
from micronet_nb.scoring import score
from micronet_nb.weights import quantise_weights

CHECKPOINT = 'riair/densenet-100.pth.tar'
needs_checkpoint = pytest.mark.skipif(find_file(CHECKPOINT) is None, reason=f'{CHECKPOINT} is not below MICRONET_DATA')


def filled(model, density=0.4, seed=0):
    "Random integers in the integer layers, FP16 numbers in the scales."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if hasattr(m, 'weight_bits'):
            top = 2 ** (m.weight_bits - 1)
            values = (
                torch.randint(-top, top, m.weight.shape, generator=g).float()
                if m.weight_bits > 1
                else torch.randint(0, 2, m.weight.shape, generator=g) * 2.0 - 1
            )
            m.weight.data = values * (torch.rand(m.weight.shape, generator=g) < density)
        elif isinstance(m, ScaleBias):
            m.weight.data = (torch.rand(m.weight.shape, generator=g) * 0.1).half().float()
            m.bias.data = torch.randn(m.bias.shape, generator=g).half().float()
    return model.eval()


class Odd(nn.Module):
    "Groups, strides, oblong kernels, every kind of argument, and a constant."

    def __init__(self):
        super().__init__()
        self.q = Quantise(7, signed=True)
        self.a = IntConv2d(4, 8, (1, 3), stride=(2, 1), padding=(0, 1), groups=2, dilation=(1, 2), weight_bits=16)
        self.s = ScaleBias(8)
        self.b, self.t = IntConv2d(4, 6, 1, weight_bits=1), ScaleBias(6)
        self.fc, self.u = IntLinear(6, 5, weight_bits=2), ScaleBias(5)
        self.shift = nn.Parameter(torch.randn(6, 1, 1))
        self.register_buffer('step', torch.tensor(0.5))

    def forward(self, x):
        first, second = self.s(self.a(self.q(x))).chunk(2, dim=1)
        x = self.t(self.b(torch.clamp(first - second[:, :, ::1], min=-float('inf'), max=9.0))) + self.shift
        return self.u(self.fc(F.adaptive_avg_pool2d(F.relu(x) * self.step, 1).flatten(start_dim=1)))


def same(a, b, x):
    "Same structure, same tensors, same answers, to the last bit."
    for g, h in zip(a.graph.nodes, b.graph.nodes, strict=True):
        assert (g.name, g.op, g.target, str(g.args), str(g.kwargs)) == (
            h.name,
            h.op,
            h.target,
            str(h.args),
            str(h.kwargs),
        )
    assert a.state_dict().keys() == b.state_dict().keys()
    for k, v in a.state_dict().items():
        assert torch.equal(v, b.state_dict()[k]) and v.dtype == b.state_dict()[k].dtype, k
    with torch.inference_mode():
        assert torch.equal(a(x), b(x))


def conv_and_linear(density, linear_bits):
    "A convolution and a linear layer, for inputs of 5x8x8."
    layers = (
        Quantise(4),
        IntConv2d(5, 7, 3, weight_bits=4),
        ScaleBias(7),
        Quantise(3),
        nn.Flatten(),
        IntLinear(7 * 36, 9, weight_bits=linear_bits),
        ScaleBias(9),
    )
    return filled(nn.Sequential(*layers), density)


@pytest.fixture
def small(tmp_path):
    return pack(filled(Odd()), tmp_path / 'small.safetensors', dict(input_size=(4, 8, 8)))


def refused(path, data, *words):
    path.write_bytes(data)
    with pytest.raises(MicronetError) as e:
        unpack(path)
    for w in words:
        assert w in str(e.value), str(e.value)


# --- bits


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 16),
    st.integers(0, 200),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
    st.integers(0, 2**31),
)
def test_any_integers_come_back(bits, n, density, masked, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1)
    w = torch.randint(-top, top, (n,), generator=g) if bits > 1 else torch.randint(0, 2, (n,), generator=g) * 2 - 1
    if masked or bits > 1:
        w = w * (torch.rand(n, generator=g) < density)
    w = w.to(dtype)
    data = encode(w, bits, masked)
    nnz = int((w != 0).sum())
    assert len(data) == -(-(n * masked + (nnz if masked else n) * bits) // 8)
    back, used = decode(np.concatenate([data, np.frombuffer(b'\xffmore', np.uint8)]), n, bits, masked, dtype)
    assert used == len(data) and back.dtype == dtype and torch.equal(back, w)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50), st.booleans())
def test_any_floats_come_back(values, masked):
    w = torch.tensor(values, dtype=torch.float32)
    back, used = decode(encode(w, None, masked), len(w), None, masked)
    assert torch.equal(back, w) and used == len(encode(w, None, masked))


# --- nets


def test_odd_net_round_trip(small):
    net, x = as_graph(filled(Odd())), torch.randn(3, 4, 8, 8) * 20
    torch.manual_seed(0)
    net.shift.data = torch.randn(6, 1, 1)
    path = pack(net, small, dict(input_size=(4, 8, 8)))
    same(net, unpack(path), x)
    table = bill(path)
    assert not (table.why == 'not explained').any()
    layers = table[table.kind.isin(['IntConv2d', 'IntLinear', 'ScaleBias'])]
    assert layers.stored.tolist() == [-(-c // 1) for c in layers.charged]
    assert pack(unpack(path), small.with_name('b'), dict(input_size=(4, 8, 8))).read_bytes() == path.read_bytes()


def test_float_net_round_trips(tmp_path):
    "Unlowered nets can be packed where torch.fx traces them and every function is known."
    torch.manual_seed(0)
    net = create_model('wrn_10_1', 10, small=True).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    graph = as_graph(net)
    path = pack(graph, tmp_path / 'n.safetensors', dict(input_size=(3, 32, 32)))
    same(graph, unpack(path), torch.randn(2, 3, 32, 32))
    assert not (bill(path).why == 'not explained').any()


def test_unlowered_net_with_modules_of_timm_is_named(tmp_path):
    with pytest.raises(MicronetError, match='BatchNormAct2d.* calls getattr.*lower the net first'):
        pack(create_model('densenet_bc_10_8', 10, small=True), tmp_path / 'n')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['mlp', 'densenet_bc_10_8', 'wrn_10_1', 'mixnet_s'])
def test_lowered_nets_round_trip(name, tmp_path):
    "Pruned, quantised (1 to 6 bits), lowered; one layer stays float."
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Flatten(), nn.Linear(768, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
        if name == 'mlp'
        else create_model(name, 10, small=True)
    )
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
    x, layers = torch.randn(4, 3, 16, 16), list(compressible(net))
    prune(net.eval(), 0.5)
    quantise_weights(
        net, {n: 32 if i == 1 and len(layers) > 3 else 1 + i % 6 for i, n in enumerate(layers)} if name == 'mlp' else 4
    )
    quantise_activations(net, x, 4)
    for scales in (torch.float16,) if name == 'mixnet_s' else (torch.float16, torch.float32):
        graph = lower(net, x[:2], scales)
        path = pack(graph, tmp_path / 'n.safetensors', dict(accounting='riair-cifar100'))
        back, table = unpack(path), bill(path)
        same(graph, back, x)
        assert back.meta['input_size'] == (3, 16, 16) and torch.equal(run_integer(back, x[:1]), graph(x[:1]))
        explained = {'', 'one number for all channels, charged once a channel'} | (
            {'FP16 would lose something: stored in 32 bits, charged as 16'} if scales == torch.float32 else set()
        )
        assert set(table.why) <= explained, table[~table.why.isin(explained)]
        assert parts_of(path)['file'] < 1.1 * (table.stored.sum()) or name != 'mixnet_s'


@pytest.mark.parametrize('masks, accounting', [('always', 'riair-cifar100'), ('paying', 'official')])
@pytest.mark.parametrize('density', [0, 0.1, 0.8, 1])
def test_payload_is_the_charge(masks, accounting, density, tmp_path):
    net = conv_and_linear(density, 5)
    table = bill(pack(net, tmp_path / 'n', masks=masks), (5, 8, 8), accounting)
    assert table.stored.tolist() == [-(-c // 1) for c in table.charged]
    storage = score(net, (5, 8, 8), accounting=accounting, corrected=True).storage
    payload = parts_of(tmp_path / 'n')['weights'] + parts_of(tmp_path / 'n')['numbers']
    assert 0 <= payload - 4 * storage < len(table)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype, tmp_path):
    net = as_graph(filled(nn.Sequential(IntConv2d(3, 4, 3), ScaleBias(4), nn.Conv2d(4, 4, 1)))).to(dtype)
    same(net, unpack(pack(net, tmp_path / 'n')), torch.randn(1, 3, 8, 8, dtype=dtype))


def test_shared_modules_and_tied_weights_are_stored_once(tmp_path):
    conv, other = IntConv2d(4, 4, 3, padding=1), IntConv2d(4, 4, 3, padding=1)
    net = filled(nn.Sequential(conv, ScaleBias(4), conv, other, ScaleBias(4)))
    other.weight = conv.weight
    graph = as_graph(net)
    path = pack(graph, tmp_path / 'n', dict(input_size=(4, 6, 6)))
    assert (contents(path).bytes > 0).sum() == 5 and contents(path).form.tolist().count('=0.weight') == 1
    back = unpack(path)
    assert back.get_submodule('0').weight.data_ptr() == back.get_submodule('3').weight.data_ptr()
    same(graph, back, torch.randn(1, 4, 6, 6))
    assert bill(path).why.eq('').all()


def test_names_of_an_edited_graph_stay(tmp_path):
    graph = as_graph(filled(nn.Sequential(Quantise(4), nn.ReLU(), IntConv2d(3, 4, 1), ScaleBias(4))))
    relu = next(n for n in graph.graph.nodes if n.target == '1')
    relu.replace_all_uses_with(relu.args[0])
    graph.graph.erase_node(relu)
    with graph.graph.inserting_before(next(n for n in graph.graph.nodes if n.op == 'output')) as _:
        graph.graph.call_function(torch.relu, (list(graph.graph.nodes)[-2],)).name
    for n in graph.graph.nodes:
        if n.op == 'call_module':
            n.name = f'node_of_{n.target}'
    graph.recompile()
    back = unpack(pack(graph, tmp_path / 'n'))
    assert [n.name for n in back.graph.nodes] == [n.name for n in graph.graph.nodes]
    same(graph, back, torch.randn(1, 3, 4, 4))


def test_training_is_left_as_it_was(tmp_path):
    net = filled(nn.Sequential(IntConv2d(3, 4, 1), nn.Dropout(), ScaleBias(4)))
    net.train()
    net[1].eval()
    before = torch.random.get_rng_state()
    pack(net, tmp_path / 'n')
    back = unpack(tmp_path / 'n')
    assert (
        net.training
        and not net[1].training
        and not back.training
        and not any(p.requires_grad for p in back.parameters())
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_half_scales_rounds_scales_and_nothing_else(tmp_path):
    net = filled(nn.Sequential(IntConv2d(3, 4, 1), ScaleBias(4), nn.Conv2d(4, 4, 1)))
    net[1].weight.data = torch.tensor([0.1, 1.0, 1e-7, 3.0])
    half = half_scales(net)
    assert torch.equal(half.get_submodule('1').weight, net[1].weight.half().float()) and torch.equal(
        half.get_submodule('2').weight, net[2].weight
    )
    assert net[1].weight[0] == torch.tensor(0.1)
    net[1].weight.data[0] = 1e6
    with pytest.raises(MicronetError, match='1.weight reaches 1e'):
        half_scales(net)


# --- what is written is read


def modules(rng):
    "A module of every kind, its arguments drawn at random: 4 channels of 9 x 8 in and (mostly) out."
    pick = rng.choice
    pad = pick(['zeros', 'reflect', 'replicate', 'circular'])
    norm = nn.BatchNorm2d(
        4, eps=pick([1e-5, 1e-3]), momentum=pick([0.1, None]), affine=pick([True, False]), track_running_stats=True
    )
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return pick(
        [
            lambda: nn.Conv2d(
                4,
                4,
                pick([1, 3, (1, 3)]),
                padding='same',
                dilation=pick([1, 2]),
                groups=pick([1, 2, 4]),
                bias=pick([True, False]),
                padding_mode=pad,
            ),
            lambda: nn.Conv2d(4, 4, (3, 1), stride=(1, 2), padding=(1, 0), padding_mode=pad),
            lambda: norm,
            lambda: nn.LayerNorm(
                [9, 8], eps=pick([1e-5, 1e-3]), elementwise_affine=pick([True, False]), bias=pick([True, False])
            ),
            lambda: nn.Identity(),
            lambda: IntConv2d(4, 4, 3, padding=1, weight_bits=rng.randrange(1, 9)),
            lambda: ScaleBias(pick([1, 4])),
            lambda: Quantise(rng.randrange(1, 9), pick([True, False])),
            lambda: nn.Hardtanh(*pick([(), (0.0, 6), (-float('inf'), 2.0), (np.float32(-1.5), 1)])),
            lambda: nn.ReLU(pick([True, False])),
            lambda: nn.ReLU6(),
            lambda: nn.SiLU(),
            lambda: nn.Sigmoid(),
            lambda: nn.Tanh(),
            lambda: nn.GELU(pick(['none', 'tanh'])),
            lambda: nn.Hardswish(),
            lambda: nn.Hardsigmoid(),
            lambda: nn.LeakyReLU(pick([0.01, 0.3])),
            lambda: nn.Softmax(pick([1, -1])),
            lambda: nn.Dropout(0.5),
            lambda: nn.AvgPool2d(
                *pick([(3, 1, 1), ([3, 3], 1, 1, True), (np.int64(3), 1, 1, False, False), (3, 1, 1, False, True, 5)])
            ),
            lambda: nn.MaxPool2d(3, 1, pick([1, (1, 1)]), ceil_mode=pick([True, False])),
            lambda: nn.AdaptiveAvgPool2d(pick([(9, 8), (None, 8), (None, None)])),
            lambda: nn.AdaptiveMaxPool2d((9, 8)),
        ]
    )()


class Drawn(nn.Module):
    "A random net: modules used again, tied or nested, parameters of any shape, and functions between them."

    def __init__(self, seed):
        super().__init__()
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        rng, self.steps = self.rng, nn.ModuleList([nn.Conv2d(4, 4, 1)])
        for _ in range(rng.randrange(1, 6)):
            self.steps.append(modules(rng))
        convs = [m for m in self.steps if type(m) is nn.Conv2d and m.weight.shape == (4, 4, 1, 1)]
        self.fc = nn.Linear(4, 4, bias=rng.choice([True, False]))
        tie = rng.randrange(4)
        if tie == 1:
            self.fc.weight = nn.Parameter(convs[0].weight.detach()[:, :, 0, 0].t())
        elif tie == 2:
            self.fc.weight = nn.Parameter(convs[0].weight.detach().view(4, 4))
        elif tie == 3:
            convs[0].norm = nn.BatchNorm2d(4)
        self.gain, self.bias = nn.Parameter(torch.tensor(rng.choice([2.0, 0.1]))), nn.Parameter(torch.zeros(4, 1, 1))
        self.order = [i for i in range(len(self.steps)) for _ in range(rng.choice([1, 1, 2]))]
        self.extra = rng.randrange(5)
        filled(self, seed=seed)

    def forward(self, x):
        for i in self.order:
            y = self.steps[i](x)
            if hasattr(self.steps[i], 'norm'):
                y = self.steps[i].norm(y)
            x = x + y.mean((2, 3), keepdim=True) if getattr(self.steps[i], 'stride', 1) == (1, 2) else y
        x = x * self.gain + self.bias
        if self.extra == 1:
            x = 1 - x[:, :, ::2, 1:]
        elif self.extra == 2:
            x = torch.cat([x, x * 2], 1)[:, 2:6]
        elif self.extra == 3:
            x = F.pad(x, (1, 0), value=float('-inf')).amax((2, 3), keepdim=True)
        x = self.fc(x.mean((2, 3)))
        return (x, self.fc.weight.sum()) if self.extra == 4 else x


@pytest.mark.parametrize('seed', range(60))
def test_what_is_written_is_read(seed, tmp_path):
    "The file of any net gives its tensors and answers, a second file is the same, and the net stays in its modes."
    net, rng = Drawn(seed), random.Random(seed)
    for m in net.modules():
        m.training = rng.random() < 0.5
    modes = [m.training for m in net.modules()]
    path = pack(net, tmp_path / 'n', dict(input_size=(4, 9, 8)))
    assert [m.training for m in net.modules()] == modes and [*tmp_path.iterdir()] == [path]
    back, x = unpack(path), torch.randn(3, 4, 9, 8)
    with torch.inference_mode():
        for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (net.eval()(x), back(x))), strict=True):
            assert torch.equal(a, b)
    for k, v in back.state_dict().items():
        owner, _, last = k.rpartition('.')
        assert torch.equal(v, getattr(net.get_submodule(owner), last)), k
    assert pack(back, tmp_path / 'again').read_bytes() == path.read_bytes()
    table = contents(path)
    floats = sum(
        t.numel() for t in {t.data_ptr(): t for n, t in net.named_parameters() if n in {*table.tensor}}.values()
    )
    assert table[table.bytes > 0].numbers.sum() <= floats + sum(b.numel() for b in net.buffers())  # tied tensors once


def test_ties_are_stored_once(tmp_path):
    "The same memory in the same order, transposed or in another shape; a square weight is not its transpose."

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)
            self.b = nn.Linear(6, 6, bias=False)
            self.c = nn.Conv2d(6, 6, 1, bias=False)
            self.d = nn.Linear(6, 6, bias=False)
            w = self.a.weight.detach()
            self.b.weight = nn.Parameter(w.t())
            self.c.weight = nn.Parameter(w.view(6, 6, 1, 1))
            self.d.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.d(self.c(x).flatten(1))))

    net, x = Tied().eval(), torch.randn(2, 6, 1, 1)
    path = pack(net, tmp_path / 'n', dict(input_size=(6, 1, 1)))
    table, back = contents(path).set_index('tensor'), unpack(path)
    assert table.bytes.sum() == 4 * 36 and len({m.weight.data_ptr() for m in (back.a, back.b, back.c, back.d)}) == 1
    assert (
        torch.equal(back.b.weight, net.a.weight.t())
        and not torch.equal(back.b.weight, net.a.weight)
        and torch.equal(back(x), net(x))
    )


def test_formats_are_no_newer_than_needed(tmp_path):
    "A file that an older reader can read says so."
    version = lambda net: json.loads(
        (d := pack(net, tmp_path / 'n').read_bytes())[8 : 8 + int.from_bytes(d[:8], 'little')]
    )['__metadata__']['micronet_nb'][0]
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert (
        version(two) == '1'
        and version(nn.Sequential(nn.Hardtanh(0.0, 6.0))) == '1'
        and version(nn.Sequential(nn.Hardtanh(0.0, float('inf')))) == '2'
    )
    two[1].weight = two[0].weight
    assert version(two) == '1'
    two[1].weight = nn.Parameter(two[0].weight.detach().t())
    assert version(two) == '2'


def hooked():
    m = nn.Sequential(nn.ReLU(), nn.ReLU())
    m[1].register_forward_hook(lambda module, args, out: out * 2)
    return m


def slim():
    m = nn.Conv2d(3, 4, 1)
    m.weight.data = m.weight.data[:2]
    return nn.Sequential(m)


def pruned():
    import torch.nn.utils.prune

    return nn.Sequential(torch.nn.utils.prune.random_unstructured(nn.Conv2d(3, 4, 1), 'weight', 0.5))


def stepless():
    q = Quantise(4)
    q.top = 3
    return nn.Sequential(q)


@pytest.mark.parametrize(
    'make, message',
    [
        (hooked, '1 has a forward hook'),
        (slim, '0.weight is 2x3x1x1'),
        (pruned, '0 has a forward hook .RandomUnstructured.'),
        (stepless, '0.top is 3'),
        (
            lambda: nn.Sequential(nn.LazyConv2d(3, 1)),
            "tracing needs the shape of '0.weight', a parameter of a lazy module",
        ),
        (lambda: nn.Sequential(nn.Conv2d(4, 2, 1)), 'does not run on an input of 3x8x8'),
        (lambda: nn.Sequential(nn.Hardtanh(torch.tensor(-1.0), 1.0)), 'the argument min_val of 0 is tensor'),
    ],
)
def test_what_a_file_would_lose_is_named(make, message, tmp_path):
    "Nothing is left behind, the old file stays, and the net keeps its modes."
    path = pack(nn.Sequential(nn.ReLU()), tmp_path / 'n')
    net, before = make().train(), path.read_bytes()
    with pytest.raises(MicronetError, match=message):
        pack(net, path, dict(input_size=(3, 8, 8)))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path] and all(m.training for m in net.modules())


@pytest.mark.parametrize('broken', ['value', 'node', 'answer'])
def test_a_file_that_is_not_the_net_is_not_kept(broken, tmp_path, monkeypatch):
    "Whatever goes wrong between the net and its file is found by opening it."
    real = packing.unpack

    def damaged(path):
        net = real(path)
        if broken == 'value':
            net.get_submodule('0').weight.data[0, 0] += 1
        elif broken == 'node':
            next(n for n in net.graph.nodes if n.target == '1').name = 'other'
        else:
            net.get_submodule('1').forward = lambda x: x
        return net

    monkeypatch.setattr(packing, 'unpack', damaged)
    with pytest.raises(
        MicronetError,
        match={
            'value': '0.weight comes back changed',
            'node': 'structure comes back changed',
            'answer': 'answers otherwise',
        }[broken],
    ):
        pack(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), tmp_path / 'n', dict(input_size=(3,)))
    assert not list(tmp_path.iterdir())


def test_a_graph_in_training_mode(tmp_path):
    "Neither its modules nor its running statistics change, and the file is that of the evaluation mode."
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    before = {k: v.clone() for k, v in graph.state_dict().items()}
    x, path = torch.randn(2, 3, 5, 5), pack(graph, tmp_path / 'n', dict(input_size=(3, 5, 5)))
    assert all(m.training for m in graph.modules()) and all(
        torch.equal(v, before[k]) for k, v in graph.state_dict().items()
    )
    back = unpack(path)
    assert torch.equal(back(x), graph.eval()(x)) and not any(m.training for m in back.modules())


def test_memory_order_is_no_difference(tmp_path):
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).to(memory_format=torch.channels_last)
    back = unpack(pack(net, tmp_path / 'n', dict(input_size=(16, 12, 12))))
    assert torch.equal(back.get_submodule('0').weight, net[0].weight) and torch.equal(
        back.get_submodule('2').weight, net[2].weight
    )


def test_nan_goes_through_an_unpacked_graph(tmp_path):
    "As through the net: no number stands for it."
    net = filled(nn.Sequential(Quantise(4), IntConv2d(3, 4, 1), ScaleBias(4)))
    x = torch.zeros(2, 3, 2, 2)
    x[0, 0, 0, 0] = float('nan')
    y = unpack(pack(net, tmp_path / 'n'))(x)
    assert (
        bool(torch.isnan(y[0, :, 0, 0]).all())
        and not bool(torch.isnan(y[1]).any())
        and torch.equal(y.isnan(), net(x).isnan())
    )


# --- one truth


@pytest.mark.parametrize('accounting', [None, 'official', 'riair-cifar100'])
@pytest.mark.parametrize('density', [0.5, 1])
def test_a_file_is_what_its_accounting_charges(accounting, density, tmp_path):
    net = conv_and_linear(density, 1)
    path = pack(net, tmp_path / 'n', dict(input_size=(5, 8, 8)) | ({'accounting': accounting} if accounting else {}))
    table, parts = bill(path), parts_of(path)
    assert table.why.eq('').all()
    assert (
        0
        <= parts['weights']
        + parts['numbers']
        - 4 * score(net, (5, 8, 8), accounting=accounting or 'official', corrected=True).storage
        < len(table)
    )
    sizes = [(m.weight.numel(), m.weight_bits, int((m.weight != 0).sum())) for m in (net[1], net[5])]
    masked, dense = (
        [-(-(n * with_mask + (nnz if with_mask else n) * b) // 8) for n, b, nnz in sizes] for with_mask in (True, False)
    )
    small = [m if b == 1 and nnz < n else min(m, d) for m, d, (n, b, nnz) in zip(masked, dense, sizes)]
    assert parts['weights'] == sum(masked if accounting == 'riair-cifar100' else small)
    assert parts_of(pack(net, path, masks='always'))['weights'] >= parts['weights']


SAME = 'the same tensor again: stored once'


class Again(nn.Module):
    "One weight in two places: of two layers, or of one layer that is called twice."

    def __init__(self, shared):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b = self.a if shared else nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.norm(self.b(self.a(x).relu()))


@pytest.mark.parametrize(
    'name', ['resnet10t', 'mobilenetv2_050', 'mobilenetv3_small_050', 'wrn_10_1', 'tied weight', 'shared layer']
)
def test_one_truth(name, tmp_path):
    "Trained, lowered and packed: the same figures, or a reason a line; weights and scales agree."
    import timm

    torch.manual_seed(0)
    twice = ' ' in name
    if twice:
        net = Again(name == 'shared layer').eval()
    elif name == 'wrn_10_1':
        net = create_model(name, 10, small=True).eval()
    else:
        net = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.normal_(0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
    quantise_weights(net, 4)
    quantise_activations(net, x, 4)
    graph = lower(net, x[:1])
    t = compare_charges(net, graph)
    before, after = (score(m, (3, 32, 32)) for m in (net, graph))
    for column, total in (
        ('simulated', before.ops),
        ('lowered', after.ops),
        ('simulated bytes', 4 * before.storage),
        ('lowered bytes', 4 * after.storage),
    ):
        assert abs(t[column].sum() - total) < 1e-3
    assert not t.why.str.contains('not explained').any() and (
        name == 'wrn_10_1' or not t[t.why != SAME].why.str.contains('again').any()
    ), t[t.why.str.contains('not|again')]
    layers = t[t.kind.isin(['conv', 'linear'])]
    assert (
        layers.why.tolist() == [''] * (len(layers) - twice) + [SAME] * twice
        and (layers['simulated bytes'] == layers['lowered bytes']).all()
        and len(layers) == len({*compressible(net)} | ({'b'} if twice else set()))
        and (layers.simulated == layers.lowered).all()
    )
    assert t['file bytes'].sum() == contents(pack(graph, tmp_path / 'n')).bytes.sum()
    assert (t[t.why == SAME]['file bytes'] == 0).all()
    assert 0 <= t['file bytes'].sum() - t['lowered bytes'].sum() < len(t)
    known = {
        'a scale: the rules charge no quantiser of the net that is trained',
        'done by the quantiser that reads it, which ends there',
        'the bias is zero everywhere: neither added nor stored',
    }
    assert {*t.why} - {'', *[SAME] * twice} <= known | {
        'the same scale again, for another reader',
        'with the bias of the norm behind it',
        'a norm: in the scale that is applied before it',
    }


@pytest.mark.parametrize('module', [True, False])
def test_a_scale_that_is_billed_already_costs_nothing(module, tmp_path):
    "One module that is called twice, or two modules with one weight and one bias."
    net = filled(nn.Sequential(Quantise(4), IntConv2d(4, 4, 1), ScaleBias(4), Quantise(4), IntConv2d(4, 4, 1)))
    net.append(net[2] if module else ScaleBias(4))
    net[5].weight, net[5].bias = net[2].weight, net[2].bias
    graph = as_graph(net)
    graph.meta['input_size'] = 4, 5, 5
    path = pack(graph, tmp_path / 'n')
    t = compare_charges(net, graph, path)
    assert t['file bytes'].sum() == contents(path).bytes.sum()
    scales = t[t.kind == 'scale']
    assert scales['file bytes'].tolist() == [16, 0] and scales.why.tolist() == ['', SAME]
    assert not bill(path).why.str.contains('channel|not explained').any()


def test_a_difference_without_a_reason_is_said():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    quantise_weights(net, 4)
    quantise_activations(net, x, 4)
    graph = lower(net, x)
    assert not compare_charges(net, graph).why.str.contains('not explained').any()
    graph.get_submodule('3').weight.data[0] = 0
    t = compare_charges(net, graph)
    assert t[t.why.str.contains('not explained')].name.tolist() == ['3']


def test_a_scale_that_is_applied_again_is_said():
    "Two layers read one value on two grids: what the net is charged once for, the deployed one does twice."

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.bn = nn.BatchNorm2d(8)
            self.a = nn.Conv2d(8, 4, 1)
            self.b = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return torch.cat([self.a(y), self.b(y)], 1)

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(2, 3, 8, 8)
    net.bn.bias.data.normal_()
    quantise_weights(net, 4)
    quantise_activations(net, x, {'a': 4, 'b': 6})
    graph = lower(net, x)
    t = compare_charges(net, graph)
    again = t[t.why == 'the same scale again, for another reader']
    assert (
        len(again) == 1
        and again.lowered.tolist() == [2 * 8 * 36 * 16 / 32]
        and again['lowered bytes'].tolist() == [2 * 8 * 2]
        and not t.why.str.contains('not explained').any()
    )


# --- what cannot be packed


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.conv = f, IntConv2d(3, 4, 1)

    def forward(self, x):
        return self.f(self.conv(x))


@pytest.mark.parametrize(
    'model, message',
    [
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 1)), '0 is a ConvTranspose2d'),
        (lambda: Calls(torch.special.i0), 'special_i0'),
        (lambda: Calls(lambda x: x.lgamma()), 'method lgamma'),
        (lambda: Calls(lambda x: x if x.sum() > 0 else -x), 'cannot be traced'),
        (lambda: nn.Sequential(IntConv2d(3, 4, 1, weight_bits=3)), 'more than 3 bits'),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))), 'ParametrizedConv2d'),
        (lambda: nn.Sequential(OrderedDict(code=nn.ReLU())), "'code' cannot be a name"),
    ],
)
def test_what_cannot_be_packed_is_named(model, message, tmp_path):
    net = model()
    for m in net.modules():
        if isinstance(m, IntConv2d):
            m.weight.data = torch.full(m.weight.shape, 5.0)
    with pytest.raises(MicronetError, match=message):
        pack(net, tmp_path / 'n')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'value, message',
    [
        (float('nan'), 'NaN or infinity|whole numbers'),
        (0.5, 'not whole numbers'),
        (float('inf'), 'NaN or infinity|bits'),
    ],
)
def test_weights_that_are_no_integers(value, message, tmp_path):
    net = filled(nn.Sequential(IntConv2d(3, 4, 1)))
    net[0].weight.data[0, 0] = value
    with pytest.raises(MicronetError, match=message):
        pack(net, tmp_path / 'n')


@pytest.mark.parametrize(
    'about',
    [
        dict(input_size=()),
        dict(input_size='3x8x8'),
        dict(input_size=(3, 8, True)),
        dict(accounting='mine'),
        dict(author='me'),
        dict(pixels=(1, 2)),
        dict(pixels={}),
        dict(input_size=(0, 8, 8)),
        7,
    ],
)
def test_about_is_checked(about, tmp_path):
    with pytest.raises(MicronetError, match='about'):
        pack(filled(nn.Sequential(IntConv2d(3, 4, 1))), tmp_path / 'n', about)


def test_unwritable_place():
    with pytest.raises(MicronetError, match='/proc/no'):
        pack(filled(nn.Sequential(IntConv2d(3, 4, 1))), '/proc/no/n.safetensors')
    with pytest.raises(MicronetError, match="'always' or 'paying'"):
        pack(nn.Sequential(), '/proc/no', masks='never')


# --- damaged and forged files


def test_every_single_bit_counts(small, tmp_path):
    "Not a sample: each bit of a file, one at a time."
    data = small.read_bytes()
    for i in range(8 * len(data)):
        bad = bytearray(data)
        bad[i // 8] ^= 1 << i % 8
        (tmp_path / 'bad').write_bytes(bad)
        with pytest.raises(MicronetError):
            unpack(tmp_path / 'bad')


def test_every_length_is_refused(small, tmp_path):
    data = small.read_bytes()
    for n in range(len(data)):
        refused(tmp_path / 'cut', data[:n])
    refused(tmp_path / 'long', data + b'\0', 'was altered')


def test_foreign_files(tmp_path):
    torch.save({'a': torch.ones(2)}, tmp_path / 'a.pt')
    save_file({'a': torch.ones(2)}, tmp_path / 'b.safetensors', metadata={'format': 'pt'})
    save_file({'a': torch.ones(2)}, tmp_path / 'c.safetensors', metadata={'micronet_nb': 'hello'})
    for f in ('a.pt', 'b.safetensors', 'c.safetensors'):
        with pytest.raises(MicronetError, match='not a file that micronet_nb packed'):
            unpack(tmp_path / f)
    with pytest.raises(MicronetError, match='cannot read'):
        unpack(tmp_path)
    with pytest.raises(MicronetError, match='No such file'):
        unpack(tmp_path / 'd')
    refused(tmp_path / 'deep', (80_000).to_bytes(8, 'little') + b'[' * 80_000, 'not a file')
    refused(
        tmp_path / 'far',
        (80).to_bytes(8, 'little')
        + json.dumps({'__metadata__': {'micronet_nb': '1 ' + '0' * 64}, 'a': {'data_offsets': [0, 1e999]}})
        .encode()
        .ljust(80),
        'not a file',
    )


def test_newer_format_is_named(small, tmp_path):
    refused(
        tmp_path / 'n',
        seal(load_file(small), version=FORMAT + 1),
        f'has format {FORMAT + 1}',
        f'reads up to format {FORMAT}',
    )


@pytest.mark.parametrize(
    'change',
    [
        dict(weights=torch.zeros(3)),
        dict(weights=torch.zeros(3, 3, dtype=torch.uint8)),
        dict(weights=torch.zeros((), dtype=torch.uint8)),
        dict(graph=torch.zeros(9)),
        dict(graph=torch.zeros(9, dtype=torch.uint8)),
        dict(extra=torch.zeros(2)),
        dict(float16=torch.zeros(1, dtype=torch.float16)),
        dict(float16=torch.zeros(10**5, dtype=torch.float16)),
        'weights',
        'graph',
        'float16',
    ],
)
def test_wrong_tensors_under_a_right_digest(small, tmp_path, change):
    tensors = load_file(small)
    tensors = {k: v for k, v in tensors.items() if k != change} if isinstance(change, str) else tensors | change
    refused(tmp_path / 'n', seal(tensors), 'cannot be unpacked')


def test_no_safetensors_under_a_right_digest(small, tmp_path):
    import hashlib

    data = small.read_bytes()
    digest = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])['__metadata__']['micronet_nb'].split()[1]
    bad = data.replace(b'"shape":[', b'"shape":[9', 1).replace(digest.encode(), b'0' * 64)
    bad = (len(bad) - (len(data) - 8 - int.from_bytes(data[:8], 'little')) - 8).to_bytes(8, 'little') + bad[8:]
    refused(tmp_path / 'n', bad.replace(b'0' * 64, hashlib.sha256(bad).hexdigest().encode(), 1), 'no safetensors file')


CANARY = []


@pytest.mark.parametrize(
    'text',
    [
        'x"); __import__("test_packing").CANARY.append(1); ("',
        "x'); __import__('test_packing').CANARY.append(1); ('",
        'a\n__import__("test_packing").CANARY.append(1)\n#',
        'eval',
        '__import__("test_packing").CANARY.append(1)',
    ],
)
def test_no_text_of_a_file_is_run(small, tmp_path, text):
    "The text takes every string's place in the structure, keys included; whatever is still a net is run."
    tensors = load_file(small)
    original = json.loads(zlib.decompress(bytes(tensors['graph'].tolist())))

    def places(v, path=()):
        for k in v if isinstance(v, dict) else range(len(v)):
            if isinstance(v, dict):
                yield (*path, k), True
            if isinstance(v[k], str):
                yield (*path, k), False
            if isinstance(v[k], (dict, list)):
                yield from places(v[k], (*path, k))

    nets = 0
    for path, key in places(original):
        s = json.loads(json.dumps(original))
        at = s
        for k in path[:-1]:
            at = at[k]
        if key:
            at[text] = at.pop(path[-1])
        else:
            at[path[-1]] = text
        (tmp_path / 'n').write_bytes(seal(tensors | {'graph': compress(s)}))
        try:
            net = unpack(tmp_path / 'n')
        except MicronetError:
            continue
        nets += 1
        try:
            net(torch.zeros(1, 4, 8, 8))
        except Exception:
            pass  # a forged net may fail when it is run
    assert not CANARY


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    net = filled(nn.Sequential(IntConv2d(3, 4, 1), ScaleBias(4), nn.BatchNorm2d(4)))
    tensors = load_file(pack(net, tmp_path / 'n'))
    s = json.loads(zlib.decompress(bytes(tensors['graph'].tolist())))
    for kind, key in ((0, 'out_channels'), (0, 'kernel_size'), (1, 'channels'), (2, 'num_features')):
        forged = json.loads(json.dumps(s))
        forged['kinds'][kind][1][key] = 10**7 if key == 'kernel_size' else 10**12
        refused(tmp_path / 'f', seal(tensors | {'graph': compress(forged)}), 'cannot be unpacked')
    zeros = json.loads(json.dumps(s))
    zeros['kinds'][1][1]['channels'], zeros['kinds'][1][2] = 10**12, {'weight': '0', 'bias': '0'}
    refused(tmp_path / 'f', seal(tensors | {'graph': compress(zeros)}), 'zeros beside 0 weights')


def test_random_damage_of_another_net(small, tmp_path):
    rng, data = random.Random(1), small.read_bytes()
    for _ in range(500):
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            i = rng.randrange(len(bad))
            bad[i : i + rng.randrange(20)] = rng.randbytes(rng.randrange(20))
        if bad != data:
            refused(tmp_path / 'n', bytes(bad))


# --- commands


def one_line(err, *words):
    assert err.count('\n') == 1 and 'Traceback' not in err, err
    for w in words:
        assert w in err, err


@pytest.fixture
def digits_net(tmp_path):
    net = filled(
        nn.Sequential(
            Quantise(8, signed=True),
            IntConv2d(3, 8, 3),
            ScaleBias(8),
            nn.ReLU(),
            nn.Flatten(),
            IntLinear(8 * 36, 10),
            ScaleBias(10),
        )
    )
    return pack(
        net,
        tmp_path / 'digits.safetensors',
        dict(
            input_size=(3, 8, 8),
            accounting='riair-cifar100',
            dataset='digits',
            pixels=([0.0, 0.0, 0.0], [0.01, 0.01, 0.01]),
        ),
    )


def test_eval_command_counts_right_answers(digits_net, capsys):
    from micronet_nb.data import load_dataset, normalise

    assert micronet_eval([str(digits_net), '-n', '60', '--batch', '7']) == 0
    ds, net = load_dataset('digits', 'test'), unpack(digits_net)
    right = int((net(normalise(ds.images[:60], [0.0] * 3, [0.01] * 3)).argmax(1) == ds.labels[:60]).sum())
    out = capsys.readouterr().out
    assert f'({right} of 60 test images of digits)' in out and f'top-1 {100 * right / 60:.2f} %' in out


@pytest.mark.parametrize(
    'args, words',
    [
        (['-n', '0'], ['-n 0']),
        (['--batch', '0'], ['--batch 0']),
        (['--data', 'cifar100'], ['digits.safetensors takes images of 3x8x8']),
    ],
)
def test_eval_command_errors(digits_net, args, words, capsys):
    if '--data' in args and find_file('cifar100/test-00000-of-00001.parquet') is None:
        pytest.skip('cifar100 is not below MICRONET_DATA')
    assert micronet_eval([str(digits_net), *args]) == 1
    one_line(capsys.readouterr().err, *words)


def test_eval_command_needs_to_know(tmp_path, capsys):
    net = filled(nn.Sequential(IntConv2d(3, 4, 1), ScaleBias(4)))
    for about, word in (
        ({}, 'give --data'),
        (dict(dataset='digits'), 'how pixels are normalised'),
        (dict(dataset='digits', pixels='released'), 'does not give 10 numbers'),
        (dict(dataset='mnist', pixels='released'), 'mnist'),
    ):
        pack(net, tmp_path / 'n', about)
        assert micronet_eval([str(tmp_path / 'n')]) == 1
        one_line(capsys.readouterr().err, word)
    assert micronet_eval([str(tmp_path / 'nothing')]) == 1
    one_line(capsys.readouterr().err, 'No such file')


def test_pack_command(digits_net, tmp_path, capsys):
    assert micronet_pack([str(digits_net), str(tmp_path / 'b' / 'again.safetensors')]) == 0
    assert (tmp_path / 'b' / 'again.safetensors').read_bytes() == digits_net.read_bytes()
    assert f'{digits_net.stat().st_size:,} bytes' in capsys.readouterr().out
    for args, word in (
        (['nothing', 'x'], "neither 'released' nor a packed file"),
        ([__file__, 'x'], 'not a file that micronet_nb packed'),
        ([str(digits_net), '/proc/no/x'], '/proc/no'),
    ):
        assert micronet_pack(args) == 1
        one_line(capsys.readouterr().err, word)


@pytest.mark.parametrize('command', [micronet_pack, micronet_eval])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as e:
        command(['--help'])
    assert e.value.code == 0 and 'examples:' in capsys.readouterr().out


def test_console_scripts_exist():
    from configparser import ConfigParser

    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    scripts = dict(s.split('=') for s in parser['DEFAULT']['console_scripts'].split())
    assert {'micronet-pack', 'micronet-eval', 'micronet-score'} <= set(scripts)
    for target in scripts.values():
        module, function = target.split(':')
        assert callable(getattr(importlib.import_module(module), function))


def test_score_command_takes_a_packed_file(digits_net, tmp_path, capsys):
    assert micronet_score([str(digits_net), '--corrected']) == 0
    net, size, accounting = load_packed(digits_net)
    s = score(net, size, accounting=accounting, corrected=True)
    assert f'{scoring._count(s.storage)} ' in capsys.readouterr().out
    (tmp_path / 'cut.safetensors').write_bytes(digits_net.read_bytes()[:-3])
    assert micronet_score([str(tmp_path / 'cut.safetensors')]) == 1
    one_line(capsys.readouterr().err, 'micronet-score', 'is cut short')


# --- RIAIR's net


@needs_checkpoint
def test_released_net_through_the_commands(tmp_path, capsys):
    from micronet_nb.released import load_released

    path, half = tmp_path / 'model.safetensors', tmp_path / 'half.safetensors'
    assert micronet_pack(['released', str(path)]) == 0 and micronet_pack(['released', str(half), '--fp16']) == 0
    released, told = load_released(), released_figures()['cifar100']
    same(as_graph(released), unpack(path), torch.rand(2, 3, 32, 32) / 100)
    s = score(unpack(path), (3, 32, 32), 'cifar100', 'riair-cifar100')
    assert (s.storage, round(s.ops, 2), round(s.score, 6)) == (told['storage'], told['ops'], told['score'])
    p, table = parts_of(half), bill(half)
    payload = p['weights'] + p['numbers']
    charged = 4 * score(released, (3, 32, 32), 'cifar100', 'riair-cifar100', corrected=True).storage
    assert 0 <= payload - charged < len(table) and p['file'] < 1.1 * payload
    assert table.stored.tolist() == [-(-c // 1) for c in table.charged]
    capsys.readouterr()
    assert micronet_score([str(path)]) == 0
    assert f"{told['storage']:,.4f}" in capsys.readouterr().out


def test_a_pool_with_ceil_mode_is_one_tensor(tmp_path):
    "As `lower` writes it: ceil_mode is the last argument, and no wish for indices."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    x = torch.randn(4, 3, 7, 8)
    quantise_weights(net, 4), quantise_activations(net, x, 4)
    graph = lower(net, x)
    assert unpack(pack(graph, tmp_path / 'net'))(x).equal(graph(x)) and graph(x).shape == (4, 4 * 2 * 3)


def test_what_the_net_knows_of_its_pixels_stays(tmp_path):
    "`about` adds to it, or takes its place."
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval(), torch.randn(4, 3, 4, 4)
    net.input_stats = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    graph = lower(net, x)
    own, other = graph.meta['about']['pixels'], [[0.1] * 3, [0.3] * 3]
    for about, pixels in ((None, own), (dict(dataset='digits'), own), (dict(pixels=other), other)):
        meta = unpack(pack(graph, tmp_path / 'net.safetensors', about)).meta['about']
        assert meta['pixels'] == pixels and meta['input_size'] == [3, 4, 4]
        assert meta.get('dataset') == (about or {}).get('dataset')
