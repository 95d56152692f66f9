"One contract for every technique on every net: shapes, finite numbers, no growth, idempotence, removal to the bit."

import copy
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load, save
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.models import resnet
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.overrides import TorchFunctionMode

from micronet_nb.activations import (
    activation_quantisers,
    attach_quantiser,
    quantise_activations,
    remove_activation_quantisers,
)
from micronet_nb.core import MicronetError
from micronet_nb.data import load_dataset
from micronet_nb.distillation import kd_loss
from micronet_nb.layers import compressible, computing_weight, dense_weight, untouched
from micronet_nb.models import create_model, densenet_bc
from micronet_nb.pruning import (
    METHODS,
    erk_rates,
    global_rates,
    magnitude_mask,
    mask_of,
    masks,
    op_sparsity,
    param_sparsity,
    prune,
    remove_pruning,
)
from micronet_nb.scoring import score, trace
from micronet_nb.sensitivity import measure_sensitivity
from micronet_nb.training import FitConfig, fit
from micronet_nb.weights import quantise_weights, quantiser_of, remove_weight_quantisers, specs_of

CLASSES = 10
MIX = [["ds_r1_k3_s1_e1_c16"], ["ir_r1_k3_a1.1_p1.1_s2_e6_c24"], ["ir_r2_k3.5.7_s2_e6_c40_se0.5_nsw"]]
NETS = {
    "densenet_bc": (lambda: densenet_bc(10, 4, CLASSES), 8),
    "mixnet": (
        lambda: EfficientNet(decode_arch_def(MIX), CLASSES, num_features=64, stem_size=16),
        16,
    ),  # MixNet-S's kinds of blocks
    "resnet": (lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), CLASSES, channels=(8, 16, 32, 64)), 16),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, CLASSES)), 8),
}
WHOLE = {
    "mixnet_s": (lambda: create_model("mixnet_s", CLASSES, small=True), 16)
}  # full size: with all techniques at once


@dataclass
class Technique:
    apply: callable  # (model, images) -> callback of `fit`, or None
    remove: callable  # model -> None; the float net comes back


def pruned(method):
    return Technique(lambda m, x: prune(m, erk_rates(m, 0.6), method), lambda m: remove_pruning(m, restore=True))


def activations(learn):
    return Technique(lambda m, x: quantise_activations(m, [x], 4, learn=learn) and None, remove_activation_quantisers)


def weights(learn):
    return Technique(
        lambda m, x: quantise_weights(m, 4, learn=learn) and None, lambda m: remove_weight_quantisers(m, restore=True)
    )


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
    remove_weight_quantisers(m, restore=True)
    remove_activation_quantisers(m)
    remove_pruning(m, restore=True)


TECHNIQUES = {
    "static": pruned("static"),
    "dynamic": pruned("dynamic"),
    "progressive": pruned("progressive"),
    "gradual": pruned("gradual"),
    "activations": activations(False),
    "activations, learned": activations(True),
    "weights": weights(False),
    "weights, learned": weights(True),
    "all": Technique(all_of, none_of),
}
each = pytest.mark.parametrize(
    "net, name", [*((n, t) for n in NETS for t in TECHNIQUES), *((n, "all") for n in WHOLE)], indirect=["net"]
)


@pytest.fixture
def net(request):
    "A net with used batch norms, and images for it."
    make, side = (NETS | WHOLE)[request.param]
    torch.manual_seed(0)
    model, x = make(), torch.randn(16, 3, side, side)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval(), x


def cost(model, x):
    return score(copy.deepcopy(model).eval(), tuple(x.shape[1:]), "cifar100")


@each
def test_the_scorer_needs_no_telling(net, name):
    "What it reads off masks and quantisers is what `specs_of` writes down."
    model, x = net
    TECHNIQUES[name].apply(model, x)
    size = tuple(x.shape[1:])
    graph = trace(model, size)
    for accounting in ("official", "riair-cifar100"):
        by_specs, by_modules = (score(graph, size, "cifar100", accounting, specs=s) for s in (specs_of(model), None))
        assert by_specs.layers.equals(by_modules.layers) and by_specs.score == by_modules.score, accounting


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def answers(model, x):
    with torch.no_grad():
        return model(x)


