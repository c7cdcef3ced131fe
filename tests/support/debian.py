"""Miniature Debian packages and indices of our own sentences, and a corpus made from them."""

import dataclasses
import gzip
import hashlib
import io
import random
import re
import sys
import tarfile

import pytest

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import binarise
from fairseq_sparsemixer.corpora.debian import apt, ding, extraction
from support import commands
from support.corpora import build_binary
from support.phrases import ADVERBS, OBJECTS, SUBJECTS, VERBS

DOMAINS = ("descriptions", "ding", "help", "manpages")
VOCAB_SIZE = 250
SPLIT = dataclasses.replace(
    extraction.SPLIT, salt="3", domain_shares=dict.fromkeys(DOMAINS, 0.25), max_held_out=12
)
LANGUAGES = ("de", "it")
LANGUAGES_SPLIT = dataclasses.replace(
    extraction.LANGUAGES_SPLIT, salt="3", held_out_share=0.3, max_held_out=12, max_train=100
)


def help_page(*blocks):
    body = "\n".join(blocks)
    return (
        '<html><body><p id="before">Outside.</p><div id="DisplayArea">'
        f'{body}</div><div id="SearchFrame"></div><p id="after">Outside.</p></body></html>'
    )


def manual(*blocks):
    return "".join(f".{kind}\n{text}\n" for kind, text in blocks)


def ar(members):
    data = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        data += header.encode() + content + b"\n" * (len(content) % 2)
    return data


def tar(content, mode="w"):
    """A tar archive of files (bytes), folders (None) and links (text)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, value in content.items():
            member = tarfile.TarInfo(f"./{name}")
            if value is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(value, str):
                member.type, member.linkname = tarfile.SYMTYPE, value
            else:
                member.size = len(value)
            archive.addfile(member, io.BytesIO(value) if isinstance(value, bytes) else None)
    return buffer.getvalue()


def write_deb(path, content, compression="xz", data=None):
    name = f"data.tar.{compression}" if compression else "data.tar"
    mode = f"w:{compression}" if compression else "w"
    archive = tar(content, mode) if data is None else data
    # An odd number of bytes before it, as a control archive may have.
    path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.gz": b"odd", name: archive}))
    return path


def write_program(path, code):
    path.write_text(f"#!{sys.executable} -IS\n{code}")
    path.chmod(0o755)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Phrases:
    """Sentences in two languages, each another one, and now and then nearly the same."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def sentence(self):
        parts = [self._random.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ADVERBS)]
        return tuple(" ".join(part[side] for part in parts) + "." for side in (0, 1))

    def sentences(self, count):
        return [" ".join(side) for side in zip(*(self.sentence() for _ in range(count)))]


def index_texts():
    """The indices of 60 packages in both languages; the words of a package's name are in both."""
    phrases = Phrases(1)
    indices = {"en": "", "de": ""}
    for number in range(60):
        for text, (language, paragraph) in zip(
            (f"title number {number} of all", f"Titel Nummer {number} von allen"),
            zip(indices, phrases.sentences(3)),
        ):
            indices[language] += (
                f"Package: word{number}-dev\nDescription-md5: {number:032}\n"
                f"Description-{language}: {text}\n {paragraph}\n\n"
            )
    return indices


def several_index_texts():
    """Those in English, German, and an Italian that is German with its words turned round.

    Every fifth package is not translated into it.
    """
    indices = index_texts()
    stanzas = indices["de"].strip("\n").split("\n\n")
    translated = [_turned(stanza) for number, stanza in enumerate(stanzas) if number % 5]
    return {**indices, "it": "\n\n".join(translated) + "\n"}


def _turned(stanza):
    head, text = stanza.split("Description-de: ")
    sentences = re.sub(r"[^\s.]+", lambda word: word[0][::-1], text).split(". ")
    return f"{head}Description-it: {'. '.join(each[0].upper() + each[1:] for each in sentences)}"


def package_contents():
    """What the fixture's packages hold, by name."""
    phrases = Phrases(2)
    entries = []
    for number in range(80):
        english, german = zip(*(phrases.sentence() for _ in range(2)))
        entries.append(
            f"wort{number} | {' | '.join(german)} :: word{number} | {' | '.join(english)}"
        )
    help_texts = {"en-US": {}, "de": {}}
    for number in range(40):
        sides = [phrases.sentence() for _ in range(4)]
        for side, (language, pages) in enumerate(help_texts.items()):
            blocks = [f'<p id="p{i}">{pair[side]}</p>' for i, pair in enumerate(sides)]
            pages[f"usr/share/libreoffice/help/{language}/text/part{number}/page.html"] = help_page(
                *blocks
            ).encode()
    manuals = {"": {}, "de/": {}}
    for number in range(40):
        sides = [phrases.sentence() for _ in range(4)]
        for side, (folder, pages) in enumerate(manuals.items()):
            page = manual(*(("PP", pair[side]) for pair in sides))
            pages[f"usr/share/man/{folder}man1/tool{number}.1.gz"] = gzip.compress(page.encode())
    # A page that another package has as well: the first one's counts.
    other = {"usr/share/man/man1/tool0.1.gz": gzip.compress(manual(("PP", "Not this.")).encode())}
    return {
        "trans-de-en": {ding.PATH: "\n".join(entries).encode()},
        "libreoffice-help-en-us": help_texts["en-US"],
        "libreoffice-help-de": help_texts["de"],
        "manpages-de": manuals["de/"],
        "manpages": manuals[""],
        "coreutils": other,
    }


def write_downloads(folder, without=(), indices=None):
    """A folder of downloads as ``prepare debian`` leaves it; most optional packages are absent."""
    folder.mkdir()
    entries = {"indices": [], "packages": [], "not_found": []}
    for language, text in (indices or index_texts()).items():
        name = f"stable_main_Translation-{language}.gz"
        (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0))
        index = apt.Index(
            name, language, "stable", "main", "stable", "woody", "today", len(text.encode()),
            sha256(text.encode()),
        )  # fmt: skip
        entries["indices"].append(dataclasses.asdict(index))
    for name, content in package_contents().items():
        path = write_deb(folder / f"{name}_1.0_all.deb", {} if name in without else content)
        data = path.read_bytes()
        package = apt.Package(path.name, name, "1.0", "all", len(data), sha256(data))
        entries["packages"].append(dataclasses.asdict(package))
    names = {entry["name"] for entry in entries["packages"]}
    entries["not_found"] = [name for name in extraction.OPTIONAL if name not in names]
    files.write_json(folder / "downloads.json", entries)
    return folder


def build_several(output, downloads, binary=False):
    """A finished corpus of several languages, made without apt; maybe with what fairseq reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "LANGUAGES_SPLIT", LANGUAGES_SPLIT)
        patch.setattr(apt.shutil, "which", lambda name: None)
        if not binary:
            patch.setattr(binarise, "build_binary", build_binary)
        commands.command(
            "prepare", "debian", "--languages", ",".join(LANGUAGES), "--output", output,
            "--downloads", downloads, "--vocab-size", VOCAB_SIZE,
        )  # fmt: skip


def build(output, downloads):
    """A finished corpus, made without apt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "SPLIT", SPLIT)
        patch.setattr(binarise, "build_binary", build_binary)
        patch.setattr(apt.shutil, "which", lambda name: None)
        commands.command(
            "prepare", "debian", "--output", output, "--downloads", downloads,
            "--vocab-size", VOCAB_SIZE,
        )  # fmt: skip
