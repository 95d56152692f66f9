"The API reference: a module's public names, with the comments behind their parameters, read off its source."

import ast
import html
import inspect
import io
import re
import tokenize
from pathlib import Path
from urllib.parse import quote


def anchor(heading):
    "What nbconvert calls a heading."
    return html.escape(quote(heading.replace(" ", "-"), safe="?/:@!$&'()*+,;=~"))


def inner_links(text):
    "Markdown whose links to its own headings, written as GitHub has them, are written as nbconvert has them."
    headings = re.findall(r"^#+ (.+?) *$", text, re.M)
    names = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-"): anchor(h) for h in headings}
    return re.sub(r"\]\(#([^)]+)\)", lambda link: f"](#{names.get(link[1], link[1])})", text)


def comments_of(source):
    "Line number -> what its comment says."
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in found if t.type == tokenize.COMMENT}


class Module:
    "An exported module: its source, its tree, and where each of its names came from."

    def __init__(self, path):
        self.name = Path(path).stem
        self.source = Path(path).read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.lines = self.source.split("\n")
        self.comments = comments_of(self.source)
        self.doc = ast.get_docstring(self.tree) or ""
        self.public = next((ast.literal_eval(n.value) for n in self.tree.body if _targets(n) == ["__all__"]), [])

    def origin(self, node):
        "Notebook and cell that a definition was exported from; None in a module written by hand."
        for line in reversed(self.lines[: node.lineno]):
            if found := re.match(r"# %% \S*?(\w+)\.ipynb #(\w+)", line):
                return found.groups()
        return None

    def patches(self, node):
        "The class that a function decorated with `patch` becomes a method of; else None."
        if not isinstance(node, ast.FunctionDef) or not node.args.args:
            return None
        named = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
        if "patch" not in named or node.args.args[0].annotation is None:
            return None
        return ast.unparse(node.args.args[0].annotation)

    def definitions(self):
        "(name, node) of what is public, in the order of the source."
        for node in self.tree.body:
            if owner := self.patches(node):
                if not node.name.startswith("_"):
                    yield f"{owner}.{node.name}", node
                continue
            for name in _targets(node):
                if name in self.public:
                    yield name, node

    def comment(self, first, last):
        "What stands behind these lines."
        return " ".join(self.comments[i] for i in range(first, last + 1) if i in self.comments)


