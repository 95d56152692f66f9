"Windows of unsigned integers with a lower end of their own, from the quantiser to every form of the lowered net."

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet_nb.activations import (
    ActivationQuantiser,
    activation_quantisers,
    calibrate,
    quantise_activations,
    solve_window,
)
from micronet_nb.core import MicronetError
from micronet_nb.integer import IntConv2d, Quantise, ScaleBias, int_sums, kernel_ranges, run_integer
from micronet_nb.lowering import lower
from micronet_nb.onnx import onnx_session, to_onnx
from micronet_nb.packing import pack, unpack
from micronet_nb.runtime import Runner
from micronet_nb.scoring import score
from micronet_nb.weights import quantise_weights


def swish_net():
    "Convolutions with borders, strides and groups behind h-swish and swish."
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, stride=2),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 12, 1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


@pytest.fixture(scope="module", params=[2, 4, 8])
def lowered(request, tmp_path_factory):
    net, x = swish_net(), torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    quantise_weights(net, 4)
    quantise_activations(net, x, request.param, affine=True)
    return net, x, lower(net, x, torch.float32), tmp_path_factory.mktemp("affine")


def test_the_window_is_taken_where_values_have_a_sign(lowered):
    net, x, graph, _ = lowered
    inside = activation_quantisers(net)
    assert all(q.low < 0 and q.ends[1] - q.ends[0] == 2**q.bits - 1 for q in inside.values())
    lows = sorted(m.low for m in graph.modules() if isinstance(m, Quantise))
    assert lows == sorted(q.low for q in inside.values())


def test_every_form_gives_the_same_answers(lowered):
    net, x, graph, folder = lowered
    out = graph(x)
    assert torch.allclose(out, net(x), atol=1e-4 * float(out.abs().max()))
    assert torch.equal(run_integer(graph, x), out)
    assert torch.equal(Runner(graph, batch=6)(x), out)
    assert torch.equal(unpack(pack(graph, folder / "net.safetensors"))(x), out)
    for form in ("qdq", "float"):
        session = onnx_session(to_onnx(graph, folder / f"{form}.onnx", form=form))
        assert torch.allclose(session(x), out, atol=1e-4 * float(out.abs().max()))


def test_the_border_is_the_code_of_zero(lowered):
    "Codes from 0 up, with the lower end as a constant of each kernel: padding then is -low, and the sums are the same."
    _, x, graph, _ = lowered
    conv = graph.get_submodule("3")
    q = next(m for n, m in graph.named_modules() if n.startswith("3_") and isinstance(m, Quantise))
    codes = torch.randint(0, 2**q.bits, (2, 8, 7, 7), generator=torch.Generator().manual_seed(2))
    integers = (codes + q.low).int()
    bordered = F.conv2d(F.pad(codes.double(), (1,) * 4, value=-q.low), conv.weight.double(), stride=2, groups=8)
    constant = q.low * conv.weight.double().sum((1, 2, 3)).view(-1, 1, 1)
    assert torch.equal(int_sums(conv, integers).double(), bordered + constant)
    low, high = kernel_ranges(conv, q.bits, False, q.low)
    sums = int_sums(conv, integers)
    assert (sums.amin((0, 2, 3)) >= low).all() and (sums.amax((0, 2, 3)) <= high).all()


def test_it_is_charged_as_unsigned_bits(lowered):
    net, x, _, _ = lowered
    plain = copy.deepcopy(net)
    for q in activation_quantisers(plain).values():
        q.low = 0
    assert score(net, (3, 12, 12)).layers.equals(score(plain, (3, 12, 12)).layers)


@pytest.mark.parametrize("bits, low", [(3, -2), (4, 0), (8, -31)])
def test_gradients_are_those_of_simple_operations(bits, low):
    "Straight through inside the window, and Esser's gradient for the scale: against round, clamp and autograd."
    x, a = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) * 8, 0.37
    q = ActivationQuantiser(bits, a, learn=True, low=low)
    given = x.clone().requires_grad_()
    weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    (q(given) * weights).sum().backward()
    wanted = x.clone().requires_grad_()
    scale = q.scale.detach().double().requires_grad_()
    v = (wanted / scale).clamp(*q.ends)
    ((v + (v.round() - v).detach()) * scale * weights).sum().backward()
    assert torch.allclose(given.grad, wanted.grad)
    factor = max(q.ends[1], 1) ** -0.5  # 1/sqrt(n Qmax), n = 1 input an image
    assert q.scale.grad.item() == pytest.approx(scale.grad.item() * factor, rel=1e-4)


def test_it_travels_in_a_state_dict():
    q, other = ActivationQuantiser(5, 0.1, low=-3), ActivationQuantiser(8, 0.2)
    other.load_state_dict(q.state_dict())
    assert (other.bits, other.low, other.ends) == (5, -3, (-3, 28))
    other.load_state_dict(ActivationQuantiser(4, 0.3).state_dict())
    assert (other.bits, other.low) == (4, 0)


def test_the_search_finds_what_brute_force_finds():
    x = F.silu(3 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    sample = calibrate(nn.Linear(1, 1), x[:, None])[""]
    for bits in (2, 3, 4):

        def error(a, low):
            return float(((x / a).round().clamp(low, low + 2**bits - 1) * a - x).square().sum())

        scales = torch.logspace(-1.3, 0.7, 300).tolist()
        best = min(error(a, low) for a in scales for low in range(1 - 2**bits, 1))
        assert error(*solve_window(sample, bits)) < 1.01 * best


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActivationQuantiser(4, low=-16),
        lambda: ActivationQuantiser(4, low=1),
        lambda: ActivationQuantiser(4, signed=True, low=-1),
        lambda: Quantise(4, low=-16),
        lambda: Quantise(4, True, -1),
        lambda: Quantise(4, low=-0.5),
    ],
)
def test_a_window_that_makes_no_sense_is_refused(make):
    with pytest.raises(MicronetError, match="whole number from -15 to 0"):
        make()


def test_one_bit_below_zero_opens_in_onnxruntime(tmp_path):
    "A window from -1 to 0 in front of an integer layer."
    scale, conv = ScaleBias(3), IntConv2d(3, 2, 1)
    scale.weight.data.fill_(0.5), scale.bias.data.fill_(0.1)
    conv.weight.data = torch.randint(-7, 8, conv.weight.shape, generator=torch.Generator().manual_seed(0)).float()
    net = nn.Sequential(scale, Quantise(1, low=-1), conv).eval()
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3
    session = onnx_session(to_onnx(net, tmp_path / "net.onnx", input_size=(3, 4, 4)))
    assert torch.equal(session(x), net(x))
    assert (net[:2](x) == -1).any()


def test_values_too_small_for_a_scale_are_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    quantisers = quantise_activations(net, torch.randn(2, 3, 4, 4) * 1e-42, 4, affine=True)
    assert quantisers["0"].ends == (0, 255)  # the first layer has 8 bits
