"Packed files from strangers: what lies about its score, fills the memory or hangs its reader is refused in one line."

import json
import os
import subprocess
import sys
import time
import zlib

import pytest
import torch
from conftest import ROOT
from fuzz import fuzz, sealed, structure_of
from torch import fx, nn
from torch.nn import functional as F

from micronet_nb.activations import quantise_activations
from micronet_nb.cli import micronet_score
from micronet_nb.core import MicronetError, find_file
from micronet_nb.integer import IntConv2d, IntLinear, Quantise, ScaleBias
from micronet_nb.lowering import lower
from micronet_nb.packing import pack, seal, unpack
from micronet_nb.weights import quantise_weights

CHECKPOINT = 'riair/densenet-100.pth.tar'


class Toy(nn.Module):
    "A net of each kind of module and call that packed files have."

    def __init__(self):
        super().__init__()
        self.quantise = Quantise(8, signed=True)
        self.conv, self.scale = IntConv2d(3, 4, 3, padding=1, weight_bits=4), ScaleBias(4)
        self.plain, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.pool, self.act = nn.MaxPool2d(2), nn.Hardtanh(0.0, 6.0)
        self.fc, self.last = IntLinear(6, 5, weight_bits=2), ScaleBias(5)
        self.shift = nn.Parameter(torch.tensor([0.5, 0.25]).view(2, 1, 1))

    def forward(self, x):
        x = self.scale(self.conv(self.quantise(x)))
        a, b = x.chunk(2, 1)
        x = torch.cat([self.pool(self.act(x)), F.avg_pool2d(self.norm(self.plain(a)) * b + self.shift, 2)], 1)
        return self.last(self.fc(x.mean((2, 3)).view(x.size(0), -1)))


def integers(model, seed=0):
    "Random weights within the promised widths, FP16 scales."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if hasattr(m, 'weight_bits'):
            top = 2 ** (m.weight_bits - 1)
            m.weight.data = torch.randint(-top, top, m.weight.shape, generator=g).float()
        elif isinstance(m, ScaleBias):
            m.weight.data = torch.rand(m.weight.shape, generator=g).half().float()
            m.bias.data = torch.randn(m.bias.shape, generator=g).half().float()
    return model.eval()


class Tokens(nn.Module):
    "A block of attention on four patches, with what is declared as operations."

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.LayerNorm(6)
        self.qkv, self.project, self.head = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.patches(F.interpolate(x, scale_factor=2)[:, :, ::2, ::2]).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 1, 6)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).squeeze(1).roll(1, 1))
        return self.head(F.gelu(x).amax(1))


def tokens():
    "That block on few bits, lowered."
    torch.manual_seed(0)
    net, images = Tokens().eval(), torch.randn(4, 3, 8, 8)
    quantise_weights(net, 4)
    quantise_activations(net, images, 6)
    return lower(net, images)


def toys(folder):
    "Packed nets to mutate, each with the size of its input; one does not say it."
    torch.manual_seed(0)
    small = nn.Sequential(Quantise(3), IntConv2d(3, 4, 1, weight_bits=3), ScaleBias(4), nn.ReLU(), nn.Flatten())
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nets = [(Toy(), True), (small, True), (small, False), (layers, True)]
    size = (3, 8, 8)
    told = lambda known: dict(input_size=size) if known else {}
    made = [(pack(integers(m), folder / f'{i}', told(known)), size) for i, (m, known) in enumerate(nets)]
    return [*made, (pack(tokens(), folder / 'tokens', told(True)), size)]


@pytest.fixture
def toy(tmp_path):
    return pack(integers(Toy()), tmp_path / 'toy.safetensors', dict(input_size=(3, 8, 8)), masks='always')


def forged(path, change, **tensors):
    "A file with a changed structure and a right checksum."
    held, structure = structure_of(path)
    change(structure)
    path.write_bytes(sealed(held | tensors, structure))
    return path


def refused(path, *words):
    with pytest.raises(MicronetError) as e:
        unpack(path)
    assert '\n' not in str(e.value) and str(path) in str(e.value)
    for w in words:
        assert w in str(e.value), str(e.value)


def kind_of(structure, cls):
    return next(k for k in structure['kinds'] if k[0] == cls)


