"Compiled code for whole nets: the graph's bits, whatever the shapes, the batch, the threads, and what memory held."

import os
import platform
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from micronet_nb import native, runtime
from micronet_nb.activations import quantise_activations
from micronet_nb.core import MicronetError
from micronet_nb.integer import IntConv2d, IntLinear, Quantise, ScaleBias, as_graph, in_evaluation
from micronet_nb.lowering import lower
from micronet_nb.native import Native, native_steps
from micronet_nb.runtime import Runner
from micronet_nb.weights import quantise_weights

pytestmark = pytest.mark.skipif(native._compiler() is None, reason="a C++ compiler is needed")


def on_eight_bits(net, x):
    "The lowered graph of a net whose weights and inputs have 8 bits."
    quantise_weights(net.eval(), 8)
    quantise_activations(net, x, 8, affine=True)
    return in_evaluation(lower(net, x))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def named(name, side=32, n=5):
    torch.manual_seed(0)
    net, x = timm.create_model(name, num_classes=10), torch.randn(n, 3, side, side)
    return on_eight_bits(net, x), x


def theirs(graph, x):
    "How many operations are left to PyTorch."
    return sum(count for what, count in native_steps(graph, x).items() if what.startswith("PyTorch"))


def assert_bits(graph, x, groups=(1, 3)):
    with torch.inference_mode():
        for group in groups:
            net = Native(graph, x, group)
            for part in (x, x[:1], x[1:]):
                assert torch.equal(net(part), graph(part))


@pytest.mark.parametrize(
    "name, left",
    [
        ("mobilenetv2_035", 0),
        ("mobilenetv3_small_050", 0),
        ("resnet18", 0),
        ("mixnet_s", 0),
        ("tf_efficientnet_lite0", 0),
        ("efficientnet_b0", 0),
        ("densenet121", 0),
        ("regnety_002", 0),
        ("convnext_atto", None),
        ("vit_tiny_patch16_224", None),
    ],
)
def test_the_bits_of_nets_that_people_use(name, left):
    if name.startswith("vit"):
        torch.manual_seed(0)
        net, x = timm.create_model(name, num_classes=10, img_size=32, depth=2), torch.randn(3, 3, 32, 32)
        graph = on_eight_bits(net, x)
    else:
        graph, x = named(name)
    assert_bits(graph, x)
    assert left is None or theirs(graph, x) == left


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_convolution_of_any_shape(data):
    pick = lambda *of: data.draw(st.sampled_from(of))
    groups = pick(1, 1, 2, "deep")
    inner = pick(1, 2, 3, 8, 17, 40)
    channels = inner * (groups if isinstance(groups, int) else 1)
    outer = channels if groups == "deep" else pick(1, 7, 8, 16, 33) * groups if groups == 1 else 8 * groups
    shape = dict(kernel_size=(pick(1, 2, 3, 5), pick(1, 3)), stride=pick(1, 2, (2, 1)), dilation=pick(1, 2))
    shape |= dict(padding=(pick(0, 1, 3), pick(0, 2)), groups=channels if groups == "deep" else groups)
    size = pick(7, 12), pick(9, 16)
    spans = [(k - 1) * shape["dilation"] + 1 for k in shape["kernel_size"]]
    assume(all(span <= n + 2 * p for span, n, p in zip(spans, size, shape["padding"])))
    bits, low = pick(1, 4, 8, 12), pick(0, -3, -1)
    q = Quantise(bits, low=max(low, 1 - 2**bits))
    conv = IntConv2d(channels, outer, **shape, weight_bits=8, wide=True)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    conv.weight.data = torch.randint(-128, 128, conv.weight.shape, generator=g).float()
    scale, last = ScaleBias(outer), pick(None, Quantise(8, low=-9), Quantise(4))
    scale.weight.data, scale.bias.data = torch.rand(outer, generator=g) / 999, torch.randn(outer, generator=g)
    between = pick(nn.Identity, nn.ReLU, nn.Hardswish, nn.SiLU, nn.Sigmoid, nn.Hardtanh, nn.LeakyReLU)()
    layers = [ScaleBias(1), q, conv, scale, between, *([ScaleBias(outer), last] if last else [])]
    graph = in_evaluation(as_graph(nn.Sequential(*layers).eval()))
    x = torch.randn(pick(2, 3, 5), channels, *size, generator=g) * 2 ** (bits - 1)
    assert theirs(graph, x) == 0
    assert_bits(graph, x, (pick(1, 2, 4),))


