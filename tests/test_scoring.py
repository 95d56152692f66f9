"The scorer on nets and inputs that no notebook shows, against counts made another way; and its command."

import dataclasses
import math
import re

import pandas as pd
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from micronet_nb.cli import micronet_score
from micronet_nb.activations import ActivationQuantiser, quantise_activations
from micronet_nb.core import MicronetError
from micronet_nb.layers import compressible
from micronet_nb.lowering import lower
from micronet_nb.models import create_model
from micronet_nb.pruning import prune
from micronet_nb.scoring import ADDERS, ON_GRID, LayerSpec, kernel_adds, score, trace, tree_adds
from micronet_nb.weights import WeightQuantiser, quantise_weights

FAMILIES = [
    'efficientnet_b0',
    'regnetx_002',
    'repvgg_a0',
    'ghostnet_100',
    'resnext26ts',
    'mobilevit_xxs',
    'vgg11',
    'mlp_mixer' if timm.is_model('mlp_mixer') else 'mixer_s32_224',
    'xception41',
    'hardcorenas_a',
    'squeezenet' if timm.is_model('squeezenet') else 'dla34',
    'hrnet_w18_small',
]


@pytest.mark.parametrize('name', FAMILIES)
def test_products_of_a_family_agree_with_torch(name):
    net = timm.create_model(name).eval()
    for p in net.parameters():
        p.data[p == 0] = 1
    size = net.default_cfg['input_size']
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *size))  # attention as products: not every version counts the CPU's fused kernel
    s = score(net, size, 'imagenet')
    assert (
        int(s.layers.query("kind in ('conv', 'linear', 'product')").multiplies.sum()) == counter.get_total_flops() // 2
    )
    assert s.storage >= 0.99 * sum(m.weight.numel() for m in compressible(net).values())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 8), st.integers(1, 8), st.booleans(), st.randoms(use_true_random=False))
def test_every_level_of_the_tree_fits(n, bw, ba, signed, random):
    "Weights of two's complement, activations as their quantiser makes them."
    l = bw + ba - signed
    top = 2 ** (ba - signed) - 1
    x = [
        random.choice((-(2 ** (bw - 1)), 2 ** (bw - 1) - 1, 0))
        * random.choice((top, -top * signed, random.randint(-top * signed, top)))
        for _ in range(n)
    ]
    paid = level = 0
    while len(x) > 1:
        # +-2^(l-1) itself occurs for the lowest weight and signed activation; quantisers of RIAIR are symmetric
        assert all(-(2 ** (l + level - 1)) <= v <= 2 ** (l + level - 1) for v in x)
        paid += len(x) // 2 * (l + level)
        x = [sum(x[i : i + 2]) for i in range(0, len(x), 2)]
        level += 1
    assert paid == int(tree_adds(torch.tensor([n]), l)[0]) and level == math.ceil(math.log2(n))


def test_adders_order_as_they_must():
    net = create_model('densenet_bc_22_12', 10)
    specs = {n: LayerSpec(4, 4) for n in compressible(net)}
    costs = {a: score(net, (3, 32, 32), specs=specs, adder=a).ops for a in ADDERS}
    assert costs['tree'] < costs['int'] and costs['int16'] <= costs['int'] and costs['fp16'] < costs['fp32']


def test_sparser_and_fewer_bits_cost_less():
    net = create_model('densenet_bc_22_12', 10)
    whole = score(net, (3, 32, 32))
    for m in compressible(net).values():
        m.weight.data[torch.rand_like(m.weight) < 0.5] = 0
    sparse = score(net, (3, 32, 32))
    few = score(net, (3, 32, 32), specs={n: LayerSpec(4, 8) for n in compressible(net)})
    assert few.ops < sparse.ops < whole.ops and few.storage < sparse.storage < whole.storage
    for s in (whole, sparse, few):
        assert s.ops == s.layers.multiplies.sum() + s.layers['adds'].sum() and s.storage == s.layers.storage.sum()


def test_batch_norms_fold_only_where_they_can():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    kinds = score(Shared(), (3, 4, 4)).layers.kind.tolist()
    assert kinds == ['conv', 'scale', 'add']
    assert score(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), (3, 4, 4)).layers.kind.tolist() == [
        'conv',
        'bias',
    ]


def test_the_model_is_left_as_it_was():
    net = create_model('wrn_10_1', 10).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    score(net, (3, 32, 32))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    broken = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(7, 7)).train()
    with pytest.raises(MicronetError, match='does not run on an image of 3x8x8'):
        trace(broken, (3, 8, 8))
    assert broken.training and not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


def test_command(capsys, tmp_path):
    assert micronet_score(['wrn_10_1', '--adder', 'fp32', '--csv', str(tmp_path / 'a' / 'rows.csv')]) == 0
    out = capsys.readouterr().out
    assert 'official, fp32 adder, cifar100 track' in out
    rows = pd.read_csv(tmp_path / 'a' / 'rows.csv')
    assert f' {rows.storage.sum():,.0f} ' in out and f' {rows.multiplies.sum() + rows["adds"].sum():,.0f} ' in out


@pytest.mark.parametrize(
    'args, message',
    [
        (['mixnet_x'], 'no model'),
        (['resnet18', '--size', '1x64x64'], 'does not run on an image of 1x64x64'),
        (['resnet18', '--size', '3x32'], '3x32'),
        (['resnet18', '--schedule'], '124 layers'),
        (['wrn_28_10', '--csv', '/proc/no/rows.csv'], '/proc/no'),
    ],
)
def test_command_errors_are_one_line(args, message, capsys):
    assert micronet_score(args) == 1
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and 'Traceback' not in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as e:
        micronet_score(['--help'])
    assert e.value.code == 0 and 'examples:' in capsys.readouterr().out


def test_unknown_operation_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    with pytest.raises(MicronetError, match='i0'):
        score(Odd(), (3, 4, 4))


class Do(nn.Module):
    "A net of one function of (itself, image), with the tensors and modules that it is given."

    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for k, v in parts.items():
            setattr(self, k, nn.Parameter(v) if isinstance(v, torch.Tensor) else v)

    def forward(self, x):
        return self.f(self, x)


