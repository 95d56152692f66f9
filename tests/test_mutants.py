"The table of mutants fits the library and the tests as they are; `make mutants` runs it."

import ast
import json
import re
import signal

import pytest
from anchors import find, keys_of, tokens_of, written
from conftest import ROOT
from mutants import MUTANTS, Mutant, broken, mutated, sources, verdict


def test_every_mutant_has_its_place():
    lost = broken()
    assert not lost, "\n" + "\n".join(lost.values())


def test_every_mutant_has_its_tests():
    assert len(MUTANTS) >= 150 and len({m.name for m in MUTANTS}) == len(MUTANTS)
    files = {p.stem.removeprefix("test_"): p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py")}
    for m in MUTANTS:
        assert keys_of(m.new) != keys_of(m.old) and m.tests, m.name
        for t in m.tests.split():
            file, name = re.sub(r"\[.*", "", t).split("::")
            assert f"def {name}(" in files[file], (m.name, t)


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("def ", "", r"'def ' is \d+ times in the library \(micronet_nb/\w+.py:\d+, .*\): make it longer$"),
        (
            "-no_such",
            "",
            r"'-no_such' is 0 times in the library: anchor it anew; the most of it, '-', is in .*\.py:\d+$",
        ),
        ("no_such", "", r"'no_such' is 0 times in the library: anchor it anew$"),
        ("", "", r"'' is 0 times in the library: anchor it anew$"),
        ("10.49e9", "a b", r"micronet_nb/scoring.py:\d+ does not parse with 'a b' in it: "),
    ],
)
def test_a_mutant_without_its_place_is_named(old, new, told):
    with pytest.raises(ValueError, match="^'a name': " + told):
        mutated(Mutant("a name", old, new, "definitions::test_tree_adder"))


def test_what_the_search_leaves_out_means_nothing():
    for module, text in sources().items():
        whole, again = ast.parse(text), ast.parse(written(tokens_of(text)))
        assert ast.dump(again) == ast.dump(whole), module
        rows = [[n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt)] for tree in (whole, again)]
        assert rows[0] == rows[1], module  # tracebacks of a mutant name the right line


LAYOUTS = """if x == 'it': f(.5, 1e-3); y = a if b else c
@if x == "it":
    f(
        0.5,  # a half
        0.001,
    )
    y = (
        a
        if b  # a comment
        else c
    )
@if (x == 'it'):
    f(0.50, 1E-3,)
    y = (a if b
         else c)
@if x == 'i' 't': f((.5),
                 1e-3); y = a if b else \\
        c
""".split("@")


@pytest.mark.parametrize("there", LAYOUTS, ids=range(4))
@pytest.mark.parametrize("here", LAYOUTS, ids=range(4))
def test_an_anchor_is_found_in_any_layout(here, there):
    def within(body):
        return "def g(x):\n    " + body.strip().replace("\n", "\n    ")

    text = within(there) + "\n    return y\n"
    for old, new, wanted in (
        (here[here.index("f(") :].strip() + "; return", "return", within("if x == 'it': return y")),
        ("if x == 'it':", "if z == 'it':", within(LAYOUTS[0].replace("x ==", "z ==")) + "\n    return y"),
        ("y = a if b", "y = z if b", within(LAYOUTS[0].replace("a if", "z if")) + "\n    return y"),
        (".001); y", "1); z", within("if x == 'it': f(.5, 1); z = a if b else c") + "\n    return y"),
    ):
        [place] = find(old, text)
        assert ast.dump(ast.parse(written(tokens_of(text), place, new))) == ast.dump(ast.parse(wanted))


@pytest.mark.parametrize(
    "one, other",
    [
        ("f((a, b))", "f(a, b)"),
        ("x = (a,)", "x = (a)"),
        ("x[a,]", "x[a]"),
        ("y = (a + b)*c", "y = a + b*c"),
        ("y = z if (a if b else c) else d", "y = z if a if b else c else d"),
        ("f('1')", "f(1)"),
        ("f(b'1')", "f('1')"),
        ("f(1)", "f(1.)"),
        ("f(x)", "f(X)"),
        ("f'{x}'", "'{x}'"),
        ("f('a  b')", "f('a b')"),
    ],
)
def test_what_means_something_else_is_not_found(one, other):
    assert find(one, one + "\n") and not find(one, other + "\n") and not find(other, one + "\n")


def test_an_f_string_is_one_whatever_its_quotes():
    text = "y = g(f\"{a['b']} {{c}}\", f'''{d!r:>{n}}''') + 1\n"
    assert find("g(f'''{a[\"b\"]} {{c}}''', f'{d!r:>{n}}')", text) == [(2, 7)]


@pytest.mark.parametrize(
    "status, told, caught",
    [
        (0, dict(code=1, found={"a::b": "failed", "a::c": "failed"}), True),
        (0, dict(code=1, found={"a::b": "failed", "a::c": "passed"}), False),  # each must notice
        # a fixture that breaks is no test that fails
        (0, dict(code=1, found={"a::b": "failed", "a::c": "error"}), False),
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