class Clip:
    "An untrained mixnet_s of few bits has gradients of 1e18: a hundred batch norms of nearly constant channels."

    def on_gradients(self, run):
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)


def some_digits(split, n, side):
    "Digits, as large as the net wants them."
    digits = load_dataset("digits", split).subset(n)
    return replace(
        digits,
        images=torch.nn.functional.interpolate(torch.as_tensor(digits.images).float(), size=side).to(torch.uint8),
    )


@each
def test_contract(net, name):
    model, x = net
    technique, before, plain, size = TECHNIQUES[name], state(model), answers(model, x), cost(model, x)
    technique.apply(model, x)
    out = answers(model, x)
    assert out.shape == plain.shape and torch.isfinite(out).all()
    after = cost(model, x)
    assert after.storage <= size.storage + ("activations" in name) * len(compressible(model))  # a scale a quantiser
    if name in ("static", "weights", "all"):
        # not the others: a gradual mask begins with nothing, and activations store their scales
        assert after.storage < 0.75 * size.storage
    once = state(model)
    (again if name == "all" else technique.apply)(model, x)
    assert same(state(model), once) and torch.equal(answers(model, x), out)
    technique.remove(model)
    assert same(state(model), before) and torch.equal(answers(model, x), plain)
    assert not [
        m
        for m in model.modules()
        if hasattr(m, "parametrizations") or m._forward_pre_hooks or type(m).__name__.endswith(("Mask", "Quantiser"))
    ]


@each
def test_survives_copying_and_storing(net, name):
    model, x = net
    other = copy.deepcopy(model)
    TECHNIQUES[name].apply(model, x)
    out = answers(model, x)
    assert torch.equal(answers(copy.deepcopy(model), x), out)
    TECHNIQUES[name].apply(other, 3 * x)  # the same structure, other numbers
    other.load_state_dict(load(save({k: v.contiguous() for k, v in model.state_dict().items()})))
    assert torch.equal(answers(other, x), out)
    with torch.autocast("cpu", torch.bfloat16):
        half = answers(model, x)
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
    config = FitConfig(epochs=2, batch_size=32, lr=0.01, warmup_epochs=0.0, augment="digits")
    run = fit(
        model,
        (digits, None),
        config,
        teacher=teacher,
        callbacks=[Clip(), *([callback] if callback else [])],
        loss=kd_loss(),
        quiet=True,
    )
    assert run.step == 6 and not same(state(model), before)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())
    if name in ("static", "all"):
        kept = {k: v for k, v in state(model).items() if k.endswith("mask")}
        assert kept and all(torch.equal(v, before[k]) for k, v in kept.items())
    if callback:
        assert param_sparsity(model) >= 0.6 - 0.005  # where the plan wanted it, at the end of a ramp too
    assert torch.isfinite(answers(model.eval(), x)).all()


@pytest.mark.parametrize("net", NETS, indirect=True)
def test_sensitivity_takes_any_net_and_leaves_it(net):
    model, x = net
    side = x.shape[-1]
    digits = some_digits("valid", 32, side)
    few = list(compressible(model))[:3]
    before = state(model)
    table = measure_sensitivity(
        model, (digits, digits), sparsities=(0.5,), weight_bits=(4,), activation_bits=(4,), layers=few
    )
    assert same(state(model), before)
    assert set(table.layer) == set(few) and len(table) == 3 * len(few) and table.loss.notna().all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, x: prune(m, 1.5), ["1.5"]),
        (lambda m, x: prune(m, 0.5, "sideways"), ["sideways", "static"]),
        (lambda m, x: prune(m, {"nothing*": 0.5}), ["nothing*"]),
        (lambda m, x: quantise_weights(m, 0), ["0"]),
        (lambda m, x: quantise_weights(m, [4]), ["1"]),
        (lambda m, x: quantise_activations(m, [x], 99), ["99"]),
        (lambda m, x: quantise_activations(m, [], 4), ["image"]),
        (lambda m, x: quantise_activations(m, [x * float("nan")], 4), ["NaN"]),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, words):
    model, x = NETS["mlp"][0](), torch.randn(4, 3, 8, 8)
    before = state(model)
    with pytest.raises(MicronetError) as e:
        call(model, x)
    for w in words:
        assert w in str(e.value)
    assert same(state(model), before)


