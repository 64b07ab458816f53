"""Jinja for chat templates, which are code by strangers: sandboxed, and bounded in time and size.

The environment gives templates what Hugging Face's `apply_chat_template` gives them (block trimming, `break` and
`continue`, `raise_exception`, `strftime_now`, an unescaped `tojson`, `{% generation %}`). Jinja's own sandbox keeps a
template from Python's internals but bounds nothing except `range`; here loops and calls watch a deadline, and whatever
can make a large value from small ones (`*`, `+`, `~`, `%`, filters, calls) is checked, so that a template can't stop a
server.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
"""Processor time of one rendering; a conversation of a thousand turns takes some hundredths of a second."""
MAX_SIZE = 16 * 2**20
"""Characters of a text, or elements of a list, that a template makes."""

_WIDTHS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice"})
_state = threading.local()


class TemplateLimitError(SecurityError):
    """A template worked longer, or made a larger value, than any conversation needs."""


def render(template: Template, variables: dict[str, Any]) -> str:
    """The template's text; raises TemplateLimitError, and whatever the template raises."""
    _state.deadline = time.thread_time() + MAX_SECONDS
    _state.steps = 0
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        _check_size(size)
        pieces.append(piece)
    return "".join(pieces)


def _watch() -> None:
    """Counts a loop iteration or a call; looks at the clock at every 64th."""
    _state.steps = steps = getattr(_state, "steps", 0) + 1
    if steps % 64 == 0 and time.thread_time() > _state.deadline:
        raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:g} s of processor time")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of {size} elements; at most {MAX_SIZE} are allowed")


def _checked(value: Any) -> Any:
    if isinstance(value, (str, bytes, list, tuple)):
        _check_size(len(value))
    return value


def _check_arguments(name: str, subject: Any, arguments: tuple[Any, ...]) -> None:
    """Refuses a filter or a string method whose result would be too large, before it is made."""
    if name in _WIDTHS:
        for value in arguments:
            if isinstance(value, int):
                _check_size(
                    value * (1 + subject.count("\n")) if name == "indent" and isinstance(subject, str) else value
                )
    elif name in ("format", "format_map") and isinstance(subject, str):
        _check_format(subject)
    elif name == "replace" and isinstance(subject, str) and len(arguments) > 1:
        old, new = str(arguments[0]), str(arguments[1])
        _check_size(len(subject) + subject.count(old) * max(0, len(new) - len(old)))
    elif name == "join":
        items, glue = (
            (arguments[0], subject)
            if isinstance(subject, str) and arguments
            else (subject, "".join(map(str, arguments[:1])))
        )
        if isinstance(items, (list, tuple)):
            _check_size(sum(len(item) if isinstance(item, str) else 1 for item in items) + len(glue) * len(items))


def _check_format(text: str) -> None:
    """Widths and precisions in a format string are runs of digits; `*` takes one from the arguments."""
    _check_size(max((int(digits[:12]) for digits in re.findall(r"[0-9]+", text)), default=0))
    if re.search(r"%[^a-zA-Z%]*\*", text):
        raise TemplateLimitError("a format takes its width from its arguments")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that also bounds time and size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["trine_watched"] = _watched
        self.filters["trine_checked"] = _checked
        self.filters["trine_concatenated"] = _concatenated
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(loop.iter, "trine_watched", loop.lineno)
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filter(block.filter, "trine_checked", block.lineno)
        return _ConcatToFilter().visit(tree)  # type: ignore[no-any-return]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operator, unless its result would be too large."""
        sequences = (str, bytes, list, tuple)
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, sequences) and isinstance(count, int):
                    _check_size(len(value) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * right * 256)  # large numbers cost more than long texts
        elif operator == "+" and isinstance(left, sequences) and isinstance(right, sequences):
            _check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call within the limits."""
        _watch()
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            _check_arguments(getattr(obj, "__name__", ""), owner, (*args, *kwargs.values()))
        return _checked(super().call(context, obj, *args, **kwargs))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or an environment comes first

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        subject, *rest = args[passed:]
        _check_arguments(name, subject, (*rest, *kwargs.values()))
        return _checked(function(*args, **kwargs))

    return bounded


def _filter(node: Any, name: str, line: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


class _ConcatToFilter(NodeTransformer):
    """Turns the `~` operator, which Jinja does not let one intercept, into a filter."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "trine_concatenated", node.lineno)


def _watched(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _watch()
        yield value


def _concatenated(values: list[Any]) -> str:
    """The `~` operator."""
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML, the form in which models saw it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model writes, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
