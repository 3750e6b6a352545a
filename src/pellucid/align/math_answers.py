r"""Whether two mathematical answers are equal, without evaluating text as code.

    final_answer("... so it is \boxed{\frac{1}{2}}.")  ->  "\frac{1}{2}"
    same_answer(r"\frac{1}{2}", "0.5")                 ->  True
    same_answer("(1, 2]", "(1,2]")                     ->  True          same_answer("x+1", "1+x")  ->  True

An answer is a value, or a tuple, interval or set of values.  A value is an expression of numbers, letters, + - * / ^,
roots, pi and brackets, as plain text or LaTeX, parsed by the small grammar below.  Values without letters are compared
exactly where they are rational, else to 12 digits; with letters, at several points (two different polynomials agree at
random points with vanishing probability: Schwartz 1980).  What cannot be parsed is compared as text.  Length, nesting and
powers are bounded, so any input is answered in milliseconds.
"""

from __future__ import annotations

import math
import re
import string
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS, MAX_DEPTH, MAX_BITS = 400, 24, 4000
Number = Fraction | float

_LAST_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?|-?\.\d+")
_SAID = re.compile(r"(?:final answer|answer)(?:\s+is|\s*[:=])\s*:?\s*(.+?)\s*(?:\.\s|\.?\n|\.?$)", re.IGNORECASE)


_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}(?:\^\{?[23]\}?)?")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}|^(?=.*[A-Za-z]{3})[A-Za-z ]+$")  # words are no products


class NoValue(ValueError):
    """The text is no expression of the grammar, or has no value."""


# --- finding it -----------------------------------------------------------------------------------------------------------