def test_sums_that_float32_does_not_hold():
    "Made in 32 bits and rounded once, as the graph's in float64; where the graph does not, they stay with it."
    for wide in (True, False):
        net = nn.Sequential(Quantise(15), IntConv2d(64, 8, 1, weight_bits=8, wide=wide), ScaleBias(8))
        net[1].weight.data.fill_(127.0)
        net[1].weight.data[:, ::2] = 126.0
        graph, x = in_evaluation(as_graph(net.eval())), torch.randint(2**14, 2**15, (2, 64, 3, 3)).float()
        assert int(net[1](x).max()) > 2**24
        assert theirs(graph, x) == (0 if wide else 1)
        assert_bits(graph, x)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_as_many_threads_as_there_are(threads):
    "Fewer images than threads: all work on the same. Sigmoids go by threads, too: large values are cut in parts."
    before = torch.get_num_threads()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 8, 1), nn.Sigmoid())
    x = torch.randn(7, 3, 37, 41)
    graph = on_eight_bits(net, x)
    one = Native(graph, x, 2)
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for n in (1, 2, 4, 7, 1):
                assert torch.equal(one(x[:n]), graph(x[:n]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (9, 9), (31, 33), (64, 72)])
def test_means_and_gates_of_any_size(size):
    torch.manual_seed(0)

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 19, 1), nn.Conv2d(19, 19, 1)

        def forward(self, x):
            x = self.conv(x)
            return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))) + F.silu(x)

    x = torch.randn(6, 3, *size)
    graph = on_eight_bits(Gate(), x)
    assert theirs(graph, x) == 0
    assert_bits(graph, x)


@pytest.mark.parametrize("size", [(3, 5), (9, 9), (32, 32), (64, 72)])
def test_a_mean_is_that_of_pytorch_to_the_last_bit(size):
    torch.manual_seed(0)
    layers = [ScaleBias(1), Quantise(8, low=-128), IntConv2d(3, 19, 1, weight_bits=8), ScaleBias(19)]
    layers[2].weight.data = torch.randint(-127, 128, layers[2].weight.shape).float()
    layers[3].weight.data, layers[3].bias.data = torch.rand(19), torch.randn(19)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*layers)

        def forward(self, x):
            return torch.mean(self.body(x), (2, 3))

    graph, x = in_evaluation(as_graph(Mean().eval())), 50 * torch.randn(4, 3, *size)
    assert theirs(graph, x) == 0
    assert_bits(graph, x)


def test_what_was_in_memory_does_not_matter():
    graph, x = named("mixnet_s")
    net = Native(graph, x)
    with torch.inference_mode():
        want = graph(x)
        for byte in (0, 127, 255):  # 255: NaN where there are floats
            net(x)
            net.arena.fill_(byte)
            for scratch in net.scratch:
                scratch.fill(byte)
            assert torch.equal(net(x), want)


def test_pads_windows_and_parts():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.deep = nn.Conv2d(3, 12, 1), nn.Conv2d(7, 7, 3, groups=7)
            self.last = nn.Conv2d(12, 5, 3, padding=2, dilation=2)

        def forward(self, x):
            x = F.pad(self.first(x), (1, 0, 2, 1))
            a, b = x[:, :7], x[:, 7:]
            a = F.pad(self.deep(a), (1, 1, 1, 1))
            x = torch.cat([a, b, a[:, 3:]], 1)[:, 2:14]
            x = F.max_pool2d(self.last(F.relu(x)), 3, 2, 1, ceil_mode=True)
            return F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)

    torch.manual_seed(0)
    x = torch.randn(5, 3, 13, 10)
    graph = on_eight_bits(Parts(), x)
    assert_bits(graph, x)
    assert theirs(graph, x) == 0


def test_hard_swish_of_every_order_of_magnitude():
    "A division by six is not a product with a sixth, whatever the exponent."
    scales = torch.tensor([10.0**k for k in range(-30, 31)])
    net = nn.Sequential(Quantise(8, low=-128), IntConv2d(1, 61, 1, weight_bits=8), ScaleBias(61), nn.Hardswish())
    net[1].weight.data.fill_(1.0)
    net[2].weight.data = scales
    graph, x = in_evaluation(as_graph(net.eval())), torch.arange(-128, 128).float().reshape(2, 1, 8, 16)
    assert_bits(graph, x)


