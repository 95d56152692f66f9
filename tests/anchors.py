"""Places in Python text that stay the same when the text is laid out anew.

A text is read as its tokens, without what a formatter may change: line breaks, indentation, comments, the quotes of
strings, the spelling of numbers, trailing commas, parentheses around a whole expression.
"""

import ast
import functools
import io
import keyword
import re
import tokenize
from typing import NamedTuple

CLOSING = dict(zip("([{", ")]}"))
# A pair of parentheses is left out where it stands between one of BEFORE and one of AFTER
# and holds one expression without one of WITHIN at its own level.
BEFORE = {*"([{,=:", *"+= -= *= /= //= %= **= @= |= &= ^= <<= >>=".split(), *"return assert raise else".split()}
BEFORE_A_CONDITION = {"if", "elif", "while"}
AFTER = {*")]},:;", "\n", "else"}
WITHIN = {",", ":", ":=", "for", "lambda", "yield"}


class Token(NamedTuple):
    "One token, and where its line begins."

    text: str  # as it is written; "\n" at the end of a logical line
    key: str  # the same for all spellings of it; "" where it only ends a statement
    row: int  # of the text, from 1
    indent: str  # of its physical line
    is_text: bool  # a string


@functools.cache
def _value(literal):
    "One name for all spellings of a number or a string."
    return ast.dump(ast.parse(f"({literal})", mode="eval").body)


def _read(text):
    "All tokens of a text but comments; an f-string is one, and so are strings that stand side by side."
    lines = io.StringIO(text).readlines()
    found, depth, start = [], 0, None
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, (row, column) = tokenize.tok_name[t.type], t.start
        if kind.endswith("STRING_START"):  # from Python 3.12 on an f-string is several tokens
            start = start if depth else t.start
            depth += 1
        depth -= kind.endswith("STRING_END")
        if depth or kind in ("ENCODING", "NL", "COMMENT", "INDENT", "DEDENT", "ENDMARKER"):
            continue
        string, is_text = t.string, kind == "STRING" or kind.endswith("STRING_END")
        if kind.endswith("STRING_END"):
            row, column = start
            inside = lines[row - 1 : t.end[0]]
            inside[-1] = inside[-1][: t.end[1]]
            string = "".join(inside)[column:]
        if is_text and found and found[-1].is_text:
            string = f"{found[-1].text} {string}"
            row = found.pop().row
        if kind == "NEWLINE":
            string = "\n"
        key = _value(string) if is_text or kind == "NUMBER" else string.strip("\n;")
        found.append(Token(string, key, row, lines[row - 1][:column] if row <= len(lines) else "", is_text))
    return found


def _superfluous(tokens, known=0):
    "Indices of the tokens that a formatter may add or remove; brackets before index `known` are of an unknown kind."
    out, stack = set(), []
    for i, t in enumerate(tokens):
        if t.is_text:
            continue
        if t.text in CLOSING:
            stack.append((i, set(), []))
        elif stack and t.text in CLOSING.values():
            first, inside, commas = stack.pop()
            before = tokens[first - 1] if first else Token("\n", "", 0, "", False)
            after = tokens[i + 1].text if i + 1 < len(tokens) else None
            follows = before.is_text or before.text in CLOSING.values() or before.text.isidentifier()
            follows = follows and not keyword.iskeyword(before.text)  # a call, a definition or an index
            tuples = not follows if t.text == ")" else follows if t.text == "]" else False
            if commas[-1:] == [i - 1] and (first < known or len(commas) > 1 or not tuples):
                out.add(i - 1)
            whole = before.text in BEFORE and not before.is_text or before.text in BEFORE_A_CONDITION
            nested = before.text in BEFORE_A_CONDITION and after != ":" and "if" in inside
            if t.text == ")" and first >= known and whole and after in AFTER and i > first + 1:
                if not nested and not inside & WITHIN:
                    out |= {first, i}
        elif stack:
            stack[-1][1].add(t.text)
            if t.text == ",":
                stack[-1][2].append(i)
    return out


@functools.lru_cache(maxsize=64)
def tokens_of(text):
    "The tokens of a module that count."
    tokens = _read(text)
    out = _superfluous(tokens)
    return [t for i, t in enumerate(tokens) if i not in out]


@functools.lru_cache(maxsize=64)
def _counted(text):
    "Of the tokens that mean something: where they stand in `tokens_of(text)`, what they mean, and that in one string."
    counted = [(i, t.key) for i, t in enumerate(tokens_of(text)) if t.key]
    return [i for i, _ in counted], [key for _, key in counted], "\0".join(key for _, key in counted)


def keys_of(fragment):
    "What the tokens of a piece of Python mean; its brackets need not be closed or opened in it."
    opened, missing = [], []
    for c in re.sub(r"'[^'\n]*'|\"[^\"\n]*\"", "", fragment):
        if c in CLOSING:
            opened.append(c)
        elif c in CLOSING.values():
            if opened:
                opened.pop()
            else:
                missing.insert(0, next(a for a, b in CLOSING.items() if b == c))
    known = 1 + len(missing)
    end = "".join(CLOSING[c] for c in reversed(opened)) + ")"  # in brackets line breaks mean nothing
    try:
        tokens = _read("(" + "".join(missing) + "\n" + fragment + "\n" + end + "\n")
    except (tokenize.TokenError, SyntaxError) as e:
        raise ValueError(f"{fragment!r} is not made of whole tokens") from e
    tokens = tokens[: -len(end) - 1]
    out = _superfluous(tokens, known)
    return [t.key for i, t in enumerate(tokens) if i >= known and i not in out and t.key]


def find(fragment, text):
    "All places (first, last) in `tokens_of(text)` between which the fragment stands."
    wanted = keys_of(fragment)
    where, keys, joined = _counted(text)
    if not wanted or "\0".join(wanted) not in joined:
        return []
    starts = [k for k, key in enumerate(keys) if key == wanted[0] and keys[k : k + len(wanted)] == wanted]
    return [(where[k], where[k + len(wanted) - 1]) for k in starts]


def nearest(fragment, text):
    "The longest piece of the fragment that stands somewhere: its number of tokens, its row, the piece itself."
    wanted, tokens = keys_of(fragment), tokens_of(text)
    where, keys, _ = _counted(text)
    best, length = 0, 0
    for k, key in enumerate(keys):
        for j in [j for j, other in enumerate(wanted) if other == key]:
            n = 1
            while j + n < len(wanted) and keys[k + n : k + n + 1] == [wanted[j + n]]:
                n += 1
            if n > length:
                best, length = k, n
    return length, tokens[where[best]].row, " ".join(tokens[where[k]].text for k in range(best, best + length))


def written(tokens, place=None, new=""):
    "Tokens as a module again, a logical line on one line and in its old row; at `place` (first, last) stands `new`."
    out, row, fresh = [], 1, True
    for i, t in enumerate(tokens):
        if place and place[0] <= i <= place[1]:
            if i > place[0]:
                continue
            piece = new.strip()
        else:
            piece = t.text
        if piece == "\n":
            fresh = True
            out.append("\n")
            row += 1
            continue
        if fresh:
            out.append("\n" * (t.row - row) + t.indent)
            row = max(row, t.row)
        out.append(piece if fresh else f" {piece}")
        row += piece.count("\n")
        fresh = False
    return "".join(out)
