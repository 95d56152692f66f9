"A number that makes no sense is refused by the function that is given it, in one line that names the number."

import types

import numpy as np
import pandas as pd
import pytest
import torch
from fuzz import CONFIG, toy_data
from torch import nn

import micronet_nb as mn
from micronet_nb import cli
from micronet_nb.core import MicronetError

NAN, INF = float('nan'), float('inf')
NO_NUMBER = [NAN, INF, -1, -0.5, True, '2', [], {}]
NO_WHOLE = [*NO_NUMBER, 1.5]
STATS = (0.0,) * 3, (1.0,) * 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()


def images(n=4):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def fit(**more):
    mn.fit(net(), toy_data(), CONFIG, quiet=True, **more)


def lowered():
    return mn.lower(net(), images())


def sensitivity(**more):
    "Of one layer, pruned by half; no level of weights."
    levels = dict(sparsities=(0.5,), weight_bits=(), activation_bits=()) | more
    return mn.measure_sensitivity(net(), 2 * toy_data()[:1], stats=STATS, quiet=True, **levels)


def plan(budget=0.5, **more):
    "From a table of two levels of one layer."
    rows = [dict(layer='0', kind='sparsity', level=s, increase=s) for s in (0.5, 0.9)]
    return mn.plan_from_sensitivity(pd.DataFrame(rows), net(), budget, **more)


def widths(budget=90.0, worth=1.0, **more):
    "Of two layers."
    rows = [dict(layer=n, level=b, storage=10 * b, kl=worth / b) for n in 'ab' for b in (2, 4)]
    return mn.choose_bits(pd.DataFrame(rows), budget, **more)


def reconstructed(**more):
    return mn.reconstruct(net(), images(), quiet=True, **more)


def stats_with(v):
    "One deviation."
    return (0.0,) * 3, (1.0, 1.0, v)


def teacher(**more):
    return mn.AsTeacher(net(), STATS, STATS, **more)


def speed(minutes):
    "What `python -m micronet_nb.cifar100 speed` was told."
    return types.SimpleNamespace(task='speed', profile='embedded', minutes=minutes, out=None)


def imagenet(**more):
    "What `python -m micronet_nb.imagenet` was told; the folder is none."
    numbers = dict(size=None, resize=None, calibration=None, workers=None, minutes=None)
    rest = dict(model=None, compress=None, limit=None, file=None, data='none')
    return types.SimpleNamespace(**numbers | rest | more)


NO_SIZE = [NAN, INF, -1, 0, '2', 1.5, None, 10**30, 10**9]
NO_STD = [NAN, INF, -1, 0, True, '2', None, [], {}]
LARGE = 10**30  # more than tensors hold