# What masks and quantisers reach, and what they do not.


class Everything(nn.Module):
    "A weight of every kind; masks and quantisers reach convolutions, `head` and the projection behind the attention."

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.deep = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Conv3d(1, 1, 3, padding=1)
        self.along, self.attend, self.words = (
            nn.Conv1d(4, 4, 3, padding=1),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Embedding(7, 4),
        )
        self.bare, self.norm, self.head = nn.Parameter(torch.randn(4, 4)), nn.LayerNorm(4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.deep(self.up(self.stem(x))[:, None])[:, 0]
        x = self.along(x.flatten(2)).transpose(1, 2)
        x = self.norm(self.attend(x, x, x)[0]) + self.words(torch.zeros(1, dtype=torch.long))
        return self.head(F.linear(x, self.bare).mean(1))


PASSED_BY = {
    "deep.weight": 27,
    "attend.in_proj_weight": 3 * 4 * 4,
    "words.weight": 7 * 4,
    "bare": 4 * 4,
}
REACHED = {
    "stem.weight": 4 * 3 * 3 * 3,
    "up.weight": 4 * 4 * 2 * 2,
    "along.weight": 4 * 4 * 3,
    "attend.out_proj.weight": 4 * 4,
    "head.weight": 10 * 4,
}  # 119 of 395 weights are passed by
every_call = pytest.mark.parametrize(
    "call",
    [lambda m, x: prune(m, 0.5), lambda m, x: quantise_weights(m, 4), lambda m, x: quantise_activations(m, [x], 4)],
)


@every_call
def test_what_is_passed_by_comes_with_every_call(call):
    torch.manual_seed(0)
    model, x = Everything().eval(), torch.randn(4, 3, 6, 6)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = call(model, x)
    table = done.untouched
    beyond = table[table.why == "out of reach"]
    assert dict(beyond.weights) == PASSED_BY
    assert beyond.share.sum() == pytest.approx(sum(PASSED_BY.values()) / sum((PASSED_BY | REACHED).values()))
    words = [str(w.message) for w in told if "passes by" in str(w.message)]
    assert len(words) == 1 and "30% of the weights" in words[0]
    assert "attend.in_proj_weight (MultiheadAttention)" in words[0]
    assert "unpack_attention makes layers of attention" in words[0]
    assert told[-1].filename == __file__  # it points at the call
    ran = ["attend.out_proj.weight"] if hasattr(done, "items") and "head" in activation_quantisers(model) else []
    assert list(table.index[table.why == "did not run"]) == ran  # attention reads that weight itself


def test_where_the_zeros_are_is_what_was_reached():
    "Independently of the list: after pruning by half, the tensors without a zero are those that it names."
    torch.manual_seed(0)
    model = Everything()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="passes by 30%"):
        prune(model, 0.5)
    remove_pruning(model)
    whole = {n for n, p in model.named_parameters() if p.dim() > 1 and torch.equal(p, before[n])}
    assert whole == set(PASSED_BY)
    assert param_sparsity(model) == (sum(REACHED.values()) // 2) / sum((PASSED_BY | REACHED).values())


def test_layers_that_a_plan_leaves_out_are_listed_and_no_warning_is_given():
    model = NETS["mlp"][0]()
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dict(prune(model, {"3": 0.5}).untouched.why) == {"1.weight": "rate 0"}
        done = quantise_weights(model, {"3": 4})
        assert (
            done == {"1": 32, "3": 4}
            and dict(done.untouched.why) == {"1.parametrizations.weight.original": "32 bits"}
            or dict(done.untouched.why) == {"1.weight": "32 bits"}
        )
        assert dict(quantise_activations(model, [x], {"1": 4}).untouched.why) == {
            "3.parametrizations.weight.original": "32 bits"
        }
        assert not len(quantise_weights(copy.deepcopy(model), 4, learn=True).untouched)  # learned steps are no weights
        assert copy.deepcopy(done).untouched.equals(done.untouched)


class Handed(TorchFunctionMode):
    "The weights that convolutions are handed, seen from outside."

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "conv2d":
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d, Conv2dSame])
def test_sparsity_is_that_of_the_weights_that_compute(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(3, 8, 3, bias=False)), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model[0].weight.masked_fill_(~magnitude_mask(model[0].weight, 0.7), 0.0)
        with Handed() as handed:
            model(x)
    zeros = float((handed.weights[0] == 0).float().mean())
    assert (zeros > 0.69) == (kind is Conv2dSame)
    assert param_sparsity(model) == op_sparsity(model, (3, 8, 8)) == pytest.approx(zeros, abs=1e-7)
    assert torch.equal(computing_weight(model[0]), handed.weights[0]) and model.training


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_layers_that_make_another_weight_are_refused_or_left_whole(kind):
    model, x = (
        nn.Sequential(kind(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        torch.randn(2, 3, 8, 8),
    )
    with pytest.warns(UserWarning, match="passes by"):
        prune(model, {"3": 0.5})
    before, digits = state(model), some_digits("valid", 16, 8)
    for call in (
        lambda: prune(model, 0.7),
        lambda: prune(model, 0.7, "gradual"),
        lambda: quantise_weights(model, 4),
        lambda: measure_sensitivity(model, (digits, digits), weight_bits=(), activation_bits=(), quiet=True),
    ):
        with pytest.raises(MicronetError, match=f"{kind.__name__} '0' makes another weight"):
            call()
        assert same(state(model), before)
    beyond = [f"0.{n}" for n, p in model[0].named_parameters() if p.dim() > 1]  # a scaled one has a gain, too
    with pytest.warns(UserWarning, match=f"passes by {73 if len(beyond) == 1 else 74}% of the weights"):
        pruner = prune(model, {"3": 0.7})
    assert list(untouched(model).index) == beyond == list(pruner.untouched.index)
    table = measure_sensitivity(
        model, (digits, digits), sparsities=(), weight_bits=(), activation_bits=(4,), quiet=True
    )
    assert set(table.layer) == {"0", "3"}


MAKERS = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "prune": (
        lambda m: torch_prune.l1_unstructured(m, "weight", amount=0.25),
        lambda m: torch_prune.remove(m, "weight"),
    ),
    "remove_parametrizations": (
        parametrizations.weight_norm,
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_a_weight_that_torch_makes_of_others_is_named_with_its_remedy(name):
    wrap, undo = MAKERS[name]
    torch.manual_seed(0)
    model, digits = nn.Sequential(nn.Flatten(), wrap(nn.Linear(192, 10))), some_digits("valid", 16, 8)
    before = state(model)
    calls = [
        lambda: prune(model, 0.5),
        lambda: quantise_weights(model, 4),
        lambda: global_rates(model, 0.5),
        lambda: erk_rates(model, 0.5),
    ]
    if name != "remove_parametrizations":
        # left out there because `measure_sensitivity` resolves a parametrization
        none = dict(weight_bits=(), activation_bits=())
        calls.append(lambda: measure_sensitivity(model, (digits, digits), quiet=True, **none))
    for call in calls:
        with pytest.raises(MicronetError, match=f"keeps no dense weight of '1': undo it first, with .*{name}"):
            call()
        assert same(state(model), before)
    assert {n.split(".")[-1][:8] for n in untouched(model).index} <= {
        "weight_g",
        "weight_v",
        "weight_o",
        "original",
    } and len(untouched(model))
    undo(model[1])
    assert param_sparsity(model) == (0.25 if name == "prune" else 0)
    prune(model, 0.5)
    quantise_weights(model, 4)
    assert mask_of(model[1]) and quantiser_of(model[1]) and not len(untouched(model))


def test_a_spectral_norm_that_keeps_its_weight_can_be_pruned_and_reading_it_does_not_move_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(192, 10))).train()
    before = state(model)
    prune(model, 0.5)
    assert param_sparsity(model) == 0.5 and int((model[1].weight == 0).sum()) == 960
    remove_pruning(copy.deepcopy(model), restore=True)
    model = nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(192, 10))).train()
    before = state(model)
    param_sparsity(model), untouched(model), computing_weight(model[1])
    assert same(state(model), before)
    with pytest.raises(MicronetError, match="makes another weight of the one that is masked"):
        prune(nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8))), 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: prune(m, 0.5),
        lambda m, x: quantise_weights(m, 4),
        lambda m, x: quantise_activations(m, [x], 4),
        lambda m, x: erk_rates(m, 0.5),
        lambda m, x: param_sparsity(m),
        lambda m, x: untouched(m),
        lambda m, x: fit(m, (some_digits("train", 64, 8), None), FitConfig(epochs=1), quiet=True),
    ],
)
def test_a_lazy_module_is_named(call):
    model, x = nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), torch.randn(2, 3, 8, 8)
    with pytest.raises(
        MicronetError,
        match="needs the shape of '1.weight', a parameter of a lazy module: run the model on one batch first",
    ):
        call(model, x)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, x)


