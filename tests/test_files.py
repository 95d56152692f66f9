"Stages, checkpoints, caches, images and writing: damage is one clear line, and nothing is lost."

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch import nn

from micronet_nb import cli
from micronet_nb import data as data_module
from micronet_nb.core import MicronetError, atomic_path, stage, write_json
from micronet_nb.data import Dataset, decode, decoded, open_rgb
from micronet_nb.training import FitConfig, fit, fit_stage

CONFIG = FitConfig(epochs=1, batch_size=8, augment='none', ema=0.5, lr=0.01)


def toy_data():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 4, 4), generator=g, dtype=torch.uint8)
    return Dataset(images, torch.arange(16) % 2, ['a', 'b'], 'toy', 'train'), None


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def trained(root, model=None):
    return fit_stage('toy', net() if model is None else model, toy_data(), CONFIG, root=root, quiet=True)


def one_line(e):
    assert '\n' not in str(e.value), str(e.value)


# --- stages


def test_a_mutated_stage_is_refused_or_is_the_one_that_was_stored(tmp_path):
    "Bytes flipped, files cut, emptied, exchanged: 60 of them, or as many as MICRONET_FUZZ says."
    rng, outcome = random.Random(int(os.environ.get('MICRONET_SEED', 0))), []
    folder = tmp_path / trained(tmp_path)['folder']
    whole = {name: (folder / name).read_bytes() for name in ('done.json', 'model.safetensors')}
    right = load_file(folder / 'model.safetensors')
    for _ in range(int(os.environ.get('MICRONET_FUZZ', 60))):
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        name = rng.choice([*whole])
        content = bytearray(whole[name])
        match rng.randrange(4):
            case 0:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case 1:
                del content[rng.randrange(len(content)) :]
            case 2:
                content = bytearray(rng.choice([*whole.values()]))
            case 3:
                content[rng.randrange(len(content))] = rng.randrange(256)
        (folder / name).write_bytes(content)
        try:
            trained(tmp_path, model := net())
        except MicronetError as e:
            outcome.append('refused')
            assert '\n' not in str(e) and folder.name in str(e), e
        else:
            outcome.append('accepted')
            assert all(torch.equal(v, right[k]) for k, v in model.state_dict().items())
    assert outcome.count('refused') > len(outcome) // 2


def test_a_stage_from_before_there_were_digests(tmp_path):
    result = trained(tmp_path, first := net())
    folder = tmp_path / result['folder']
    told = json.loads((folder / 'done.json').read_text())
    (folder / 'done.json').write_text(json.dumps({k: v for k, v in told.items() if k not in ('sha256', 'files')}))
    assert trained(tmp_path, second := net()) == result
    assert torch.equal(first[1].weight, second[1].weight)
    (folder / 'model.safetensors').write_bytes(b'damaged')
    with pytest.raises(MicronetError, match='model.safetensors is damaged') as e:
        trained(tmp_path)
    one_line(e)


def test_a_stage_works_in_its_own_folder(tmp_path):
    folder = tmp_path / trained(tmp_path)['folder']
    (tmp_path / 'other' / 'checkpoints').mkdir(parents=True)
    told = json.loads((folder / 'done.json').read_text())
    told['result']['folder'] = '../' + tmp_path.name + '/other'
    (folder / 'done.json').write_text(json.dumps({k: v for k, v in told.items() if k != 'sha256'}))
    assert trained(tmp_path)['folder'] == folder.name and (tmp_path / 'other' / 'checkpoints').exists()


def test_what_a_kill_has_left_is_removed_under_the_lock(tmp_path):
    def killed(folder):
        (folder / '.model.safetensors.1.2.part').touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage('s', {}, killed, root=tmp_path)
    assert stage('s', {}, lambda folder: [p.name for p in folder.glob('.*.part')], root=tmp_path) == []


class Poison:
    "Makes one kind of what a run keeps NaN behind the last step, whose loss was finite."

    def __init__(self, what):
        self.what = what

    def on_update(self, run):
        if run.step < run.total:
            return
        if self.what == 'weights':
            run.model[1].weight.data[0, 0] = float('nan')
        elif self.what == 'averages':
            run.ema.module[1].weight.data[0, 0] = float('nan')
        else:
            run.optimizer.state[run.model[1].weight]['momentum_buffer'][0, 0] = float('nan')


@pytest.mark.parametrize('what', ['weights', 'averages', 'momenta'])
def test_nan_of_the_last_step_is_never_stored_as_finished(tmp_path, what):
    with pytest.raises(MicronetError, match='not finite'):
        fit_stage('toy', net(), toy_data(), CONFIG, root=tmp_path, callbacks=[Poison(what)], quiet=True)
    assert not [*tmp_path.rglob('done.json'), *tmp_path.rglob('step-*')]


# --- writing


def test_targets_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    for name, kind in (('pipe', 'a device, a FIFO'), ('folder', 'a folder')):
        with pytest.raises(MicronetError, match=f'{name} is {kind}') as e:
            write_json(tmp_path / name, 1)
        one_line(e)
    assert (tmp_path / 'pipe').is_fifo() and sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'pipe']


LIMITED = """
import resource, sys
from pathlib import Path
from micronet_nb.core import MicronetError, atomic_path, write_json
write_json(sys.argv[1], 'before')
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_json(sys.argv[1], 'x' * 5000)
except MicronetError as e:
    print(e)
"""