def some(*shape):
    return torch.rand(*shape) + 0.5  # nothing is zero


def tokens(x):
    return x.flatten(2).transpose(1, 2)


class Plain(nn.Module):
    "Holds a tensor that nobody registered."

    def __init__(self):
        super().__init__()
        self.g = some(6, 1, 1)

    def forward(self, x):
        return x * self.g


def shared_conv(f):
    return Do(f, conv=nn.Conv2d(2, 8, 3, bias=False), a=nn.BatchNorm2d(8), b=nn.BatchNorm2d(8))


ROWS = torch.arange(4)[:, None] - torch.arange(4)[None] + 3  # of a table of 7 distances
STORED = {  # net, size of its input, numbers that it stores
    'slices of a weight': (
        Do(lambda m, x: torch.cat([F.conv2d(x, m.w[:4]), F.conv2d(x, m.w[4:])], 1), w=some(16, 8, 3, 3)),
        (8, 8, 8),
        16 * 8 * 9,
    ),
    'slices that overlap': (
        Do(lambda m, x: F.conv2d(x, m.w[:10]).sum() + F.conv2d(x, m.w[6:12]).sum(), w=some(16, 8, 3, 3)),
        (8, 8, 8),
        12 * 8 * 9,
    ),
    'weights joined': (
        Do(
            lambda m, x: F.conv2d(x, torch.cat([m.v, m.w])) + F.conv2d(x, m.v).sum(),
            v=some(2, 3, 1, 1),
            w=some(4, 3, 1, 1),
        ),
        (3, 4, 4),
        18,
    ),
    'a transposed weight': (Do(lambda m, x: F.linear(F.linear(x, m.w), m.w.t().contiguous()), w=some(5, 6)), (6,), 30),
    'attention, one source': (
        Do(
            lambda m, x: m.a(tokens(x), tokens(x), tokens(x), need_weights=False)[0],
            a=nn.MultiheadAttention(16, 2, batch_first=True),
        ),
        (16, 3, 3),
        4 * 16 * 16 + 4 * 16,
    ),
    'attention, two sources': (
        Do(
            lambda m, x: m.a(m.q + tokens(x).mean(1, keepdim=True), tokens(x), tokens(x))[0],
            a=nn.MultiheadAttention(16, 2, batch_first=True),
            q=some(1, 1, 16),
        ),
        (16, 3, 3),
        4 * 16 * 16 + 4 * 16 + 16,
    ),
    'an expanded gate': (Do(lambda m, x: x * m.g.expand_as(x), g=some(1, 8, 1, 1)), (8, 6, 6), 8),
    'an expanded gate, copied': (Do(lambda m, x: x * m.g.expand_as(x).contiguous(), g=some(1, 8, 1, 1)), (8, 6, 6), 8),
    'a gathered table': (Do(lambda m, x: x + m.t[:, ROWS.view(-1)].view(2, 4, 4), t=some(2, 7)), (2, 4, 4), 14),
    'the sigmoid of a gathered table': (
        Do(lambda m, x: x + 16 * torch.sigmoid(m.t[:, ROWS.view(-1)].view(2, 4, 4)), t=some(2, 7)),
        (2, 4, 4),
        14,
    ),
    'a gathered table, half of it': (
        Do(lambda m, x: x + m.t[:, ROWS.view(-1).clamp(max=2)].view(2, 4, 4), t=some(2, 7)),
        (2, 4, 4),
        6,
    ),
    'constants written into a buffer': (Do(lambda m, x: x + put(torch.zeros(3, 4), m.g), g=some(4)), (3, 4), 4),
    'a table padded': (Do(lambda m, x: x + F.pad(m.g, (1, 1), value=3.0), g=some(4)), (3, 6), 4),
    'a tensor that is no parameter': (Plain(), (6, 4, 4), 6),
    'a number written in the code': (Do(lambda m, x: x * torch.tensor([1.0, 2.0, 3.0])), (3,), 0),
    'one conv, two norms': (
        shared_conv(lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x.flip(-1)))),
        (2, 6, 6),
        8 * 2 * 9 + 8 + 8,
    ),
    'one conv, one norm, twice': (
        shared_conv(lambda m, x: m.a(m.conv(x)) + m.a(m.conv(x.flip(-1)))),
        (2, 6, 6),
        8 * 2 * 9 + 8,
    ),
    'one norm before, twice': (
        shared_conv(lambda m, x: m.conv(m.a(x.flip(-1))[:, :2]).sum() + m.a(x).sum()),
        (8, 6, 6),
        8 * 2 * 9 + 16,
    ),
    'a norm behind Flatten': (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 16)),
        (2, 6, 6),
        8 * 2 * 9 + 8 + 2 * 8 * 16,
    ),
    'a norm of pixels': (
        Do(lambda m, x: m.n(m.fc(tokens(x))), fc=nn.Linear(3, 36, bias=False), n=nn.BatchNorm1d(8)),
        (3, 2, 4),
        3 * 36 + 16,
    ),
    'a norm of features': (
        Do(lambda m, x: m.n(m.fc(tokens(x)).transpose(1, 2)), fc=nn.Linear(3, 36), n=nn.BatchNorm1d(36)),
        (3, 2, 4),
        3 * 36 + 36,
    ),
    'a norm across two convs': (
        Do(
            lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 1)),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 2, 1),
            n=nn.BatchNorm2d(6),
        ),
        (3, 4, 4),
        18 + 6,
    ),
    'a norm behind zeros around': (
        nn.Sequential(nn.Conv2d(3, 1, 1), nn.ZeroPad2d(1), nn.BatchNorm2d(1)),
        (3, 4, 4),
        3 + 1 + 2,
    ),
    'a norm of shuffled pixels': (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.BatchNorm2d(2)),
        (3, 4, 4),
        24 + 8 + 4,
    ),
    'a norm that takes its own statistics': (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (3, 4, 4),
        12 + 4 + 8,
    ),
    'an instance norm behind a conv': (nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)), (3, 4, 4), 12 + 4),
    'a transposed conv': (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), 4 * 3 * 9 + 6),
}


