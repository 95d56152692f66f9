"Operations between integer layers: each declaration holds in every room, and one of your own needs no other place."

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from micronet_nb.activations import ActivationQuantiser, quantise_activations, quantise_products
from micronet_nb.core import MicronetError
from micronet_nb.integer import CARRIES, OPERATIONS, IntegerRun, IntLinear, ScaleBias
from micronet_nb.integer import grid_of, int_products, operation, run_integer
from micronet_nb.lowering import lower
from micronet_nb.onnx import onnx_session, to_onnx, try_operation
from micronet_nb.packing import decode_node, pack, unpack
from micronet_nb.runtime import Runner
from micronet_nb.scoring import ELEMENTWISE, score
from micronet_nb.weights import WeightQuantiser, quantise_weights


@pytest.mark.parametrize('key', [*OPERATIONS])
def test_a_declaration_holds_everywhere(key):
    assert try_operation(OPERATIONS[key].function)[-1] == 'to_onnx'


def tokens(n=3, seed=0):
    return torch.randn(n, 6, 8, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    "Attention and a perceptron on tokens, with a class token and places, and a head."

    def __init__(self, attend):
        super().__init__()
        self.row, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 7, 8))
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.attend = nn.Linear(8, 4), attend

    def forward(self, x):
        x = torch.cat([self.row.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.attend(self, self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(x[:, 0])


def _heads(self, x):
    return self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)


def fused(self, x):
    return self.out(F.scaled_dot_product_attention(*_heads(self, x)).transpose(1, 2).flatten(2))


def unfused(self, x):
    q, k, v = _heads(self, x)
    weights = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1)
    return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


def by_einsum(self, x):
    q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
    weights = torch.einsum('nqhd,nkhd->nhqk', q, k).mul(0.5).softmax(-1)
    return self.out(torch.einsum('nhqk,nkhd->nqhd', weights, v).flatten(2))


def by_module(self, x):
    return self.mha(x, x, x, need_weights=False)[0]


def by_windows(self, x):
    "Attention within rolled windows: the batch changes its size on the way."
    n = len(x)
    y = torch.roll(x[:, :6], -1, 1).view(n, 3, 2, 8).reshape(-1, 2, 8)
    y = torch.roll(fused(self, y).view(n, 6, 8), 1, 1)
    return torch.cat([y, x[:, 6:]], 1)


WAYS = [fused, unfused, by_einsum, by_module, by_windows]


@torch.no_grad()
def agree(net, x, path, exact_onnx=True):
    "Float64 graph and net; integer run, Runner, file and ONNX with the float32 graph."
    net = net.eval()
    graph = lower(net, x, torch.float64)
    want = net.double()(x.double())
    assert float((graph(x.double()) - want).abs().max()) < 1e-9 * float(want.abs().max())
    net.float()
    graph = lower(net, x)
    y = graph(x)
    few = x[:2]  # another batch than that of the example
    assert run_integer(graph, x).equal(y) and Runner(graph)(x).equal(y)
    assert unpack(pack(graph, path / 'net'))(few).equal(graph(few))
    assert float((onnx_session(to_onnx(graph, path / 'net.onnx'))(few) - graph(few)).abs().max()) < 1e-4
    return graph


@pytest.mark.parametrize('bits', [None, 8])
@pytest.mark.parametrize('attend', WAYS)
def test_attention_however_it_is_spelt(attend, bits, tmp_path):
    torch.manual_seed(0)
    net, x = Block(attend).eval(), tokens()
    if bits:
        net.mha.requires_grad_(False)
        quantise_weights(net, bits)
        quantise_activations(net, x, bits)
    graph = agree(net, x, tmp_path)
    layers = [type(m).__name__ for m in graph.modules()]
    assert layers.count('LayerNorm') == 2 and ('IntLinear' in layers) == bool(bits)


HIDDEN = ~torch.ones(6, 6, dtype=torch.bool).tril()  # from a token: those behind it
INFINITE = torch.zeros(6, 6).masked_fill(HIDDEN, -math.inf)
MASKS = dict(
    added=lambda scores, mask: scores + mask,
    in_front=lambda scores, mask: mask + scores,
    filled=lambda scores, mask: scores.masked_fill(mask < 0, -math.inf),
    where=lambda scores, mask: torch.where(mask < 0, -math.inf, scores),
    where_not=lambda scores, mask: torch.where(mask == 0, scores, torch.tensor(-math.inf)),
    method=lambda scores, mask: scores.where(mask == 0, -math.inf),
)


class Masked(nn.Module):
    "Attention with a mask of 0 and -inf, as a net stores it; None: torch's fused attention; 'causal': with its own."

    def __init__(self, mask):
        super().__init__()
        self.qkv, self.how = nn.Linear(8, 24), mask
        self.register_buffer('mask', INFINITE)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how is None:
            return F.scaled_dot_product_attention(q, k, v, self.mask)
        if self.how == 'causal':
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.how(q @ k.transpose(1, 2), self.mask).softmax(-1) @ v


@pytest.mark.parametrize('mask', [None, 'causal', *MASKS])
def test_what_a_mask_of_infinities_hides_is_hidden(mask, tmp_path):
    net, x = Masked(MASKS.get(mask, mask)).eval(), tokens()
    quantise_weights(net, 8), quantise_activations(net, x, 8)
    graph = agree(net, x, tmp_path)
    other = torch.cat([x[:, :3], tokens(seed=7)[:, 3:]], 1)  # the same first tokens, which see nothing of the others
    assert graph(other)[:, :3].equal(graph(x)[:, :3]) and not graph(other)[:, 3:].equal(graph(x)[:, 3:])


def test_a_net_that_gives_infinities_is_refused():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('mask', INFINITE)

        def forward(self, x):
            return x @ x.transpose(1, 2) + self.mask

    with pytest.raises(MicronetError, match='what the net gives to the example has 45 values that are NaN or infinite'):
        lower(Shifted(), tokens())  # 3 images with 15 places above the diagonal


def test_a_choice_by_values_of_an_activation_is_refused():
    class Chosen(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x, 0.0)

    with pytest.raises(MicronetError, match="'gt' in Chosen cannot be lowered"):
        lower(Chosen(), tokens())


def test_products_quantised_within_attention_are_lowered(tmp_path):
    "Both factors of both products, on grids: the products are those of whole numbers."
    torch.manual_seed(0)
    net, x = Block(fused).eval(), tokens()
    assert list(quantise_products(net, x, 8)) == ['']
    graph = agree(net, x, tmp_path)
    products = [n for n in graph.graph.nodes if n.target is torch.matmul]
    assert [[grid_of(graph, i) for i in n.args] for n in products] == [[(8, True)] * 2, [(8, False), (8, True)]]


@pytest.mark.parametrize('same', [True, False])
def test_the_packed_projection_of_attention_may_be_quantised(same, tmp_path):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.mha = ActivationQuantiser(8, 0.03, signed=True), nn.MultiheadAttention(8, 2, batch_first=True)
            scale = self.mha.in_proj_weight.detach().abs().amax(1, keepdim=True) / 7
            register_parametrization(self.mha, 'in_proj_weight', WeightQuantiser(4, scale), unsafe=True)

        def forward(self, x):
            x = self.q(x)
            return self.mha(x, x if same else x[:, :4], x if same else x[:, :4], need_weights=False)[0]

    torch.manual_seed(0)
    graph = agree(Packed(), tokens(), tmp_path)
    whole = [m for m in graph.modules() if isinstance(m, IntLinear)]
    assert [m.out_features for m in whole] == ([24] if same else [8, 8, 8])
    assert {m.weight_bits for m in whole} == {4} and {type(m) for m in graph.modules()} >= {nn.Linear}  # out_proj


def test_products_of_two_grids_are_whole(tmp_path):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ActivationQuantiser(8, 0.02, signed=True), ActivationQuantiser(4, 0.1)

        def forward(self, x):
            return self.a(x) @ self.b(x).transpose(1, 2)

    x, seen = tokens(), []
    graph = agree(Product(), x, tmp_path)
    IntegerRun(graph, watch=lambda n, v: seen.append(v) if n.target is torch.matmul else None).run(x)
    a = (x / 0.02).round().clamp(-127, 127)
    b = (x / 0.1).round().clamp(0, 15)
    assert seen[0].dtype == torch.int32 and seen[0].equal((a.double() @ b.double().mT).int())


def test_products_that_leave_32_bits():
    x = torch.full((1, 1, 3), 32767, dtype=torch.int32)
    assert int_products(x, x.mT).item() == 3 * 32767 * 32767
    assert int_products(x[..., :1], x[:, :, :1]).dtype == torch.int32


def test_an_operation_of_ones_own(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)), torch.randn(3, 3, 5, 5)

    def gate(v):
        return v * torch.special.bessel_j0(v)

    class Gated(nn.Module):
        def forward(self, v):
            return seen(v)

    seen = gate
    net.insert(1, Gated())
    with pytest.raises(MicronetError, match="'special_bessel_j0' in module '1'|'bessel_j0' in module '1'"):
        lower(net, x)
    with pytest.raises(MicronetError, match='bessel_j0'):
        score(net, (3, 5, 5))

    try:
        seen = operation(gate, example=(torch.randn(2, 3),), cost=dict(special_bessel_j0=(8, 7)))
        rows = score(net, (3, 5, 5)).layers.set_index('kind')
        assert rows.loc['special_bessel_j0', 'multiplies'] == 8 * 4 * 3 * 3
        quantise_weights(net, 4), quantise_activations(net, x, 4)
        graph = lower(net, x)
        assert [n.target for n in graph.graph.nodes].count(seen) == 1
        assert unpack(pack(graph, tmp_path / 'net'))(x).equal(graph(x)) and Runner(graph)(x).equal(graph(x))
        with pytest.raises(MicronetError, match='gate cannot be exported|no rule for'):
            to_onnx(graph, tmp_path / 'net.onnx')
    finally:
        ELEMENTWISE.pop('special_bessel_j0', None), OPERATIONS.pop('own.gate', None), CARRIES.discard(seen)
    with pytest.raises(MicronetError, match="'own.gate', which is none .* declare it with micronet_nb.operation"):
        unpack(tmp_path / 'net')