def test_a_limit_on_file_sizes(tmp_path):
    path = tmp_path / 'a.json'
    done = subprocess.run([sys.executable, '-c', LIMITED, path], capture_output=True, text=True, cwd=ROOT)
    assert f'cannot write {path}: File too large' in done.stdout and done.stdout.count('\n') == 1, done.stderr
    assert path.read_text() == '"before"\n' and [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_an_error_of_the_block_itself_goes_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / 'a'):
        open(tmp_path / 'another')
    assert not [*tmp_path.iterdir()]


# --- images and caches


def test_a_fifo_is_no_image(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='not a regular file'):
        open_rgb(tmp_path / 'a.png')


def test_an_eps_by_another_name(tmp_path, monkeypatch):
    (tmp_path / 'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n')
    monkeypatch.setattr('PIL.EpsImagePlugin.Ghostscript', lambda *a, **k: pytest.fail('Ghostscript was started'))
    with pytest.raises(MicronetError, match='a.png is not a readable image'):
        list(decode([('a.png', tmp_path / 'a.png')], (3, 2, 2)))


@pytest.mark.parametrize('what', ['pixel', 'label', 'name'])
def test_a_cache_that_has_changed(tmp_path, what):
    from PIL import Image

    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / 'a.png')
    items, readings, path = [(str(i), tmp_path / 'a.png') for i in range(4)], [], tmp_path / 'cache' / 'toy-1-2.npy'

    def read():
        readings.append(1)
        return data_module._Raw(items, [0, 1, 0, 1], ['a', 'b'], {'test': np.arange(4)}, (3, 2, 2))

    before = decoded('toy', 'test', path, read)
    if what == 'pixel':
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert torch.equal(decoded('toy', 'test', path, read).images, torch.zeros_like(before.images))
        assert len(readings) == 2
        return
    meta = json.loads(path.with_suffix('.json').read_text())
    if what == 'label':
        meta['labels'][0] = 1
    else:
        meta['classes'][0] = 'c'
    path.with_suffix('.json').write_text(json.dumps(meta))
    with pytest.raises(MicronetError, match='toy-1-2.json was altered or damaged'):
        decoded('toy', 'test', path, read)


# --- numbers


@pytest.mark.parametrize('wrong', [dict(epochs='2'), dict(epochs=1.5), dict(seed=-1), dict(lr='1'), dict(epochs=True)])
def test_settings_of_another_kind(wrong):
    with pytest.raises(MicronetError, match='belongs there'):
        FitConfig(**wrong)


def test_a_batch_of_one_with_a_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(MicronetError, match='choose a larger batch_size'):
        fit(model, toy_data(), FitConfig(epochs=1, batch_size=1, augment='none'), quiet=True)


def test_more_classes_than_logits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1))
    with pytest.raises(MicronetError, match='1 logits, the training set 2 classes'):
        fit(model, toy_data(), CONFIG, quiet=True)


class Evil:
    "A pickle that makes a file when it is read by a reader that trusts it."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_a_checkpoint_with_a_pickle_that_runs_code(tmp_path):
    stopped = FitConfig(epochs=2, batch_size=8, augment='none', lr=0.01)
    fit(net(), toy_data(), stopped, folder=tmp_path / 'run', quiet=True)
    (folder,) = (tmp_path / 'run').glob('step-*')
    torch.save(dict(state=Evil(tmp_path / 'ran'), param_groups=[]), folder / 'optimizer.pt')
    told = json.loads((folder / 'run.json').read_text())
    told.pop('sha256')
    told.pop('files')  # as one from before there were digests
    (folder / 'run.json').write_text(json.dumps(told))
    with pytest.raises(MicronetError, match='not the state of this optimiser') as e:
        fit(net(), toy_data(), stopped, folder=tmp_path / 'run', quiet=True)
    one_line(e)
    assert not (tmp_path / 'ran').exists()


def test_weights_with_a_pickle_that_runs_code(tmp_path):
    from micronet_nb.imagenet import pretrained

    torch.save(dict(state_dict=Evil(tmp_path / 'ran')), tmp_path / 'mixnet_s.pth')
    with pytest.raises(MicronetError) as e:
        pretrained('mixnet_s', tmp_path, 10)
    one_line(e)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('wrong', [-1, 10**6, 0.5])
def test_imagenet_labels_out_of_range(tmp_path, wrong):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from micronet_nb.imagenet import ParquetImages

    rows = [dict(bytes=b'', path='') for _ in range(2)]
    pq.write_table(pa.table(dict(image=rows, label=[0 * wrong, wrong])), tmp_path / 'a.parquet')
    with pytest.raises(MicronetError, match="'label' holds no whole numbers from 0 to") as e:
        ParquetImages([tmp_path / 'a.parquet'])
    one_line(e)


@pytest.mark.parametrize('seed', ['-1', '1.5', str(2**32)])
@pytest.mark.parametrize('command', ['score', 'cifar100', 'imagenet'])
def test_a_seed_that_is_none(command, seed, capsys):
    parser = getattr(cli, f'_{command}_parser')()
    with pytest.raises(SystemExit):
        parser.parse_args(['mixnet_s'] * (command == 'score') + [f'--seed={seed}'])
    assert 'a whole number from 0' in capsys.readouterr().err
