"""Compressing image classifiers: pruning, distillation, quantisation, and what the result costs as integers.

`import micronet_nb as mn` gives the verbs; each loads its module when it is first used."""

__version__ = "0.1.0"

_MODULE_OF = {
    # nets and data
    'create_model': 'models',
    'load_published': 'released',
    'published_nets': 'released',
    'load_released': 'released',
    'load_dataset': 'data',
    'imagenet_sample': 'data',
    # training
    'FitConfig': 'training',
    'fit': 'training',
    'evaluate': 'training',
    'normalised': 'training',
    'estimate_norms': 'training',
    'kd_loss': 'distillation',
    'AsTeacher': 'distillation',
    'Ensemble': 'distillation',
    # pruning
    'measure_sensitivity': 'sensitivity',
    'plan_from_sensitivity': 'sensitivity',
    'uniform_rates': 'pruning',
    'global_rates': 'pruning',
    'erk_rates': 'pruning',
    'prune': 'pruning',
    'remove_pruning': 'pruning',
    'param_sparsity': 'pruning',
    'untouched': 'layers',
    'unpack_attention': 'layers',
    'plain_layers': 'layers',
    # quantisation
    'calibrate': 'activations',
    'quantise_activations': 'activations',
    'quantise_products': 'activations',
    'remove_activation_quantisers': 'activations',
    'quantise_weights': 'weights',
    'remove_weight_quantisers': 'weights',
    'choose_bits': 'weights',
    # without training
    'compress': 'compressing',
    'photo_crops': 'compressing',
    'reconstruct': 'post_training',
    'reconstruct_blocks': 'post_training',
    'equalise': 'post_training',
    # what it costs, and what runs
    'score': 'scoring',
    'lower': 'lowering',
    'run_integer': 'integer',
    'Runner': 'runtime',
    'pack': 'packing',
    'unpack': 'packing',
    'to_onnx': 'onnx',
    # nets of one's own
    'operation': 'integer',
    'try_operation': 'onnx',
    'check': 'own_nets',
    'save_net': 'own_nets',
    'load_net': 'own_nets',
}

__all__ = [*_MODULE_OF]


def __getattr__(name):
    "A verb, from the module that has it."
    from importlib import import_module
    from importlib.util import find_spec

    if name not in _MODULE_OF:
        if not name.startswith('_') and find_spec(f'{__name__}.{name}'):
            return import_module(f'.{name}', __name__)
        british = name.replace('iz', 'is')
        hint = f'; British spelling: {british}' if british in _MODULE_OF else ''
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}{hint}')

    globals()[name] = verb = getattr(import_module(f'.{_MODULE_OF[name]}', __name__), name)
    return verb


def __dir__():
    return sorted([*__all__, '__version__'])