def test_the_page_is_a_program_that_says_what_it_shows(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / 'docs' / 'OPERATIONS.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```(python|text)\n(.*?)```', page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    before, costs, space = dict(OPERATIONS), dict(ELEMENTWISE), {'__name__': 'page'}
    try:
        for kind, text in blocks:
            if kind == 'python':
                exec(text, space)
            else:
                assert capsys.readouterr().out == text
    finally:
        for table, kept in ((OPERATIONS, before), (ELEMENTWISE, costs)):
            table.clear()
            table.update(kept)
    assert len(blocks) > 5 and not capsys.readouterr().out


def test_arguments_in_a_file_are_those_that_a_declaration_allows():
    graph = fx.Graph()
    nodes = [graph.placeholder('x')]
    row = lambda times: ['f', 'own.tiled', ['1'], {'times': {'t': times}}]
    assert decode_node(graph, row([1, 2, 1]), nodes, []).target.__name__ == 'tiled'
    for times in ([1, 2**14, 1], [1, 0, 1], [1] * 9, [1.0], ['1']):
        with pytest.raises(MicronetError, match='own.tiled has the argument times=.* which its declaration does not'):
            decode_node(graph, row(times), nodes, [])
    with pytest.raises(MicronetError, match="torch.softmax has the argument 'bits'"):
        decode_node(graph, ['f', 'torch.softmax', ['1'], {'bits': 1}], nodes, [])


def test_scales_of_columns_are_no_scales_of_channels(tmp_path):
    "In a Runner, the scale behind a convolution of bytes joins it; one of columns may not."

    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.column = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1), nn.Parameter(torch.rand(5) + 0.5)

        def forward(self, x):
            return (self.b(torch.relu(self.a(x) * self.column)) * self.column).flatten(1)

    net, x = Columns().eval(), torch.randn(3, 3, 5, 5)
    net.a.bias = net.b.bias = None
    quantise_weights(net, 4), quantise_activations(net, x, 4)
    graph = agree(net, x, tmp_path)
    assert [m.axis for m in graph.modules() if isinstance(m, ScaleBias) and len(m.weight) > 1].count(3) > 0


