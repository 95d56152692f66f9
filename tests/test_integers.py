"The integers of a deployed net and of its files, by bits and bytes that are worked out by hand."

import numpy as np
import pytest
import torch
from torch import nn

from micronet_nb import lowering
from micronet_nb.adders import accumulate, accumulator_ranges, bits_for
from micronet_nb.core import MicronetError
from micronet_nb.integer import IntConv2d, IntLinear, Quantise, ScaleBias
from micronet_nb.integer import check_integers, int_sums, kernel_ranges, register_bits
from micronet_nb.lowering import lower
from micronet_nb.packing import decode, encode, form_of, from_bits, half_scales, pack, to_bits, unpack
from micronet_nb.runtime import Int8Conv, ToBytes
from micronet_nb.weights import quantise_weights


def int_linear(rows, bits):
    "An integer layer of these weights."
    layer = IntLinear(len(rows[0]), len(rows), weight_bits=bits)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


# ------------------------------------------------------------------ modules of a deployed net


def test_quantisers_round_half_to_even_and_clamp():
    x = torch.tensor([-9.0, -0.6, 0.2, 1.5, 2.5, 40.0])
    assert Quantise(4)(x).tolist() == [0, 0, 0, 2, 2, 15] and Quantise(4, True)(x).tolist() == [-7, -1, 0, 2, 2, 7]
    assert Quantise(1)(x).tolist() == [0, 0, 0, 1, 1, 1] and Quantise(1, True)(x).tolist() == [-1, -1, 1, 1, 1, 1]


def test_integers_fit_their_bits():
    check_integers(torch.tensor([-8.0, 7.0]), 4)
    check_integers(torch.tensor([-1.0, 0.0, 1.0]), 1)
    for wrong in ([8.0], [-9.0], [0.5]):
        with pytest.raises(MicronetError):
            check_integers(torch.tensor(wrong), 4)


def used(layers):
    "A net whose batch norm has mean 1, variance 3 and eps 1: it divides by 2."
    net = nn.Sequential(*layers).eval()
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.running_mean, m.running_var = 1.0, torch.ones(1), torch.full((1,), 3.0)
            m.weight.data, m.bias.data = torch.tensor([4.0]), torch.tensor([0.25])
        if isinstance(m, nn.Conv2d):
            m.weight.data, m.bias.data = torch.full((1, 1, 1, 1), 2.0), torch.tensor([0.5])
    return net


def test_biases_and_norms_are_folded_in():
    "2x + .5 is normalised to (2x - .5)/2, times 4, plus .25: 4x - .75. The layer behind it makes 2 (4x - .75) + .5."
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0]).view(4, 1, 1, 1)
    graph = lower(used([nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)]), x, torch.float32)
    assert graph(x).flatten().tolist() == [-4.75, -0.75, 1.25, 7.25]
    graph = lower(used([nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)]), x, torch.float32)
    assert graph(x).flatten().tolist() == [-9.0, -1.0, 3.0, 15.0]
    net = used([nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)])
    quantise_weights(net, 4)
    graph = lower(net, x, torch.float32)
    assert torch.allclose(graph(x).flatten(), torch.tensor([-4.75, -0.75, 1.25, 7.25]), rtol=0, atol=1e-6)
    assert {type(m) for m in graph.children()} == {IntConv2d, ScaleBias}


def test_a_lowering_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(lowering.RULES, "relu", lambda low, node: low.values[node.args[0]])
    x = torch.tensor([[-1.0], [1.0]])
    with pytest.raises(MicronetError, match="off by 1 on the example"):
        lower(nn.Sequential(nn.ReLU()), x)


def test_integer_sums_do_not_overflow():
    layer = int_linear([[32767, 32767]], 16)
    assert int_sums(layer, torch.tensor([[65535, 65535]], dtype=torch.int32)).tolist() == [[2 * 32767 * 65535]]


def test_registers_and_ranges():
    assert [register_bits(0, 7), register_bits(-8, 7), register_bits(0, 8), register_bits(-9, 0)] == [4, 4, 5, 5]
    layer = int_linear([[3, -2, 1], [0, 0, 1]], 4)
    assert [t.tolist() for t in kernel_ranges(layer, 2, False)] == [[-6, 0], [12, 3]]  # inputs 0 to 3
    assert [t.tolist() for t in kernel_ranges(layer, 2, True)] == [[-6, -1], [6, 1]]  # inputs -1 to 1
    assert [bits_for(-8, 7), bits_for(0, 8), bits_for(-9, 0)] == [4, 5, 5]


def test_bytes_are_clamped_at_both_ends():
    "Weights 1, scale .5, bias -1: 0, 4 and 12 become -1, 1 and 5, and in two bits 0, 1 and 3."
    conv, scale = IntConv2d(1, 1, 1, weight_bits=4), ScaleBias(1)
    conv.weight.data = torch.ones(1, 1, 1, 1)
    scale.weight.data, scale.bias.data = torch.tensor([0.5]), torch.tensor([-1.0])
    x = torch.tensor([0, 4, 12], dtype=torch.uint8).view(1, 1, 1, 3)
    assert Int8Conv(conv, scale, Quantise(2), int8=False)(x).flatten().tolist() == [0, 1, 3]
    assert ToBytes(scale, Quantise(2))(x.float().permute(0, 2, 3, 1)).flatten().tolist() == [0, 1, 3]


# ------------------------------------------------------------------ Slide 'Scoring': adders


