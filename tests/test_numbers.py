"A number that makes no sense is refused by the function that is given it, in one line that names the number."

import numpy as np
import pytest
import torch
from fuzz import CONFIG, toy_data
from torch import nn

import micronet_nb as mn
from micronet_nb.core import MicronetError

NAN, INF = float('nan'), float('inf')
NO_NUMBER = [NAN, INF, -1, -0.5, True, '2', [], {}]
NO_WHOLE = [*NO_NUMBER, 1.5]
STATS = (0.0,) * 3, (1.0,) * 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()


def images():
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def fit(**more):
    mn.fit(net(), toy_data(), CONFIG, quiet=True, **more)


def lowered():
    return mn.lower(net(), images())


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