LINES = '(test_operations.py, line '


@pytest.mark.parametrize(
    'f, words',
    [
        (lambda x: x.cumsum(1), "'cumsum' in Lambda cannot be lowered: no rule is known for it; declare it with"),
        (lambda x: x.sort(1)[0], "Lambda calls 'sort', which returns several tensors: it cannot be lowered; call"),
        (lambda x: x[1:], "'getitem' in Lambda cannot be lowered: it picks images of the batch; give the net"),
        (lambda x: x.transpose(0, 1), 'it is what the net returns, and the batch must be in front there; transpose'),
        (lambda x: x + torch.arange(len(x)).view(-1, 1, 1), 'is another for each image of the batch'),
        (lambda x: x.half().float(), 'it makes torch.float16 of the activations; leave their type'),
    ],
)
def test_what_is_refused_is_named_with_its_line_and_the_remedy(f, words):
    class Lambda(nn.Module):
        def forward(self, x):
            return f(x)

    with pytest.raises(MicronetError) as told:
        lower(Lambda(), tokens())
    assert words in str(told.value) and LINES in str(told.value)


def test_a_net_may_go_on_without_its_batch_in_front_and_with_another_batch(tmp_path):
    class Turned(nn.Module):
        "The batch of 8 meets 8 channels and 8 heads."

        def forward(self, x):
            y = x.permute(2, 0, 1).reshape(8, len(x), 2, 3).permute(0, 2, 1, 3).softmax(0)
            return y.permute(2, 0, 1, 3).reshape(len(x), -1)

    graph = agree(Turned(), tokens(8), tmp_path)
    assert graph(tokens(5, seed=3)).equal(Turned()(tokens(5, seed=3)))