def put(buffer, row):
    buffer[1] = row
    return buffer


@pytest.mark.parametrize('name', STORED)
def test_what_is_stored_is_its_elements(name):
    net, size, right = STORED[name]
    for _ in range(2):
        assert score(net, size).storage == right  # what the first run left behind changes nothing


@pytest.mark.parametrize(
    'cut, right',
    [
        (lambda net: prune(net, 0.5), (576 * 17 + 512 * 17) / 32),
        (lambda net: quantise_weights(net, 4), (576 * 4 + 512 * 4) / 32 + (8 + 4) / 2),
        (lambda net: (prune(net, 0.5), quantise_weights(net, 4)), (576 + 288 * 4 + 512 + 256 * 4) / 32 + (8 + 4) / 2),
    ],
)
def test_a_tied_layer_is_stored_once(cut, right):
    torch.manual_seed(0)
    a, b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    b.weight = a.weight
    net = nn.Sequential(a, nn.ReLU(), b, nn.Flatten(), nn.Linear(128, 4, bias=False))
    for m in (a, net[4]):
        m.weight.data.uniform_(1, 7).mul_(torch.randn_like(m.weight).sign())  # 4 bits make none of them zero
    cut(net)
    assert score(net, (8, 4, 4)).storage == right


def read_by(net, size):
    "What a net stores, by hooks alone: parameters and buffers, less what norms right behind a layer bring along."
    makers, less, outs, hooks = {}, [0], ({}, {}), []

    def behind(m, a):
        layer, out = makers.get(a[0].data_ptr(), (None, None))
        if out is not None and out.numel() == a[0].numel():
            less[0] += m.num_features * (1 + (layer.bias is not None))

    for n, m in net.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            hooks.append(m.register_forward_hook(lambda m, a, out: makers.update({out.data_ptr(): (m, out)})))
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            hooks.append(m.register_forward_pre_hook(behind))
    with torch.no_grad():
        net(torch.rand(1, *size))
    for h in hooks:
        h.remove()
    buffers = sum(b.numel() for n, b in net.named_buffers() if b.is_floating_point() and 'running' not in n)
    gains = [m.gain for m in net.modules() if isinstance(getattr(m, 'gain', None), nn.Parameter)]
    standardised = sum(gain.numel() for gain in gains)  # such weights are stored as they come out
    return sum(p.numel() for p in net.parameters()) + buffers - less[0] - standardised


def constants_of(net, size):
    "Modules with parameters whose output is the same for two images, the outermost of each: done before deployment."
    seen, hooks = ({}, {}), []
    for n, m in net.named_modules():
        if any(True for _ in m.parameters()):
            hooks.append(m.register_forward_hook(lambda m, a, out, n=n: now.update({n: out})))
    with torch.no_grad():
        for now in seen:
            net(torch.rand(1, *size))
    for h in hooks:
        h.remove()
    same = [n for n, t in seen[0].items() if isinstance(t, torch.Tensor) and torch.equal(t, seen[1][n])]
    return {n: seen[0][n].numel() for n in same if not any(n.startswith(f'{o}.') for o in same)}


SMALL = '''test_vit test_resnet test_convnext test_byobnet test_efficientnet mobilenetv3_small_050 levit_128s pvt_v2_b0
    coat_lite_tiny gcvit_xxtiny efficientnet_cc_b0_4e repghostnet_050 efficientvit_b0 fastvit_t8 nf_regnet_b0
    edgenext_xx_small swin_tiny_patch4_window7_224'''.split()


@pytest.mark.parametrize('name', SMALL)
def test_a_family_stores_what_it_reads(name):
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    for p in net.parameters():
        p.data[p == 0] = 1
    size = net.default_cfg['input_size']
    folded = constants_of(net, size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *size))
    done = sum(sum(counter.get_flop_counts().get(f'{type(net).__name__}.{n}', {}).values()) for n in folded)
    s = score(net, size, 'imagenet')
    assert (
        int(s.layers.query("kind in ('conv', 'linear', 'product')").multiplies.sum())
        == (counter.get_total_flops() - done) // 2
    )
    assert s.storage == read_by(net, size) + sum(
        n - sum(p.numel() for p in net.get_submodule(m).parameters()) for m, n in folded.items()
    )


@st.composite
def small_nets(draw):
    "Convolutions, norms and pools in any order, and a linear layer."
    c, layers, size = draw(st.integers(1, 4)), [], 12
    first = c
    for kind in draw(
        st.lists(
            st.sampled_from(['conv', 'conv', 'norm', 'relu', 'average', 'max', 'shuffle', 'instance', 'group']),
            max_size=6,
        )
    ):
        if kind == 'conv':
            groups, k = draw(st.sampled_from([g for g in (1, 2, 3) if c % g == 0])), draw(st.sampled_from([1, 3]))
            out = groups * draw(st.integers(1, 4))
            layers.append(
                nn.Conv2d(
                    c,
                    out,
                    k,
                    draw(st.sampled_from([1, 2])),
                    draw(st.integers(0, 1)) + k // 2,
                    1,
                    groups,
                    draw(st.booleans()),
                )
            )
            c = out
        elif kind == 'shuffle':
            layers.append(nn.ChannelShuffle(1 if c % 2 else 2))
        else:
            layers.append(
                dict(
                    norm=nn.BatchNorm2d(c),
                    relu=nn.ReLU(),
                    average=nn.AvgPool2d(2, 1),
                    max=nn.MaxPool2d(2, 1),
                    instance=nn.InstanceNorm2d(c),
                    group=nn.GroupNorm(1, c),
                )[kind]
            )
    return first, nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 3, draw(st.booleans()))
    )


