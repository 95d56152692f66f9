"""Files that somebody made: structure-aware mutations of packed nets and of stages' folders.

`make fuzz`, or `python tests/fuzz.py 50000`, tries so many; the tests try a few hundred, or MICRONET_FUZZ of them.

A packed net, with a right checksum, is refused by `MicronetError`, or it is accepted, and then scored, packed again,
unpacked and run with the same answers. A file that does not say what its input is has that promise from
`unpack(path, input_size)`. A stage or checkpoint that is damaged is refused, or gives what was stored; one that was
written anew with right digests may give something else, but a whole result and finite weights, or it is refused.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

from micronet_nb.core import MicronetError, sealed as with_digest, sha256
from micronet_nb.data import Dataset
from micronet_nb.packing import compress, pack, seal, unpack
from micronet_nb.scoring import score
from micronet_nb.training import FitConfig, Stopped, fit_stage

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
    ['f', 'own.tiled', ['1', {'t': [1, 9, 9, 9]}]],
    ['f', 'own.tiled', ['1', {'t': [1, 10**5, 10**5, 1]}]],
    ['f', 'own.repeated', ['1', '1']],
    ['f', 'own.nearest', ['1', {'t': [9, 9]}]],
    ['f', 'own.resized', ['1', {'t': [10**6, 10**6]}, {'s': 'bilinear'}, False]],
    ['f', 'own.picked', ['1', 1]],
    ['f', 'own.matmul_wide', ['1', '1']],
    ['f', 'torch.softmax', ['1', 1]],
    ['f', 'torch.amax', ['1', 1, True]],
    ['f', 'torch.pow', ['1', 9]],
    ['f', 'torch.clamp', ['1', 0, 1]],
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


def anew(value):
    "A copy that shares nothing: what is put into a structure is changed there."
    return json.loads(json.dumps(value))


def mutated(tensors, structure, rng):
    "A copy of a file with one to three changes."
    tensors, s = dict(tensors), anew(structure)
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind, (at, k) = rng.randrange(8), rng.choice([*places(s)])
        if kind < 3:
            at[k] = anew(rng.choice(VALUES))
        elif kind == 3:
            other, j = rng.choice([*places(s)])
            at[k] = anew(other[j])
        elif kind == 4 and s.get('kinds') and isinstance(s['kinds'], list):
            args = rng.choice(s['kinds'])
            if isinstance(args, list) and len(args) > 1 and isinstance(args[1], dict):
                args[1][rng.choice(KEYS)] = anew(rng.choice(VALUES))
        elif kind == 5 and isinstance(s.get('nodes'), list):
            s['nodes'].insert(rng.randrange(len(s['nodes']) + 1), anew(rng.choice(NODES)))
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
    return tree_leaves(out)


def equal(a, b):
    "The same answers, NaN included."
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7)) if tensors else a == b


def opened(path, size=None):
    "The net of a file, None where it is refused: in one line."
    try:
        return unpack(path, size)
    except MicronetError as e:
        assert '\n' not in str(e), e
        return None


def verdict(path, size):
    "'refused' or 'accepted'; an error where an accepted file is no net like any other."
    net = opened(path)
    if net is not None and 'input_size' not in net.meta:
        unpack(pack(net, path.with_name('again')))
        net = opened(path, size)  # its size is for the reader to say
    if net is None:
        return 'refused'
    size = net.meta['input_size']
    scored, first = score(net, size, corrected=True).score, answers(net, size)
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
            raise AssertionError(f'mutation {i} of seed {seed}, kept as {path}: {type(e).__name__}: {e}') from e
        assert time.process_time() - started < LIMIT, f'mutation {i} of seed {seed} takes too long'
    return outcome


# --- stages

CONFIG = FitConfig(epochs=2, batch_size=8, augment='none', ema=0.5, lr=0.01)


def toy_data():
    "(16 images of two classes, no validation set)."
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 4, 4), generator=g, dtype=torch.uint8)
    return Dataset(images, torch.arange(16) % 2, ['a', 'b'], 'toy', 'train'), None


def net():
    "A net of one layer."
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def trained(root, model=None, **more):
    "The stage of that net."
    return fit_stage('toy', net() if model is None else model, toy_data(), CONFIG, root=root, quiet=True, **more)


def damaged(content, others, rng):
    "Bytes with one of them changed, cut short, or those of another file."
    content, kind = bytearray(content), rng.randrange(4)
    if kind == 0:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 2:
        del content[rng.randrange(len(content)) :]
    else:
        content = rng.choice(others)
    return bytes(content)


def rewritten(content, rng):
    "What a stage tells of itself with something else in one or two places, and its own SHA-256."
    told = json.loads(content)
    told.pop('sha256')
    for _ in range(rng.choice([1, 1, 2])):
        at, k = rng.choice([*places(told)])
        other, j = rng.choice([*places(told)])
        at[k] = anew(rng.choice([*VALUES, other[j]]))
        if rng.random() < 0.2 and isinstance(at, dict):
            at[rng.choice(['folder', 'steps', '../x', 'more'])] = at.pop(k)
    return json.dumps(with_digest(told)).encode()


def mutate_stage(folder, rng):
    "Changes one file of a whole stage or checkpoint; whether its digests are right all the same."
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name[0] != '.')
    (about,) = (f for f in files if f.name in ('done.json', 'run.json'))
    kind, file = rng.randrange(3), rng.choice(files)
    if kind == 0:
        about.write_bytes(rewritten(about.read_bytes(), rng))
        return True
    file.write_bytes(damaged(file.read_bytes(), [f.read_bytes() for f in files], rng))
    if kind == 1 or file == about:
        return False
    told = json.loads(about.read_bytes())
    told.pop('sha256')
    told['files'][file.name] = sha256(file)
    about.write_text(json.dumps(with_digest(told)))
    return True


def stage_verdict(root, folder, right):
    "'refused', 'the same' or 'another'; an assertion where it is anything else."
    beside = {p for p in root.rglob('*') if folder not in p.parents}
    try:
        result = trained(root, model := net())
    except MicronetError as e:
        assert '\n' not in str(e) and folder.name in str(e), e
        return 'refused'
    finally:
        assert beside <= {*root.rglob('*')}, 'something beside the stage was removed'
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())
    assert result['folder'] == folder.name and isinstance(result['history'][-1], dict)
    return 'the same' if all(torch.equal(v, right[k]) for k, v in model.state_dict().items()) else 'another'


def fuzz_stages(n, seed, folder):
    "Counter of the verdicts on n mutations of a stage that is done, and of one that was stopped on its way."
    rng, outcome, kinds = random.Random(seed), Counter(), []
    for stop in (None, 0.0):
        root = Path(folder) / f'stages-{stop}'
        try:
            trained(root, stop=stop)
        except Stopped:
            pass
        (stage,) = (p for p in root.iterdir() if p.is_dir())
        (root / 'other' / 'checkpoints').mkdir(parents=True)
        kinds.append((root, stage, root.with_name(f'{root.name}-whole')))
        shutil.copytree(root, kinds[-1][2])
    right = load_file(kinds[0][1] / 'model.safetensors')
    for i in range(n):
        root, stage, whole = rng.choice(kinds)
        shutil.rmtree(root)
        shutil.copytree(whole, root)
        (at,) = [*stage.glob('checkpoints/step-*')] or [stage]
        forged = mutate_stage(at, rng)
        try:
            verdict = stage_verdict(root, stage, right)
            assert forged or verdict != 'another', 'damage was not noticed'
        except Exception as e:
            raise AssertionError(f'mutation {i} of seed {seed}, kept in {root}: {type(e).__name__}: {e}') from e
        outcome[verdict] += 1
    return outcome


def main(n, seed, chunk=1000):
    "Chunks of mutations, a line each; each has a seed of its own, so that it can be repeated alone."
    from test_strangers import toys

    folder, started = Path(tempfile.mkdtemp()), time.perf_counter()
    for what, n in (('packed nets', n), ('stages', n // 10)):
        total = Counter()
        for first in range(0, n, chunk):
            place = folder / f'{what}-{seed + first // chunk}'
            place.mkdir()
            size, each = min(chunk, n - first), seed + first // chunk
            total += (
                outcome := fuzz(toys(place), size, each, place) if what != 'stages' else fuzz_stages(size, each, place)
            )
            print(f'{what}, seed {each}: {dict(outcome)}, {time.perf_counter() - started:.0f} s', flush=True)
        print(f'{n:,} mutations of {what}: {dict(total)}', flush=True)
    shutil.rmtree(folder)


if __name__ == '__main__':
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(os.environ.get('MICRONET_SEED', 0)))