def test_a_quantised_layer_on_what_is_made_at_run_time_is_a_constant(tmp_path):
    class Places(nn.Module):
        "A layer on places that the net computes, and one on the tokens."

        def __init__(self):
            super().__init__()
            self.places, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            made = torch.sin(torch.arange(48.0).view(1, 6, 8).to(x.dtype)).expand(len(x), -1, -1)
            return self.fc(x + self.places(made))

    net, x = Places().eval(), tokens()
    quantise_weights(net, 8), quantise_activations(net, x, 8)
    graph = agree(net, x, tmp_path)
    assert [type(m) for m in graph.modules()].count(IntLinear) == 1
    assert [tuple(getattr(graph, n.target).shape) for n in graph.graph.nodes if n.op == 'get_attr'] == [(1, 6, 8)]


def test_functions_of_torch_that_call_themselves_otherwise():
    "torch.special.erfcx has the name special_erfcx, and a net calls it as it is."
    operation(torch.special.erfcx, example=(torch.rand(2, 3, 4, 4),), cost={'special_erfcx': (8, 7)})
    assert OPERATIONS['special_erfcx'].name == 'special.erfcx'
    assert try_operation(torch.special.erfcx)[-1] == 'pack'


@pytest.mark.parametrize(
    'cost, word',
    [
        ({'exp': (-100, 0)}, 'whole from 0'),
        ({'exp': (7, 7)}, 'leave it out of cost'),
        ({'special_i1': 3}, 'whole from 0'),
        ('free', 'a dict'),
    ],
)
def test_a_declaration_prices_nothing_but_its_own(cost, word):
    with pytest.raises(MicronetError, match=word):
        operation(torch.special.i1, example=(torch.rand(2, 3),), cost=cost)
    assert 'special_i1' not in OPERATIONS or 'special_i1' not in ELEMENTWISE


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def scaled_by(x, factor, shift=0.0):
    return x * factor + shift


is_float = lambda v: isinstance(v, float)


