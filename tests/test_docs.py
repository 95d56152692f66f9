"A notebook as a page for a reader, and what the site is made of."

import html
import importlib.util
import re

import nbformat
import pytest
import yaml
from conftest import ROOT, toy
from test_repository import NOTEBOOKS

from micronet_nb import pages

spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api)


def prose(page):
    "What a reader reads as text."
    return html.unescape(re.sub(r"<(pre|code|style|math)\b.*?</\1>|<[^>]+>", " ", page, flags=re.S))


@pytest.fixture(scope="module")
def distillation():
    "The notebook with the most formulas, and its page."
    nb = nbformat.read(ROOT / "nbs" / "08_distillation.ipynb", 4)
    return nb, pages.to_html(nb, "08_distillation")


def test_formulas_need_no_script_and_no_host(distillation):
    nb, page = distillation
    assert len(re.findall("<math ", page)) == len(re.findall("</math>", page)) > 20
    assert "$" not in prose(page) and "\\" not in prose(page)
    assert "<script" not in page and not re.findall(r'(?:src|href)="(?:https?:)?//', re.sub(r"<a [^>]*>", "", page))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_formula_is_converted(path):
    "Every formula of the notebooks is one that latex2mathml reads, to its last command."
    texts = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown" and "$" in c.source]
    page = pages.body(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(t) for t in texts]))
    assert "$" not in prose(page)
    assert not [m for m in re.findall(r"<math.*?</math>", page, re.S) if "\\" in m]


def test_hidden_cells_parameters_and_directives_are_left_out(distillation):
    nb, page = distillation
    code = [c for c in nb.cells if c.cell_type == "code"]
    hidden = [c for c in code if pages.is_hidden(c) or "parameters" in c.metadata.get("tags", [])]
    assert len(hidden) >= 3
    assert not [c.id for c in hidden if f"cell-id={c.id}" in page]
    assert "check_parameters" not in page and "#|" not in page


def test_exported_cells_are_folded_and_named(distillation):
    nb, page = distillation
    code = [c for c in nb.cells if c.cell_type == "code"]
    exported = [c for c in code if {"export", "exporti"} & {*pages.directives(c.source)}]
    folds = re.findall(r"<details.*?</details>", page, re.S)
    assert len(folds) == len(exported) + 1  # the last cell, which says finish
    assert sum("<code>kd_loss</code>" in f.split("</summary>")[0] for f in folds) == 1
    assert all(f'id="cell-id={c.id}"' in "".join(folds) for c in exported)  # a link to the cell opens its fold


def test_a_failed_cell_is_shown_though_hidden(tmp_path):
    nb = nbformat.read(toy(tmp_path, "01_a", "#| hide\n1 / 0"), 4)
    assert not [c for c in pages.for_reading(nb).cells if "1 / 0" in c.source]
    nb.cells[3].outputs = [nbformat.v4.new_output("error", ename="Z", evalue="", traceback=["\x1b[31mZ: <b>\x1b[0m"])]
    page = pages.to_html(nb, "01_a")
    assert 'id="cell-id=cell3"' in page and "Z: &lt;b&gt;" in page


def test_what_is_wide_scrolls_in_its_box(distillation):
    page = distillation[1]
    assert len(re.findall("<table", page)) == len(re.findall(r'<div class="wide" tabindex="0"><table', page)) > 5
    assert re.search(r"\.wide[^{]*{[^}]*overflow-x: auto", page) and re.search(r"pre {[^}]*overflow-x: auto", page)


def test_sections_of_the_page_results_are_there():
    wanted = yaml.safe_load((ROOT / "docs" / "results.yml").read_text(encoding="utf-8"))
    for stem, headings in wanted.items():
        nb = nbformat.read(ROOT / "nbs" / f"{stem}.ipynb", 4)
        there = re.findall(r"^#+ (.+)", "\n".join(c.source for c in nb.cells if c.cell_type == "markdown"), re.M)
        assert not [h for h in headings if h not in there], stem


SOURCE = '''"What it is."
__all__ = ['N', 'f', 'A']

# %% ../nbs/07_toy.ipynb #0a1b2c3d
N = 3  # how many

def f(
    x: int | None,  # a | b, in `bits`
    *args,  # the others
    y: float = 0.5,  # fraction in [0,1]
) -> int:  # the sum
    """Adds.

    >>> f(1)
    1
    """
    return x  # not a parameter

# %% ../nbs/07_toy.ipynb #4e5f6a7b
class A:
    "A class."

    def __init__(self, k: int = 1):  # how wide
        self.k = k

    def g(self):
        "Goes."

@patch
def h(self: A, z: str):  # a name
    "Patched in."
'''


def test_api_has_every_public_name_with_its_comments(tmp_path):
    (tmp_path / "toy.py").write_text(SOURCE)
    text = api.page(api.Module(tmp_path / "toy.py"))
    assert re.findall(r"^#+ .*", text, re.M) == ["# toy", "## `N`", "## `f`", "## `A`", "### `A.g`", "## `A.h`"]
    assert "f(x: int | None, *args, y: float = 0.5) -> int" in text and "A(k: int = 1)" in text and "h(z: str)" in text
    for told in ("a | b, in <code>bits</code>", "the others", "fraction in [0,1]", "the sum", "how many", "a name"):
        assert told in text, told
    assert "not a parameter" not in text and "```python\n>>> f(1)\n1\n```" in text
    assert "(../07_toy.ipynb#cell-id=0a1b2c3d)" in text and "(../07_toy.ipynb#cell-id=4e5f6a7b)" in text


def test_api_covers_the_modules():
    for path in sorted((ROOT / "micronet_nb").glob("[a-z]*.py")):
        module = api.Module(path)
        defined = {name.split(".")[-1] for name, _ in module.definitions()}
        assert {*module.public} <= defined, path.name


def test_links_within_the_readme_lead_to_headings_of_the_site():
    links = "see [there](#what-came-out) and [the API](#an-api-of-its-own)"
    text = f"{links}\n\n## What came out\n\n## An API, of its own\n"
    linked = api.inner_links(text)
    assert "](#What-came-out)" in linked and "](#An-API,-of-its-own)" in linked
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {api.anchor(h) for h in re.findall(r"^#+ (.+?) *$", readme, re.M)}
    assert {*re.findall(r"\]\(#([^)]+)\)", api.inner_links(readme))} <= names
