"One contract for every technique on every net: shapes, finite numbers, no growth, idempotence, removal to the bit, and training in between."
import copy
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load, save
from timm.models import resnet
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

from micronet_nb.activations import quantise_activations, remove_activation_quantisers
from micronet_nb.core import MicronetError
from micronet_nb.data import load_dataset
from micronet_nb.distillation import kd_loss
from micronet_nb.models import create_model, densenet_bc
from micronet_nb.pruning import erk_rates, param_sparsity, prune, remove_pruning
from micronet_nb.scoring import compressible, score
from micronet_nb.sensitivity import sensitivity
from micronet_nb.training import FitConfig, fit
from micronet_nb.weights import quantise_weights, remove_weight_quantisers, specs_of

CLASSES = 10
MIX = [["ds_r1_k3_s1_e1_c16"], ["ir_r1_k3_a1.1_p1.1_s2_e6_c24"], ["ir_r2_k3.5.7_s2_e6_c40_se0.5_nsw"]]
NETS = {
    "densenet_bc": (lambda: densenet_bc(10, 4, CLASSES), 8),
    "mixnet": (lambda: EfficientNet(decode_arch_def(MIX), CLASSES, num_features=64, stem_size=16), 16),  # MixNet-S's kinds of blocks
    "resnet": (lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), CLASSES, channels=(8, 16, 32, 64)), 16),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, CLASSES)), 8)}
WHOLE = {"mixnet_s": (lambda: create_model("mixnet_s", CLASSES, small=True), 16)}  # full size: with all techniques at once


@dataclass
class Technique:
    apply: callable    # (model, images) -> callback of `fit`, or None
    remove: callable   # model -> None; the float net comes back

def pruned(method): return Technique(lambda m, x: prune(m, erk_rates(m, 0.6), method), lambda m: remove_pruning(m, restore=True))
def activations(learn): return Technique(lambda m, x: quantise_activations(m, [x], 4, learn=learn) and None, remove_activation_quantisers)
def weights(learn): return Technique(lambda m, x: quantise_weights(m, 4, learn=learn) and None, remove_weight_quantisers)
def all_of(m, x):
    pruner = prune(m, 0.6, "static")
    quantise_activations(m, [x], 4)
    quantise_weights(m, 4)
    return pruner
def again(m, x):
    "Not the activations: their steps are found in the net as it is, and its weights have changed since."
    prune(m, 0.6, "static")
    quantise_weights(m, 4)
def none_of(m):
    remove_weight_quantisers(m)
    remove_activation_quantisers(m)
    remove_pruning(m, restore=True)


TECHNIQUES = {"static": pruned("static"), "dynamic": pruned("dynamic"), "progressive": pruned("progressive"), "gradual": pruned("gradual"),
              "activations": activations(False), "activations, learned": activations(True), "weights": weights(False), "weights, learned": weights(True),
              "all": Technique(all_of, none_of)}
each = pytest.mark.parametrize("net, name", [*((n, t) for n in NETS for t in TECHNIQUES), *((n, "all") for n in WHOLE)], indirect=["net"])


@pytest.fixture
def net(request):
    "A net with used batch norms, and images for it."
    make, side = (NETS | WHOLE)[request.param]
    torch.manual_seed(0)
    model, x = make(), torch.randn(16, 3, side, side)
    with torch.no_grad():
        for _ in range(3): model(x)
    return model.eval(), x


def cost(model, x): return score(copy.deepcopy(model).eval(), tuple(x.shape[1:]), "cifar100", specs=specs_of(model))
def state(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def answers(model, x):
    with torch.no_grad(): return model(x)


class Clip:
    "An untrained mixnet_s of few bits has gradients of 1e18: batch norms of nearly constant channels, a hundred in a row."
    def on_gradients(self, run): torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.)


def some_digits(split, n, side):
    "Digits, as large as the net wants them."
    digits = load_dataset("digits", split).subset(n)
    return replace(digits, images=torch.nn.functional.interpolate(torch.as_tensor(digits.images).float(), size=side).to(torch.uint8))