@settings(max_examples=60, deadline=None)
@given(small_nets())
def test_small_nets(made):
    channels, net = made
    net.eval()
    for p in net.parameters():
        p.data = some(*p.shape)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.rand(1, channels, 12, 12))
    except (RuntimeError, ValueError):
        return  # smaller than its window
    s = score(net, (channels, 12, 12))
    assert s.layers.query("kind in ('conv', 'linear')").multiplies.sum() == counter.get_total_flops() // 2
    shuffled = sum(
        2 * m.num_features
        for m, before in zip(net[1:], net)
        if isinstance(m, nn.BatchNorm2d) and isinstance(before, nn.ChannelShuffle)
    )
    right = read_by(net, (channels, 12, 12))
    # a norm behind a shuffle of a conv's channels folds too, which hooks do not see
    assert right - shuffled <= s.storage <= right


def reads_of(pool, size):
    "(outputs, inputs): what each output of a pool multiplies each input by, 0 where it does not read it."
    base = torch.zeros(1, 1, *size, dtype=torch.float64)
    at_rest, columns = pool(base).flatten(), []
    for i in range(base.numel()):
        x = base.clone()
        x.view(-1)[i] = 1
        columns.append(pool(x).flatten() - at_rest)
    return torch.stack(columns, 1)


def pool_cases():
    "Pools of all kinds."
    for k, s, p in ((3, 2, 1), (2, 2, 0), (2, 2, 1), (3, 1, 1), ((2, 3), (1, 2), (1, 0)), (1, 1, 0)):
        for ceil in (False, True):
            yield nn.MaxPool2d(k, s, p, ceil_mode=ceil)
            for include in (False, True):
                yield nn.AvgPool2d(k, s, p, ceil_mode=ceil, count_include_pad=include)
    yield from (
        nn.MaxPool2d(2, 1, dilation=2),
        nn.AvgPool2d(2, divisor_override=1),
        nn.AvgPool2d(2, divisor_override=3),
    )
    yield from (make(n) for make in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d) for n in (1, 2, 3, 5, 9, (2, 7)))
    yield Do(lambda m, x: x.mean((2, 3)))
    yield Do(lambda m, x: x.sum(3))
    yield Do(lambda m, x: x.amax(2))


@pytest.mark.parametrize('pool', [*pool_cases()], ids=str)
def test_a_pool_by_its_windows(pool):
    reads = reads_of(pool, (7, 6))
    rows = score(pool, (5, 7, 6)).layers
    assert rows['adds'].sum() == 5 * int(((reads != 0).sum(1) - 1).sum())
    assert rows.multiplies.sum() == 5 * int(((reads.amax(1) - 1).abs() > 1e-9).sum())


def test_pools_of_the_released_scorer_stay_as_they_were():
    "Its slip is to charge a k x k pool as k, whatever lies at the border."
    s = score(nn.AvgPool2d(3, 2, 1), (5, 7, 7), accounting='riair-cifar100')
    assert s.layers['adds'].sum() == 5 * 16 * 2 / 2 and s.layers.multiplies.sum() == 5 * 16 / 2


@pytest.mark.parametrize(
    'args',
    [
        dict(kernel_size=2, stride=2),
        dict(kernel_size=3, stride=2),
        dict(kernel_size=3, stride=1, groups=2),
        dict(kernel_size=(2, 3), stride=(3, 1), bias=False),
    ],
)
def test_a_transposed_convolution(args):
    torch.manual_seed(0)
    net = nn.ConvTranspose2d(4, 6, **args).eval()
    net.weight.data.uniform_(1, 2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 4, 5, 4))
    rows = score(net, (4, 5, 4)).layers
    assert rows.multiplies.sum() == counter.get_total_flops() // 2
    x, products = torch.zeros(1, 4, 5, 4), []
    with torch.no_grad():
        rest = net(x).flatten()
        for i in range(x.numel()):
            products.append(net(torch.eye(x.numel())[i].view_as(x)).flatten() != rest)
    meets = torch.stack(products).sum(0)  # products that reach each output
    assert rows['adds'].sum() == int((meets - 1).clamp(min=0).sum()) + (len(rest) if net.bias is not None else 0)
    net.weight.data[:, :, 0] = 0
    sparse = score(net, (4, 5, 4)).layers.iloc[0]
    assert sparse.multiplies == int((net.weight != 0).sum()) * 20 and sparse.storage < rows.iloc[0].storage


MADE = dict(l=nn.Linear(3, 8 * 27, bias=False))
PRODUCTS_OF_TWO = {
    'a kernel made from the image': (
        Do(lambda m, x: F.conv2d(x, m.l(x.mean((2, 3))).view(8, 3, 3, 3), padding=1), **MADE),
        648 + 55296,
        648 - 216 + 55296 - 2048,
    ),
    'with a bias': (
        Do(lambda m, x: F.conv2d(x, m.l(x.mean((2, 3))).view(8, 3, 3, 3), m.b, padding=1), b=some(8), **MADE),
        648 + 55296,
        648 - 216 + 55296,
    ),
    'transposed': (
        Do(lambda m, x: F.conv_transpose2d(x, m.l(x.mean((2, 3))).view(3, 8, 3, 3), stride=3), **MADE),
        648 + 55296,
        648 - 216 + 55296 - 8 * 48 * 48,
    ),
    'matmul': (Do(lambda m, x: x.flatten(2) @ x.flatten(2).transpose(1, 2)), 9 * 256, 9 * 255),
    'einsum': (Do(lambda m, x: torch.einsum('bchw,bdhw->bcd', x, x)), 9 * 256, 9 * 255),
    'a constant from the left': (Do(lambda m, x: m.w @ x, w=some(5, 16)), 3 * 5 * 16 * 16, 3 * 5 * 16 * 15),
    'addmm': (Do(lambda m, x: torch.addmm(m.b, x[0, 0], x[0, 1]), b=some(16)), 16**3, 16**3),
    'addmm, alpha and beta': (
        Do(lambda m, x: torch.addmm(x[0, 2], x[0, 0], x[0, 1], alpha=2, beta=3)),
        16**3 + 2 * 256,
        16**3,
    ),
    'addmm, beta 0': (Do(lambda m, x: torch.addmm(x[0, 2], x[0, 0], x[0, 1], beta=0)), 16**3, 16 * 16 * 15),
    'addmm, a layer': (
        Do(lambda m, x: torch.addmm(m.b, x[0, 0], m.w, alpha=2, beta=3), b=some(5), w=some(16, 5)),
        16 * 16 * 5,
        16 * 16 * 5,
    ),
    'addmm, a layer, an image for bias': (
        Do(lambda m, x: torch.addmm(x[0, 0, :, :5], x[0, 1], m.w, beta=3), w=some(16, 5)),
        16 * 16 * 5 + 16 * 5,
        16 * 16 * 5,
    ),
    'baddbmm': (Do(lambda m, x: torch.baddbmm(x[0], x[0], x[0], alpha=0.5)), 3 * 16**3 + 3 * 256, 3 * 16**3),
}