class ByName(nn.Module):
    "Calls its layers by keyword."

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(input=self.conv(input=x).relu().mean((2, 3)))


class ByPlace(ByName):
    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_layers_called_by_keyword_are_quantised_alike():
    torch.manual_seed(0)
    model, x, digits = ByName().eval(), torch.randn(8, 3, 8, 8), some_digits("valid", 32, 8)
    twin = ByPlace().eval()
    twin.load_state_dict(model.state_dict())
    plain = answers(model, x)
    for m in (model, twin):
        quantise_activations(m, [x], 3)
    assert torch.equal(answers(model, x), answers(twin, x)) and not torch.equal(answers(model, x), plain)
    assert torch.equal(answers(copy.deepcopy(model), x), answers(twin, x))
    a, b = (measure_sensitivity(m, (digits, digits), (), (), (3,), quiet=True) for m in (model, twin))
    assert a.equals(b) and a.increase.abs().max() > 0
    remove_activation_quantisers(model)
    assert torch.equal(answers(model, x), plain) and not any(
        m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules()
    )
    with pytest.raises(MicronetError, match="stands before a module that is called"):
        attach_quantiser(model.conv.weight, activation_quantisers(twin)["conv"])


# What happens while a net trains: the same in `fit` and in a loop of one's own.

