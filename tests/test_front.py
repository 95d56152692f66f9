"The front door and the order of the rooms: what `import micronet_nb as mn` gives, and which module knows which."

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import micronet_nb as mn
from micronet_nb.integer import OPERATIONS
from micronet_nb.scoring import ELEMENTWISE

PACKAGE = ROOT / "micronet_nb"
SOURCES = {p.stem: p.read_text(encoding="utf-8") for p in PACKAGE.glob("*.py") if not p.stem.startswith("_")}


# --- front door


@pytest.mark.parametrize("verb", mn.__all__)
def test_a_verb_is_what_its_module_offers(verb):
    module = importlib.import_module(f"micronet_nb.{mn._MODULE_OF[verb]}")
    assert getattr(mn, verb) is getattr(module, verb) and verb in module.__all__
    first, *example = inspect.getdoc(getattr(mn, verb)).splitlines()
    assert first and (not example or example[0] == "" and example[1].startswith(">>> "))
    assert not (PACKAGE / f"{verb}.py").exists()  # else loading that module would put it in the verb's place


def test_a_module_is_there_and_a_slip_of_spelling_is_told():
    assert mn.scoring is importlib.import_module("micronet_nb.scoring") and "_MODULE_OF" not in dir(mn)
    with pytest.raises(AttributeError, match="no attribute 'quantize_weights'; British spelling: quantise_weights"):
        mn.quantize_weights
    with pytest.raises(AttributeError, match="no attribute 'paint'$"):
        mn.paint


SHOWN = {  # verbs of the README that must have an example
    *("create_model", "load_dataset", "fit", "evaluate", "kd_loss", "measure_sensitivity", "prune"),
    *("quantise_activations", "quantise_weights", "score", "lower", "Runner", "pack", "unpack", "to_onnx"),
}


def test_examples_of_the_verbs_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = doctest.DocTestFinder(recurse=False)
    globs = {verb: getattr(mn, verb) for verb in mn.__all__} | dict(torch=torch)
    examples = [d for verb in mn.__all__ for d in found.find(getattr(mn, verb), verb, globs=globs) if d.examples]
    kept = [(table, dict(table)) for table in (OPERATIONS, ELEMENTWISE)]
    try:
        assert SHOWN <= {d.name for d in examples} and not any(doctest.DocTestRunner().run(d).failed for d in examples)
    finally:  # an example declares an operation, which the tests behind this one are not to find
        for table, before in kept:
            table.clear()
            table.update(before)


def test_the_front_door_opens_at_once():
    code = (
        "import sys, micronet_nb as mn; "
        "print(*(m in sys.modules for m in ('torch', 'pandas', 'micronet_nb.core')), *dir(mn))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said[:3] == ["False"] * 3
    assert {*mn.__all__, "__version__"} <= {*said}  # what a notebook completes


def test_what_there_is_not_is_said():
    with pytest.raises(AttributeError, match="'micronet_nb' has no attribute 'prun'"):
        mn.prun


def test_a_star_gives_the_verbs():
    exec("from micronet_nb import *", names := {})
    assert {*mn.__all__} == {n for n in names if not n.startswith("__")}


def test_the_version_is_that_of_the_settings():
    assert re.search(r"^version = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1] == mn.__version__


# --- rooms


def is_main_part(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) and "__main__" in ast.unparse(node.test)


def imports(source):
    "The modules of this package that a module imports, at its top or inside a function, its `__main__` part aside."
    todo, found = [ast.parse(source)], set()
    while todo:
        node = todo.pop()
        if is_main_part(node):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or "" if not node.level else f"micronet_nb.{node.module or ''}".rstrip(".")
            found |= {stem, *(f"{stem}.{a.name}" for a in node.names)}
    return {parts[1] for f in found if (parts := f.split("."))[0] == "micronet_nb" and len(parts) > 1} & {*SOURCES}


def circle(graph):
    "A circle of a graph, as a list of its nodes; None where there is none."
    done = set()

    def visit(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        done.add(node)
        return next((c for n in sorted(graph[node]) if (c := visit(n, [*path, node]))), None)

    return next((c for n in sorted(graph) if (c := visit(n, []))), None)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert imports("def f():\n    from micronet_nb.core import stage\n    import micronet_nb.data") == {"core", "data"}
    assert imports("from . import cli\nfrom .models import wrn\nimport torch") == {"cli", "models"}
    assert imports("if __name__ == '__main__':\n    from .cli import micronet_score") == set()


def test_no_import_circle():
    graph = {name: imports(source) for name, source in SOURCES.items()}
    assert circle(graph) is None


def test_only_the_commands_know_all_and_nobody_knows_them():
    assert not [name for name, source in SOURCES.items() if name != "cli" and "cli" in imports(source)]
    known = imports(SOURCES["cli"])
    assert {"scoring", "packing", "released", "cifar100", "imagenet"} <= known and "reproduce" not in known


def test_methods_are_added_by_a_decorator():
    "`Class.name = function`, pages below the class, says nothing where it stands."
    by_hand = re.compile(r"^[A-Z]\w+\.\w+(, *[A-Z]\w+\.\w+)* = ", re.M)
    assert not [name for name, source in SOURCES.items() if by_hand.search(source)]