def set_argument(cls, name, value):
    return lambda s: kind_of(s, cls)[1].update({name: value})


def set_form(cls, key, form):
    return lambda s: kind_of(s, cls)[2].update({key: form})


# --- a pack may not lie


def one_bit(s):
    for k in s['kinds']:
        if k[0].startswith('Int'):
            k[1]['weight_bits'] = 1


def test_one_bit_with_the_values_unchanged(toy, capsys):
    refused(forged(toy, one_bit), 'conv.weight holds', 'more than 1 bits')
    assert micronet_score([str(toy)]) == 1
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.skipif(find_file(CHECKPOINT) is None, reason=f'{CHECKPOINT} is not below MICRONET_DATA')
def test_one_bit_of_the_released_net(tmp_path):
    from micronet_nb.released import load_released

    path = pack(load_released(), tmp_path / 'released.safetensors', dict(accounting='riair-cifar100'))
    unpack(path)
    refused(forged(path, one_bit), 'more than 1 bits')


@pytest.mark.parametrize(
    'change, words',
    [
        (set_argument('IntConv2d', 'weight_bits', 3), 'more than 3 bits'),
        (set_argument('IntConv2d', 'weight_bits', 5), "is stored as 'm4', and its values make it m5"),
        (set_form('IntConv2d', 'weight', 'd4'), 'pack the net again'),
        (set_form('IntConv2d', 'weight', 'm40'), "'m40' is no form"),
        (set_form('IntConv2d', 'weight', 'q4'), "'q4' is no form"),
        (set_form('IntConv2d', 'weight', 4), '4 is no form'),
        (set_form('Conv2d', 'weight', 'm4'), 'plain.weight'),
        (set_form('ScaleBias', 'weight', 'float16 float64'), 'does not run on an input of 3x8x8'),
        (set_form('ScaleBias', 'weight', '0'), 'zeros beside 0 weights'),
        (set_argument('Quantise', 'bits', 4.5), 'bits='),
        (set_argument('Quantise', 'signed', 0.5), 'signed='),
        (set_argument('Quantise', 'low', -1), 'lower end'),
    ],
)
def test_widths_forms_and_grids_are_those_of_the_values(toy, change, words):
    with pytest.raises(MicronetError) as e:
        unpack(forged(toy, change))
    assert any(w in str(e.value) for w in words.split('|')) and '\n' not in str(e.value), e.value


def test_a_mask_that_calls_zeros_nonzero(toy):
    held, _ = structure_of(toy)
    data = held['weights'].clone()
    data[:13] = 255  # the mask of the first 104 of 108 weights
    data[14:] = 0
    refused(forged(toy, lambda s: None, weights=data), 'calls a number nonzero that is 0')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_scales_that_are_no_numbers(toy, value):
    held, _ = structure_of(toy)
    halves = held['float16'].clone()
    halves[0] = value
    refused(forged(toy, lambda s: None, float16=halves), 'scale.weight holds NaN or infinity')


@pytest.mark.parametrize('value', [0.5, float('nan')])
def test_weights_that_are_no_integers(toy, value):
    "Floats in the place of an integer layer's weights."
    held, s = structure_of(toy)
    values = torch.cat([torch.full((108,), value), torch.zeros(0)]).view(torch.uint8)
    change = set_form('IntConv2d', 'weight', 'dfloat32')
    refused(forged(toy, change, weights=torch.cat([values, held['weights']])), 'conv.weight')


def test_a_scale_in_32_bits_that_16_would_hold(toy):
    held, _ = structure_of(toy)
    numbers = dict(float16=held['float16'][4:], float32=torch.cat([held['float16'][:4].float(), held['float32']]))

    def change(s):
        s['kinds'][s['modules'][[n for n, _ in s['modules']].index('scale')][1]][2]['weight'] = 'float32'

    refused(forged(toy, change, **numbers), "scale.weight is stored as 'float32', and its values make it float16")


# --- bounded by the size of the file


def test_a_module_on_a_device_of_the_file(toy):
    "3.6 kB took 3.9 GB before they were refused."
    refused(forged(toy, set_argument('Conv2d', 'device', 'cpu')), "device='cpu' cannot be an argument of Conv2d")