@each
def test_contract(net, name):
    model, x = net
    technique, before, plain, size = TECHNIQUES[name], state(model), answers(model, x), cost(model, x)
    technique.apply(model, x)
    out = answers(model, x)
    assert out.shape == plain.shape and torch.isfinite(out).all()
    after = cost(model, x)
    assert after.storage <= size.storage + ("activations" in name) * len(compressible(model))  # a scale a quantiser
    if name in ("static", "weights", "all"): assert after.storage < 0.75 * size.storage  # a gradual mask begins with nothing, a scale is all that activations store
    once = state(model)
    (again if name == "all" else technique.apply)(model, x)
    assert same(state(model), once) and torch.equal(answers(model, x), out)
    technique.remove(model)
    assert same(state(model), before) and torch.equal(answers(model, x), plain)
    assert not [m for m in model.modules() if hasattr(m, "parametrizations") or m._forward_pre_hooks or type(m).__name__.endswith(("Mask", "Quantiser"))]


@each
def test_survives_copying_and_storing(net, name):
    model, x = net
    other = copy.deepcopy(model)
    TECHNIQUES[name].apply(model, x)
    out = answers(model, x)
    assert torch.equal(answers(copy.deepcopy(model), x), out)
    TECHNIQUES[name].apply(other, 3*x)  # the same structure, other numbers
    other.load_state_dict(load(save({k: v.contiguous() for k, v in model.state_dict().items()})))
    assert torch.equal(answers(other, x), out)
    with torch.autocast("cpu", torch.bfloat16): half = answers(model, x)
    assert torch.isfinite(half).all()
    TECHNIQUES[name].remove(copy.deepcopy(model))
    assert torch.equal(answers(model, x), out)  # what is done to a copy stays with the copy


@each
def test_trains(net, name):
    "Two epochs with a teacher: finite, changed, and as sparse as planned at the end."
    model, x = net
    side = x.shape[-1]
    digits = some_digits("train", 96, side)
    teacher = copy.deepcopy(model)
    callback = TECHNIQUES[name].apply(model, x)
    before = state(model)
    config = FitConfig(epochs=2, batch_size=32, lr=.01, warmup_epochs=0., augment="digits")
    run = fit(model, (digits, None), config, teacher=teacher, callbacks=[Clip(), *([callback] if callback else [])], loss=kd_loss(), quiet=True)
    assert run.step == 6 and not same(state(model), before)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())
    if name in ("static", "all"):
        kept = {k: v for k, v in state(model).items() if k.endswith("mask")}
        assert kept and all(torch.equal(v, before[k]) for k, v in kept.items())
    if callback: assert param_sparsity(model) >= 0.6 - 0.005  # where the plan wanted it, at the end of a ramp too
    assert torch.isfinite(answers(model.eval(), x)).all()


@pytest.mark.parametrize("net", NETS, indirect=True)
def test_sensitivity_takes_any_net_and_leaves_it(net):
    model, x = net
    side = x.shape[-1]
    digits = some_digits("valid", 32, side)
    few = list(compressible(model))[:3]
    before = state(model)
    table = sensitivity(model, (digits, digits), sparsities=(0.5,), weight_bits=(4,), activation_bits=(4,), layers=few)
    assert same(state(model), before)
    assert set(table.layer) == set(few) and len(table) == 3 * len(few) and table.loss.notna().all()


@pytest.mark.parametrize("call, words", [
    (lambda m, x: prune(m, 1.5), ["1.5"]),
    (lambda m, x: prune(m, 0.5, "sideways"), ["sideways", "static"]),
    (lambda m, x: prune(m, {"nothing*": 0.5}), ["nothing*"]),
    (lambda m, x: quantise_weights(m, 0), ["0"]),
    (lambda m, x: quantise_weights(m, [4]), ["1"]),
    (lambda m, x: quantise_activations(m, [x], 99), ["99"]),
    (lambda m, x: quantise_activations(m, [], 4), ["image"]),
    (lambda m, x: quantise_activations(m, [x * float("nan")], 4), ["NaN"])])
def test_bad_input_is_named_and_changes_nothing(call, words):
    model, x = NETS["mlp"][0](), torch.randn(4, 3, 8, 8)
    before = state(model)
    with pytest.raises(MicronetError) as e: call(model, x)
    for w in words: assert w in str(e.value)
    assert same(state(model), before)