TINY = FitConfig(epochs=3, batch_size=32, lr=0.05, momentum=0.9, weight_decay=1e-2, warmup_epochs=0.0, augment="none")


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


class Steps:
    "Dense weights and masks before and after each step, and what the net was fed."

    def __init__(self):
        self.rows, self.fed, self.lr = [], [], []

    def see(self, model):
        return {n: (dense_weight(m).detach().clone(), k.mask.clone()) for n, (m, k) in masks(model).items()}

    def on_step(self, run):
        self.lr.append(run.lr)

    def on_gradients(self, run):
        self.now = self.see(run.model)

    def on_update(self, run):
        self.rows.append((self.now, self.see(run.model)))

    def loss(self, logits, target, teacher_logits, config):
        self.fed.append((self.x, target))
        return F.cross_entropy(logits, target)


@pytest.fixture(scope="module")
def trained():
    "Method to (what was seen step by step, the net after `fit`, its pruner)."
    digits, runs = some_digits("train", 192, 8), {}
    for method in METHODS:
        model, steps = tiny(), Steps()
        model[0].register_forward_pre_hook(lambda m, args: setattr(steps, "x", args[0].clone()))
        pruner = prune(model, 0.8, method)
        fit(model, (digits, None), TINY, callbacks=[pruner, steps], loss=steps.loss, quiet=True)
        runs[method] = steps, model, pruner
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_masked_weights_hold_still_unless_dynamic(trained, method):
    "Weight decay and momentum would move them; under dynamic they are ordinary weights."
    steps, model, _ = trained[method]
    moved = [
        bool((w[~mask] != old[~mask]).any())
        for before, after in steps.rows
        for (old, mask), (w, _) in zip(before.values(), after.values(), strict=True)
    ]
    assert len(steps.rows) == 18 and (all(moved) if method == "dynamic" else not any(moved))
    kept = [
        bool((w[mask] != old[mask]).any())
        for before, after in steps.rows[1:]
        for (old, mask), (w, _) in zip(before.values(), after.values(), strict=True)
    ]
    assert all(kept)


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_renewed_when_the_method_says(trained, method):
    "By hand: at every step the mask is that of the magnitudes, at the rate of the moment, when it was last renewed."
    steps, _, _ = trained[method]
    first = steps.rows[0][0]
    for s, (before, _) in enumerate(steps.rows):
        for n, (w, mask) in before.items():
            rate = 0.8 * (1 - (1 - min(s / 17 / 0.75, 1.0)) ** 3) if method == "gradual" else 0.8
            assert int((~mask).sum()) == round(rate * mask.numel())
            renewed = dict(static=s == 0, dynamic=True, progressive=s % 6 == 0, gradual=(s - 1) / 17 < 0.75)[method]
            if renewed:
                assert torch.equal(mask, magnitude_mask(w, rate))
            else:
                assert torch.equal(mask, steps.rows[s - 1][0][n][1])
    last = steps.rows[-1][0]
    assert all(torch.equal(first[n][1], last[n][1]) for n in first) == (method == "static")