@pytest.mark.parametrize(
    'change, words',
    [
        (set_argument('IntConv2d', 'device', 'cpu'), "device='cpu' cannot be an argument of IntConv2d"),
        (set_argument('Conv2d', 'dtype', 'float64'), 'cannot be an argument of Conv2d'),
        (set_argument('BatchNorm2d', 'eps', '1e-5'), "eps='1e-5' cannot be an argument of BatchNorm2d"),
        (set_argument('BatchNorm2d', 'eps', {'f': 'nan'}), 'cannot be an argument'),
        (set_argument('BatchNorm2d', 'eps', {'f': '1' * 10**5}), 'cannot be an argument'),
        (set_argument('IntConv2d', 'out_channels', 10**12), 'cannot be unpacked'),
        (set_argument('IntConv2d', 'out_channels', 10**30), 'cannot be an argument'),
        (set_argument('MaxPool2d', 'kernel_size', [2] * 1000), 'cannot be an argument of MaxPool2d'),
        (set_argument('Conv2d', 'padding', 60_000), 'more than the 100,000,000 that are tried'),
        (lambda s: s['about'].update(input_size=[3, 10**6, 10**6]), 'more numbers than'),
        (lambda s: s['about'].update(input_size=[4, 8, 8]), 'does not run on an input of 4x8x8'),
    ],
)
def test_arguments_of_modules(toy, change, words):
    refused(forged(toy, change), words)


def insert(*rows):
    "Nodes behind the input, the last of which the rest reads."
    return lambda s: s['nodes'].__setitem__(slice(1, 1), [json.loads(json.dumps(r)) for r in rows])


GROWN = ['f', 'functional.adaptive_avg_pool2d', ['1', 4000]]  # 48 million numbers
EVERY = {'c': [None, None, None]}  # the slice `:`


@pytest.mark.parametrize(
    'rows, words',
    [
        ([['f', 'operator.pow', [9, 9]], ['f', 'operator.pow', [9, '1']]], 'is given no other node'),
        ([['c', 'dim', ['1']], ['f', 'operator.pow', [9, '1']]], 'operator.pow on numbers'),
        ([['c', 'dim', ['1']], *[['f', 'operator.mul', ['1', '1']]] * 60], 'more than 1000 bits'),
        ([['c', 'size', ['1']], *[['f', 'operator.add', ['1', '1']]] * 60], 'operator.add on numbers'),
        ([['c', 'chunk', ['1', 2]], *[['f', 'operator.add', ['1', '1']]] * 60], 'on a tuple'),
        ([['f', 'functional.pad', ['1', [10**6] * 4]]], 'more than the 100,000,000 that are tried'),
        ([['c', 'expand', ['1', 10**9, -1, -1, -1]]], 'more than the 100,000,000 that are tried'),
        ([['f', 'torch.add', ['1', '1'], {'out': '1'}]], "torch.add has the argument 'out'"),
        ([['c', 'float', ['1']]] * 20_000, 'a packed file holds 10,000'),
        ([['c', 'view', ['1', eval('[' * 50 + ']' * 50)]]], 'more than 8 tuples and lists'),
        ([['c', 'view', ['1', {'s': 'cuda'}]]], 'cannot be an argument'),
        ([['c', 'view', ['1', 2**70]]], 'cannot be an argument'),
        ([['c', 'sum', ['1'], {'dtype': {'d': 'int64'}, 'dim': [0], 'keepdim': True}]], 'conv is given torch.int64'),
        ([GROWN, *[['c', 'neg', ['1']]] * 9000], 'makes 10,032,000,192 numbers of an input'),
        ([GROWN, ['f', 'functional.max_pool2d', ['1', 2999, 1, 1499]]], 'by 431,712,048,000,000 multiplications'),
        ([GROWN, ['f', 'functional.avg_pool2d', ['1'], {'kernel_size': 2999, 'stride': 1}]], '27,090,038,940,012'),
        ([GROWN, *[['f', 'torch.matmul', ['1', '1']]] * 9], 'by 1,152,000,000,000 multiplications'),
        ([['f', 'operator.getitem', ['1', [[1, 1]]]]], 'takes the places 1 to 1 of 1'),
        ([['f', 'operator.getitem', ['1', {'t': [EVERY, [0, 3, -1]]}]]], 'takes the places -1 to 3 of 3'),
        ([['f', 'operator.getitem', ['1', {'t': [None, EVERY, [2, -4]]}]]], 'takes the places -4 to 2 of 3'),
    ],
)
def test_calls_of_a_graph(toy, rows, words):
    refused(forged(toy, insert(*rows)), words)


