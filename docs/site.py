"MkDocs' hooks: the site's pages, made of the committed notebooks, the modules' source and the repository's texts."

import base64
import hashlib
import re
import sys
from configparser import ConfigParser
from html import escape, unescape
from pathlib import Path

import nbformat
import yaml
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File
from mkdocs.structure.toc import get_toc

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import api  # noqa: E402

from micronet_nb import pages  # noqa: E402

log = get_plugin_logger("site")
made = {}  # page -> its HTML
pictures = {}  # file -> its bytes


def notebooks():
    "(stem, title, subtitle, nbformat's notebook for reading), in order."
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        nb = pages.for_reading(nbformat.read(path, 4))
        title, subtitle = re.match(r"# (.+)\n\n> (.+)", nb.cells[0].source).groups()
        yield path.stem, title, subtitle, nb


def markdown(text):
    "HTML of a text."
    return pages.body(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]))


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def _file(found):
    "A picture in a page becomes a file beside it."
    kind, data = found.groups()
    data = base64.b64decode(data)
    name = f"pictures/{hashlib.sha1(data).hexdigest()[:12]}.{kind}"
    pictures[name] = data
    return f'src="{name}"'


def put(page, text):
    "Takes a page's HTML in."
    made[page] = re.sub(r'src="data:image/(png|jpeg);base64,([A-Za-z0-9+/=]{100,})"', _file, text)


def relink(page, text):
    "Links to what is no page of the site lead to the repository."

    def _to(found):
        path, rest = found.groups()
        where = (Path(page).parent / path).as_posix() if path else page
        if path and re.sub(r"\.html$", ".md", where.replace("api/../", "")) not in made:
            return f'<a href="{settings()["git_url"]}/blob/{settings()["branch"]}/{path.lstrip("./")}{rest}"'
        return found[0]

    return re.sub(r'<a href="(?!\w+:|#)([^"#]*)([^"]*)"', _to, text)


# --- results


def at_headings(cells):
    "The cells, with a new one at each heading."
    for c in cells:
        if c.cell_type != "markdown":
            yield c
            continue
        for part in re.split(r"(?m)^(?=#+ )", c.source):
            if part.strip():
                yield nbformat.v4.new_markdown_cell(part.strip())


def section(nb, heading):
    "The cells below a heading, to the next of its level; none where there is no such heading."
    found, level = [], 0
    for c in at_headings(nb.cells):
        head = re.match(r"(#+) (.+)", c.source) if c.cell_type == "markdown" else None
        if head and level and len(head[1]) <= level:
            break
        if head and head[2] == heading:
            level = len(head[1])
        if level:
            found.append(c)
    return found


def shows(cell):
    "Is it a table or a picture?"
    return any({"text/html", "image/png"} & {*o.get("data", {})} for o in cell.get("outputs", []))


def outputs_of(cells):
    "Texts, tables and pictures, without the code."
    for c in cells:
        if c.cell_type == "markdown":
            yield nbformat.v4.new_markdown_cell(re.sub(r"^#+ .+\n*", "", c.source))
        elif shows(c):
            yield nbformat.v4.new_code_cell(
                outputs=[o for o in c.outputs if {"text/html", "image/png"} & {*o.get("data", {})}]
            )


def results(found):
    "The page Results, and the cards of the first page."
    purpose = (
        "The tables and pictures that the study is judged by; each stands in its notebook, with the code that makes it."
    )
    page, cards = [f"<h1 id='Results'>Results</h1><p>{purpose}</p>"], []
    for stem, headings in yaml.safe_load((HERE / "results.yml").read_text(encoding="utf-8")).items():
        title, subtitle, nb = found[stem]
        page.append(f'<h2 id="{stem}">{stem}</h2><p>{escape(subtitle)}</p>')
        for heading in headings:
            cells = section(nb, heading)
            if not cells:
                log.warning(f"results.yml: {stem} has no heading {heading!r}")
                continue
            at = f"{stem}.html#{api.anchor(heading)}"
            page.append(f'<h3 id="{stem}-{api.anchor(heading)}"><a href="{at}">{escape(heading)}</a></h3>')
            page.append(pages.body(nbformat.v4.new_notebook(cells=list(outputs_of(cells)))))
        cards.append(card(stem, title, subtitle, [c for h in headings for c in section(nb, h)]))
    return "\n".join(page), "\n".join(cards)


