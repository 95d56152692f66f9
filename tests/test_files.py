"Stages, checkpoints, caches, images and writing: damage is one clear line, and nothing is lost."

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from fuzz import CONFIG, fuzz_stages, net, toy_data, trained
from torch import nn

from micronet_nb import cli, core
from micronet_nb import data as data_module
from micronet_nb.core import MicronetError, atomic_path, check_store, stage, write_json
from micronet_nb.data import decode, decoded, open_rgb
from micronet_nb.onnx import to_onnx
from micronet_nb.packing import pack
from micronet_nb.training import FitConfig, fit, fit_stage


def one_line(e):
    assert '\n' not in str(e.value), str(e.value)


# --- stages


def test_mutated_stages_are_refused_or_are_those_that_were_stored(tmp_path):
    "Of a stage that is done and one that was stopped: 60 mutations, or as many as MICRONET_FUZZ says."
    n = int(os.environ.get('MICRONET_FUZZ', 60))
    outcome = fuzz_stages(n, int(os.environ.get('MICRONET_SEED', 0)), tmp_path)
    assert outcome['refused'] > n // 3 and outcome['the same']


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


def test_files_that_a_stage_has_not_stored_are_told_of(tmp_path):
    folder = tmp_path / trained(tmp_path, first := net())['folder']
    (folder / 'more').mkdir()
    (folder / 'more' / 'weights.bin').touch()
    (folder / '.hidden').touch()
    with pytest.warns(UserWarning, match='holds more/weights.bin, which was not stored with it: it is ignored'):
        trained(tmp_path, second := net())
    assert torch.equal(first[1].weight, second[1].weight)


def left_behind(root, runs, name, holder):
    "A part in a stage's folder or in the cache, and the lock of whoever writes there."
    folder = runs / 'stages' / 'toy-0' if holder == 'stage' else root / 'decoded'
    folder.mkdir(parents=True)
    (folder / name).touch()
    return folder / name, folder / '.lock' if holder == 'stage' else root / 'decoded-lock'


@pytest.mark.parametrize('holder', ['stage', 'cache'])
def test_a_run_begins_by_sweeping_where_nobody_writes(tmp_path, monkeypatch, holder):
    from filelock import FileLock

    cache, runs = tmp_path / 'cache', tmp_path / 'runs'
    monkeypatch.setenv('MICRONET_CACHE', str(cache))
    monkeypatch.setenv('MICRONET_RUNS', str(runs))
    part, lock = left_behind(cache, runs, '.a.npy.1.2.part', holder)
    with FileLock(lock):
        check_store()
        assert part.exists()
    check_store()
    assert not part.exists()