class Chosen(nn.Module):
    "Channels of channels."

    def __init__(self, index):
        super().__init__()
        self.conv, self.index = nn.Conv2d(3, 4, 1), nn.Buffer(torch.tensor(index))

    def forward(self, x):
        return self.conv(x[:, [0, 2, 1]])[:, self.index]


@pytest.mark.parametrize('index, words', [([0, 2], ''), ([0, 4], '0 to 4 of 4'), ([-5, 3], '-5 to 3 of 4')])
@pytest.mark.parametrize('lowered', [False, True])
def test_places_that_a_constant_names(tmp_path, index, words, lowered):
    "They were read without a look, and the first image ended in an IndexError."
    net = Chosen(index).eval()
    if lowered:  # with places counted from the front alone
        net = lower(Chosen([0, 3]).eval(), torch.randn(2, 3, 8, 8))
        [places] = [b for _, b in net.named_buffers() if b.numel() == 2]
        places.copy_(torch.tensor(index))
    else:
        net = fx.symbolic_trace(net)
    net.meta.clear()  # so that `pack` knows no size
    path = pack(net, tmp_path / 'chosen')
    if words:
        with pytest.raises(MicronetError, match=words):
            unpack(path, (3, 8, 8))
        return
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(unpack(path, (3, 8, 8))(x), net(x))


@pytest.mark.parametrize('pixels', [[0.0] * 3, [1.0, 1.0, -1.0], [1.0, 1.0, float('nan')]])
def test_pixels_that_cannot_be_normalised(toy, pixels):
    "NaN was accepted, and could not be packed again."
    held, s = structure_of(toy)
    s['about']['pixels'] = [[0.0] * 3, pixels]
    text = zlib.compress(json.dumps(s).encode())  # with NaN, which JSON has not
    toy.write_bytes(seal(held | {'graph': torch.frombuffer(bytearray(text), dtype=torch.uint8)}))
    refused(toy, 'those of std above 0')


@pytest.mark.parametrize(
    'change', [set_argument('Conv2d', '\x1b[2J\n', 1), set_form('IntConv2d', 'weight', '=\x1b[2J\n')]
)
def test_no_text_of_a_file_controls_the_terminal(toy, change):
    refused(forged(toy, change), '\\x1b[2J\\n')


@pytest.mark.parametrize('model', [nn.Dropout(), nn.Identity()])
def test_a_net_that_gives_its_input(tmp_path, model):
    "It could be unpacked, and not be scored."
    path = pack(nn.Sequential(model).eval(), tmp_path / 'a')
    with pytest.raises(MicronetError, match='what it gives does not depend on its input'):
        unpack(path, (3, 8, 8))
    refused(forged(path, lambda s: s['about'].update(input_size=[3, 8, 8])), 'does not depend on its input')


MEASURED = """
import sys, time
from micronet_nb.core import MicronetError
from micronet_nb.packing import unpack
import micronet_nb.scoring, torch
torch.randn(8).sum()

def status(name):
    (line,) = (l for l in open('/proc/self/status') if l.startswith(name))
    return 1024 * int(line.split()[1])

for path in sys.argv[1:]:
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')  # the peak begins anew
    before, started = status('VmRSS'), time.process_time()
    try:
        unpack(path)
        verdict = 'accepted'
    except MicronetError as e:
        verdict = 'refused'
    print(verdict, status('VmHWM') - before, time.process_time() - started)
"""


def bomb(text, level=9):
    return torch.frombuffer(bytearray(zlib.compress(text, level)), dtype=torch.uint8)


