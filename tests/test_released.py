"RIAIR's checkpoint: where it comes from, what it costs, and that every way to run it agrees."

import shutil

import pytest
import torch

from micronet_nb.cli import micronet_score
from micronet_nb.core import MicronetError, find_file, released_figures
from micronet_nb.data import load_dataset
from micronet_nb.released import load_released, prepare, resumable_predictions
from micronet_nb.runtime import Runner
from micronet_nb.scoring import score

CHECKPOINT = 'riair/densenet-100.pth.tar'
needs_checkpoint = pytest.mark.skipif(find_file(CHECKPOINT) is None, reason=f'{CHECKPOINT} is not below MICRONET_DATA')
needs_images = pytest.mark.skipif(
    find_file('cifar100/test-00000-of-00001.parquet') is None, reason='cifar100 is not below MICRONET_DATA'
)


def test_missing_and_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('MICRONET_OFFLINE', '1')
    with pytest.raises(MicronetError, match='MICRONET_OFFLINE is set: put it at'):
        load_released(root=tmp_path)


def test_command_without_the_checkpoint(tmp_path, monkeypatch, capsys):
    for v in ('MICRONET_DATA', 'MICRONET_CACHE'):
        monkeypatch.setenv(v, str(tmp_path))
    monkeypatch.setenv('MICRONET_OFFLINE', '1')
    assert micronet_score(['released']) == 1
    err = capsys.readouterr().err
    assert 'densenet-100.pth.tar' in err and err.count('\n') == 1


def test_wrong_checkpoint_is_never_opened(tmp_path, monkeypatch):
    (tmp_path / 'riair').mkdir()
    (tmp_path / CHECKPOINT).write_bytes(b'not a checkpoint')
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('opened'))
    with pytest.raises(MicronetError, match='truncated or another file'):
        load_released(root=tmp_path)


@needs_checkpoint
def test_truncated_checkpoint(tmp_path):
    (tmp_path / 'riair').mkdir()
    shutil.copyfile(find_file(CHECKPOINT), tmp_path / CHECKPOINT)
    with open(tmp_path / CHECKPOINT, 'rb+') as f:
        f.truncate(1_000_000)
    with pytest.raises(MicronetError, match='truncated or another file'):
        load_released(root=tmp_path)


@needs_checkpoint
def test_published_score_to_the_last_digit(capsys):
    s, told = score(load_released(), (3, 32, 32), 'cifar100', 'riair-cifar100', 'tree'), released_figures()['cifar100']
    assert (s.storage, round(s.ops, 2), round(s.score, 6)) == (told['storage'], told['ops'], told['score'])
    assert micronet_score(['released']) == 0
    assert f"{told['storage']:,.4f}" in capsys.readouterr().out
    assert micronet_score(['released', '--size', '3x64x64']) == 1  # its pool and classifier want 32x32
    assert '3x64x64' in capsys.readouterr().err


@needs_checkpoint
@needs_images
def test_runner_is_the_net_bit_for_bit_on_real_images():
    net, images = load_released(), load_dataset('cifar100', 'test').images[:50]
    for truncated in (False, True):
        x = prepare(images, truncated)
        with torch.inference_mode():
            straight = net(x)
        for int8 in (None, False):
            assert torch.equal(Runner(net, int8)(x), straight)
    assert (resumable_predictions(Runner(net), images) == straight_predictions(net, images)).all()


def straight_predictions(net, images):
    with torch.inference_mode():
        return net(prepare(images)).argmax(1).numpy()