def test_reproduce_sweeps_and_refuses_a_damaged_stage(tmp_path, monkeypatch, capsys):
    from conftest import toy
    from micronet_nb.reproduce import main

    monkeypatch.setenv('MICRONET_RUNS', str(tmp_path / 'runs'))
    toy(tmp_path / 'nbs', '01_toy')
    folder = tmp_path / 'runs' / 'stages' / trained(tmp_path / 'runs' / 'stages')['folder']
    (part := folder / '.done.json.1.2.part').touch()
    (folder / 'model.safetensors').write_bytes(b'damaged')
    assert main(['--nbs', str(tmp_path / 'nbs'), '--out', str(tmp_path / 'out')]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'model.safetensors has SHA-256' in said and 'remove' in said
    assert not part.exists() and not (tmp_path / 'out' / 'embedded' / '01_toy.html').exists()


def test_downloads_of_others_have_an_upper_size(tmp_path, monkeypatch):
    import huggingface_hub

    def long_file(repo, relative, repo_type, local_dir):
        (tmp_path / 'part').write_bytes(bytes(2000))

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', long_file)
    monkeypatch.setattr(core, 'MOST_BYTES', 1000)
    with pytest.raises(MicronetError, match='train.parquet is not what was expected: it has more than 1,000 b') as e:
        data_module._hub(data_module.CIFAR100, 'train.parquet')
    one_line(e)
    assert (tmp_path / 'part').stat().st_size <= 1000
    (tmp_path / 'part').write_bytes(bytes(2000))  # the limit is gone


def test_weights_that_timm_downloads_have_an_upper_size(tmp_path, monkeypatch):
    import timm
    from micronet_nb import models

    def long_file(name, num_classes, pretrained):
        (tmp_path / 'part').write_bytes(bytes(2000))

    monkeypatch.setattr(timm, 'create_model', long_file)
    monkeypatch.setattr(models, 'MOST_BYTES_OF_WEIGHTS', 1000)
    with pytest.raises(MicronetError, match='the published mixnet_s is not what was expected'):
        models.create_model('mixnet_s', 1000, pretrained=True)


def test_what_a_killed_download_has_left(tmp_path, monkeypatch):
    (tmp_path / 'a.bin').write_bytes(b'a')
    (tmp_path / 'cache').mkdir()
    for name in ('.b.bin.1.2.part', '.c.bin.1.2.part'):
        (tmp_path / 'cache' / name).touch()
    monkeypatch.setenv('MICRONET_CACHE', str(tmp_path / 'cache'))
    path = core.fetch('b.bin', (tmp_path / 'a.bin').as_uri(), core.sha256(tmp_path / 'a.bin'))
    assert path.read_bytes() == b'a' and [p.name for p in (tmp_path / 'cache').glob('.*.part')] == ['.c.bin.1.2.part']


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


# --- where nothing can be written


COMMANDS = {
    'pack': lambda path: pack(packed_toy(), path),
    'onnx': lambda path: to_onnx(packed_toy(), path),
    'record': lambda path: core.record('a', [dict(x=1)], 'embedded', {}, folder=path.parent),
    'result': lambda path: core.finish('a', 'embedded'),
    'stage': lambda path: stage('s', {}, lambda folder: 1, root=path.parent),
    'fit_stage': lambda path: trained(path.parent),
    'cache': lambda path: data_module.write_decoded(path.with_suffix('.npy'), toy_raw()),
    'figure': lambda path: core.finish('a', 'embedded', picture=Figure()),
    'csv': lambda path: cli.micronet_score(['densenet_bc_10_4', '--csv', str(path)]),
}


class Figure:
    "A picture that writes a few bytes."

    def savefig(self, path, **more):
        Path(path).write_bytes(b'picture')


def packed_toy():
    "A lowered net of one layer."
    from micronet_nb.lowering import lower

    return lower(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.randn(2, 3, 2, 2))


def toy_raw():
    "Four black images, to be decoded."
    import io
    from PIL import Image

    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(png := io.BytesIO(), 'png')
    items = [(str(i), png.getvalue()) for i in range(4)]
    return data_module._Raw(items, [0, 1, 0, 1], ['a', 'b'], {'test': np.arange(4)}, (3, 2, 2))


def refusing(number, where, monkeypatch):
    "The system as it is where a file cannot be flushed, or not put in its place."

    def fails(*args, **more):
        raise OSError(number, os.strerror(number), None if where == 'fsync' else args[0])

    monkeypatch.setattr(os, where, fails)


@pytest.mark.parametrize(
    'number, where', [(errno.EROFS, 'replace'), (errno.ENOSPC, 'fsync'), (errno.EACCES, 'replace')]
)
@pytest.mark.parametrize('command', COMMANDS)
def test_what_cannot_be_written(tmp_path, monkeypatch, capsys, command, number, where):
    monkeypatch.setenv('MICRONET_OUT', str(tmp_path / 'out'))
    path = tmp_path / 'out' / 'a.json'
    path.parent.mkdir()
    path.write_text('before')
    refusing(number, where, monkeypatch)
    if command == 'csv':
        assert COMMANDS[command](path) == 1
        said = capsys.readouterr().err
    else:
        with pytest.raises(MicronetError) as e:
            COMMANDS[command](path)
        said = f'{e.value}\n'
    assert said.count('\n') == 1 and str(tmp_path / 'out') in said and os.strerror(number) in said, said
    assert path.read_text() == 'before' and not [*tmp_path.rglob('.*.part'), *tmp_path.rglob('done.json')]


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