@pytest.mark.parametrize(
    'function, said, words',
    [
        (3, dict(example=(X,)), '3 cannot be declared: an operation is a function'),
        (scaled_by, dict(example=X), 'is a tuple of arguments, not torch.float32 2x3x4x4: '),
        (scaled_by, dict(example=None), 'is a tuple of arguments, not NoneType'),
        (scaled_by, dict(example=(2.0, X)), 'begins with a tensor of floats'),
        (scaled_by, dict(example=(X.int(), 2.0)), 'begins with a tensor of floats'),
        (scaled_by, dict(example=(X[:1], 2.0)), r'begins with a tensor of floats \(n, ...\), n > 1'),
        (scaled_by, dict(example=(X.sum(), 2.0)), 'begins with a tensor of floats'),
        (scaled_by, dict(example=(X,)), 'does not run on its example: .*factor'),
        (scaled_by, dict(example=(X, 2.0)), 'has 1 values behind its tensors, and arguments= has 0'),
        (scaled_by, dict(example=(X, 2.0, X)), 'has a tensor behind a number'),
        (scaled_by, dict(example=(X, X), arguments=dict(gain=is_float)), "has no argument 'gain'"),
        (scaled_by, dict(example=(X, 2.0), arguments=dict(gain=is_float)), "example by name: .*'gain'"),
        (scaled_by, dict(example=(X, 2.0, 1.0), arguments=dict(shift=is_float, factor=is_float)), 'in another order'),
        (
            scaled_by,
            dict(example=(X, 2), arguments=dict(factor=is_float)),
            'factor=2 in the example of own.scaled_by is',
        ),
        (scaled_by, dict(example=(X, 2.0), arguments=dict(factor=3)), 'a dict of each argument to a test'),
        (scaled_by, dict(example=(X, 2.0), arguments=['factor']), 'a dict of each argument to a test'),
        (torch.relu, dict(example=(X,), onnx='Relu'), "onnx='Relu' of torch.relu: a function of the export"),
        (torch.relu, dict(example=(X,), carries='yes'), "carries='yes' of torch.relu: True or False"),
        (torch.relu, dict(example=(X,), name=3), '3 is no name of an operation'),
        (lambda x: None, dict(example=(X,), name='own.f'), 'own.f makes of its example NoneType: '),
        (
            lambda x: (x, x),
            dict(example=(X,), name='own.f'),
            'own.f makes of its example tuple: an operation makes one',
        ),
        (lambda x: x.sum(), dict(example=(X,), name='own.f'), 'own.f makes of its example torch.float32 : '),
        (lambda x: x.transpose(0, 1), dict(example=(X,), name='own.f'), 'makes of its example torch.float32 3x2x4x4'),
        (lambda x: x.argmax(1), dict(example=(X,), name='own.f'), 'makes of its example torch.int64 2x4x4'),
        (lambda x: 1 // 0, dict(example=(X,), name='own.f'), 'own.f does not run on its example: integer division'),
    ],
)
def test_a_wrong_declaration_is_one_sentence(function, said, words):
    before = {key: vars(op) for key, op in OPERATIONS.items()}
    with pytest.raises(MicronetError, match=words) as told:
        operation(function, **said)
    assert '\n' not in str(told.value) and {key: vars(op) for key, op in OPERATIONS.items()} == before


@pytest.fixture
def declared():
    "Declares for one test."
    before, carry = dict(OPERATIONS), set(CARRIES)
    yield operation
    for table, kept in ((OPERATIONS, before), (CARRIES, carry)):
        table.clear()
        table.update(kept)


def raises(e, x):
    raise ZeroDivisionError('nothing to divide')


@pytest.mark.parametrize(
    'said, f, words',
    [
        (dict(onnx=raises), lambda x: x + 1, r'has arguments that its rule does not know \(ZeroDivisionError: not'),
        (dict(onnx=lambda e, x: None), lambda x: x + 1, 'the rule of .* returns NoneType, not the name of a value'),
        (dict(onnx=lambda e: e('Relu', 'x')), lambda x: x + 1, 'cannot be exported to ONNX: .*too many positional'),
        ({}, lambda x: x / (len(x) - 1 or x[3]), 'own.f does not run on one image alone: index 3 is out of bounds'),
        (
            dict(carries=True),
            lambda x: x + 0.5,
            'own.f is said to carry whole numbers, and makes torch.float32 of them',
        ),
        (
            dict(carries=True),
            lambda x: F.softmax(x, 1),
            'own.f is said to carry whole numbers, and does not run on any',
        ),
    ],
)
def test_what_is_tried_and_fails_is_one_sentence(said, f, words, declared):
    with pytest.raises(MicronetError, match=words) as told:
        try_operation(declared(f, example=(X,), name='own.f', **said))
    assert '\n' not in str(told.value)


def test_a_declaration_that_was_replaced_is_called_no_more(declared):
    "Two functions that a maker makes have one name and one place; lambdas have no other."

    class Call(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x)

    def times(k):
        return declared(lambda x: x * k, example=(X,), name='own.times')

    two, three = times(2), times(3)
    assert lower(Call(three), X)(X).equal(X * 3)
    with pytest.raises(MicronetError, match='own.times has been declared anew since: let the net call that one'):
        lower(Call(two), X)
    four = declared(lambda x: x * 4, example=(X,), name='own.fourfold')  # another name, another operation
    assert lower(Call(three), X)(X).equal(X * 3) and lower(Call(four), X)(X).equal(X * 4)


def test_a_declaration_that_carries_no_more(declared):
    declared(torch.erfc, example=(X,), carries=True)
    declared(torch.erfc, example=(X,))
    assert torch.erfc not in CARRIES and not OPERATIONS['erfc'].carries


def test_an_argument_that_a_declaration_does_not_name_is_refused(declared):
    f = declared(scaled_by, example=(X, 2.0), arguments=dict(factor=is_float))

    class Call(nn.Module):
        def forward(self, x):
            return f(x, 2.0, 1.0)

    with pytest.raises(
        MicronetError, match='called with 1.0, for which the declaration of own.scaled_by has no argument'
    ):
        lower(Call(), X)


def test_a_test_that_cannot_judge_a_value_of_a_file_refuses_it(declared):
    declared(scaled_by, example=(X, 2.0), arguments=dict(factor=lambda v: 0 < v < 9))
    graph = fx.Graph()
    row = ['f', 'own.scaled_by', ['1'], {'factor': {'t': [1]}}]
    with pytest.raises(MicronetError, match='own.scaled_by has the argument factor=.* which its declaration does not'):
        decode_node(graph, row, [graph.placeholder('x')], [])


def test_importing_draws_nothing():
    "A seed set before the first use of the library gives the same numbers as after it."
    code = 'import torch, micronet_nb as mn; torch.manual_seed(0); mn.lower, mn.to_onnx; print(torch.rand(1))'
    drawn = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    torch.manual_seed(0)
    assert drawn.strip() == str(torch.rand(1))


def test_what_a_declaration_says_of_a_batch_and_of_whole_numbers_is_tried():
    "One that mixes images, and one that makes other numbers than it was given."

    def centred_in_the_batch(x):
        return x - x.mean(0)

    def thousand_times(x):
        return x * 1000

    example = (torch.randn(2, 3, 4, 4),)
    mixing = operation(centred_in_the_batch, example=example)
    with pytest.raises(MicronetError, match='one image at a time gives something else'):
        try_operation(mixing)
    making = operation(thousand_times, example=example, carries=True)
    with pytest.raises(MicronetError, match='makes others of them'):
        try_operation(making)
    CARRIES.remove(making)
    for key in ('own.centred_in_the_batch', 'own.thousand_times'):
        OPERATIONS.pop(key)


def test_a_name_in_files_stands_for_one_function():
    "A cell that is run again may declare its function again; another function of that name may not."

    def declared(module):
        def gate_of_two(x):
            return x * 2

        gate_of_two.__module__ = module
        return operation(gate_of_two, example=(torch.randn(2, 3),))

    first, again = declared('mine'), declared('mine')
    assert OPERATIONS['own.gate_of_two'].function is again is not first
    with pytest.raises(MicronetError, match='own.gate_of_two is declared already, by mine'):
        declared('yours')
    OPERATIONS.pop('own.gate_of_two')


def test_ends_that_are_stored_numbers_and_ends_at_infinity(tmp_path):
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('low', torch.tensor(-0.5))
            self.register_buffer('none', torch.tensor(math.inf))

        def forward(self, x):
            x = torch.clamp(x, self.low, self.none)  # one end
            return torch.clamp(x, -self.none, self.none).clip(max=1.25) * 2  # no end, and the other one

    graph = agree(Clipped(), tokens(), tmp_path)
    ends = [n.kwargs for n in graph.graph.nodes if n.target is torch.clamp]
    assert ends == [{'min': -0.5}, {'max': 1.25}] and graph(tokens()).equal(tokens().clamp(-0.5, 1.25) * 2)


def test_empty_pieces_are_none(tmp_path):
    class Pieces(nn.Module):
        "Prefix tokens, of which there are none."

        def forward(self, x):
            prefix, x = x[:, :0], torch.exp(x)
            x = torch.cat([prefix, x], 1)
            return torch.cat([torch.tanh(prefix), x[:, :3], x[:, 3:]], 1)

    graph = agree(Pieces(), tokens(), tmp_path)
    assert [len(n.args[0]) for n in graph.graph.nodes if n.target is torch.cat] == [2]
