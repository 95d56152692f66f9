"The scorer on nets and inputs that no notebook shows, and its command."
import math

import pandas as pd
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from micronet_nb.core import MicronetError
from micronet_nb.models import create_model
from micronet_nb.scoring import ADDERS, LayerSpec, compressible, main, score, trace, tree_adds

FAMILIES = ['efficientnet_b0', 'regnetx_002', 'repvgg_a0', 'ghostnet_100', 'resnext26ts', 'mobilevit_xxs', 'vgg11', 'mlp_mixer' if timm.is_model('mlp_mixer') else 'mixer_s32_224',
            'xception41', 'hardcorenas_a', 'squeezenet' if timm.is_model('squeezenet') else 'dla34', 'hrnet_w18_small']


@pytest.mark.parametrize('name', FAMILIES)
def test_products_of_a_family_agree_with_torch(name):
    net = timm.create_model(name).eval()
    for p in net.parameters(): p.data[p == 0] = 1
    size = net.default_cfg['input_size']
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: net(torch.zeros(1, *size))   # attention as products: not every version counts the CPU's fused kernel
    s = score(net, size, 'imagenet')
    assert int(s.layers.query("kind in ('conv', 'linear', 'product')").multiplies.sum()) == counter.get_total_flops()//2
    assert s.storage >= 0.99*sum(m.weight.numel() for m in compressible(net).values())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 8), st.integers(1, 8), st.booleans(), st.randoms(use_true_random=False))
def test_every_level_of_the_tree_fits(n, bw, ba, signed, random):
    "Weights of two's complement, activations as their quantiser makes them."
    l = bw + ba - signed
    top = 2**(ba - signed) - 1
    x = [random.choice((-2**(bw - 1), 2**(bw - 1) - 1, 0))*random.choice((top, -top*signed, random.randint(-top*signed, top))) for _ in range(n)]
    paid = level = 0
    while len(x) > 1:
        # +-2^(l-1) itself occurs for the lowest weight with the lowest signed activation: a quantiser of RIAIR's is symmetric, so its weights are not that low there
        assert all(-2**(l + level - 1) <= v <= 2**(l + level - 1) for v in x)
        paid += len(x)//2*(l + level)
        x = [sum(x[i:i + 2]) for i in range(0, len(x), 2)]
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
    for m in compressible(net).values(): m.weight.data[torch.rand_like(m.weight) < .5] = 0
    sparse = score(net, (3, 32, 32))
    few = score(net, (3, 32, 32), specs={n: LayerSpec(4, 8) for n in compressible(net)})
    assert few.ops < sparse.ops < whole.ops and few.storage < sparse.storage < whole.storage
    for s in (whole, sparse, few):
        assert s.ops == s.layers.multiplies.sum() + s.layers['adds'].sum() and s.storage == s.layers.storage.sum()


def test_batch_norms_fold_only_where_they_can():
    class Shared(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        def forward(self, x): y = self.conv(x); return self.norm(y) + y
    kinds = score(Shared(), (3, 4, 4)).layers.kind.tolist()
    assert kinds == ['conv', 'scale', 'add']
    assert score(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), (3, 4, 4)).layers.kind.tolist() == ['conv', 'bias']


def test_the_model_is_left_as_it_was():
    net = create_model('wrn_10_1', 10).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    score(net, (3, 32, 32))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    broken = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(7, 7)).train()
    with pytest.raises(MicronetError, match='does not run on an image of 3x8x8'): trace(broken, (3, 8, 8))
    assert broken.training and not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


def test_command(capsys, tmp_path):
    assert main(['wrn_10_1', '--adder', 'fp32', '--csv', str(tmp_path/'a'/'rows.csv')]) == 0
    out = capsys.readouterr().out
    assert 'official, fp32 adder, cifar100 track' in out
    rows = pd.read_csv(tmp_path/'a'/'rows.csv')
    assert f' {rows.storage.sum():,.0f} ' in out and f' {rows.multiplies.sum() + rows["adds"].sum():,.0f} ' in out


@pytest.mark.parametrize('args, message', [
    (['mixnet_x'], 'no model'), (['resnet18', '--size', '1x64x64'], 'does not run on an image of 1x64x64'), (['resnet18', '--size', '3x32'], '3x32'), (['resnet18', '--schedule'], '124 layers'),
    (['wrn_28_10', '--csv', '/proc/no/rows.csv'], '/proc/no')])
def test_command_errors_are_one_line(args, message, capsys):
    assert main(args) == 1
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and 'Traceback' not in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    assert e.value.code == 0 and 'examples:' in capsys.readouterr().out


def test_unknown_operation_is_named():
    class Odd(nn.Module):
        def forward(self, x): return torch.special.i0(x)
    with pytest.raises(MicronetError, match='i0'): score(Odd(), (3, 4, 4))