CALLS = {  # of a value: where it goes
    'evaluate batch_size': (lambda v: mn.evaluate(net(), toy_data()[0], STATS, batch_size=v), [*NO_WHOLE, None, 0]),
    'evaluate n': (lambda v: mn.evaluate(net(), toy_data()[0], STATS, n=v), NO_WHOLE),
    'evaluate top': (lambda v: mn.evaluate(net(), toy_data()[0], STATS, top=(v,)), [*NO_WHOLE, None, 0]),
    'evaluate std': (
        lambda v: mn.evaluate(net(), toy_data()[0], ((0.0,) * 3, (1, 1, v))),
        [NAN, INF, -1, '2', None, 0],
    ),
    'evaluate mean': (lambda v: mn.evaluate(net(), toy_data()[0], ((0, 0, v), (1.0,) * 3)), [NAN, INF, '2', None, []]),
    'fit every': (lambda v: fit(every=v), [NAN, -1, True, '2', None, []]),
    'fit stop': (lambda v: fit(stop=v), [NAN, -1, True, '2', []]),
    'calibrate limit': (lambda v: mn.calibrate(net(), images(), limit=v), [*NO_WHOLE, None, 0]),
    'calibrate seed': (lambda v: mn.calibrate(net(), images(), seed=v), [*NO_WHOLE, None]),
    'activations bits': (lambda v: mn.quantise_activations(net(), images(), bits=v), [NAN, INF, -1, 0, True, '2', 1.5]),
    'activations first_bits': (lambda v: mn.quantise_activations(net(), images(), first_bits=v), [*NO_WHOLE, 0]),
    'activations seed': (lambda v: mn.quantise_activations(net(), images(), seed=v), [*NO_WHOLE, None]),
    'weights bits': (lambda v: mn.quantise_weights(net(), v), [NAN, INF, -1, 0, True, '2', 1.5, None]),
    'prune rates': (lambda v: mn.prune(net(), v), [NAN, INF, -1, True, '2', 1.5, None]),
    'uniform_rates': (lambda v: mn.uniform_rates(net(), v), [NAN, INF, -1, '2', 1.5, None]),
    'global_rates': (lambda v: mn.global_rates(net(), v), [NAN, INF, -1, '2', 1.5, None]),
    'erk_rates': (lambda v: mn.erk_rates(net(), v), [NAN, INF, -1, '2', 1.5, None]),
    'score input_size': (lambda v: mn.score(net(), (3, v, 4)), [NAN, INF, -1, 0, '2', 1.5, None]),
    'unpack input_size': (lambda v: mn.unpack('none', (3, v, 4)), [NAN, INF, -1, 0, True, '2', 1.5, None]),
    'Runner batch': (lambda v: mn.Runner(lowered(), batch=v), [*NO_WHOLE, None, 0]),
    'create_model classes': (lambda v: mn.create_model('densenet_bc_10_4', v), [*NO_WHOLE, None]),
    'create_model large': (lambda v: mn.create_model('densenet_bc_10_4', v), [LARGE]),
    'lower example': (lambda v: mn.lower(net(), v), [*NO_NUMBER, 1.5, None, images()[:0], images().long()]),
    'lower NaN': (lambda v: mn.lower(net(), images() * v), [NAN, INF]),
    'lower scales': (lambda v: mn.lower(net(), images(), scales=v), [*NO_NUMBER, None, torch.int8]),
    'run_integer x': (lambda v: mn.run_integer(lowered(), v), [*NO_NUMBER, 1.5, None, (1, 2), images()[0, 0]]),
    'run_integer NaN': (lambda v: mn.run_integer(lowered(), images() * v), [NAN, INF]),
    'to_onnx input_size': (lambda v: mn.to_onnx(lowered(), 'none', input_size=(3, v, 4)), NO_SIZE),
    'kd_loss temperature': (lambda v: mn.kd_loss(temperature=v), [*NO_NUMBER, None, 0]),
    'kd_loss hard': (lambda v: mn.kd_loss(hard=v), [*NO_NUMBER, None, 1.5]),
    'kd_loss soft': (lambda v: mn.kd_loss(soft=v), NO_NUMBER),
    'AsTeacher size': (lambda v: teacher(size=v), [*NO_WHOLE, 0, LARGE]),
    'AsTeacher std': (lambda v: mn.AsTeacher(net(), STATS, stats_with(v)), NO_STD),
    'AsTeacher std of the batch': (lambda v: mn.AsTeacher(net(), stats_with(v), STATS), NO_STD),
    'Ensemble std': (lambda v: mn.Ensemble([net()], [stats_with(v)], STATS), NO_STD),
    'choose_bits budget': (lambda v: widths(v), [*NO_NUMBER, None, 0]),
    'choose_bits cells': (lambda v: widths(cells=v), [*NO_WHOLE, None, 0, LARGE]),
    'choose_bits by': (lambda v: widths(by=v), [*NO_NUMBER, None, 1.5]),
    'choose_bits worth': (lambda v: widths(worth=v), [NAN, INF]),
    'compress budget': (lambda v: mn.compress(net(), images(16), v, quiet=True), [*NO_NUMBER, None, 0]),
    'compress bytes': (lambda v: mn.compress(net(), images(16), dict(bytes=v), quiet=True), [*NO_NUMBER, None, 0]),
    'compress held_out': (
        lambda v: mn.compress(net(), images(16), held_out=v, quiet=True),
        [*NO_NUMBER, None, 0, 1, 1.5],
    ),
    'compress labels': (
        lambda v: mn.compress(net(), images(16), labels=v, quiet=True),
        [*NO_NUMBER, 1.5, torch.ones(4)],
    ),
    'compress images': (lambda v: mn.compress(net(), v, quiet=True), [*NO_NUMBER, None, images()[:0], images() * NAN]),
    'reconstruct bits': (lambda v: reconstructed(bits=v), [NAN, INF, -1, 0, 17, True, '2', 1.5, None]),
    'reconstruct rates': (lambda v: reconstructed(rates=v), [NAN, INF, -1, True, '2', 1.5, None]),
    'reconstruct follow': (lambda v: reconstructed(follow=v), [*NO_NUMBER, None, 1.5]),
    'reconstruct damp': (lambda v: reconstructed(damp=v), [*NO_NUMBER, None, 0, LARGE]),
    'reconstruct limit': (lambda v: reconstructed(limit=v), [*NO_WHOLE, None, 0, LARGE]),
    'reconstruct batch_size': (lambda v: reconstructed(batch_size=v), [*NO_WHOLE, None, 0, LARGE]),
    'estimate_norms size': (
        lambda v: mn.estimate_norms(nn.BatchNorm2d(3), images(), size=v),
        [*NO_WHOLE, None, 0, LARGE],
    ),
    'photo_crops n': (lambda v: mn.photo_crops(net(), n=v), [*NO_WHOLE, None, 0, LARGE]),
    'photo_crops size': (lambda v: mn.photo_crops(net(), 1, v), [*NO_WHOLE, 0, LARGE]),
    'photo_crops seed': (lambda v: mn.photo_crops(net(), 1, seed=v), [*NO_WHOLE, None, LARGE]),
    'imagenet_sample size': (lambda v: mn.imagenet_sample(size=v), [*NO_WHOLE, None, 0, LARGE]),
    'imagenet_sample resize': (lambda v: mn.imagenet_sample(resize=v), [*NO_WHOLE, 0, 100]),
    'subset': (lambda v: toy_data()[0].subset(v), [*NO_WHOLE, None, 0, 17, LARGE]),
    'sensitivity sparsities': (lambda v: sensitivity(sparsities=(v,)), [*NO_NUMBER, None, 1.5]),
    'sensitivity weight_bits': (lambda v: sensitivity(weight_bits=(v,)), [*NO_WHOLE, None, 0, 17]),
    'sensitivity activation_bits': (lambda v: sensitivity(activation_bits=(v,)), [*NO_WHOLE, None, 0, 17]),
    'sensitivity n': (lambda v: sensitivity(n=v), [*NO_WHOLE, 0, LARGE]),
    'sensitivity n_train': (lambda v: sensitivity(n_train=v), [*NO_WHOLE, 0]),
    'sensitivity batch_size': (lambda v: sensitivity(batch_size=v), [*NO_WHOLE, 0, LARGE]),
    'plan budget': (lambda v: plan(v), [*NO_NUMBER, None, 1.5]),
    'plan most': (lambda v: plan(most=v), [*NO_NUMBER, None, 1.5]),
    'plan input_size': (lambda v: plan(of='operations', input_size=(3, v, 4)), NO_SIZE),
    'prune start': (lambda v: mn.prune(net(), 0.5, 'gradual', start=v), [NAN, INF, -1, True, '2', None, 1.5]),
    'prune ramp': (lambda v: mn.prune(net(), 0.5, 'gradual', ramp=v), [*NO_NUMBER, None, 1.5]),
    'prune every': (lambda v: mn.prune(net(), 0.5, 'dynamic', every=v), [*NO_WHOLE, None, 0]),
    'prune until': (lambda v: mn.prune(net(), 0.5, 'dynamic', until=v), NO_WHOLE),
    'global_rates most': (lambda v: mn.global_rates(net(), 0.5, most=v), [*NO_NUMBER, None, 1.5]),
    'score pool_bits': (lambda v: mn.score(net(), (3, 4, 4), pool_bits=v), [NAN, INF, -1, 0, '2', 1.5, 8]),
    'score bias_bits': (lambda v: mn.score(net(), (3, 4, 4), bias_bits=v), [NAN, INF, -1, 0, '2', 1.5, 8, None]),
    'pack input_size': (lambda v: mn.pack(lowered(), 'none', dict(input_size=(3, v, 4))), [*NO_SIZE, True]),
    'normalised deviation': (lambda v: mn.normalised(images(), stats_with(v)), NO_STD),
    'pack pixels': (lambda v: mn.pack(lowered(), 'none', dict(pixels=stats_with(v))), NO_STD),
    'training_speed minutes': (lambda v: cli._cifar100_run(speed(v)), [NAN, INF, -1]),
    **{
        f'imagenet --{name}': (lambda v, name=name: cli._imagenet_run(imagenet(**{name: v})), [-1, low, LARGE])
        for name, low in dict(size=0, resize=0, calibration=0, workers=-2).items()
    },
    'imagenet --minutes': (lambda v: cli._imagenet_run(imagenet(minutes=v)), [NAN, -1.0, 0.0]),
    **{
        f'FitConfig {name}': (lambda v, name=name: mn.FitConfig(**{name: v}), [*NO_WHOLE, None])
        for name in ('epochs', 'batch_size', 'seed', 'epoch_images')
    },
    **{
        f'FitConfig {name}': (lambda v, name=name: mn.FitConfig(**{name: v}), [*NO_NUMBER, None])
        for name in 'lr momentum weight_decay warmup_epochs label_smoothing ema mixup cutmix'.split()
    },
}