def test_the_runner_takes_it_where_it_is_faster(monkeypatch):
    graph, x = named("mobilenetv2_035")
    for fast in ("native, 1", "native, 8", "tasks"):
        monkeypatch.setattr(runtime, "_milliseconds", lambda ways, values: {n: 1.0 + (n != fast) for n in ways})
        runner = Runner(graph)
        with torch.inference_mode():
            assert torch.equal(runner(x), graph(x))
            assert runner.choices.chosen["whole net"] == fast and runner.choices.attrs["not native"] == ""
            small = torch.randn(2, 3, 24, 24)  # another size: by tasks
            assert torch.equal(runner(small), graph(small)) and torch.equal(runner(x), graph(x))
        monkeypatch.undo()
    forced, refused = Runner(graph, native=True, timed=False), Runner(graph, native=False)
    assert torch.equal(forced(x), graph(x)) and torch.equal(refused(x), graph(x))
    assert forced.choices.chosen["whole net"].startswith("native")
    assert refused.choices.attrs["not native"] == "not asked for"
    with pytest.raises(MicronetError, match="native=True has no other ways"):
        Runner(graph, int8=False, native=True)


def test_other_bits_are_not_taken(monkeypatch):
    graph, x = named("mobilenetv2_035")
    monkeypatch.setattr(Native, "__call__", lambda self, x: self.graph(x) + 1)
    runner = Runner(graph)
    assert torch.equal(runner(x), graph(x))
    assert runner.choices.attrs["not native"] == "its bits are not those of the graph"
    with pytest.raises(MicronetError, match="native=True, but its bits are not"):
        Runner(graph, native=True)(x)


def test_a_net_without_layers_of_integers_is_left_alone():
    graph = in_evaluation(as_graph(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()))
    x = torch.randn(4, 3, 2, 2)
    runner = Runner(graph)
    assert torch.equal(runner(x), graph(x))
    assert runner.choices.attrs["not native"] == "nothing of this net is known there"


def in_a_process(code, **env):
    "Its output; the compiled interpreter is kept in a folder of this process's own where the cache is another."
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = """
    import torch
    import micronet_nb as mn
    from micronet_nb.runtime import Runner
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 20, 3, padding=1), torch.nn.Hardswish(), torch.nn.Conv2d(20, 20, 3, groups=20),
        torch.nn.SiLU(), torch.nn.Conv2d(20, 9, 1), torch.nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(5, 3, 13, 13)
    mn.quantise_weights(net, 8), mn.quantise_activations(net, x, 8, affine=True)
    graph = mn.lower(net, x)
"""


def test_without_a_compiler_there_is_one_way_less(tmp_path):
    code = SMALL + """
    runner = Runner(graph)
    assert torch.equal(runner(x), graph(x))
    print(runner.choices.attrs["not native"])
    """
    empty = str(tmp_path / "none")
    assert "no C++ compiler" in in_a_process(code, PATH=empty, CXX="", MICRONET_CACHE=str(tmp_path))
    broken = in_a_process(code, CXXFLAGS="--no-such-flag", MICRONET_CACHE=str(tmp_path))
    assert "does not compile the interpreter" in broken and "no-such-flag" in broken
    assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("*.cpp")]


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='its flags are those of x86')
def test_a_processor_without_vectors_gives_the_same_bits(tmp_path):
    code = SMALL + """
    from micronet_nb.native import Native, native_steps
    for group in (1, 4):
        assert torch.equal(Native(graph, x, group)(x), graph(x))
    print(native_steps(graph, x).to_dict())
    """
    plain = in_a_process(code, CXXFLAGS="-mno-avx2 -mno-avx -mno-fma", MICRONET_CACHE=str(tmp_path))
    assert "PyTorch's silu" in plain  # its exponential is another: left to PyTorch
    usual = in_a_process(code)
    assert "PyTorch's" not in usual or not native.gates_as_torch(True)