@pytest.mark.parametrize('name', PRODUCTS_OF_TWO)
def test_products_of_two_activations(name):
    net, multiplies, adds = PRODUCTS_OF_TWO[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 16, 16))
    rows = score(net, (3, 16, 16)).layers.query("kind != 'pool'")
    assert (rows.multiplies.sum(), rows['adds'].sum()) == (multiplies, adds)
    assert rows.query("kind in ('conv', 'linear', 'product')").multiplies.sum() == counter.get_total_flops() // 2


def test_attention_with_a_mask():
    net = Do(
        lambda m, x: F.scaled_dot_product_attention(
            x[:, :2].contiguous(), x[:, 1:, :5].contiguous(), x[:, 1:, :5].contiguous(), attn_mask=m.mask.detach()
        ),
        mask=some(16, 5),
    )
    s, dots = score(net, (3, 16, 16)), 2 * 16 * 5
    assert s.storage == 80 and s.layers.multiplies.sum() == dots * 16 + dots * 3 + 2 * 16 * 16 * 5
    assert s.layers['adds'].sum() == dots * 15 + 2 * dots + 2 * 16 * 16 * 4


def quantised(bits=4, step=0.25, signed=False):
    return ActivationQuantiser(bits, step, signed)


ONE = (1,) * 6


def row(x, f):
    "f of an image as one row of pixels, as an image again."
    return f(x.flatten(2))[:, :, :36].unflatten(2, (6, 6))


def box(x, f):
    "f of an image as a box of depth 2, as an image again."
    return f(x.unflatten(3, (2, 3)).permute(0, 1, 3, 2, 4))[:, :, 0]