@pytest.mark.parametrize('what', CALLS)
def test_a_number_that_makes_no_sense(what):
    call, wrong = CALLS[what]
    for value in wrong:
        with pytest.raises(MicronetError) as e:
            call(value)
        assert '\n' not in str(e.value) and len(str(e.value)) > 20, (value, str(e.value))


@pytest.mark.parametrize('kind', [np.int64, np.int32, np.uint8])
def test_whole_numbers_of_numpy_are_whole_numbers(kind):
    model = net()
    quantisers = mn.quantise_activations(model, images(), bits=kind(4), first_bits=kind(8), seed=kind(0))
    mn.quantise_weights(model, [kind(4), kind(3)])
    assert [(q.bits, type(q.bits)) for q in quantisers.values()] == [(8, int), (4, int)]
    assert mn.score(mn.lower(model, images()), (3, 4, 4)).score > 0


def test_labels_in_32_bits():
    data = toy_data()[0]
    batches = [(data.images, data.labels.int())]
    with pytest.raises(MicronetError, match='labels must be int64'):
        mn.evaluate(net(), batches, STATS)


def test_an_evaluation_of_nothing():
    with pytest.raises(MicronetError, match='no image to evaluate'):
        mn.evaluate(net(), [], STATS)


@pytest.mark.parametrize('value', [NAN, INF, 0.5])
def test_integers_that_are_none(tmp_path, value):
    small = net()
    mn.quantise_weights(small, 4)
    graph = mn.lower(small, images())
    layer = next(m for m in graph.modules() if hasattr(m, 'weight_bits'))
    layer.weight.data.view(-1)[0] = value
    with pytest.raises(MicronetError, match='whole number|integers|NaN'):
        mn.pack(graph, tmp_path / 'a')
    assert not [*tmp_path.iterdir()]