def _targets(node):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        targets = [e for t in node.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        return [t.id for t in targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def parameters(module, node, method=False):
    "Of a function: (name, type, default, comment) a parameter, without self."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    listed = list(zip([""] * len(plain), plain, defaults))
    listed += [("*", a.vararg, None)] if a.vararg else []
    listed += list(zip([""] * len(a.kwonlyargs), a.kwonlyargs, a.kw_defaults))
    listed += [("**", a.kwarg, None)] if a.kwarg else []
    for stars, arg, default in listed[1:] if method else listed:
        last = max(arg.end_lineno, default.end_lineno if default else 0)
        told = module.comment(arg.lineno, last) if last < node.body[0].lineno else ""
        yield (
            stars + arg.arg,
            ast.unparse(arg.annotation) if arg.annotation else "",
            ast.unparse(default) if default else "",
            told,
        )


def returned(module, node):
    "Of a function: ('returns', type, '', comment), or nothing."
    if not node.returns:
        return
    told = module.comment(node.returns.lineno, node.returns.end_lineno)
    if told or ast.unparse(node.returns) != "None":
        yield "returns", ast.unparse(node.returns), "", told


def fields(module, node):
    "Of a class: its annotated attributes, as parameters."
    for n in node.body:
        if isinstance(n, ast.AnnAssign) and not _targets(n)[0].startswith("_"):
            told = module.comment(n.lineno, n.end_lineno)
            yield _targets(n)[0], ast.unparse(n.annotation), ast.unparse(n.value) if n.value else "", told


def signature(name, rows, result=""):
    "As Python would write it; a parameter a line where it is long."
    parts = []
    for p, kind, default, _ in rows:
        typed = f"{p}: {kind}" if kind else p
        parts.append(typed + (f" = {default}" if kind and default else f"={default}" if default else ""))
    arrow = f" -> {result}" if result else ""
    line = f"{name}({', '.join(parts)}){arrow}"
    return line if len(line) <= 88 else "\n    ".join([f"{name}(", *(p + "," for p in parts)]) + f"\n){arrow}"


def _text(s):
    "Escaped, with `code` as code."
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(s, quote=False))


def table(rows):
    "Parameters as an HTML table; '' where nothing is said of any."
    if not any(told for *_, told in rows):
        return ""
    line = "<tr><td><code>{}</code></td><td>{}</td><td>{}</td><td>{}</td></tr>"
    coded = lambda s: f"<code>{html.escape(s, quote=False)}</code>" if s else ""
    lines = [line.format(html.escape(n), coded(k), coded(d), _text(t)) for n, k, d, t in rows]
    return (
        "<table>\n<thead><tr><th>parameter</th><th>type</th><th>default</th><th>what it is</th></tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table>"
    )


def docstring(node):
    "As Markdown: what starts with >>> becomes a block of code."
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return re.sub(r"(?m)(?:^(?:>>>|\.\.\.).*\n?)+(?:^\S.*\n?)*", lambda m: f"\n```python\n{m[0].rstrip()}\n```\n", text)


def _function(module, name, node, method=False):
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    rows = list(parameters(module, node, method and not static))
    code = signature(name, rows, ast.unparse(node.returns) if node.returns else "")
    return f"```python\n{code}\n```\n\n{docstring(node)}\n\n{table([*rows, *returned(module, node)])}\n"


def _class(module, name, node):
    start = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    rows = list(parameters(module, start, True)) if start else list(fields(module, node))
    text = f"```python\n{signature(name, rows)}\n```\n\n{docstring(node)}\n\n{table(rows)}\n"
    for n in node.body:
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and ast.get_docstring(n):
            called = n.name if {ast.unparse(d) for d in n.decorator_list} & {"property", "cached_property"} else ""
            text += f"\n### `{name}.{n.name}`\n\n"
            text += f"{docstring(n)}\n" if called else _function(module, n.name, n, True)
    return text


def _constant(module, node):
    code = ast.get_source_segment(module.source, node)
    code = code if len(code) < 600 else code[:600].rsplit("\n", 1)[0] + "\n..."
    told = module.comment(node.end_lineno, node.end_lineno)
    return f"```python\n{code}\n```\n\n{told}\n"


def page(module):
    "A module's page, as Markdown."
    made = [f"# {module.name}\n\n> {module.doc}\n" if module.doc else f"# {module.name}\n"]
    for name, node in module.definitions():
        made.append(f"## `{name}`\n")
        if isinstance(node, ast.ClassDef):
            made.append(_class(module, name, node))
        elif isinstance(node, ast.FunctionDef):
            made.append(_function(module, name, node, method="." in name))
        else:
            made.append(_constant(module, node))
        if at := module.origin(node):
            made.append(f"[source, in its notebook](../{at[0]}.ipynb#cell-id={at[1]})\n")
    return "\n".join(made)


def contents(modules, front=()):
    "The reference's first page: the front door's names, then the modules."
    homes = {name.split(".")[0]: m.name for m in modules for name, _ in m.definitions()}
    text = ["# API\n\nWhat a module offers, with its parameters, as the notebooks say it.\n"]
    linked = [f"[`{n}`]({homes[n]}.html#{n})" for n in front if n in homes]
    if linked:
        text.append("## The front door\n\n```python\nimport micronet_nb as mn\n```\n\n" + ", ".join(linked) + "\n")
    text.append("## Modules\n\n| module | |\n|---|---|")
    text += [f"| [{m.name}]({m.name}.html) | {m.doc.splitlines()[0] if m.doc else ''} |" for m in modules]
    return "\n".join(text) + "\n"