GRID = {  # operation on a quantised image (4 bits unless said): bits of what it makes, 32 for what is off the grid
    'itself': (lambda m, x: m.q(x), 4),
    'max pool': (lambda m, x: F.max_pool2d(m.q(x), 3, 2, 1), 4),
    'relu': (lambda m, x: F.relu(m.q(x)), 4),
    'relu, signed': (lambda m, x: F.relu(m.s(x)), 4),
    'reshape': (lambda m, x: m.q(x).flatten(2).transpose(1, 2).reshape(x.shape), 4),
    'slice': (lambda m, x: m.q(x)[:, :2, ::2], 4),
    'a dimension more': (lambda m, x: m.q(x).unsqueeze(2), 4),
    'split': (lambda m, x: m.q(x).chunk(2, 1)[1], 4),
    'select': (lambda m, x: torch.stack(list(m.q(x).unbind(1))[::-1], 1), 4),
    'cat': (lambda m, x: torch.cat([m.q(x), F.relu(m.q(x))], 1), 4),
    'cat of equal steps': (lambda m, x: torch.cat([m.q(x), m.same(x)], 1), 4),
    'cat of other steps': (lambda m, x: torch.cat([m.q(x), m.other(x)], 1), 32),
    'cat with a sign': (lambda m, x: torch.cat([m.q(x), m.s(x)], 1), 5),
    'cat with a parameter': (lambda m, x: torch.cat([m.q(x), m.p.expand_as(x)], 1), 32),
    'cat with zeros': (lambda m, x: torch.cat([m.q(x), torch.zeros_like(x)], 1), 4),
    'cat with ones': (lambda m, x: torch.cat([m.q(x), torch.full_like(x, 0.1)], 1), 32),
    'cat with the image': (lambda m, x: torch.cat([m.q(x), x], 1), 32),
    'pad': (lambda m, x: F.pad(m.q(x), (1, 1, 1, 1)), 4),
    'pad with .1': (lambda m, x: F.pad(m.q(x), (1, 1, 1, 1), value=0.1), 32),
    'pad by reflection': (lambda m, x: F.pad(m.q(x), (1, 1, 1, 1), mode='reflect'), 4),
    'pad by replication': (lambda m, x: F.pad(m.q(x), (1, 1, 1, 1), mode='replicate'), 4),
    'pad around': (lambda m, x: F.pad(m.q(x), (1, 1, 1, 1), mode='circular'), 4),
    'roll, flip and turn': (lambda m, x: m.q(x).roll(1, 2).flip(3).rot90(1, (2, 3)), 4),
    'nearest': (lambda m, x: F.interpolate(m.q(x), scale_factor=2), 4),
    'nearest, exact': (lambda m, x: F.interpolate(m.q(x), scale_factor=2, mode='nearest-exact'), 4),
    'nearest in a row': (lambda m, x: row(m.q(x), lambda r: F.interpolate(r, scale_factor=2)), 4),
    'exact in a row': (lambda m, x: row(m.q(x), lambda r: F.interpolate(r, scale_factor=2, mode='nearest-exact')), 4),
    'nearest in a box': (lambda m, x: box(m.q(x), lambda r: F.interpolate(r, scale_factor=2)), 4),
    'exact in a box': (lambda m, x: box(m.q(x), lambda r: F.interpolate(r, scale_factor=2, mode='nearest-exact')), 4),
    'pad a row': (lambda m, x: row(m.q(x), lambda r: F.pad(F.pad(r, (1, 1), 'reflect'), (2, 2), 'replicate')), 4),
    'pad a box': (lambda m, x: box(m.q(x), lambda r: F.pad(F.pad(r, ONE, 'reflect'), ONE, 'replicate')), 4),
    'triangles': (lambda m, x: m.q(x).tril().triu(-2), 4),
    'diagonal': (lambda m, x: m.q(x).diagonal(0, 2, 3).unsqueeze(3), 4),
    'slice written': (lambda m, x: m.q(x).slice_scatter(m.same(x)[:, :1], 1, 2, 3), 4),
    'channel written': (lambda m, x: m.q(x).select_scatter(m.same(x)[:, 0], 1, 1), 4),
    'squeezed': (lambda m, x: m.q(x)[..., None, :, None].squeeze((3, 5)), 4),
    'masked': (lambda m, x: m.q(x).masked_fill(torch.eye(6) > 0, 0.1), 32),
    'chosen': (lambda m, x: torch.where(torch.eye(6) > 0, m.q(x), m.p), 32),
    'bilinear': (lambda m, x: F.interpolate(m.q(x), scale_factor=2, mode='bilinear'), 32),
    'repeat': (lambda m, x: m.q(x).repeat(1, 2, 1, 1), 4),
    'index': (lambda m, x: m.q(x)[:, [2, 0]], 4),
    'index_select': (lambda m, x: m.q(x).index_select(1, torch.tensor([1, 1])), 4),
    'gather': (lambda m, x: m.q(x).gather(1, torch.zeros(x.shape, dtype=torch.int64)), 4),
    'unfold': (lambda m, x: F.unfold(m.q(x), 3, padding=1), 4),
    'shuffle': (lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(m.q(x), 2), 2), 4),
    'channel shuffle': (lambda m, x: F.channel_shuffle(m.q(x), 2), 4),
    'copy': (lambda m, x: write(torch.zeros_like(x), m.q(x)), 4),
    'copy among ones': (lambda m, x: write(torch.full_like(x, 0.1), m.q(x)), 32),
    'clone': (lambda m, x: m.q(x).clone().contiguous(), 4),
    'expand': (lambda m, x: m.q(x)[:, :1].expand(-1, 4, -1, -1), 4),
    'windows': (lambda m, x: m.q(x).unfold(2, 2, 1)[..., 0], 4),
    'double': (lambda m, x: m.q(x).double().float(), 4),
    'maximum': (lambda m, x: torch.maximum(m.q(x), m.same(x)), 4),
    'minimum': (lambda m, x: torch.minimum(m.q(x), m.s(x)), 5),
    'amax': (lambda m, x: m.q(x).amax(3, keepdim=True), 4),
    'max': (lambda m, x: m.q(x).max(3, keepdim=True)[0], 4),
    'min': (lambda m, x: m.q(x).min(3, keepdim=True)[0], 4),
    'amin': (lambda m, x: m.q(x).amin(3, keepdim=True), 4),
    'adaptive max': (lambda m, x: F.adaptive_max_pool2d(m.q(x), 3), 4),
    'clamp on the grid': (lambda m, x: m.q(x).clamp(0.5, 1.75), 4),
    'clamp off the grid': (lambda m, x: m.q(x).clamp(0.3, 1.75), 32),
    'clamp beyond': (lambda m, x: m.q(x).clamp(-0.1, 99.9), 4),
    'clamp_min': (lambda m, x: m.q(x).clamp_min(0.25), 4),
    'clamp_max': (lambda m, x: m.q(x).clamp_max(0.6), 32),
    'clamp to 5': (lambda m, x: m.q(x).clamp_min(5.0), 32),
    'relu6': (lambda m, x: F.relu6(m.q(x)), 4),
    'hardtanh': (lambda m, x: F.hardtanh(m.q(x), 0.1, 1), 32),
    'sum of two': (lambda m, x: m.q(x) + m.same(x), 5),
    'sum, signed': (lambda m, x: m.s(x) + m.q(x), 6),
    'sum of signs': (lambda m, x: m.sign(x) + m.sign(x.flip(1)), 3),
    'difference': (lambda m, x: m.q(x) - m.same(x.flip(1)), 5),
    'sum of other steps': (lambda m, x: m.q(x) + m.other(x), 32),
    'sum with alpha': (lambda m, x: torch.add(m.q(x), m.same(x), alpha=0.3), 32),
    'sum with a number': (lambda m, x: m.q(x) + 0.1, 32),
    'with a parameter': (lambda m, x: m.q(x) + m.p, 32),
    'times a parameter': (lambda m, x: m.q(x) * m.p, 32),
    'times .3': (lambda m, x: m.q(x) * 0.3, 32),
    'negative': (lambda m, x: -m.s(x), 4),
    'negative, no sign': (lambda m, x: -m.q(x), 32),
    'abs': (lambda m, x: m.s(x).abs(), 4),
    'sigmoid': (lambda m, x: m.q(x).sigmoid(), 32),
    'average pool': (lambda m, x: F.avg_pool2d(m.q(x), 2), 32),
    'adaptive average': (lambda m, x: F.adaptive_avg_pool2d(m.q(x), 3), 32),
    'mean': (lambda m, x: m.q(x).mean(3, keepdim=True), 32),
    'leaky relu': (lambda m, x: F.leaky_relu(m.s(x), 0.1), 32),
    'prelu': (lambda m, x: F.prelu(m.s(x), m.p.view(1)), 32),
    'silu': (lambda m, x: F.silu(m.q(x)), 32),
    'gelu': (lambda m, x: F.gelu(m.q(x)), 32),
    'hardswish': (lambda m, x: F.hardswish(m.s(x)), 32),
    'softmax': (lambda m, x: m.q(x).softmax(1), 32),
    'layer norm': (lambda m, x: F.layer_norm(m.q(x), x.shape[1:]), 32),
    'product of two': (lambda m, x: m.q(x) * m.other(x), 32),
    'batch norm': (lambda m, x: m.norm(m.q(x)), 32),
    'quantised again': (lambda m, x: m.other(m.q(x).sigmoid()), 3),
}


def write(buffer, x):
    buffer[:, 1:] = x[:, 1:]
    return buffer