def test_a_dynamic_mask_lets_the_gradient_through():
    "That of the zero which stands in the weight's place: by hand, the outer product of what comes and what goes."
    for method in ("static", "dynamic"):
        torch.manual_seed(0)
        model, x, g = nn.Sequential(nn.Linear(6, 4, bias=False)), torch.randn(3, 6), torch.randn(3, 4)
        prune(model, 0.5, method)
        model(x).backward(g)
        whole = g.t() @ x
        torch.testing.assert_close(
            dense_weight(model[0]).grad, whole if method == "dynamic" else whole * mask_of(model[0]).mask
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_of_ones_own_prunes_as_fit_does(trained, method):
    "The same batches and learning rates in a plain loop give the same weights, masks and momenta to the bit."
    steps, by_fit, _ = trained[method]
    model = tiny().train()
    pruner = prune(model, 0.8, method)
    optimizer = torch.optim.SGD(
        model.parameters(), TINY.lr, TINY.momentum, weight_decay=TINY.weight_decay, nesterov=True
    )
    assert pruner.attach(model, optimizer, steps=len(steps.fed), steps_an_epoch=6) is pruner
    for (x, y), lr in zip(steps.fed, steps.lr, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert same(state(model), state(by_fit)) and param_sparsity(model) == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(MicronetError, match="the run of 18 steps that `attach` was told of is over"):
        pruner.step()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimisers_keep_masked_weights_too(make):
    torch.manual_seed(0)
    model = tiny().train()
    pruner, optimizer = prune(model, 0.8, "gradual"), make(model.parameters(), 1e-2, weight_decay=0.1)
    pruner.attach(model, optimizer, steps=12)
    for _ in range(12):
        before = {n: (dense_weight(m).detach().clone(), k.mask.clone()) for n, (m, k) in masks(model).items()}
        model(torch.randn(32, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        for n, (m, _) in masks(model).items():
            assert torch.equal(dense_weight(m)[~before[n][1]], before[n][0][~before[n][1]])
    assert param_sparsity(model) == pytest.approx(0.8, abs=1e-3)


def test_a_pruner_without_its_run_says_so():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(MicronetError, match=r"call pruner.attach\(model, optimizer, steps\) before the loop"):
        prune(model, 0.5, "gradual").step()
    with pytest.raises(MicronetError, match="gradual pruning needs steps, a whole number from 1 on, not None"):
        prune(model, 0.5, "gradual").attach(model, optimizer, None)
    with pytest.raises(MicronetError, match="progressive pruning needs steps_an_epoch"):
        prune(model, 0.5, "progressive").attach(model, optimizer, 10)


def test_a_weight_that_comes_back_is_at_rest():
    "Where the mask is renewed, the optimiser forgets what weight decay has told it of the masked weights."
    model = tiny().train()
    pruner, optimizer = (
        prune(model, 0.8, "progressive"),
        torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-2),
    )
    pruner.attach(model, optimizer, steps=6, steps_an_epoch=3)
    for s in range(6):
        model(torch.randn(32, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        was = {n: k.mask.clone() for n, (_, k) in masks(model).items()}
        pruner.step()
        for n, (m, _) in masks(model).items():
            hidden = optimizer.state[dense_weight(m)]["momentum_buffer"][~was[n]]
            assert (hidden == 0).all() if s == 2 else (hidden != 0).any()
