"""Data sets when things go wrong: damaged, missing or changed files, decoding killed or twice at once; CIFAR-100."""

import dataclasses, io, json, os, shutil, signal, subprocess, sys, time, types, warnings

import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from micronet_nb import data
from micronet_nb.core import MicronetError, record
from micronet_nb.data import (
    CIFAR100,
    Dataset,
    dataset_stats,
    fingerprint,
    has_cifar100,
    held_out,
    imagenet_sample,
    load_dataset,
    make_splits,
    overlap,
)

CLASSES = ['apple', 'bear', 'cup']
SHARDS = [f'cifar100/{f}' for f in CIFAR100.files['train']]
TEST = 'cifar100/' + CIFAR100.files['test'][0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test has its own cache, no data folder and no network."
    monkeypatch.setenv('MICRONET_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('MICRONET_OFFLINE', '1')
    real = os.environ.get('MICRONET_DATA')
    monkeypatch.delenv('MICRONET_DATA', raising=False)
    return real


def png(array, format='png'):
    Image.fromarray(array).save(buffer := io.BytesIO(), format)
    return buffer.getvalue()


def write_parquet(path, blobs, labels, classes=CLASSES, image='img', label='fine_label'):
    rows = pa.table({image: [{'bytes': b, 'path': None} for b in blobs], label: labels})
    info = {'info': {'features': {label: {'names': classes}}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows.replace_schema_metadata({'huggingface': json.dumps(info)}), path)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A small CIFAR-100 for `load_dataset`: 2 shards of 60 images, 30 for testing, 3 classes, 8x8 pixels."
    images = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)
    root, blobs = tmp_path / 'root', [png(x) for x in images]
    for relative, part in zip([*SHARDS, TEST], (slice(0, 60), slice(60, 120), slice(120, 150))):
        write_parquet(root / relative, blobs[part], (np.arange(150) % 3)[part].tolist())
    spec = dataclasses.replace(
        CIFAR100,
        counts={'train': 120, 'test': 30},
        n_classes=3,
        shape=(3, 8, 8),
        fingerprints={'train': {}, 'test': {}},
    )
    monkeypatch.setattr(data, 'CIFAR100', spec)
    return types.SimpleNamespace(root=root, images=images.transpose(0, 3, 1, 2), blobs=blobs)


def make_folder(root, n=30, side=8, classes=CLASSES, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    for i, x in enumerate(images):
        path = root / classes[i % len(classes)] / f'{i:05}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(x))
    return root


def refused(*parts):
    "Raises MicronetError whose message has all these parts."
    return pytest.raises(MicronetError, match='(?s)' + ''.join(f'(?=.*{p})' for p in parts))


# ------------------------------------------------------------------ parquet


def test_parquet_is_read_right(tiny):
    sets = {s: load_dataset('cifar100', s, tiny.root) for s in ('train', 'valid', 'trainvalid', 'test')}
    assert {s: len(d) for s, d in sets.items()} == {'train': 108, 'valid': 12, 'trainvalid': 120, 'test': 30}
    assert (
        np.array_equal(sets['test'].images.numpy(), tiny.images[120:])
        and sets['test'].labels.tolist() == [0, 1, 2] * 10
    )
    parts = make_splits(np.arange(120) % 3)
    for s in ('train', 'valid'):
        assert (
            np.array_equal(sets[s].images.numpy(), tiny.images[parts[s]])
            and sets[s].labels.tolist() == (parts[s] % 3).tolist()
        )
    assert sets['train'].classes == CLASSES and overlap(sets['valid'], sets['train']) == 0


@pytest.mark.parametrize('keep', [0, 3, 4, 100, 0.5, -1])
@pytest.mark.parametrize('which', [SHARDS[0], SHARDS[1], TEST])
def test_truncated_parquet(tiny, tmp_path, which, keep):
    whole = (tiny.root / which).read_bytes()
    (tiny.root / which).write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with refused(which, 'cut short or not a parquet file', 'fetch it again'):
        load_dataset('cifar100', 'test' if which == TEST else 'train', tiny.root)
    assert not list((tmp_path / 'cache').rglob('*.*'))
    (tiny.root / which).write_bytes(whole)  # mended: found at once
    assert len(load_dataset('cifar100', 'trainvalid', tiny.root)) == 120


def test_missing_shard(tiny, monkeypatch):
    (tiny.root / SHARDS[1]).unlink()
    with refused(SHARDS[1], 'missing below'):
        load_dataset('cifar100', 'train', tiny.root)
    with refused('train-00000') as e:
        load_dataset('cifar100', 'train')
    assert 'MICRONET_OFFLINE' in str(e.value)
    monkeypatch.setenv('MICRONET_DATA', str(tiny.root))
    with refused(SHARDS[1], 'MICRONET_OFFLINE', 'MICRONET_DATA') as e:
        load_dataset('cifar100', 'train')
    assert SHARDS[0] not in str(e.value)
    assert len(load_dataset('cifar100', 'test')) == 30  # which needs no training shard


def test_same_shard_twice(tiny):
    (tiny.root / SHARDS[1]).write_bytes((tiny.root / TEST).read_bytes())
    with refused('90 images', 'train has 120'):
        load_dataset('cifar100', 'train', tiny.root)


def test_wrong_files(tiny):
    path, args = tiny.root / TEST, ('cifar100', 'test', tiny.root)
    path.write_bytes(b'<html>404</html>')
    with refused(TEST, 'not a parquet file'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:30], [0, 1, 2] * 10, label='label')
    with refused(TEST, 'no column fine_label'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:30], [0.0, 1.0, 2.0] * 10)
    with refused(TEST, 'fine_label', 'double'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:30], [0, 1, None] * 10)
    with refused(TEST, 'empty rows'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:30], [0, 1, 3] * 10)
    with refused('labels are not 0 to 2'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:30], [0, 1, 2] * 9 + [0, 1, 1])
    with refused('not 0 to 2, 10 times each'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:30], [0, 1, -2] * 10)
    with refused('labels are not 0 to 2'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:29] + [png(np.zeros((9, 9, 3), np.uint8))], [0, 1, 2] * 10)
    with refused(TEST, 'row 29', '9x9'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:7] + [tiny.blobs[7][:150]] + tiny.blobs[8:30], [0, 1, 2] * 10)
    with refused(TEST, 'row 7', 'not a readable image'):
        load_dataset(*args)
    write_parquet(path, tiny.blobs[:29] + [None], [0, 1, 2] * 10)
    with refused(TEST, 'row 29', 'not a readable image'):
        load_dataset(*args)
    pq.write_table(pa.table({'img': tiny.blobs[:30], 'fine_label': [0, 1, 2] * 10}), path)
    with refused(TEST, 'another layout'):
        load_dataset(*args)
    path.unlink()
    path.mkdir()
    with refused(TEST, 'missing'):
        load_dataset(*args)


