"""A Sphinx extension that lets docstrings be plain text.

A docstring here is written to be read in an editor: code stands in single backquotes, an equation or a piece of code is
an indented block after a blank line, and |v|, y* and f_y mean what they say. To reStructuredText all of these are
markup, so they are translated before napoleon takes the sections (Args, Returns, ...) apart.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_SECTION = re.compile(
    r"^(Args|Arguments|Attributes|Example|Examples|Note|Notes|Raises|References?|Returns|See Also|Yields):$"
)
_ITEM = re.compile(r"^\s+[\w`*, .]+(\([^)]*\))?: ")
_LIST = re.compile(r"^\s*([-*]|\d+\.|#\.) +")
_CODE = re.compile(r"(?<![`:])`([^`]+)`(?!`)", re.DOTALL)
_LITERAL = re.compile(r"(``.+?``|:[a-z:]+:`[^`]+`)", re.DOTALL)


def translate(lines: list[str]) -> list[str]:
    """The docstring in reStructuredText."""
    lines = _joined_names(lines)
    out: list[str] = []
    prose: list[str] = []
    blocks = _indented_blocks(lines)

    def flush() -> None:
        out.extend(_tables(_inline("\n".join(prose)).split("\n")) if prose else [])
        prose.clear()

    for number, line in enumerate(lines):
        if number in blocks:
            if number - 1 not in blocks:
                while prose and not prose[-1].strip():
                    prose.pop()
                before = next((text for text in reversed(prose) if text.strip()), "")
                indent = _text_indent(before)
                flush()
                if not before.rstrip().endswith("::"):
                    out.extend(["", " " * indent + "::"])
                out.append("")
            out.append(line)
        else:
            prose.append(line)
    flush()
    return out


def _joined_names(lines: list[str]) -> list[str]:
    """Items of a section whose names take two lines, "a, b,\\n    c: text", on one."""
    out: list[str] = []
    for line in lines:
        if out and re.fullmatch(r" +(\w+, )*\w+,", out[-1]) and _indent(line) > _indent(out[-1]):
            out[-1] += f" {line.lstrip()}"
        else:
            out.append(line)
    return out


def _indented_blocks(lines: list[str]) -> set[int]:
    """The numbers of the lines that are equations or code: indented deeper than the text above, after a blank line."""
    blocks: set[int] = set()
    text = 0  # the indentation of the running text
    above = ""
    for number, line in enumerate(lines):
        if not line.strip():
            # A blank line within a block belongs to it.
            following = next((later for later in lines[number:] if later.strip()), "")
            if number - 1 in blocks and _indent(following) > text:
                blocks.add(number)
            continue
        after_blank = number > 0 and not lines[number - 1].strip()
        starts = after_blank and above and not _SECTION.match(above.strip())
        if (starts or number - 1 in blocks) and _indent(line) > text:
            blocks.add(number)
        else:
            above = line
            text = _text_indent(line)
    return blocks


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _text_indent(line: str) -> int:
    """Where the text of a line's paragraph stands: behind the marker of a list, inside the item of a section."""
    if marker := _LIST.match(line):
        return len(marker[0])
    return _indent(line) + 4 if _ITEM.match(line) else _indent(line)


def _inline(text: str) -> str:
    """Code spans to literals; everything that is markup by accident escaped."""

    def literal(match: re.Match[str]) -> str:
        before = text[match.start() - 1 : match.start()]
        after = text[match.end() : match.end() + 1]
        content = re.sub(r"\s*\n\s*", " ", match[1])
        return ("\\ " if before.isalnum() else "") + f"``{content}``" + ("\\ " if after.isalnum() else "")

    parts = _LITERAL.split(_CODE.sub(literal, text))
    for i in range(0, len(parts), 2):
        # A star or a dash that starts a line is a list's; every other star is a star.
        escaped = re.sub(r"(?m)(?<!^)(?<!^ )([*])", r"\\\1", parts[i].replace("|", "\\|"))
        escaped = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", escaped)
        # "steps: K. The paper takes 10." has no list whose first item is K.
        parts[i] = re.sub(r"(?m)(^ *(?=[A-Za-z])|: )(\w+)\.(?= |$)", r"\1\2\\.", escaped)
    return "".join(parts)


def _tables(lines: list[str]) -> list[str]:
    """Markdown's tables (whose bars `_inline` has escaped) as list-tables."""
    out: list[str] = []
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("\\|"):
            out.append(line)
            continue
        indent = " " * _indent(line)
        if number == 0 or not lines[number - 1].lstrip().startswith("\\|"):
            out.extend([f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""])
        cells = [cell.strip() for cell in line.strip().removeprefix("\\|").removesuffix("\\|").split("\\|")]
        if all(set(cell) <= set("-:") for cell in cells):
            continue
        out.extend(f"{indent}   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(cells))
    return out


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # What a dataclass calls its attributes are the parameters of its constructor.
    parameters = dataclasses.is_dataclass(obj) or hasattr(obj, "_fields")
    lines[:] = translate(["Args:" if parameters and line == "Attributes:" else line for line in lines])


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    # The fields of a named tuple are described under Attributes of its docstring.
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Any) -> dict[str, bool]:
    """Register ahead of napoleon."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