def final_answer(text: str, last_number: bool = True) -> str | None:
    r"""The last \boxed{...}; else what stands behind the last ####; else behind the last "answer is"; else the last number
    (or None)."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip() or None
    said = _SAID.findall(text[-5000:])
    if said:
        return said[-1].strip().strip("$*").strip()
    numbers = _LAST_NUMBER.findall(text[-5000:]) if last_number else []
    return numbers[-1] if numbers else None


def _last_boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin, depth = text.index("{", start) + 1, 1
    for at in range(begin, min(len(text), begin + 10 * MAX_CHARS)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at].strip()
    return None


# --- comparing ------------------------------------------------------------------------------------------------------------


def same_answer(given: str, wanted: str) -> bool:
    """Whether both are the same answer."""
    given, wanted = cleaned(given), cleaned(wanted)
    if not given or not wanted:
        return False
    if given == wanted:
        return True
    if len(given) > MAX_CHARS or len(wanted) > MAX_CHARS:
        return False
    one, other = _collection(given), _collection(wanted)
    if one is None or other is None:
        return one is other and _same_value(given, wanted)
    if one.brackets != other.brackets or len(one.items) != len(other.items):
        return False
    if one.brackets in ("{}", ""):  # a set, or solutions one after the other: in any order
        left = list(other.items)
        for item in one.items:
            match = next((i for i, candidate in enumerate(left) if same_answer(item, candidate)), None)
            if match is None:
                return False
            del left[match]
        return True
    return all(map(same_answer, one.items, other.items))


def cleaned(text: str) -> str:
    """Without what does not change the value: $, spacing commands, units in text, a name before `=`, a final point."""
    text = text.strip().strip("$").strip()
    text = re.sub(r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|,|;|:|!|quad|qquad)(?![A-Za-z])|\\ ", "", text)
    text = re.sub(r"\\(?:[dt]frac|cfrac)(?![A-Za-z])", r"\\frac", text)
    text = text.replace("\\$", "").replace("\\%", "%").replace("^\\circ", "").replace("^{\\circ}", "").replace("°", "")
    text = re.sub(r"(?<!\\)sqrt(?![A-Za-z])", r"\\sqrt", re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi", text))
    text = re.sub(r"(?<![\d./^])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)  # 2 1/2
    text = text.replace("∞", "\\infty").replace("−", "-").replace("×", "*").replace("·", "*").replace("÷", "/").replace("π", "\\pi").replace("√", "\\sqrt")
    text = _TEXT.sub(lambda m: "" if re.search("[0-9]", text.replace(m[0], "")) else m[1], text)  # a unit, else a word
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))(?![^(\[{]*[)\]}])", "", text)  # 1,234, but not inside brackets
    text = re.sub(r"^[A-Za-z]\w?(?:\([A-Za-z]\))?\s*(?:=|\\in)\s*(?!=)", "", text)  # x = 5, f(x) = 2x
    text = re.sub(r"(?<=[\d)}])\s*(?:cm|mm|km|m|kg|g|dollars?|cents?|degrees?|units?|hours?|minutes?|seconds?|days?|years?|square|"
                  r"inches|feet|miles|meters?|people|ways)(?:\^\{?[23]\}?)?\s*$", "", text)
    return " ".join(text.rstrip(".").split())


class _Collection(NamedTuple):
    brackets: str
    items: list[str]


def _collection(text: str) -> _Collection | None:
    r"""(a, b), [a, b), \{a, b\} or a, b as brackets and items; None for a single value."""
    brackets, inner = "", text
    if text.startswith("\\{") and text.endswith("\\}"):
        brackets, inner = "{}", text[2:-2]
    elif text[0] in "([" and text[-1] in ")]" and _closes_at_the_end(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    items = _split(inner)
    if len(items) == 1 and brackets != "{}":
        return None
    return _Collection(brackets, items if inner.strip() else [])


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if depth == 0:
            return at == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """At the commas that stand outside all brackets."""
    items, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append(text[start:at].strip())
            start = at + 1
    return [*items, text[start:].strip()]


POINTS: tuple[dict[str, Fraction], ...] = tuple(
    {letter: Fraction(97 + 13 * i * (k + 1) + i * i * k, 53 + 2 * k) for i, letter in enumerate(string.ascii_letters)}
    for k in range(3))  # positive, so that roots have values; all letters differ


def _same_value(given: str, wanted: str) -> bool:
    if given.isalpha() and wanted.isalpha() and max(len(given), len(wanted)) == 1:  # the letter of a choice
        return given.casefold() == wanted.casefold()
    percent = given.endswith("%") != wanted.endswith("%")
    given, wanted = given.rstrip("% "), wanted.rstrip("% ")
    try:
        pairs = [(value(given, point), value(wanted, point)) for point in POINTS]
    except NoValue:
        return _unwrapped(given) == _unwrapped(wanted)
    if all(_close(one, other) for one, other in pairs):
        return True
    return percent and all(_close(one, other / 100) or _close(one / 100, other) for one, other in pairs)


def _unwrapped(text: str) -> str:
    """(A) -> a"""
    found = re.fullmatch(r"\(([^()]*)\)", text)
    return (found[1] if found else text).strip().casefold()


def _close(one: Number, other: Number) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    return math.isclose(float(one), float(other), rel_tol=1e-12, abs_tol=1e-12)


def value(text: str, point: dict[str, Fraction] | None = None) -> Number:
    """The value of an expression, with letters standing for the numbers of `point`.  Errors: NoValue."""
    if len(text) > MAX_CHARS or _WORDS.search(text):
        raise NoValue("too long, or words")
    parser = _Parser(text, point or {})
    try:
        found = parser.sum(0)
    except (OverflowError, ZeroDivisionError) as error:
        raise NoValue(str(error)) from None
    if parser.token:
        raise NoValue(f"unexpected {parser.token!r}")
    return found


# sum := product (("+" | "-") product)*       product := power (("*" | "/" | nothing) power)*
# power := factor ("^" power)?                factor := "-" power | number | letter | brackets | command
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[A-Za-z]+|\*\*|[A-Za-z+\-*/^(){}\[\]])")


class _Parser:
    """Recursive descent that computes as it goes; `token` is the next unread one, or empty."""

    def __init__(self, text: str, point: dict[str, Fraction]):
        self.text, self.point, self.at, self.token = text, point, 0, ""
        self.next()

    def next(self) -> str:
        taken = self.token
        found = _TOKEN.match(self.text, self.at)
        if not found and self.text[self.at :].strip():
            raise NoValue(f"unexpected {self.text[self.at :].strip()[0]!r}")
        self.token, self.at = (found[1], found.end()) if found else ("", len(self.text))
        return taken

    def take(self, *choices: str) -> str:
        return self.next() if self.token in choices and self.token else ""

    def sum(self, depth: int) -> Number:
        if depth > MAX_DEPTH:
            raise NoValue("nested too deep")
        total = self.product(depth)
        while sign := self.take("+", "-"):
            term = self.product(depth)
            total = _bounded(total + term if sign == "+" else total - term)
        return total

    def product(self, depth: int) -> Number:
        result = self.signed(depth)
        while True:
            if self.take("*", "\\cdot", "\\times"):
                result = _bounded(result * self.signed(depth))
            elif self.take("/", "\\div"):
                result = _divided(result, self.signed(depth))
            elif self.token and (self.token[0].isalnum() or self.token[0] == "\\" or self.token in "([{"):
                result = self._beside(result, depth)
            else:
                return result

    def _beside(self, left: Number, depth: int) -> Number:
        r"""2x, 2\pi and 3(4) are products, 2\frac{1}{2} is a mixed number, and 1 2 is nothing."""
        before = self.text[: self.at - len(self.token)].rstrip()[-1:]
        if self.token[0].isdigit() and before.isdigit():
            raise NoValue("two numbers beside one another")
        if self.token == "\\frac" and before.isdigit() and isinstance(left, Fraction) and left.denominator == 1:
            part = self.power(depth)
            return left + part if left >= 0 else left - part
        return _bounded(left * self.power(depth))

    def signed(self, depth: int) -> Number:
        if self.take("-"):
            return -self.signed(depth + 1) if depth < MAX_DEPTH else self._deep()
        self.take("+")
        return self.power(depth)

    def power(self, depth: int) -> Number:
        base = self.factor(depth)
        if self.take("^", "**"):
            return _power(base, self.signed(depth + 1) if depth < MAX_DEPTH else self._deep())
        return base

    def factor(self, depth: int) -> Number:
        token = self.next()
        if token[:1].isdigit() or token[:1] == ".":
            return Fraction(token)
        if token in ("(", "[", "{"):
            inside = self.sum(depth + 1)
            if not self.take({"(": ")", "[": "]", "{": "}"}[token]):
                raise NoValue("a bracket is not closed")
            return inside
        if token == "\\frac":
            above = self.argument(depth)
            return _divided(above, self.argument(depth))
        if token == "\\sqrt":
            order = self.factor(depth + 1) if self.token == "[" else Fraction(2)
            return _power(self.argument(depth), _divided(Fraction(1), order))
        if token == "\\pi":
            return math.pi
        if len(token) == 1 and token.isalpha() and token in self.point:
            return self.point[token]
        raise NoValue(f"unexpected {token!r}" if token else "something is missing")

    def argument(self, depth: int) -> Number:
        r"""Of a command: a group, or one digit or letter (\frac12, \sqrt2)."""
        if self.token[:1].isdigit() and len(self.token) > 1:
            first, rest = self.token[0], self.at - len(self.token) + 1
            self.at = rest
            self.next()
            return Fraction(first)
        return self.factor(depth + 1)

    def _deep(self) -> Number:
        raise NoValue("nested too deep")


def _bounded(number: Number) -> Number:
    """Exact numbers that have grown too long go on as floats."""
    if isinstance(number, Fraction) and number.numerator.bit_length() + number.denominator.bit_length() > MAX_BITS:
        return float(number)
    return number


def _divided(above: Number, below: Number) -> Number:
    if below == 0:
        raise NoValue("division by zero")
    return _bounded(above / below)


def _power(base: Number, exponent: Number) -> Number:
    """Exact for whole exponents, and for roots that are rational."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = base.numerator.bit_length() + base.denominator.bit_length()
            if base == 0 and exponent <= 0:
                raise NoValue("no power of zero")
            if abs(exponent) * size <= MAX_BITS:
                return base**exponent.numerator
        elif base >= 0 and exponent.denominator <= 12:
            roots = [_root(n, exponent.denominator) for n in (base.numerator, base.denominator)]
            if None not in roots and abs(exponent.numerator) <= 64:
                return _power(Fraction(roots[0] or 0, roots[1] or 1), Fraction(exponent.numerator))
    if base < 0 and not (isinstance(exponent, Fraction) and exponent.denominator == 1):
        raise NoValue("a root of a negative number")
    if base == 0:
        return Fraction(0) if exponent > 0 else _divided(Fraction(1), Fraction(0))
    return float(base) ** float(exponent)


def _root(n: int, order: int) -> int | None:
    """The whole n-th root, if there is one."""
    if order == 2:
        guess = math.isqrt(n)
    elif n.bit_length() <= 100:
        guess = round(n ** (1.0 / order))
    else:
        return None
    return next((g for g in (guess - 1, guess, guess + 1) if g >= 0 and g**order == n), None)
