"""Files that somebody made: structure-aware mutations of packed nets, each with a right checksum.

`python tests/fuzz.py 50000` tries so many; the tests try a few hundred, or MICRONET_FUZZ of them. Each file is refused
by `MicronetError`, or it is accepted, and then scored, packed again, unpacked and run with the same answers.
"""

import json
import os
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from micronet_nb.core import MicronetError
from micronet_nb.packing import check_size, compress, pack, seal, unpack
from micronet_nb.scoring import score

LIMIT = 5  # seconds for one file
VALUES = [0, 1, -1, 2, 3, 16, 17, 33, 10**4, 10**9, 10**12, 2**53, 2**70, 0.5, 1.5, -1.0, 1e300, None, True, False]
VALUES += ['', '1', '2', '3', '99', 'x', 'cpu', 'os.system', '__class__', 'weight', 'zeros', 'circular', 'same']
VALUES += ['m1', 'm4', 'd4', 'd16', 'm17', 'mfloat32', 'dfloat32', 'float16', 'float64', 'int64', '0']
VALUES += ['float16 float64', {'f': 'nan'}]
VALUES += [[], {}, [1, 1], [10**9] * 4, [[[[]]]], {'s': 'x'}, {'s': 'cuda'}, {'t': ['1', '2']}, {'f': 'inf'}]
VALUES += [{'c': [None, 1, None]}, {'c': [0, 10**9, 2]}, {'d': 'float64'}, {'d': 'int64'}, ['1', '1'], {'t': [1, -1]}]
KEYS = ['device', 'dtype', 'bias', 'wide', 'weight_bits', 'bits', 'signed', 'low', 'eps', 'padding', 'groups', 'stride']
KEYS += ['out', 'dim', 'training', 'weight', 'inplace', 'return_indices', 'p', 'padding_mode', 'input_size']
NODES = [
    ['f', 'operator.pow', [9, 9]],
    ['f', 'operator.pow', ['1', '1']],
    ['f', 'operator.mul', ['1', '1']],
    ['f', 'operator.add', ['1', '2']],
    ['f', 'torch.cat', [['1', '1']]],
    ['f', 'operator.getitem', ['1', 0]],
    ['f', 'functional.pad', ['1', [9, 9, 9, 9]]],
    ['f', 'functional.dropout', ['1', 0.5]],
    ['f', 'functional.max_pool2d', ['1', 2]],
    ['c', 'size', ['1']],
    ['c', 'dim', ['1']],
    ['c', 'chunk', ['1', 2, 1]],
    ['c', 'flatten', ['1', 1]],
    ['c', 'add_', ['1', 1]],
    ['a', 'shift'],
    ['c', 'expand', ['1', 10**9, -1, -1, -1]],
    ['m', 0, ['1']],
    ['o', 'output', ['1']],
    ['p', 'y'],
]


def structure_of(path):
    "(tensors, structure) of a packed file."
    tensors = load_file(path)
    return tensors, json.loads(zlib.decompress(bytes(tensors['graph'].tolist())))


def sealed(tensors, structure):
    "A file of a structure, with a right checksum."
    return seal(tensors | {'graph': compress(structure)})


def places(value):
    "Every (container, key) of a nested structure."
    for k in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, k
        if isinstance(value[k], (dict, list)):
            yield from places(value[k])


def mutated(tensors, structure, rng):
    "A copy of a file with one to three changes."
    tensors, s = dict(tensors), json.loads(json.dumps(structure))
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind, (at, k) = rng.randrange(8), rng.choice([*places(s)])
        if kind < 3:
            at[k] = rng.choice(VALUES)
        elif kind == 3:
            other, j = rng.choice([*places(s)])
            at[k] = json.loads(json.dumps(other[j]))
        elif kind == 4 and s.get('kinds') and isinstance(s['kinds'], list):
            args = rng.choice(s['kinds'])
            if isinstance(args, list) and len(args) > 1 and isinstance(args[1], dict):
                args[1][rng.choice(KEYS)] = rng.choice(VALUES)
        elif kind == 5 and isinstance(s.get('nodes'), list):
            s['nodes'].insert(rng.randrange(len(s['nodes']) + 1), json.loads(json.dumps(rng.choice(NODES))))
        elif kind == 6 and isinstance(at, list):
            del at[k]
        elif kind == 7:
            name = rng.choice([n for n in tensors if n != 'graph'])
            raw = bytearray(tensors[name].view(torch.uint8).numpy().tobytes())
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            tensors[name] = torch.frombuffer(raw, dtype=torch.uint8).view(tensors[name].dtype)
    return sealed(tensors, s)


def answers(net, size):
    "What a net makes of one input."
    with torch.inference_mode():
        torch.manual_seed(0)
        out = net(torch.randn(1, *size))
    return [t for t in (out if isinstance(out, (tuple, list)) else [out])]


def equal(a, b):
    "The same answers, NaN included."
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7)) if tensors else a == b


def verdict(path, size):
    "'refused' or 'accepted'; an assertion where an accepted file is no net like any other."
    try:
        net = unpack(path)
    except MicronetError as e:
        assert '\n' not in str(e), e
        return 'refused'
    try:
        if 'input_size' not in net.meta:
            check_size(net, size)
        size = net.meta.get('input_size', size)
        scored, first = score(net, size, corrected=True).score, answers(net, size)
    except MicronetError as e:
        assert '\n' not in str(e), e
        return 'refused by score'
    back = unpack(pack(net, path.with_name('again')))
    assert score(back, size, corrected=True).score == scored
    assert all(equal(a, b) for a, b in zip(first, answers(back, size), strict=True))
    return 'accepted'


def fuzz(nets, n, seed, folder):
    "Counter of the verdicts on n mutations of packed nets: a list of (path, size)."
    rng, outcome, originals = random.Random(seed), Counter(), [(*structure_of(p), size) for p, size in nets]
    for i in range(n):
        tensors, structure, size = rng.choice(originals)
        path = Path(folder) / 'mutant'
        path.write_bytes(mutated(tensors, structure, rng))
        started = time.process_time()
        try:
            outcome[verdict(path, size)] += 1
        except Exception as e:
            kept = Path(folder) / f'failed-{seed}-{i}'
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f'mutation {i} of seed {seed}, kept as {kept.name}: {type(e).__name__}: {e}') from e
        assert time.process_time() - started < LIMIT, f'mutation {i} of seed {seed} takes too long'
    return outcome


if __name__ == '__main__':
    from test_strangers import toys

    n, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(os.environ.get('MICRONET_SEED', 0))
    folder = Path(tempfile.mkdtemp())
    print(fuzz(toys(folder), n, seed, folder))