def test_small_set_is_not_cifar100(tiny, monkeypatch):
    monkeypatch.setattr(data, 'CIFAR100', CIFAR100)
    with refused('120 images', '50,000'):
        load_dataset('cifar100', 'valid', tiny.root)


def test_changed_content_is_refused(tiny, monkeypatch, tmp_path):
    good = load_dataset('cifar100', 'test', tiny.root).fingerprint
    monkeypatch.setattr(
        data, 'CIFAR100', dataclasses.replace(data.CIFAR100, fingerprints={'train': {}, 'test': {'test': good}})
    )
    assert load_dataset('cifar100', 'test', tiny.root).fingerprint == good
    write_parquet(tiny.root / TEST, tiny.blobs[120:], [1, 0, 2] + [0, 1, 2] * 9)  # two labels changed places
    with refused('pixels, labels, names or order differ'):
        load_dataset('cifar100', 'test', tiny.root)
    write_parquet(tiny.root / TEST, tiny.blobs[120:], [0, 1, 2] * 10, classes=['apple', 'bear', 'cat'])
    with refused('pixels, labels, names or order differ'):
        load_dataset('cifar100', 'test', tiny.root)


def test_cached_without_the_check_is_checked_later(tiny, monkeypatch):
    load_dataset('cifar100', 'test', tiny.root)
    monkeypatch.setattr(data, 'CIFAR100', CIFAR100)
    with refused('30 images', '10,000'):
        load_dataset('cifar100', 'test', tiny.root)


# ------------------------------------------------------------------ download


def hub(monkeypatch, download):
    monkeypatch.delenv('MICRONET_OFFLINE')
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(hf_hub_download=download))


