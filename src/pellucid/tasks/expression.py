"""Arithmetic expressions as trees: a small parser of our own, because text from a model is never evaluated.

    expression := term (("+" | "-") term)*
    term       := factor (("*" | "/") factor)*
    factor     := number | "(" expression ")" | "-" factor        the last only with `signs`

There is no power, no name, no call and no other alphabet of digits; length and nesting are bounded, so any input is
answered in microseconds.  Values are exact (`fractions.Fraction`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 200
MAX_DEPTH = 20
_WHOLE = re.compile(r"(?:0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")


class ExpressionError(ValueError):
    """The text is not an expression of the grammar, or has no value."""


@dataclass(frozen=True)
class Binary:
    """`left operator right`."""

    operator: str
    left: Tree
    right: Tree


@dataclass(frozen=True)
class Negative:
    """`-inner`."""

    inner: Tree


Tree = Fraction | Binary | Negative


def parse(text: str, operators: str = "+-*", signs: bool = False, decimals: bool = False) -> Tree:
    """The tree of `text`.  Raises ExpressionError for anything outside the grammar, however it is disguised."""
    if len(text) > MAX_CHARS:
        raise ExpressionError(f"longer than {MAX_CHARS} characters")
    parser = _Parser(text.replace(" ", "") if _spaces_between_parts(text) else text, operators, signs, decimals)
    tree = parser.sum(0)
    if parser.at < len(parser.text):
        raise ExpressionError(f"unexpected {parser.text[parser.at]!r}")
    return tree


def value(tree: Tree) -> Fraction:
    """The exact value.  Raises ExpressionError for a division by zero."""
    if isinstance(tree, Fraction):
        return tree
    if isinstance(tree, Negative):
        return -value(tree.inner)
    left, right = value(tree.left), value(tree.right)
    if tree.operator == "/":
        if right == 0:
            raise ExpressionError("division by zero")
        return left / right
    return {"+": left + right, "-": left - right, "*": left * right}[tree.operator]


def leaves(tree: Tree) -> list[Fraction]:
    """The numbers as written, left to right."""
    if isinstance(tree, Fraction):
        return [tree]
    if isinstance(tree, Negative):
        return leaves(tree.inner)
    return leaves(tree.left) + leaves(tree.right)


def _spaces_between_parts(text: str) -> bool:
    """Whether no space parts two digits: `1 2` must not become 12."""
    return re.search(r"[0-9.] +[0-9.]", text) is None


class _Parser:
    """Recursive descent over `text`; `at` is the place of the next unread character."""

    def __init__(self, text: str, operators: str, signs: bool, decimals: bool):
        self.text, self.at = text, 0
        self.additive = "".join(o for o in "+-" if o in operators)
        self.multiplicative = "".join(o for o in "*/" if o in operators)
        self.signs = signs
        self.number = _DECIMAL if decimals else _WHOLE

    def take(self, choices: str) -> str:
        """The next character if it is one of `choices`, else the empty string."""
        if self.at < len(self.text) and self.text[self.at] in choices:
            self.at += 1
            return self.text[self.at - 1]
        return ""

    def sum(self, depth: int) -> Tree:
        tree = self.product(depth)
        while operator := self.take(self.additive):
            tree = Binary(operator, tree, self.product(depth))
        return tree

    def product(self, depth: int) -> Tree:
        tree = self.factor(depth)
        while operator := self.take(self.multiplicative):
            tree = Binary(operator, tree, self.factor(depth))
        return tree

    def factor(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        if self.take("("):
            tree = self.sum(depth + 1)
            if not self.take(")"):
                raise ExpressionError("an opening bracket is never closed")
            return tree
        if self.signs and self.take("-"):
            return Negative(self.factor(depth + 1))
        found = self.number.match(self.text, self.at)
        if not found:
            raise ExpressionError("a number is missing" if self.at == len(self.text) else
                                  f"unexpected {self.text[self.at]!r}")
        self.at = found.end()
        return Fraction(found.group())
