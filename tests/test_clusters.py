"Work in many places: the same bits in the same order, no more sent than asked for, nothing left running."

import copy
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from torch import nn

import micronet_nb as mn
from micronet_nb.clusters import net_bytes, net_from_bytes, spread
from micronet_nb.core import MicronetError
from micronet_nb.data import Dataset
from micronet_nb.weights import bit_table


class Backwards:
    "Waits for so many items, and works on the last one first."

    def __init__(self, after):
        self.after, self.waiting = after, []

    def submit(self, work, item):
        self.waiting.append((future := Future(), work, item))
        if len(self.waiting) == self.after:
            for f, w, i in self.waiting[::-1]:
                f.set_result(w(i))
        return future


class Never:
    "Keeps what it is asked, and does nothing."

    def __init__(self):
        self.futures = []

    def submit(self, work, item):
        self.futures.append(future := Future())
        if len(self.futures) == 1:
            future.set_result(work(item))
        return future


def net():
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convs, nn.Linear(64, 2)).eval()


def images(n, split):
    g = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
    return Dataset(pixels, torch.arange(n) % 2, ["a", "b"], "toy", split)


def test_a_net_with_masks_and_quantisers_arrives_as_it_was():
    sent, x = net(), torch.randn(4, 3, 8, 8)
    mn.prune(sent, 0.5)
    mn.quantise_weights(sent, 4)
    mn.quantise_activations(sent, x, 6)
    there = net_from_bytes(net_bytes(sent))
    assert there(x).equal(sent(x)) and mn.param_sparsity(there) == mn.param_sparsity(sent)
    before = sent(x)
    mn.remove_weight_quantisers(there, restore=True)
    assert sent(x).equal(before) and not there(x).equal(before)  # two nets, not one


@pytest.mark.parametrize("what", ["sensitivity", "bits"])
def test_tables_are_in_the_order_of_the_layers_whoever_is_first(what):
    def table(executor=None):
        if what == "bits":
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            return bit_table(net(), x, (2, 3, 4), quiet=True, executor=executor)
        some = dict(sparsities=(0.5,), weight_bits=(3,), activation_bits=(4,), quiet=True)
        return mn.measure_sensitivity(net(), (images(16, "train"), images(8, "valid")), executor=executor, **some)

    pd.testing.assert_frame_equal(table(), table(Backwards(3)), check_exact=True)


def test_no_more_is_sent_than_was_asked_for_and_the_rest_is_called_off():
    executor = Never()
    results = spread(abs, range(-9, 0), executor, ahead=4)
    assert next(results) == (0, 9) and len(executor.futures) == 4
    results.close()
    assert [f.cancelled() for f in executor.futures] == [False, True, True, True]


def test_work_has_as_many_threads_as_who_asks():
    class Narrow:
        "A worker that is set to another number of threads."

        def submit(self, work, item):
            torch.set_num_threads(asked + 1)
            future = Future()
            future.set_result(work(item))
            assert torch.get_num_threads() == asked + 1  # and has its own again
            torch.set_num_threads(asked)
            return future

    asked = torch.get_num_threads()
    counted = sorted(spread(lambda _: torch.get_num_threads(), [0, 1], Narrow()))
    assert counted == [(0, asked), (1, asked)]


def test_what_was_finished_is_handed_on_before_a_lost_worker_is_told():
    class Half:
        def submit(self, work, item):
            future = Future()
            future.set_result(work(item)) if item else future.set_exception(BrokenExecutor("gone"))
            return future

    results = spread(abs, [0, 1, 2, 3], Half())
    assert sorted(next(results) for _ in range(3)) == [(1, 1), (2, 2), (3, 3)]
    with pytest.raises(MicronetError, match="call again with a new pool"):
        next(results)


def test_what_cannot_be_sent_or_cannot_submit_is_one_line():
    hooked = copy.deepcopy(net())
    hooked[0].register_forward_hook(lambda *args: None)
    with pytest.raises(MicronetError, match="cannot be sent to another process"):
        net_bytes(hooked)
    with pytest.raises(MicronetError, match="executor='two' has no submit"):
        list(spread(abs, [1], "two"))
    with ThreadPoolExecutor(1) as pool, pytest.raises(TypeError):
        list(spread(len, [3], pool))  # the work's own error, as it is
