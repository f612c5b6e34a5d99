"""docs/troubleshooting.md names messages of the program: each is a string in its source code.

A message on the page is the text in backticks in the first cell of a row. {words} in braces stand
for what differs from case to case: a path, a number.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = re.findall(r"^\| `([^`]+)`", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
ANY = "\0"  # stands for a value that is put into a string
PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def text_of(node):
    """The text of a string or f-string, with ANY for each value; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return PLACEHOLDER.sub(ANY, node.value)  # it can be a template of str.format
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else ANY for part in node.values)
    return None


def strings(path):
    """The texts of all strings in a source file except docstrings, without "error: "."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_docstring:
            texts += [text_of(child) for child in ast.iter_child_nodes(node)]
    return {text.removeprefix("error: ") for text in texts if text}


@functools.cache
def strings_of_the_program():
    """The strings of each source file, by its path."""
    return {
        path.relative_to(ROOT): strings(path)
        for folder in ("", "support/", "reporting/", "nas201/")
        for path in sorted(ROOT.glob(f"{folder}*.py"))
    }


def is_printed(message, texts):
    """Whether these strings can make the message: one has its start, and some have the rest."""
    start, *parts = PLACEHOLDER.split(message)
    if not start and parts:  # the message begins with a value
        start = ANY + parts.pop(0)
    begins = any(text.startswith(start) for text in texts)
    return begins and all(any(part in text for text in texts) for part in parts)


def test_the_page_has_messages():
    assert len(MESSAGES) > 20
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_in_the_program(message):
    assert any(is_printed(message, texts) for texts in strings_of_the_program().values()), message


def test_a_changed_message_is_noticed():
    texts = {"cannot read \0: \0. Restore it.", "note: \0 of \0"}
    assert is_printed("cannot read {path}: {reason}. Restore it.", texts)
    assert is_printed("note: {n} of", texts)
    assert not is_printed("can not read {path}", texts)
    assert not is_printed("cannot read {path}: {reason}. Remove it.", texts)
    assert not is_printed("{path}: {reason}. Restore it.", texts)