def test_offline_says_what_to_do(tiny):
    with refused(TEST, 'MICRONET_OFFLINE', 'MICRONET_DATA', 'huggingface.co/datasets/uoft-cs/cifar100'):
        load_dataset('cifar100', 'test')


def test_no_network_says_what_to_do(tiny, monkeypatch, tmp_path):
    def download(*args, **kw):
        raise OSError('Name or service not known\nmore')

    hub(monkeypatch, download)
    with refused('could not download', TEST, 'Name or service not known', str(tmp_path / 'cache' / TEST)) as e:
        load_dataset('cifar100', 'test')
    assert 'more' not in str(e.value)


def test_interrupted_download_is_not_taken_for_whole(tiny, monkeypatch, tmp_path):
    calls = []

    def download(repo, name, repo_type, local_dir):
        calls.append((repo, name, repo_type))
        target = local_dir / name
        part = local_dir / '.cache' / 'huggingface' / 'download' / f'{name}.incomplete'
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes((tiny.root / name).read_bytes()[:500])
        if len(calls) == 1:
            raise KeyboardInterrupt
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tiny.root / name).read_bytes())
        return str(target)

    hub(monkeypatch, download)
    with pytest.raises(KeyboardInterrupt):
        load_dataset('cifar100', 'test')
    assert len(load_dataset('cifar100', 'test')) == 30
    assert calls == [('uoft-cs/cifar100', TEST, 'dataset')] * 2
    assert len(load_dataset('cifar100', 'test')) == 30 and len(calls) == 2  # found in the cache from now on


def test_root_is_never_filled_from_the_network(tiny, monkeypatch, tmp_path):
    hub(monkeypatch, lambda *a, **k: pytest.fail('tried the network'))
    with refused('missing below'):
        load_dataset('cifar100', 'test', tmp_path / 'other')


# ------------------------------------------------------------------ the cache


def test_decoded_once(tiny, monkeypatch):
    first = load_dataset('cifar100', 'train', tiny.root)
    monkeypatch.setattr(data, 'read_parquet', lambda *a, **k: pytest.fail('read again'))
    monkeypatch.setattr(data, 'decode', lambda *a, **k: pytest.fail('decoded again'))
    for s in ('train', 'valid', 'trainvalid'):
        load_dataset('cifar100', s, tiny.root)
    assert torch.equal(load_dataset('cifar100', 'train', tiny.root).images, first.images)