class OnGrid(nn.Module):
    "An operation on quantised values, and a linear layer that reads what it makes."

    def __init__(self, f):
        super().__init__()
        self.f, self.p, self.norm = f, nn.Parameter(torch.tensor(0.37)), nn.BatchNorm2d(4)
        self.q, self.same, self.other, self.s, self.sign = (
            quantised(),
            quantised(),
            quantised(3, 0.3),
            quantised(signed=True),
            quantised(1, 0.25, True),
        )
        self.norm.running_var.fill_(1.7)
        self.fc = nn.LazyLinear(2)

    def forward(self, x):
        y = self.f(self, x).flatten(1)
        self.read = y.detach()
        return self.fc(y)


@pytest.mark.parametrize('name', GRID)
def test_a_width_lasts_as_long_as_the_grid(name):
    f, bits = GRID[name]
    torch.manual_seed(0)
    net, x = OnGrid(f).eval(), torch.randn(1, 4, 6, 6) * 3
    net(x)
    claim = score(net, (4, 6, 6)).layers.query("name == 'fc' and kind == 'linear'").bits.iloc[0]
    assert claim == f'32w {bits}a'
    with torch.no_grad():
        net(x)
    q = net.read.double() / (net.other if name == 'quantised again' else net.q).scale.item()
    whole = bool(((q - q.round()).abs() < 1e-5).all())
    if bits < 32:
        assert whole and q.max() <= 2**bits - 1 and q.min() >= -(2 ** (bits - 1) - 1 if bits > 1 else 1)
    elif name not in ('clamp to 5', 'negative, no sign'):
        assert not whole  # these two are whole, but out of range


NEVER = set(
    '''reshape expand_as contiguous detach narrow chunk unsafe_chunk unsafe_split flatten t split_with_sizes pad
    lift_fresh as_strided pixel_unshuffle embedding permute squeeze alias split unsafe_view'''.split()
)


def test_every_operation_that_stays_on_the_grid_was_tried():
    "An operation that is new on the list needs a case in GRID; NEVER names those that do not reach the dispatcher."
    tried = {n.op for f, _ in GRID.values() for n in grid_nodes(f)}
    assert set(ON_GRID) - tried - NEVER - {'max_pool3d_with_indices'} == set()


def grid_nodes(f):
    net = OnGrid(f).eval()
    with torch.no_grad():
        net(torch.zeros(1, 4, 6, 6))
    return trace(net, (4, 6, 6)).nodes


def test_products_and_work_on_quantised_values():
    "A product of 4-bit values sums 8-bit products in the adder; float work on them is 32 bits wide, a relu 4."
    net = Do(
        lambda m, x: m.q(x).flatten(2) @ m.r(x).flatten(2).transpose(1, 2), q=quantised(), r=quantised(signed=True)
    )
    for adder in ADDERS:
        row = score(net, (3, 4, 4), adder=adder).layers.query("kind == 'product'").iloc[0]
        assert row.multiplies == 9 * 16 * 4 / 32 and row['adds'] == 9 * kernel_adds(torch.tensor([16]), 8, adder)
    rows = score(Do(lambda m, x: F.relu(m.q(x)) * m.p, q=quantised(), p=some(1)), (3, 4, 4)).layers.set_index('kind')
    assert rows.multiplies['relu'] == 48 * 4 / 32 and rows.multiplies['mul'] == 48


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True))


def test_a_weight_that_is_computed_from_a_quantised_one_is_a_float():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3))
    quantise_weights(plain, 4)
    standardised = nn.Sequential(Standardised(3, 8, 3))  # refused by quantise_weights: made by hand
    quantiser = WeightQuantiser(4, torch.full((8, 1, 1, 1), 0.05))
    nn.utils.parametrize.register_parametrization(standardised[0], 'weight', quantiser, unsafe=True)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    for net, bits in ((plain, 4), (standardised, 32), (normed, 32)):
        row = score(net, (3, 6, 6)).layers.iloc[0]
        assert row.bits == f'{bits}w 32a'
        whole = 216 * bits / 32
        assert row.storage == whole or bits == 4 and row.storage < whole  # zeros of rounding pay for a mask
    after = nn.Sequential(nn.Conv2d(3, 8, 3))
    quantise_weights(after, 4)
    nn.utils.parametrize.register_parametrization(after[0], 'weight', Do(lambda m, w: w * m.g, g=some(8, 1, 1, 1)))
    assert score(after, (3, 6, 6)).layers.bits.iloc[0] == '32w 32a'


def test_layers_that_read_constants_after_quantisation():
    "A linear layer on a table is done before deployment, quantiser and all."
    net = Do(lambda m, x: tokens(x) + m.fc(m.table), fc=nn.Linear(5, 3), table=some(16, 5)).eval()
    plain = score(net, (3, 4, 4))
    quantise_activations(net, torch.rand(2, 3, 4, 4), 8)
    assert score(net, (3, 4, 4)).storage == plain.storage == 48


class Inside(nn.Module):
    def forward(self, x, y):
        return x


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor


LAZY = nn.Sequential(nn.LazyConv2d(4, 3))


@pytest.mark.parametrize(
    'net, size, message',
    [
        (nn.Conv2d(3, 4, 1), (3, 10_000_000, 10_000_000), 'has 300,000,000,000,000 numbers'),
        (nn.Conv2d(3, 4, 1), (3, 0, 32), 'input_size is'),
        (nn.Conv2d(3, 4, 1), '3x32x32', 'input_size is'),
        (nn.Conv2d(3, 4, 1), 32, 'input_size is'),
        (nn.Conv2d(3, 4, 1), (3, 32.0, 32.5), 'input_size is'),
        (LAZY, (3, 8, 8), "scoring needs the shape of '0.weight', a parameter of a lazy module"),
        (Inside(), (3, 8, 8), 'scoring gives a net one tensor, and Inside takes 2 '),
        (Do(lambda m, x: x.nothing), (3, 8, 8), 'AttributeError'),
        (torch.relu, (3, 8, 8), 'scoring wants an nn.Module'),
        (Do(lambda m, x: {'a': None}), (3, 8, 8), 'does not depend on its input'),
        (Do(lambda m, x: torch.special.i0(x)), (3, 8, 8), 'ELEMENTWISE'),
    ],
)
def test_errors_say_what_is_wrong(net, size, message):
    with pytest.raises(MicronetError, match=re.escape(message)):
        score(net, size)


