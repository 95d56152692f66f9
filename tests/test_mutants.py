"The table of mutants fits the library and the tests as they are; `make mutants` runs it."

import json
import re
import signal

import pytest
from conftest import ROOT
from mutants import MUTANTS, Mutant, mutated, verdict


def test_every_mutant_has_its_place_and_its_tests():
    assert len(MUTANTS) >= 40 and len({m.name for m in MUTANTS}) == len(MUTANTS)
    files = {p.stem.removeprefix("test_"): p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py")}
    for m in MUTANTS:
        mutated(m)  # names the one whose text is not there exactly once
        assert m.new != m.old and m.tests, m.name
        for t in m.tests.split():
            file, name = re.sub(r"\[.*", "", t).split("::")
            assert f"def {name}(" in files[file], (m.name, t)


def test_an_anchor_that_is_lost_or_there_twice_is_named():
    for old in ("no such text", "def "):
        told = r"^'a name': '(no such text|def )' is \d+ times in micronet_nb/core.py: anchor it anew$"
        with pytest.raises(ValueError, match=told):
            mutated(Mutant("a name", "core", old, "", "definitions::test_tree_adder"))


@pytest.mark.parametrize(
    "status, told, caught",
    [
        (0, dict(code=1, found={"a::b": "failed", "a::c": "failed"}), True),
        (0, dict(code=1, found={"a::b": "failed", "a::c": "passed"}), False),  # each must notice
        (
            0,
            dict(code=1, found={"a::b": "failed", "a::c": "error"}),
            False,
        ),  # a fixture that breaks is no test that fails
        (0, dict(code=2, found={}), False),  # nor is a module that cannot be imported
        (0, None, False),
        (signal.SIGALRM, dict(code=1, found={"a::b": "failed", "a::c": "failed"}), False),
    ],
)
def test_only_failed_tests_catch_a_mutant(status, told, caught, tmp_path):
    out = tmp_path / "0.json"
    if told:
        out.write_text(json.dumps(told))
    assert (verdict(MUTANTS[0]._replace(tests="a::b a::c"), status, out) == "") == caught


@pytest.mark.parametrize(
    "told, passed",
    [
        (dict(code=0, found={"a::b": "passed"}), True),
        (dict(code=1, found={"a::b": "failed"}), False),
        (dict(code=0, found={"a::b": "skipped"}), False),
        (dict(code=4, found={}), False),
    ],
)
def test_the_library_as_it_is_must_pass_them_all(told, passed, tmp_path):
    (tmp_path / "0.json").write_text(json.dumps(told))
    assert (verdict(None, 0, tmp_path / "0.json") == "") == passed