def test_writing_to_the_tensor_harms_nobody(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ds = load_dataset('cifar100', 'train', tiny.root)
        ds.images.zero_()
    again = load_dataset('cifar100', 'train', tiny.root)
    assert again.images.any() and fingerprint(again.images, again.labels, again.classes) == ds.fingerprint


def test_changed_source_is_decoded_again(tiny, tmp_path):
    before = load_dataset('cifar100', 'test', tiny.root)
    write_parquet(tiny.root / TEST, tiny.blobs[:30], [0, 1, 2] * 10)
    after = load_dataset('cifar100', 'test', tiny.root)
    assert after.fingerprint != before.fingerprint and np.array_equal(after.images.numpy(), tiny.images[:30])
    assert np.array_equal(before.images.numpy(), tiny.images[120:])  # who has it open keeps it
    assert len(list((tmp_path / 'cache' / 'decoded').iterdir())) == 2  # the old decoding is gone
    os.utime(tiny.root / TEST, (1, 1))
    assert load_dataset('cifar100', 'test', tiny.root).fingerprint == after.fingerprint


@pytest.mark.parametrize('damage', ['truncated', 'emptied', 'no pixels', 'no sidecar', 'other shape'])
def test_damaged_cache_is_made_again(tiny, tmp_path, damage):
    before = load_dataset('cifar100', 'valid', tiny.root).fingerprint
    (pixels,) = (tmp_path / 'cache' / 'decoded').glob('*.npy')
    if damage == 'truncated':
        os.truncate(pixels, pixels.stat().st_size - 1)
    elif damage == 'emptied':
        os.truncate(pixels, 0)
    elif damage == 'no pixels':
        pixels.unlink()
    elif damage == 'no sidecar':
        pixels.with_suffix('.json').unlink()
    else:
        np.save(pixels, np.zeros((5, 3, 8, 8), np.uint8))
    again = load_dataset('cifar100', 'valid', tiny.root)
    assert again.fingerprint == before == fingerprint(again.images, again.labels, again.classes)


def test_broken_sidecar_is_named(tiny, tmp_path):
    load_dataset('cifar100', 'valid', tiny.root)
    (side,) = (tmp_path / 'cache' / 'decoded').glob('*.json')
    side.write_text('{"splits": ')
    with refused(side.name, 'not valid JSON', 'remove it'):
        load_dataset('cifar100', 'valid', tiny.root)


def test_read_only_data_folder(tiny):
    folder = tiny.root / 'cifar100'
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    for f in folder.iterdir():
        f.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert len(load_dataset('cifar100', 'train', tiny.root)) == 108
    finally:
        folder.chmod(0o755)
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_unwritable_cache(tiny, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('not a folder')
    monkeypatch.setenv('MICRONET_CACHE', str(tmp_path / 'file'))
    with refused('cannot make the folder'):
        load_dataset('cifar100', 'train', tiny.root)


def test_full_disk(tiny, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(data.np.lib.format, 'write_array_header_1_0', full)
    with refused('cannot write', 'No space left on device', 'MICRONET_CACHE'):
        load_dataset('cifar100', 'train', tiny.root)
    assert not list((tmp_path / 'cache').rglob('*.*'))


LOAD = """
import sys
from micronet_nb.data import load_dataset
print(load_dataset('imagefolder', 'train', sys.argv[1], size=int(sys.argv[2])).fingerprint)
"""


def start(root, size):
    return subprocess.Popen([sys.executable, '-c', LOAD, str(root), str(size)], stdout=subprocess.PIPE, text=True)


def test_killed_decoding_leaves_nothing_that_passes_for_whole(tmp_path):
    root = make_folder(tmp_path / 'images', 1500)
    process = start(root, 256)
    cache = tmp_path / 'cache' / 'decoded'

    def part():
        return [f for f in cache.glob('.*.part') if f.stat().st_size > 1_000_000]

    while process.poll() is None and not part():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL, 'it was over before it could be killed'
    left = part()
    assert len(left) == 1 and not list(cache.glob('*.npy')) and not list(cache.glob('*.json'))
    os.utime(left[0], (1, 1))  # an hour later
    ds = load_dataset('imagefolder', 'train', root, size=256)
    assert ds.fingerprint == fingerprint(ds.images, ds.labels, ds.classes) and ds.images.flatten(1).any(1).all()
    assert not left[0].exists() and len(list(cache.iterdir())) == 2


def test_two_processes_at_once(tmp_path):
    root = make_folder(tmp_path / 'images', 600)
    processes = [start(root, 32) for _ in range(3)]
    prints = {p.communicate(timeout=120)[0].strip() for p in processes}
    assert [p.returncode for p in processes] == [0, 0, 0]
    ds = load_dataset('imagefolder', 'train', root, size=32)
    assert prints == {ds.fingerprint} == {fingerprint(ds.images, ds.labels, ds.classes)}
    assert sorted(f.suffix for f in (tmp_path / 'cache' / 'decoded').iterdir()) == ['.json', '.npy']


# ------------------------------------------------------------------ splits and fingerprints


def test_digits_are_the_same_for_ever():
    assert {s: load_dataset('digits', s).describe() for s in ('train', 'valid', 'test')} == {
        'train': dict(name='digits', split='train', n=1293, fingerprint='1eaddae227adf126'),
        'valid': dict(name='digits', split='valid', n=145, fingerprint='6c4055b142172219'),
        'test': dict(name='digits', split='test', n=359, fingerprint='e22771620ed338af'),
    }
    assert load_dataset('digits', 'valid').labels[:12].tolist() == [9, 0, 9, 3, 6, 6, 8, 0, 7, 1, 4, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=120), st.booleans())
def test_splits_partition_and_are_stratified(labels, test):
    parts = make_splits(labels, test=test)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    for c in set(labels):
        n = labels.count(c)
        tests = (n + 2) // 5 if test else 0
        counts = {s: sum(labels[i] == c for i in ids) for s, ids in parts.items()}
        assert counts.get('test', 0) == tests and counts['valid'] == (n - tests + 5) // 10


def test_held_out_does_not_depend_on_the_order_of_files():
    keys = [f'{i}.png' for i in range(200)]
    labels = [i % 2 for i in range(200)]
    mixed = np.random.default_rng(0).permutation(200)
    chosen = {keys[i] for i in held_out(labels, 10, 'valid', keys)}
    assert chosen == {keys[mixed[i]] for i in held_out(np.array(labels)[mixed], 10, 'valid', np.array(keys)[mixed])}
    assert chosen != {keys[i] for i in held_out(labels, 10, 'test', keys)}


def test_fingerprint_changes_with_content():
    ds = load_dataset('digits', 'valid')
    seen = {ds.fingerprint}
    for i, c, y, x in [(0, 0, 0, 0), (144, 2, 7, 7)]:
        images = ds.images.clone()
        images[i, c, y, x] ^= 1
        seen.add(fingerprint(images, ds.labels, ds.classes))
    labels = ds.labels.clone()
    labels[-1] = (labels[-1] + 1) % 10
    seen |= {
        fingerprint(ds.images, labels, ds.classes),
        fingerprint(ds.images, ds.labels, ds.classes[::-1]),
        fingerprint(ds.images[:-1], ds.labels[:-1], ds.classes),
    }
    seen |= {ds.subset(range(144, -1, -1)).fingerprint, ds.subset(10).fingerprint}
    assert len(seen) == 8


def test_dataset_fits_a_record_and_a_loader(tmp_path):
    ds = load_dataset('digits', 'test').subset(20)
    made = record('x', [{'top1': 1.0}], 'embedded', {}, dataset=ds.describe(), n=len(ds), folder=tmp_path)
    assert made['dataset'] == dict(name='digits', split='test[20]', n=20, fingerprint=ds.fingerprint)
    images, labels = next(iter(torch.utils.data.DataLoader(ds, batch_size=8)))
    assert torch.equal(images, ds.images[:8]) and torch.equal(labels, ds.labels[:8])


def test_statistics_are_exact():
    images = torch.randint(0, 256, (2100, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = dataset_stats(Dataset(images, torch.zeros(2100, dtype=torch.int64), ['a'], 'random', 'train'))
    x = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, x.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, x.std((0, 2, 3)), rtol=1e-13)


def test_unknown_names():
    with refused("unknown data set 'mnist'", 'cifar100, digits, imagefolder'):
        load_dataset('mnist', 'train')
    with refused("unknown split 'dev'", 'train, valid, trainvalid, test'):
        load_dataset('digits', 'dev')
    for size in (0, -3, 1.5, '8'):
        with refused('size='):
            load_dataset('imagefolder', 'train', '.', size=size)
    with refused('only imagefolder'):
        load_dataset('cifar100', 'train', size=32)


# ------------------------------------------------------------------ folders of images


def test_image_folder(tmp_path):
    root = make_folder(tmp_path / 'images', 60)
    sets = {s: load_dataset('imagefolder', s, root) for s in ('train', 'valid', 'test')}
    assert {s: len(d) for s, d in sets.items()} == {'train': 42, 'valid': 6, 'test': 12} and sets[
        'train'
    ].classes == CLASSES
    everything = torch.cat([d.images for d in sets.values()])
    assert len(torch.unique(everything.flatten(1), dim=0)) == 60
    before = {bytes(x.numpy().tobytes()) for x in sets['test'].images}
    make_folder(root, 63)  # one more of each class; the others are written again, unchanged
    after = {bytes(x.numpy().tobytes()) for x in load_dataset('imagefolder', 'test', root).images}
    assert len(before & after) >= 9


def test_image_folder_with_split_folders(tmp_path):
    root = tmp_path / 'images'
    make_folder(root / 'train', 60, side=10)
    make_folder(root / 'test', 9, side=8, seed=1)
    assert [len(load_dataset('imagefolder', s, root)) for s in ('train', 'valid', 'trainvalid', 'test')] == [
        54,
        6,
        60,
        9,
    ]
    assert load_dataset('imagefolder', 'test', root).images.shape == (9, 3, 10, 10)  # the size of the training set
    make_folder(root / 'val', 12, side=10, seed=2)
    assert [len(load_dataset('imagefolder', s, root)) for s in ('train', 'valid')] == [60, 12]
    with refused("no split 'trainvalid'", 'it has test, train, valid'):
        load_dataset('imagefolder', 'trainvalid', root)
    (root / 'test' / 'cup').rename(root / 'test' / 'dish')
    with refused('cup|dish', 'not in every split'):
        load_dataset('imagefolder', 'train', root)


def test_odd_files(tmp_path):
    root = make_folder(tmp_path / 'images', 30)
    load = lambda: load_dataset('imagefolder', 'trainvalid', root)
    whole = load().fingerprint
    (root / 'README.txt').write_text('beside the classes')
    (root / 'cup' / '.DS_Store').write_text('hidden')
    assert load().fingerprint == whole
    for name, content in [('notes.txt', b'text'), ('image.webp', b''), ('noext', b'')]:
        (root / 'cup' / name).write_bytes(content)
        with refused(name, 'not a png or jpg'):
            load()
        (root / 'cup' / name).unlink()
    for name, content in [
        ('empty.png', b''),
        ('html.jpg', b'<html>'),
        ('cut.png', (root / 'cup' / '00002.png').read_bytes()[:100]),
        ('deep.png', png(np.zeros((8, 8), np.uint16))),
    ]:
        (root / 'cup' / name).write_bytes(content)
        with refused(name, 'not a readable image'):
            load()
        (root / 'cup' / name).unlink()
    (root / 'cup' / 'dangling.png').symlink_to(tmp_path / 'nowhere.png')
    with refused('dangling.png'):
        load()
    (root / 'cup' / 'dangling.png').unlink()
    (root / 'cup' / 'folder.png').mkdir()
    with refused('folder.png'):
        load()
    (root / 'cup' / 'folder.png').rmdir()
    (root / 'empty').mkdir()
    with refused('empty is empty'):
        load()
    (root / 'empty').rmdir()
    assert load().fingerprint == whole
    with refused('needs the folder'):
        load_dataset('imagefolder', 'train')
    with refused('no class folders'):
        load_dataset('imagefolder', 'train', root / 'cup')
    for c in CLASSES:
        for f in sorted((root / c).glob('*.png'))[2:]:
            f.unlink()
    with refused('test is empty', 'too few images'):
        load_dataset('imagefolder', 'test', root)


def test_modes_and_sizes(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    images = {
        'rgb.png': Image.fromarray(colour),
        'grey.PNG': Image.fromarray(colour).convert('L'),
        'alpha.png': Image.fromarray(colour).convert('RGBA'),
        'palette.png': Image.fromarray(colour).quantize(16),
        'photo.JPEG': Image.fromarray(colour),
        'tall.jpg': Image.fromarray(colour.transpose(1, 0, 2).copy()),
    }
    for name, im in images.items():
        (tmp_path / 'images' / 'one').mkdir(parents=True, exist_ok=True)
        im.save(tmp_path / 'images' / 'one' / name)
    ds = load_dataset('imagefolder', 'train', tmp_path / 'images')
    assert ds.images.shape[1:] == (3, 12, 12)
    assert load_dataset('imagefolder', 'train', tmp_path / 'images', size=5).images.shape[1:] == (3, 5, 5)
    assert np.array_equal(
        data.pixels(tmp_path / 'images' / 'one' / 'rgb.png', 12), colour[:, 4:16].transpose(2, 0, 1)
    )  # centre crop, untouched
    grey = data.pixels(tmp_path / 'images' / 'one' / 'grey.PNG')
    assert (grey[0] == grey[1]).all() and (grey[1] == grey[2]).all()


# ------------------------------------------------------------------ the real thing


def test_real_cifar100(elsewhere, monkeypatch):
    if not elsewhere:
        pytest.skip('needs CIFAR-100: set MICRONET_DATA to a folder that holds cifar100/*.parquet')
    if not has_cifar100(elsewhere):
        pytest.skip('MICRONET_DATA has no cifar100/*.parquet')
    monkeypatch.setenv('MICRONET_DATA', elsewhere)
    sets = {s: load_dataset('cifar100', s) for s in ('train', 'valid', 'trainvalid', 'test')}
    assert {s: (len(d), d.labels.bincount().unique().tolist()) for s, d in sets.items()} == {
        'train': (45_000, [450]),
        'valid': (5_000, [50]),
        'trainvalid': (50_000, [500]),
        'test': (10_000, [100]),
    }
    mean, std = dataset_stats(sets['trainvalid'])
    np.testing.assert_allclose(mean, [0.50707516, 0.48654887, 0.44091784], rtol=0, atol=1e-8)
    np.testing.assert_allclose(std, data.CIFAR100_STATS[1], rtol=0, atol=1e-8)
    assert len(sets['train'].classes) == 100 and (sets['train'].classes[0], sets['train'].classes[-1]) == (
        'apple',
        'worm',
    )
    for s, d in sets.items():
        assert (
            d.fingerprint
            == fingerprint(d.images, d.labels, d.classes)
            == CIFAR100.fingerprints['test' if s == 'test' else 'train'][s]
        )


def test_real_cifar100_with_one_row_changed_is_refused(elsewhere, tmp_path):
    if not elsewhere or not has_cifar100(elsewhere):
        pytest.skip('needs CIFAR-100: set MICRONET_DATA to a folder that holds cifar100/*.parquet')
    table = pq.read_table(os.path.join(elsewhere, TEST))
    labels = table['fine_label'].to_pylist()
    other = next(i for i, y in enumerate(labels) if y != labels[0])
    labels[0], labels[other] = labels[other], labels[0]
    (tmp_path / 'root' / 'cifar100').mkdir(parents=True)
    pq.write_table(
        table.set_column(table.schema.get_field_index('fine_label'), 'fine_label', pa.array(labels)),
        tmp_path / 'root' / TEST,
    )
    with refused('expected 95ad54b50ebe239b', 'fetch the files again'):
        load_dataset('cifar100', 'test', tmp_path / 'root')


# --- the sample of ImageNet


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "A thousand small pictures, one a class, that show the number of their class; returns the folder that holds them."
    from timm.data import ImageNetInfo

    root = tmp_path_factory.mktemp('sample')
    (root / 'imagenet-sample').mkdir()
    for label, number in enumerate(ImageNetInfo().label_names()):
        colour = np.full((9, 8, 3), (label % 256, label // 256, 0), dtype=np.uint8)
        name = f'{number}_{"tench" if label == 0 else "thing"}.JPEG'
        (root / 'imagenet-sample' / name).write_bytes(png(colour))  # the format is that of the bytes
    (root / 'imagenet-sample' / 'README.md').write_text('not an image')
    return root


def painted(dataset):
    "The classes that the pictures show."
    pixel = dataset.images[:, :, 0, 0].long()
    return pixel[:, 0] + 256 * pixel[:, 1]


def test_sample_has_two_halves_and_the_right_labels(photographs):
    both, calibrate, judge = (imagenet_sample(s, 7, root=photographs) for s in ('all', 'calibrate', 'judge'))
    assert [len(d) for d in (both, calibrate, judge)] == [1000, 500, 500]
    for d in (both, calibrate, judge):
        assert torch.equal(painted(d), d.labels) and len(d.classes) == 1000 and d.images.shape[1:] == (3, 7, 7)
    assert not set(calibrate.labels.tolist()) & set(judge.labels.tolist())
    assert torch.equal(both.labels, torch.arange(1000)) and not (calibrate.labels % 2).any()
    few = imagenet_sample('judge', 7, n=10, root=photographs)
    assert len(few) == 10 and torch.equal(painted(few), few.labels) and few.fingerprint != judge.fingerprint


@pytest.mark.parametrize('change', ['missing', 'twice', 'strange', 'broken'])
def test_sample_that_is_not_whole_is_named(photographs, tmp_path, change):
    folder = shutil.copytree(photographs / 'imagenet-sample', tmp_path / 'imagenet-sample')
    second = folder / 'n01443537_thing.JPEG'
    words = dict(
        missing='has 0 images of class n01443537',
        twice='has 2 images of class n01443537',
        strange='has 1 images of class n99999999',
        broken='n01443537_thing.JPEG is not a readable image',
    )
    if change == 'missing':
        second.unlink()
    elif change == 'broken':
        second.write_bytes(second.read_bytes()[:40])
    else:
        number = second.name[:9] if change == 'twice' else 'n99999999'
        shutil.copy(second, folder / f'{number}_other.jpg')
    with pytest.raises(MicronetError, match=words[change]):
        imagenet_sample(size=7, root=tmp_path)


def test_sample_that_is_not_here_is_never_fetched(monkeypatch):
    monkeypatch.delenv('MICRONET_OFFLINE')
    monkeypatch.setattr('urllib.request.urlopen', lambda *a, **k: pytest.fail('fetched'))
    with pytest.raises(MicronetError, match='get https://github.com/EliSchwartz/imagenet-sample-images and put its'):
        imagenet_sample()