def card(stem, title, subtitle, cells):
    "A notebook's first picture, else its first table, with its title."
    outputs = [o for c in cells for o in c.get("outputs", [])]
    kinds = [(o, kind) for kind in ("image/png", "text/html") for o in outputs if kind in o.get("data", {})]
    shown = ""
    if kinds:
        output, kind = kinds[0]
        output = nbformat.from_dict({**output, "data": {kind: output["data"][kind]}})
        shown = pages.body(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])]))
    return (
        f'<div class="card"><p><a href="{stem}.html"><b>{escape(title)}</b></a><br>{escape(subtitle)}</p>{shown}</div>'
    )


# --- all of it


def make():
    "Every page of the site; returns its navigation."
    made.clear()
    pictures.clear()
    found = {stem: (title, subtitle, nb) for stem, title, subtitle, nb in notebooks()}
    for stem, (_, _, nb) in found.items():
        put(f"{stem}.md", pages.body(nb))
    page, cards = results(found)
    put("results.md", page)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](nbs/", "](")
    put("index.md", f'{markdown(api.inner_links(readme))}<h2 id="Gallery">Gallery</h2><div class="gallery">{cards}</div>')
    texts = {"operations": "docs/OPERATIONS.md", "files": "docs/FILES.md"}
    for name, file in {"contributing": "CONTRIBUTING.md", **texts, "changes": "CHANGELOG.md"}.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        put(f"{name}.md", markdown(text.replace("](nbs/", "](").replace("](../nbs/", "](")))
    import micronet_nb

    modules = [api.Module(p) for p in sorted((ROOT / "micronet_nb").glob("[a-z]*.py"))]
    put("api/index.md", markdown(api.contents(modules, getattr(micronet_nb, "__all__", ()))))
    for m in modules:
        put(f"api/{m.name}.md", markdown(api.page(m)))
    return [
        {"Study": [{"Overview": "index.md"}, {"Results": "results.md"}]},
        {"Notebooks": [{f"{stem[:2]} {title}": f"{stem}.md"} for stem, (title, _, _) in found.items()]},
        {"API": [{"Contents": "api/index.md"}, *({m.name: f"api/{m.name}.md"} for m in modules)]},
        {
            "Project": [
                {"Add an operation": "operations.md"},
                {"Contributing": "contributing.md"},
                {"Files": "files.md"},
                {"Changes": "changes.md"},
            ]
        },
    ]


def on_config(config):
    config.nav = make()
    return config


def on_files(files, config):
    for page, text in made.items():
        title = re.search(r"<h1[^>]*>(.*?)(?:<a class=|</h1>)", text, re.S)
        name = re.sub(r"<.*?>", "", title[1]) if title else Path(page).stem
        files.append(File.generated(config, page, content=f"# {name}\n"))
    for name, data in pictures.items():
        files.append(File.generated(config, name, content=data))
    files.append(File.generated(config, "notebook.css", content=pages.STYLE))
    return files


def _nested(flat):
    "Headings as a tree."
    top = []
    stack = [(0, top)]
    for level, at, name in flat:
        while stack[-1][0] >= level:
            stack.pop()
        token = dict(level=level, id=at, name=name, html=name, children=[])
        stack[-1][1].append(token)
        stack.append((level, token["children"]))
    return top


def on_page_content(html, page, config, files):
    "The page that was made, instead of what MkDocs read."
    text = relink(page.file.src_uri, made[page.file.src_uri])
    text = text.replace('class="anchor-link"', 'class="headerlink"')
    text = re.sub(r'(<div class=" ?highlight[^>]*>)<pre>(.*?)</pre>', r"\1<pre><code>\2</code></pre>", text, flags=re.S)
    heads = re.findall(r"<h([1-3]) id=[\"'](.*?)[\"']>(.*?)</h\1>", text, re.S)
    plain = lambda s: re.sub(r"<.*?>", "", re.sub(r'<a class="headerlink".*?</a>', "", s, flags=re.S)).strip()
    page.toc = get_toc(_nested([(int(level), unescape(at), plain(name)) for level, at, name in heads]))
    return text
