"Layers on tokens: rows of pixels, transposed convolutions, attention as torch has it, and products of activations."

import pytest
import torch
from torch import nn

from micronet_nb.activations import quantise_activations, quantise_products, remove_product_quantisers
from micronet_nb.compressing import compress
from micronet_nb.core import MicronetError
from micronet_nb.layers import compressible, unpack_attention
from micronet_nb.lowering import lower
from micronet_nb.post_training import reconstruct
from micronet_nb.pruning import param_sparsity, prune
from micronet_nb.scoring import score
from micronet_nb.weights import quantise_weights, weight_integers


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


class Tokens(nn.Module):
    "Convolutions of every kind that has a layer, then attention of torch's own."

    def __init__(self):
        super().__init__()
        self.up, self.along = nn.ConvTranspose2d(3, 4, 2, 2), nn.Conv1d(4, 8, 3, padding=1)
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.along(self.up(x).flatten(2)).transpose(1, 2)
        return self.head(self.block(x).mean(1))


def tokens():
    torch.manual_seed(0)
    return Tokens().eval(), torch.randn(6, 3, 3, 3)


def test_packed_attention_is_pruned_and_quantised_like_any_layer():
    net, x = tokens()
    want = net(x)
    before = {id(p) for p in net.parameters()}
    assert unpack_attention(net) == ["block.self_attn"] and unpack_attention(net) == []
    assert close(net(x), want) and {id(p) for p in net.parameters()} == before
    prune(net, 0.5)
    assert param_sparsity(net) == 0.5 and int((net.block.self_attn.in_proj_weight == 0).sum()) == 3 * 8 * 8 // 2
    assert len(quantise_weights(net, 4).untouched) == 0
    done = quantise_activations(net, x, 8)
    assert len(done.untouched) == 0 and list(done) == list(compressible(net))
    layers = score(net, (3, 3, 3)).layers.query("kind in ('conv', 'linear')").set_index("name")
    assert set(layers.bits) == {"4w 8a"}
    assert layers.nnz["block.self_attn.in_proj"] == int((net.block.self_attn.in_proj.weight != 0).sum())


def test_a_transposed_convolution_has_one_scale():
    "Its rows are inputs, and a scale for each would not come out of a sum."
    net, _ = tokens()
    unpack_attention(net)
    quantise_weights(net, 4)
    assert {n: weight_integers(m)[1].numel() for n, m in compressible(net).items() if n in ("up", "along")} == {
        "up": 1,
        "along": 8,
    }
    back = net.up.weight / weight_integers(net.up)[1]
    assert close(back, back.round(), 1e-4)


def test_post_training_reaches_every_layer():
    net, x = tokens()
    unpack_attention(net)
    table = reconstruct(net, x, 4, {"*": 0.5}, quiet=True)
    assert list(table.index) == list(compressible(net)) and set(table.bits) == {4}
    assert (table.zeros >= table.weights // 2).all() and len(table.attrs["untouched"]) == 0
    assert table.error["up"] == table.nearest["up"] > 0  # rounded, not solved


def test_products_of_two_activations_are_quantised_on_both_sides():
    net, x = tokens()
    unpack_attention(net)
    plain = net(x)
    assert list(quantise_products(net, x, 8)) == ["block.self_attn"]
    assert not torch.equal(net(x), plain) and close(net(x), plain, 0.05)
    assert score(net, (3, 3, 3)).layers.query("kind == 'product'").bits.tolist() == ["8", "8"]
    remove_product_quantisers(net)
    assert torch.equal(net(x), plain)


def test_compress_reaches_attention():
    net, x = tokens()
    with pytest.raises(MicronetError, match="'up' is a transposed convolution.*put nn.Upsample and a convolution"):
        compress(net, torch.cat([x] * 4), "8-bit", quiet=True)
    net.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, padding=1))  # as the message says
    small = compress(net, torch.cat([x] * 4), "8-bit", quiet=True)
    assert "block.self_attn.in_proj" in small.report.layers.index and len(small.report.untouched) == 0
    assert type(net.block.self_attn) is nn.MultiheadAttention  # the net that was given is left as it was


class Attend(nn.Module):
    "Attention of one head behind a norm: 6 tokens of 8 numbers."

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def test_what_a_graph_with_attention_costs_more_than_its_net():
    "A multiplication at 16 bits counts a half. 48 inputs of each layer, 36 scores, which softmax has at 32 in the net."
    torch.manual_seed(0)
    net, x = Attend().eval(), torch.randn(4, 6, 8)
    quantise_weights(net, 4), quantise_activations(net, x, 8)
    kinds = [score(m, (6, 8)).layers.groupby("kind").multiplies.sum() for m in (net, lower(net, x, torch.float32))]
    assert [k["scale"] for k in kinds] == [(6 * 24 + 6 * 8) / 2, (6 * 24 + 6 * 8) / 2 + (48 + 36 + 48) / 2]
    assert [k["softmax"] for k in kinds] == [3 * 36, 2 * 36]
    rest = [k.drop(["scale", "softmax"]) for k in kinds]
    assert rest[0].equals(rest[1]) and len(rest[0]) >= 3