def test_adders_add_as_their_registers_do():
    row = lambda *v: torch.tensor([[float(i) for i in v]])
    assert accumulate(row(7, 1), "wrap", 4).tolist() == [-8] and accumulate(row(-8, -1), "wrap", 4).tolist() == [7]
    assert accumulate(row(7, 1, -1), "saturate", 4).tolist() == [6]
    assert accumulate(row(-8, -1, 1), "saturate", 4).tolist() == [-7]
    assert accumulate(row(2048, 1, 1, 1), "exact").tolist() == [2051]
    assert accumulate(row(2048, 1, 1, 1), "fp16").tolist() == [2048]  # 2049 is no FP16 number
    assert accumulate(row(2048, 1, 1, 1), "fp16 tree").tolist() == [2050]  # 2048 + 1, 1 + 1


def test_the_tree_is_as_wide_as_its_levels_need():
    "Three products of 4 + 2 bits, added up in two levels: 8 bits."
    net = nn.Sequential(Quantise(2), int_linear([[7, -7, 1], [1, 0, 0]], 4), ScaleBias(2))
    row = accumulator_ranges(net, torch.tensor([[3.0, 0.0, 3.0], [0.0, 3.0, 0.0]])).iloc[0]
    assert (row.products, row.tree_bits, row.low, row.high, row.holds) == (3, 8, -21, 24, True)


# ------------------------------------------------------------------ files


def test_bits_of_a_packed_tensor():
    "1, 0, -2, 3 in three bits: the mask 1011, then 001 110 011; without a mask 001 000 110 011."
    w = torch.tensor([1.0, 0.0, -2.0, 3.0])
    assert encode(w, 3).tolist() == [0b10110011, 0b10011000]
    assert encode(w, 3, masked=False).tolist() == [0b00100011, 0b00110000]
    assert encode(torch.tensor([-1.0, 1.0, 1.0, -1.0]), 1, masked=False).tolist() == [0b10010000]
    assert encode(torch.tensor([0.0, 1.0])).tolist() == [
        0b01000000,
        0,
        0,
        128,
        63,
    ]  # 1 in float32, the lowest byte first
    bits = [1, 1, 0, 0, 1, 1]
    assert to_bits(torch.tensor([-2, 3]), 3).tolist() == bits
    assert from_bits(np.array(bits, np.uint8), 3).tolist() == [-2, 3]


def test_a_packed_tensor_is_read_from_its_bits():
    data = np.array([0b10110011, 0b10011000, 255], np.uint8)
    values, size = decode(data, 4, 3)
    assert values.tolist() == [1, 0, -2, 3] and size == 2
    assert decode(np.array([0b00100011, 0b00110000], np.uint8), 4, 3, masked=False)[0].tolist() == [1, 0, -2, 3]
    assert decode(np.array([0b10010000], np.uint8), 4, 1, masked=False)[0].tolist() == [-1, 1, 1, -1]


def test_numbers_are_halved_only_where_nothing_is_lost():
    scale = ScaleBias(2)
    scale.weight.data, scale.bias.data = torch.tensor([0.5, 2.0]), torch.tensor([0.1, 0.0])
    assert form_of(scale.weight, scale, "weight") == "float16" and form_of(scale.bias, scale, "bias") == "float32"
    assert form_of(torch.zeros(2), scale, "bias") == "0"
    rounded = half_scales(nn.Sequential(scale)).get_submodule("0")
    assert rounded.bias.tolist() == [float(np.float16(0.1)), 0.0] and scale.bias.tolist() == [
        float(np.float32(0.1)),
        0.0,
    ]


def test_a_file_with_one_other_bit_is_refused(tmp_path):
    net = nn.Sequential(Quantise(2), int_linear([[7, -7, 1], [1, 0, 0]], 4), ScaleBias(2))
    x = torch.rand(5, 3) * 4
    data = pack(net, tmp_path / "net.safetensors").read_bytes()
    assert torch.equal(unpack(tmp_path / "net.safetensors")(x), net(x))
    for place in (len(data) - 1, len(data) // 2):
        (tmp_path / "other").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(MicronetError, match="was altered or damaged"):
            unpack(tmp_path / "other")


def test_integers_of_an_onnx_file():
    onnx = pytest.importorskip("onnx")
    from micronet_nb.onnx import carrier, integers

    assert [carrier(b) for b in (1, 2, 3, 4, 5, 8, 9)] == ["INT2", "INT2", "INT8", "INT4", "INT8", "INT8", "INT16"]
    assert carrier(4, False) == "UINT4"
    assert integers(np.array([1, 2, -1]), "INT4").raw_data == bytes([0x21, 0x0F])  # the first number is the lower half
    with pytest.raises(MicronetError):
        integers(np.array([8]), "INT4")
    assert integers(np.array([8]), "UINT4").raw_data == bytes([8])
    assert integers(np.array([-8]), "INT4").data_type == onnx.TensorProto.INT4


@pytest.mark.parametrize("form", ["qdq", "float"])
@pytest.mark.parametrize("bits, signed", [(4, False), (4, True), (8, False), (3, True)])
def test_an_onnx_quantiser_gives_the_same_integers(form, bits, signed, tmp_path):
    pytest.importorskip("onnxruntime")
    from micronet_nb.onnx import onnx_session, to_onnx

    top = 2 ** (bits - signed) - 1
    net = nn.Sequential(Quantise(bits, signed), int_linear([[1, 0], [0, 1]], 4), ScaleBias(2))
    x = torch.tensor([[0.0, 1.5], [2.5, top - 0.4], [top + 0.6, 1000.0], [-0.6, -1000.0]])
    low = -top if signed else 0
    want = [[0, 2], [2, top], [top, top], [max(-1, low), low]]
    assert onnx_session(to_onnx(net, tmp_path / "net.onnx", form, (2,)))(x).tolist() == want
