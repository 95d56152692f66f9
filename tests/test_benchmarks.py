"How fast the nets train is measured, and recorded after each row."

import json

import pytest

from micronet_nb import benchmarks
from micronet_nb.core import MicronetError
from micronet_nb.training import SMALL_STUDIES


def test_speed_measures_at_least_one_row(tmp_path):
    rows = benchmarks.training_speed("embedded", minutes=1e-6, seconds=0.0, device="cpu", folder=tmp_path)
    recorded = json.loads((tmp_path / "90_benchmarks.speed.json").read_text())["rows"]
    assert len(rows) == len(recorded) == 1 and {k: recorded[0][k] for k in ("net", "mode", "batch")} == {
        "net": SMALL_STUDIES["embedded"].model,
        "mode": "eager",
        "batch": 64,
    }
    for r in recorded:
        assert r["images_s"] > 0 and r["epoch_seconds"] > 0 and r["bandwidth_share"] is None


def test_a_mode_that_there_is_not_is_named():
    with pytest.raises(MicronetError, match="no mode 'fast': choose eager, compiled, CUDA graphs"):
        benchmarks.trained_a_second("densenet_bc_10_4", 4, "fast")