def test_a_damaged_library_is_told(tmp_path):
    code = """
    from micronet_nb.core import MicronetError
    from micronet_nb.native import interpreter
    try:
        interpreter()
    except MicronetError as e:
        print(e)
    """
    assert in_a_process(code, MICRONET_CACHE=str(tmp_path)) == ""
    (made,) = (tmp_path / "native").iterdir()
    made.write_bytes(b"no library")
    assert "delete it, and it is compiled anew" in in_a_process(code, MICRONET_CACHE=str(tmp_path))
    made.unlink()
    assert in_a_process(code, MICRONET_CACHE=str(tmp_path)) == ""


def test_numbers_that_are_left_over_are_those_of_pytorch():
    "Which numbers of a tensor does torch make one by one? Those that change when more follow."
    two = 2 * native._lanes()
    x = 4 * torch.randn(5 * two + 7, generator=torch.Generator().manual_seed(1))
    padded = torch.sigmoid(torch.cat([x, torch.zeros(two)]))[: len(x)]
    apart = (torch.sigmoid(x) != padded).nonzero().flatten()
    ((first, end),) = native._left_over(len(x), 1)
    assert (first, end) == (5 * two, 5 * two + 7) and all(first <= i < end for i in apart.tolist())


def test_a_linear_layer_of_many_kernels():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(Quantise(8, low=-100), IntLinear(77, 203, weight_bits=8), ScaleBias(203))
    net[1].weight.data = torch.randint(-128, 128, net[1].weight.shape, generator=g).float()
    graph, x = in_evaluation(as_graph(net.eval())), 60 * torch.randn(5, 77, generator=g)
    assert theirs(graph, x) == 0
    assert_bits(graph, x)
    assert np.isfinite(Native(graph, x)(x).numpy()).all()


def test_memory_of_all_images_lasts_as_long_as_its_segments():
    "Threads are at different places of a segment: what one has read, another may need yet."
    graph, x = named("convnext_atto")  # GELUs stay with PyTorch
    plan = native._Plan(graph, x[:2], native._lanes())
    parts, _, _ = plan.place()
    used = plan.uses(parts)
    shared = [(m, {segment for segment, _ in times}) for m, times in used.items() if m.shared]
    assert len(shared) > 5
    for i, (a, of_a) in enumerate(shared):
        for b, of_b in shared[i + 1 :]:
            apart = max(of_a) < min(of_b) or max(of_b) < min(of_a)
            assert apart or a.offset + a.image <= b.offset or b.offset + b.image <= a.offset


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_has_threads_of_its_own(two_threads):
    graph, x = named("mobilenetv2_035")
    net, want = Native(graph, x), graph(x)
    assert torch.equal(net(x), want)
    if not (child := os.fork()):
        signal.alarm(60)  # a thread that is waited for and is not there would be waited for in vain
        os._exit(0 if torch.equal(net(x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("ways", [dict(native=True), dict(native=False)])
def test_two_threads_that_call_the_same_net(ways, two_threads):
    "Its memory is one: they wait for one another."
    graph, x = named("mobilenetv2_035", n=4)
    batches = [x + 0.01 * i for i in range(12)]
    with torch.inference_mode():
        wanted = [graph(b) for b in batches]
    runner = Runner(graph, timed=False, **ways)
    with ThreadPoolExecutor(4) as pool:
        for want, got in zip(4 * wanted, pool.map(runner, 4 * batches)):
            assert torch.equal(got, want)


def test_nearest_neighbours():
    "Sizes up and down, behind a layer and before one, floats and whole numbers; a margin around."

    class Sizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 3, padding=1)

        def forward(self, x):
            x = self.first(F.interpolate(x, size=(17, 31)))
            x = F.interpolate(F.relu(x), scale_factor=2)
            return F.interpolate(self.last(x), size=(5, 9), mode="nearest")

    torch.manual_seed(0)
    x = torch.randn(5, 3, 13, 10)
    graph = on_eight_bits(Sizes(), x)
    assert_bits(graph, x)
    assert theirs(graph, x) == 0


def test_images_too_large_for_its_tables_are_refused():
    view = native._View(native._Memory(20_000, 20_000, 16, True), 20_000, 20_000, 16)
    with pytest.raises(MicronetError, match="1 images of 20000 x 20000 x 16 are too large for 32 bits"):
        view.at(0, 0, 1)
