"The least-squares scale against whatever hypothesis thinks of."

import pytest
import torch
from hypothesis import given, settings, strategies as st

from micronet_nb import quantisers
from micronet_nb.core import MicronetError
from micronet_nb.quantisers import fake_quantise, grid, quantise, solve_scale, solve_scales

BIG = 2.0**100
number = st.floats(-BIG, BIG, width=32, allow_nan=False, allow_subnormal=False)
row = st.lists(number, min_size=1, max_size=40)


def errors(x, a, bits, signed):
    "Squared error, in double and relative to the row's largest value."
    x, a = x.double(), a.double()[:, None]
    unit = x.abs().amax(1, keepdim=True).clamp(min=1e-300)
    return (((x - a * quantise(x, a, bits, signed)) / unit) ** 2).sum(1)


@settings(max_examples=300, deadline=None)
@given(row, st.integers(1, 8), st.booleans())
def test_never_worse_than_the_plain_iteration(values, bits, signed):
    x = torch.tensor([values])
    scales = {k: solve_scale(x, bits, signed, search=k) for k in ('plain', 'auto', 'exact')}
    assert all(torch.isfinite(a).all() and (a > 0).all() for a in scales.values())
    e = {k: float(errors(x, a, bits, signed)) for k, a in scales.items()}
    assert e['auto'] <= e['plain'] * (1 + 1e-4) + 1e-9
    assert e['exact'] <= e['auto'] * (1 + 1e-4) + 1e-9


@settings(max_examples=100, deadline=None)
@given(row, st.integers(2, 6))
def test_no_scale_of_a_fine_search_beats_the_exact_one(values, bits):
    x = torch.tensor([values])
    best = float(errors(x, solve_scale(x, bits, search='exact'), bits, True))
    top = x.abs().amax(1) / grid(bits)[1]
    if top == 0:
        return
    brute = min(float(errors(x, top * f, bits, True)) for f in torch.linspace(0.05, 2, 200).tolist())
    assert best <= brute * (1 + 1e-4) + 1e-9


@settings(max_examples=50, deadline=None)
@given(row, st.integers(1, 8), st.floats(1e-6, 1e6))
def test_scales_with_its_input(values, bits, factor):
    x = torch.tensor([values]).clamp(-1e20, 1e20)
    if x.abs().amax() < 1e-20:
        return
    error = float(errors(x, solve_scale(x, bits), bits, True))
    assert abs(float(errors(x * factor, solve_scale(x * factor, bits), bits, True)) - error) < 1e-5


def test_many_tensors_are_solved_as_one_by_one():
    torch.manual_seed(0)
    tensors = [torch.randn(5, 3, 3, 3), torch.randn(7, 27), torch.randn(4, 700), torch.randn(2, 3)]
    bits = [2, 3, 7, 1]
    for a, t, b in zip(solve_scales(tensors, bits), tensors, bits):
        assert torch.equal(a, solve_scale(t.reshape(len(t), -1), b))


def test_zeros_stay_zeros_and_idempotent():
    torch.manual_seed(0)
    w = torch.randn(8, 50) * (torch.rand(8, 50) < 0.4)
    for bits in range(1, 9):
        a = solve_scale(w, bits)[:, None]
        q = fake_quantise(w, a, bits)
        assert not q[w == 0].any() and torch.allclose(fake_quantise(q, a, bits), q)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_nan_and_infinity_are_errors(bad):
    with pytest.raises(MicronetError, match='row 0 holds NaN or infinity'):
        solve_scale(torch.tensor([[1.0, bad]]), 4)


def test_gradients_survive_bfloat16_and_compile_like_code():
    x = torch.randn(16, dtype=torch.bfloat16, requires_grad=True)
    a = torch.tensor(0.1, requires_grad=True)
    fake_quantise(x, a, 4).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and torch.isfinite(x.grad).all() and torch.isfinite(a.grad)


@pytest.mark.parametrize('length', [100, 2**14 + 1])
def test_many_numbers_are_solved_as_few_and_show_how_far_they_are(monkeypatch, length):
    torch.manual_seed(0)
    x, shown = torch.randn(7, length), []
    alone = quantisers.solve_scale(x, 4)
    monkeypatch.setattr(quantisers, 'MANY', x.numel())
    monkeypatch.setattr(quantisers, 'progress', lambda blocks, **kwargs: shown.append(kwargs) or blocks)
    assert torch.equal(quantisers.solve_scale(x, 4), alone)
    assert [bar['total'] for bar in shown] == [7 if length > 2**14 else 1]
    assert not shown.clear() and torch.equal(quantisers.solve_scale(x[:6], 4), alone[:6]) and not shown
