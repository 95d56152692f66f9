"What 25_peers says of others: its table holds the record's rows, and its verdict follows from them."

import json
import re
from pathlib import Path

import numpy as np
import pytest

from micronet_nb.core import load_record

ROOT = Path(__file__).resolve().parent.parent
RECORD = load_record("25_peers.table", "laptop")
pytestmark = pytest.mark.skipif(RECORD is None, reason="25_peers has not been recorded")


def flags(text, n):
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n]


def outputs():
    "All that the committed notebook shows, without tags."
    cells = json.loads((ROOT / "nbs" / "25_peers.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [o.get("data", {}).get("text/html", o.get("text", "")) for c in cells for o in c.get("outputs", [])]
    return re.sub(r"<[^>]+>", " ", " ".join("".join(p) for p in parts))


def test_each_row_is_of_all_images_and_of_a_package_with_a_version():
    packages = RECORD["config"]["packages"]
    for r in RECORD["rows"]:
        assert r["tool"] == "ours" or r["tool"] in packages
        assert len(r["right"]) == len(r["same"]) == 2 * -(-RECORD["n"] // 8)
        assert r["kl"] >= 0 and r["seconds"] > 0 and r["rounded"] >= 40
        kinds = {(x["weights"], x["inputs"]) for x in RECORD["rows"] if x["method"] == "solved"}
        assert (r["weights"], r["inputs"]) in kinds  # each has ours beside it
    keys = [(r["tool"], r["method"], r["weights"], r["inputs"]) for r in RECORD["rows"]]
    assert len({*keys}) == len(keys)


def test_the_table_shows_the_record():
    shown = outputs()
    for r in RECORD["rows"]:
        top1, same = (100 * flags(r[k], RECORD["n"]).mean() for k in ("right", "same"))
        row = (
            re.escape(r["method"])
            + rf"\s+{top1:.1f}\s+[\d.]+\s+[\d.]+\s+{same:.1f}\s+[\d.]+\s+[\d.]+\s+{r['kl']:.4f}\s"
        )
        assert re.search(row, shown), (r["tool"], r["method"], r["weights"], r["inputs"])


@pytest.mark.parametrize("bits", [(8, 8), (4, 8)])
def test_the_verdict_follows_from_the_record(bits):
    rows = [r for r in RECORD["rows"] if (r["weights"], r["inputs"]) == bits]
    peer = min((r for r in rows if r["tool"] != "ours"), key=lambda r: r["kl"])
    own = next(r for r in rows if r["method"] == "solved")
    assert abs(peer["kl"] - own["kl"] - peer["kl_more"]) < 1e-6
    right = [flags(r["right"], RECORD["n"]).astype(int) for r in (own, peer)]
    difference = 100 * (right[0] - right[1]).mean()
    half_width = 196 * (right[0] - right[1]).std() / RECORD["n"] ** 0.5
    if abs(difference) <= half_width:
        verdict = "not told apart"
    else:
        verdict = "ours is better" if difference > 0 else "the peer is better"
    assert re.search(r"top-1\s+" + re.escape(f"{difference:+.3f}") + rf"\s+{half_width:.3f}\s+{verdict}", outputs())
