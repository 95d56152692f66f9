"The sweep over timm's families: its references count by themselves, and what is wrong is not passed."

import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from torch import nn

from micronet_nb import families
from micronet_nb.core import MicronetError
from micronet_nb.families import STAGES, products_by_score, products_by_torch, stored_by_autograd, without_batch_norms
from micronet_nb.scoring import score


class Small(nn.Module):
    "A layer, a product of two activations, one with a constant, and a constant that is computed."

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.table, self.gain = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(7))
        self.register_buffer("mix", torch.randn(4, 4))

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2)  # (n, 4, 6)
        x = x @ x.transpose(1, 2)  # (n, 4, 4)
        x = x @ self.mix.expand(len(x), 4, 4)
        return x + self.table[torch.tensor([1, 3])].sum(0) * self.gain


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


IMAGE = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(0))


def test_products_on_the_way_back(net):
    "Layer: 6 places x 4 x 3. Two activations: 4 x 4 x 6, twice. With the constant: 4 x 4 x 4."
    assert products_by_torch(net, IMAGE) == 6 * 12 + 2 * 96 + 64 == products_by_score(net, (3, 2, 3))


def test_stored_numbers_at_the_border(net):
    "12 weights, 16 of the buffer, 4 that are computed of table and gain; without the norm, and what is not read."
    assert stored_by_autograd(without_batch_norms(net), IMAGE) == (12 + 16, 12 + 16 + 4)


def test_constants_that_are_computed_without_gradients_are_stored():
    "Four sines of a buffer: the net says that they need no gradient."

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rates", torch.rand(4))

        def forward(self, x):
            with torch.no_grad():
                waves = torch.sin(self.rates)
            return x.flatten(2)[..., :4] + waves

    assert stored_by_autograd(Waves(), IMAGE) == (0, 4) and score(Waves(), (3, 2, 3)).storage == 4
    with torch.no_grad():
        assert not (IMAGE.requires_grad_() * 2).requires_grad  # it means again what it says
    IMAGE.requires_grad_(False)


def test_a_wrong_count_is_refused(monkeypatch):
    way = families.Way("test_vit")
    monkeypatch.setattr(families, "products_by_torch", lambda *args: 7)
    with pytest.raises(MicronetError, match="products by the score, and 7 by torch"):
        STAGES["score"](way)
    monkeypatch.undo()
    monkeypatch.setattr(families, "stored_by_autograd", lambda *args: (1, 2))
    with pytest.raises(MicronetError, match="stored numbers by the score, and 2 by torch"):
        STAGES["score"](way)


@pytest.mark.parametrize("stage", ["integer", "Runner", "ONNX"])
def test_a_wrong_answer_is_refused(stage, monkeypatch):
    way = families.Way("test_efficientnet")
    STAGES["quantise"](way)
    STAGES["lower"](way)
    assert STAGES[stage](way)["off"] <= families.TOLERANCE[stage]
    monkeypatch.setattr(way, "answers", lambda: 1.05 * way.graph(way.fresh))
    with torch.no_grad(), pytest.raises(MicronetError, match="off by"):
        STAGES[stage](way)


def test_a_quantiser_that_is_another_in_onnx_is_refused(monkeypatch):
    "Where integers are neighbours, the answers are not compared: what is refused then is a step of its own."
    way = families.Way("test_efficientnet")
    STAGES["quantise"](way)
    STAGES["lower"](way)
    few = families.beside_onnx(way.graph, way.fresh)
    monkeypatch.setattr(families, "beside_onnx", lambda *args: few)
    few.iloc[0, few.columns.get_loc("other")] = 3
    monkeypatch.setattr(way, "answers", lambda: 1.05 * way.graph(way.fresh))
    with torch.no_grad():
        told = STAGES["ONNX"](way)
        assert told["neighbours"] == 3 and 0.04 < told["off"] < 0.05
        few.attrs["off"] = 1e-3
        with pytest.raises(MicronetError, match="given its integers, its answer is off by 0.001"):
            STAGES["ONNX"](way)


def test_a_sweep_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv("MICRONET_RUNS", str(tmp_path))
    walked = []

    def walk_apart(model, seed, **limits):
        walked.append(model)
        if model == "b":
            raise KeyboardInterrupt
        made = dict(stage="make", ok=True, told=dict(size=32, parameters=5))
        return [made, dict(stage="score", ok=False, told="why")]

    monkeypatch.setattr(families, "walk_apart", walk_apart)
    monkeypatch.setattr(families, "smallest_of", lambda family: family[0])
    with pytest.raises(KeyboardInterrupt):
        families.sweep(["alpha", "beta"])
    monkeypatch.setattr(families, "walk_apart", lambda model, seed, **limits: walked.append(model) or [])
    with ThreadPoolExecutor(2) as executor:
        table = families.sweep(["alpha", "beta"], executor=executor)
    assert walked == ["a", "b", "b"]
    assert table.loc["alpha", ["model", "size", "score", "prune", "why"]].tolist() == ["a", 32, "no", "", "score: why"]
    assert not families.went(table).any()


def test_the_table_says_who_goes_all_the_way():
    rows = [dict(family=n, model=n, size=32, parameters=2e6, why="", **dict.fromkeys(STAGES, "yes")) for n in "ab"]
    rows[1] |= dict(lower="no", integer="", why="lower: because")
    table = families.family_table(pd.DataFrame(rows).set_index("family"))
    assert table.goes.tolist() == ["all the way", " ".join(s for s in STAGES if s not in ("lower", "integer"))]
    assert table.parameters.tolist() == [2.0, 2.0] and table.why.tolist() == ["", "lower: because"]


def test_a_process_that_dies_or_takes_too_long_is_told(monkeypatch):
    began = time.time()
    assert families.walk_apart("test_vit", seconds=0.01)[-1]["told"] == "took more than 0.01 s"
    died = families.walk_apart("no_such_model")
    assert [d["stage"] for d in died] == ["make"] and "no_such_model" in died[0]["told"] and time.time() - began < 300


@pytest.mark.parametrize("named, written", [([], "26_families.sweep"), (["resnet"], "26_families.again")])
def test_some_families_do_not_take_the_place_of_all(monkeypatch, capsys, named, written):
    row, records = families._row("resnet", "resnet10t", []), []
    monkeypatch.setattr(families, "sweep", lambda *args, **kwargs: pd.DataFrame([row]).set_index("family"))
    monkeypatch.setattr(families, "record", lambda name, rows, *args, **kwargs: records.append((name, rows)))
    assert families.main([*named, "--record"]) == 0
    assert [name for name, _ in records] == [written] and records[0][1][0]["model"] == "resnet10t"
    assert "0 of 1 go the whole way" in capsys.readouterr().out