@pytest.mark.parametrize(
    'form', [lambda a, b: (a, b), lambda a, b: {'logits': a, 'aux': [b, 3]}, Result], ids=['tuple', 'dict', 'dataclass']
)
def test_all_that_a_net_returns_is_counted(form):
    net = Do(
        lambda m, x: form(m.norm(y := m.a(x)), m.b(y)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 2, 1),
        norm=nn.BatchNorm2d(4),
    )
    assert score(net, (3, 5, 5)).layers.kind.tolist() == ['conv', 'bias', 'scale', 'conv', 'bias']
    both = Do(lambda m, x: form(y := m.a(x), m.norm(y)), a=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
    assert score(both, (3, 5, 5)).layers.kind.tolist() == [
        'conv',
        'bias',
        'scale',
    ]  # what is returned as it is, no norm can fold into


def test_heads_for_training_cost_nothing():
    net = Do(
        lambda m, x: (m.a(x), m.aux(x)) if m.training else m.a(x), a=nn.Conv2d(3, 4, 1), aux=nn.Conv2d(3, 9, 1)
    ).train()
    assert score(net, (3, 5, 5)).storage == 16 and net.training


class Attends(nn.Module):
    "Attention of 3 tokens of 4 channels in 2 heads, in one of its spellings."

    def __init__(self, spelling):
        super().__init__()
        self.mha, self.spelling = nn.MultiheadAttention(4, 2, bias=False, batch_first=True), spelling
        for p in self.parameters():
            nn.init.constant_(p, 0.1)

    def forward(self, x):
        if self.spelling == 'module':
            return self.mha(x, x, x)[0]
        if self.spelling == 'module, fused':
            return self.mha(x, x, x, need_weights=False)[0]
        qkv = F.linear(x, self.mha.in_proj_weight)
        q, k, v = qkv.unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        if self.spelling == 'fused':
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == 'einsum':
            y = torch.einsum('bhij,bhjd->bhid', torch.einsum('bhid,bhjd->bhij', q, k).softmax(-1), v)
        else:
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.mha.out_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize('spelling', ['module', 'module, fused', 'fused', 'einsum', 'matmul'])
def test_attention_costs_the_same_products_however_it_is_spelled(spelling):
    "In: 3 tokens x 4 x 12; scores: 2 heads x 3 x 3 x 2, and as many with the values; out: 3 tokens x 4 x 4."
    s = score(Attends(spelling), (3, 4))
    by_kind = s.layers.groupby('kind').multiplies.sum()
    assert by_kind['linear'] == 144 + 48 and by_kind['product'] == 36 + 36
    assert s.layers.query("kind in ('linear', 'product')")['adds'].sum() == 12 * 3 * 3 + 3 * 4 * 3 + 18 * 1 + 12 * 2
    assert s.storage == 48 + 16


def of(f, size):
    "Multiplies and adds of a function of an image."
    return tuple(score(Calls(f), size).layers[['multiplies', 'adds']].sum())


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize(
    'f, size, count',
    [
        # exp and division of each, and the sum of each row but one
        (lambda x: x.softmax(-1), (2, 5), (20, 10)),
        (lambda x: F.gelu(x), (10,), (40, 10)),
        # a row of 5: its mean, deviations, squares, their mean, eps and root, and a product each
        (lambda x: F.layer_norm(x, (5,)), (2, 5), (2 * 10 + 3 * 2, 3 * 10 - 2)),
        (lambda x: F.rms_norm(x, (5,)), (2, 5), (2 * 10 + 2 * 2, 10)),
        (lambda x: F.group_norm(x, 2), (4, 5), (2 * 20 + 3 * 2, 3 * 20 - 2)),
        (lambda x: F.interpolate(x, scale_factor=2), (1, 2, 2), (0, 0)),
        (lambda x: F.interpolate(x, scale_factor=2, mode='bilinear'), (1, 2, 2), (4 * 16, 3 * 16)),
        (lambda x: F.fold(F.unfold(x, 2), 3, 2), (1, 3, 3), (0, 4 * 1 + 3)),
        (lambda x: torch.stack([x, x], 1).roll(1, 2), (4,), (0, 0)),
        (lambda x: F.pixel_shuffle(x, 2), (4, 3, 3), (0, 0)),
        (lambda x: x.clamp(0, 1), (7,), (7, 0)),
        (lambda x: F.celu(x), (7,), (14, 7)),
        (lambda x: x.cumsum(1), (7,), (0, 7)),
        (lambda x: torch.where(x > 0, x, x - 1), (7,), (0, 14)),
        (lambda x: [x + 1, x * 2], (7,), (7, 7)),
    ],
)
def test_counts_by_hand(f, size, count):
    assert of(f, size) == count


def test_counts_the_same_in_inference_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    plain = score(net, (3, 8, 8))
    with torch.inference_mode():
        assert score(net, (3, 8, 8)).layers.equals(plain.layers)


@pytest.mark.parametrize(
    'read',
    [
        lambda x: bool(x.mean() > 0),
        lambda x: x.mean().item() > 0,
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.allclose(x, x + 1),
        lambda x: int(x.argmax()) > 0,
    ],
    ids=['bool', 'item', 'equal', 'allclose', 'int'],
)
def test_a_net_that_reads_a_value_is_named(read):
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return (2 * x if read(x) else x + 1).mean((2, 3))

    with pytest.raises(MicronetError, match="Choosy '' reads a value of an activation"):
        score(Choosy(), (3, 8, 8))
    with pytest.raises(MicronetError, match='decides by values of an activation'):
        lower(Choosy().eval(), torch.randn(4, 3, 8, 8))