def worst(folder, toy):
    "Files that ask for much, each with whether it is a net all the same."
    held, _ = structure_of(toy)
    graph = {'graph': held['graph']}
    x, out = ['p', 'x'], ['o', 'output', ['1']]
    plain = dict(names=None, modules=[], constants=[], kinds=[], about={})

    def written(name, tensors=graph, **s):
        (folder / name).write_bytes(sealed(tensors, plain | s))
        return folder / name

    def text(name, content):
        (folder / name).write_bytes(seal(held | {'graph': bomb(content)}))
        return folder / name

    calls = lambda n, row: [x, *[row] * n, out]
    yield written('a million nodes', nodes=calls(10**6, ['c', 'float', ['1']])), False
    yield written('as many nodes as may be', nodes=calls(9_990, ['c', 'neg', ['1']])), True
    yield written('as many arguments', nodes=[x, ['f', 'torch.cat', [['1'] * 190_000]], out]), True
    yield written('more arguments', nodes=[x, ['f', 'torch.cat', [['1'] * 900_000]], out]), False
    pieces = [['c', 'chunk', [str(i + 1), 2**14, 1]] for i in range(60)]
    ends = ['o', 'output', [[str(i + 1) for i in range(60)]]]
    yield written('pieces', nodes=[x, *pieces, ends], about=dict(input_size=[2**14, 1, 1])), False
    named = dict(modules=[['a' * 10**5, 0]], kinds=[['ReLU', {}, {}]])
    yield written('a long name', nodes=calls(9_000, ['m', 0, ['1']]), **named), False
    shape = dict(constants=[['c', [2**53] * 150_000, 'float16']])
    yield written('a long shape', nodes=[x, ['a', 'c'], ['f', 'operator.add', ['1', '2']], out], **shape), False
    yield text('deep', b'[' * 10**6), False
    yield text('wide', b'[' + b'[],' * 10**6 + b'0]'), False
    yield text('tables', b'[' + b','.join([b'{"":' * 400 + b'0' + b'}' * 400] * 2_000) + b']'), False
    yield text('spaces', b' ' * 2**28), False
    empty = nn.Sequential(IntLinear(2800, 2800, weight_bits=1))
    empty[0].weight.data.zero_()
    yield pack(empty, folder / 'zeros', masks='always'), True
    yield pack(empty.double(), folder / 'zeros in 64 bits', masks='always'), True


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='asks Linux for the peak of its memory')
def test_memory_and_time_are_bounded_by_the_size(toy, tmp_path):
    "At most 20 times the file and 200 MB, and 5 s: for what is accepted, too."
    files = [*worst(tmp_path, toy)]
    files.append((forged(toy, set_argument('Conv2d', 'device', 'cpu')), False))
    command = [sys.executable, '-c', MEASURED, *(str(path) for path, _ in files)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for (path, good), line in zip(files, out.splitlines(), strict=True):
        verdict, memory, seconds = line.split()
        assert float(memory) <= 20 * path.stat().st_size + 200e6, (path.name, line)
        assert float(seconds) < 5, (path.name, line)
        assert verdict == ('accepted' if good else 'refused'), (path.name, line)


@pytest.mark.parametrize('value', [1e39, -1e300])
def test_numbers_that_float32_does_not_hold(toy, tmp_path, value):
    "Of modules and of calls; infinities are numbers of float32."
    with pytest.raises(MicronetError, match='max_val|argument'):
        unpack(forged(toy, set_argument('Hardtanh', 'max_val', value)), (3, 8, 8))

    class Adds(nn.Module):
        def forward(self, x):
            return x + value

    with pytest.raises(MicronetError, match='cannot be an argument in a packed file'):
        pack(Adds().eval(), tmp_path / 'a', dict(input_size=[3, 4, 4]))


def test_a_crowd_of_modules(tmp_path):
    "Each is tried without values, which takes a millisecond or two."
    crowd = nn.Sequential(*(nn.ReLU() for _ in range(2501))).eval()
    with pytest.raises(MicronetError, match='it has 2,501 modules, and a packed file holds 2,500'):
        pack(crowd, tmp_path / 'a', dict(input_size=[3, 4, 4]))
    assert not [*tmp_path.iterdir()]


# --- and any other


def test_mutations_are_refused_or_are_nets(tmp_path):
    "300 of them, or as many as MICRONET_FUZZ says."
    n = int(os.environ.get('MICRONET_FUZZ', 300))
    started = time.perf_counter()
    outcome = fuzz(toys(tmp_path), n, int(os.environ.get('MICRONET_SEED', 0)), tmp_path)
    print(outcome, f'{time.perf_counter() - started:.1f} s')
    assert sum(outcome.values()) == n and outcome['refused'] > n // 3 and outcome['accepted'] > n // 50
