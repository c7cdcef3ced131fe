"""Package descriptions and packages from the machine's own apt sources, without root.

apt works in folders of ours, with the machine's sources, keys and proxy. It verifies what it
fetches. The folder of downloads holds the packages, the indices (gzip), and ``downloads.json``,
which says what they are; with it, everything can be brought to a machine without apt.
"""

import contextlib
import dataclasses
import email.parser
import gzip
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

from tqdm import tqdm

from fairseq_sparsemixer.corpora.resumable import say
from fairseq_sparsemixer.corpora.subprocesses import last_line, raise_full_disk
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    atomic_path,
    decode_line,
    read_json,
    replace_durably,
    scratch_folder,
    sha256_of,
    write_json,
)
from fairseq_sparsemixer.locks import in_turn

_RECORD = "downloads.json"
ELSEWHERE = (
    "run the command on a Debian or Ubuntu machine with a network and bring the folder of its "
    "downloads with --downloads DIR, or bring the corpus's raw/ folder, or text of your own, with "
    "--raw-dir DIR"
)
"""The cure where this machine cannot fetch something."""

# On top of the machine's settings: container images may forbid translations, and commands that run
# after an update belong to the system's own lists. The indices are declared anew so that those
# that other programs ask for are not fetched as well.
_SETTINGS = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::Languages;
#clear Acquire::IndexTargets;
Acquire::Languages { LANGUAGES };
Acquire::GzipIndexes "false";
Acquire::IndexTargets::deb {
  Packages {
    MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
    ShortDescription "Packages";
    Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
    flatMetaKey "Packages";
    flatDescription "$(RELEASE) Packages";
    Optional "false";
  };
  Translations {
    MetaKey "$(COMPONENT)/i18n/Translation-$(LANGUAGE)";
    ShortDescription "Translation-$(LANGUAGE)";
    Description "$(RELEASE)/$(COMPONENT) Translation-$(LANGUAGE)";
    flatMetaKey "$(LANGUAGE)";
    flatDescription "$(RELEASE) Translation-$(LANGUAGE)";
  };
};
"""
_INDEX_FIELDS = ("RELEASE", "COMPONENT", "LANGUAGE", "SUITE", "CODENAME", "METAKEY", "FILENAME")


@dataclass(frozen=True)
class Index:
    """The descriptions of a part of the archive in one language.

    Attributes:
        file: its name in the folder of downloads (gzip).
        release, component: the part, such as ``bookworm`` and ``main``.
        suite, codename, date: what the archive says of the release.
        bytes, sha256: of the text.
    """

    file: str
    language: str
    release: str
    component: str
    suite: str
    codename: str
    date: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A binary package and the name of its file in the folder of downloads."""

    file: str
    name: str
    version: str
    architecture: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Downloads:
    """What ``downloads.json`` says.

    Attributes:
        indices: of each part of the archive English, followed by the other languages that it has.
        packages: in the order in which they were asked for.
        not_found: names that the machine's sources do not have.
    """

    indices: List[Index]
    packages: List[Package]
    not_found: List[str]

    def describe(self) -> Dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    def only(self, names: Sequence[str], languages: Sequence[str]) -> "Downloads":
        """Those packages, and the indices of those languages with the English ones beside them."""
        parts = {
            (each.release, each.component) for each in self.indices if each.language in languages
        }
        return Downloads(
            [
                each
                for each in self.indices
                if (each.release, each.component) in parts and each.language in ("en", *languages)
            ],
            [each for name in dict.fromkeys(names) for each in self.packages if each.name == name],
            [name for name in names if name in self.not_found],
        )


def obtain(
    folder: Path,
    required: Sequence[str],
    optional: Sequence[str],
    languages: Sequence[str] = ("de",),
) -> Downloads:
    """The indices and packages in ``folder``: those there, or fetched where one is missing.

    The folder may serve several corpora: what was fetched before stays in its record.

    Args:
        folder: made if need be.
        required: packages without which there is nothing to be done.
        optional: packages that another release of the distribution may not have.
        languages: of the descriptions, besides English.

    Raises:
        UserError: there is no apt, no network, or no such package or index; or a file was damaged
            on the way.
    """
    names = [*required, *optional]
    downloads = read_record(folder)
    if downloads is not None and _complete(folder, downloads, names, languages):
        return downloads.only(names, languages)
    if shutil.which("apt-get") is None:
        raise UserError(f"this machine has no apt to fetch {folder} with: {ELSEWHERE}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--downloads {folder}: {error.strerror}") from error
    # Not the lock of the folder itself: that may be the one of the corpus.
    with in_turn(folder / "downloads", beside=True):
        downloads = read_record(folder)  # another process may have fetched them meanwhile
        if downloads is None or not _complete(folder, downloads, names, languages):
            downloads = _obtain_anew(
                folder, required, names, languages, downloads or Downloads([], [], [])
            )
        return downloads.only(names, languages)


def _obtain_anew(
    folder: Path,
    required: Sequence[str],
    names: Sequence[str],
    asked: Sequence[str],
    before: Downloads,
) -> Downloads:
    """Fetch what is not there, of what is asked for and what was ``before``."""
    earlier = [*(package.name for package in before.packages), *before.not_found]
    names = list(dict.fromkeys([*names, *earlier]))
    of_before = [index.language for index in before.indices if index.language != "en"]
    languages = list(dict.fromkeys([*asked, *of_before]))
    with scratch_folder(folder.resolve() / ".apt.partial") as scratch:
        apt = _Apt(scratch, languages)
        say("apt fetches the lists of packages and their descriptions (tens of MB)")
        warnings = apt.update()
        found = apt.indices()
        entries = _with_english(found, languages)
        missing = sorted(set(asked) - {entry["LANGUAGE"] for entry in entries})
        if missing:
            why = f" ({last_line(warnings)})" if warnings.strip() else ""
            raise UserError(
                "the machine's apt sources gave no package descriptions in English and "
                f"{', '.join(missing)}{why}: check the network and the names, or {ELSEWHERE}"
            )
        indices = [_keep_index(entry, folder) for entry in entries]
        offered = apt.show(names)
        missing = [name for name in required if name not in offered]
        if missing:
            raise UserError(
                f"the machine's apt sources have no package {', '.join(missing)}: {ELSEWHERE}"
            )
        packages = [_package(offered[name]) for name in names if name in offered]
        _fetch(apt, packages, folder, scratch)
    not_found = [name for name in names if name not in offered]
    downloads = Downloads(indices, packages, not_found)
    write_json(folder / _RECORD, downloads.describe())
    return downloads


def read_record(folder: Path) -> Optional[Downloads]:
    """What ``downloads.json`` in a folder says, or None where there is none.

    Raises:
        UserError: it is no such record.
    """
    path = folder / _RECORD
    if not path.is_file():
        return None
    cure = "it is to be a record of downloads; remove it, or name another folder with --downloads"
    shape = {"indices": [{"file": str}], "packages": [{"file": str}], "not_found": [str]}
    content = read_json(path, shape, cure)
    try:
        downloads = Downloads(
            [Index(**entry) for entry in content["indices"]],
            [Package(**entry) for entry in content["packages"]],
            list(content["not_found"]),
        )
        for entry in [*content["indices"], *content["packages"]]:
            if Path(entry["file"]).name != entry["file"]:
                raise ValueError("a file outside of the folder")
        return downloads
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}): {cure}") from error


def index_lines(folder: Path, index: Index) -> Iterator[str]:
    """Yield the lines of an index.

    Raises:
        UserError: a line is not UTF-8.
    """
    with gzip.open(folder / index.file) as file:
        for number, line in enumerate(file, 1):
            yield decode_line(line, index.file, number)


def _complete(
    folder: Path, downloads: Downloads, names: Sequence[str], languages: Sequence[str]
) -> bool:
    """Whether all that is asked for is there and undamaged."""
    known = {package.name for package in downloads.packages} | set(downloads.not_found)
    known |= {index.language for index in downloads.indices}
    if not {*names, *languages} <= known:
        return False
    entries: List[Union[Index, Package]] = [*downloads.indices, *downloads.packages]
    for entry in entries:
        path = folder / entry.file
        if not path.is_file():
            say(f"{path} is missing")
            return False
        found = _text_sha256(path) if isinstance(entry, Index) else sha256_of(path)
        if found != entry.sha256:
            say(f"{path} is damaged: its checksum is not the one in {_RECORD}")
            return False
    return True


def _text_sha256(path: Path) -> str:
    """SHA-256 of what a gzip file holds; empty where it is damaged."""
    digest = hashlib.sha256()
    try:
        with gzip.open(path) as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except (OSError, EOFError, ValueError):
        return ""
    return digest.hexdigest()


class _Apt:
    """apt with lists and caches in a folder of its own."""

    def __init__(self, folder: Path, languages: Sequence[str]):
        folders = [folder / "lists" / "partial", folder / "archives" / "partial"]
        for path in folders:
            path.mkdir(parents=True)
        settings = folder / "apt.conf"
        declared = " ".join(f'"{language}";' for language in ("en", *languages))
        settings.write_text(_SETTINGS.replace("LANGUAGES", declared), encoding="utf-8")
        # What is installed on the machine has no say in which version is fetched.
        (folder / "status").touch()
        paths = {
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "Dir::Cache::archives": folder / "archives",
            "Dir::Cache::pkgcache": folder / "pkgcache.bin",
            "Dir::Cache::srcpkgcache": folder / "srcpkgcache.bin",
        }
        # To root, apt would be another user, who need not be able to write here.
        options = [f"{name}={path}" for name, path in paths.items()] + ["APT::Sandbox::User=root"]
        self._options = ["-c", str(settings)]
        for option in options:
            self._options += ["-o", option]

    def update(self) -> str:
        """Fetch the lists; what apt says to that. Sources out of reach are no error yet."""
        return self._run("apt-get", "-qq", "update").stderr

    def indices(self) -> List[Dict[str, str]]:
        """The fetched translations, by :data:`_INDEX_FIELDS`."""
        form = "\t".join(f"$({name})" for name in _INDEX_FIELDS)
        process = self._run("apt-get", "indextargets", "--format", form, "Created-By: Translations")
        entries = (
            dict(zip(_INDEX_FIELDS, line.split("\t"))) for line in process.stdout.split("\n")
        )
        return [entry for entry in entries if os.path.isfile(entry.get("FILENAME", ""))]

    def show(self, names: Sequence[str]) -> Dict[str, Dict[str, str]]:
        """The fields of the packages that the sources have, by name."""
        process = self._run("apt-cache", "show", "--no-all-versions", *names)
        found: Dict[str, Dict[str, str]] = {}
        for stanza in process.stdout.split("\n\n"):
            fields = dict(email.parser.HeaderParser().parsestr(stanza.strip("\n")).items())
            if "SHA256" in fields:
                found.setdefault(fields["Package"], fields)
        return found

    def download(self, package: Package, folder: Path) -> None:
        """Fetch a package into an empty folder.

        Raises:
            UserError: apt could not.
        """
        process = self._run(
            "apt-get", "-qq", "download", f"{package.name}={package.version}", folder=folder
        )
        if process.returncode != 0:
            raise UserError(
                f"apt could not download {package.name} {package.version} "
                f"({last_line(process.stderr)}): check the network and run the command again, or "
                f"{ELSEWHERE}"
            )

    def _run(
        self, program: str, *arguments: str, folder: Optional[Path] = None
    ) -> "subprocess.CompletedProcess[str]":
        process = subprocess.run(
            [program, *self._options, *arguments],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        raise_full_disk(process.stderr)
        return process


def _with_english(
    entries: Sequence[Dict[str, str]], languages: Sequence[str]
) -> List[Dict[str, str]]:
    """Those of the parts of the archive that have English and any other language, English first."""
    parts: Dict[Any, Dict[str, Dict[str, str]]] = {}
    for entry in entries:
        part = parts.setdefault((entry["RELEASE"], entry["COMPONENT"]), {})
        part.setdefault(entry["LANGUAGE"], entry)
    translated = [
        [part[language] for language in ("en", *languages) if language in part]
        for part in parts.values()
        if "en" in part
    ]
    return [entry for part in translated if len(part) > 1 for entry in part]


def _keep_index(entry: Dict[str, str], folder: Path) -> Index:
    """Copy an index from apt's lists to the folder of downloads, compressed."""
    source = Path(entry["FILENAME"])
    part = f"{entry['RELEASE']}_{entry['COMPONENT']}".replace("/", "_")
    name = f"{part}_Translation-{entry['LANGUAGE']}.gz"
    with (
        atomic_path(folder / name) as partial,
        source.open("rb") as text,
        gzip.open(partial, "wb") as packed,
    ):
        shutil.copyfileobj(text, packed)
    return Index(
        file=name,
        language=entry["LANGUAGE"],
        release=entry["RELEASE"],
        component=entry["COMPONENT"],
        suite=entry["SUITE"],
        codename=entry["CODENAME"],
        date=_release_date(source, entry["METAKEY"]),
        bytes=source.stat().st_size,
        sha256=sha256_of(source),
    )


def _release_date(index: Path, key: str) -> str:
    """The date of the release that an index of apt's lists belongs to; empty where unknown."""
    prefix = index.name[: -len(key)]  # the key's slashes are underscores in the name
    for name in ("InRelease", "Release"):
        with (
            contextlib.suppress(FileNotFoundError),
            (index.parent / f"{prefix}{name}").open(encoding="utf-8", errors="replace") as file,
        ):
            for line in file:
                if line.startswith("Date:"):
                    return line[len("Date:") :].strip()
    return ""


def _package(fields: Dict[str, str]) -> Package:
    name, version, architecture = (fields[key] for key in ("Package", "Version", "Architecture"))
    return Package(
        # A colon in the version cannot be in a file name everywhere.
        file=f"{name}_{version.replace(':', '%3a')}_{architecture}.deb",
        name=name,
        version=version,
        architecture=architecture,
        bytes=int(fields["Size"]),
        sha256=fields["SHA256"],
    )


def _fetch(apt: _Apt, packages: Sequence[Package], folder: Path, scratch: Path) -> None:
    """Fetch the packages that ``folder`` does not have yet."""
    absent = [
        package
        for package in packages
        if not (folder / package.file).is_file()
        or sha256_of(folder / package.file) != package.sha256
    ]
    size = sum(package.bytes for package in absent)
    say(f"apt fetches {len(absent)} packages ({size / 1e6:.1f} MB)")
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for package in absent:
            with scratch_folder(scratch / "package") as place:
                apt.download(package, place)
                fetched = [path for path in place.iterdir() if path.suffix == ".deb"]
                if len(fetched) != 1 or sha256_of(fetched[0]) != package.sha256:
                    raise UserError(
                        f"{package.name} {package.version} came damaged: run the command again"
                    )
                replace_durably(fetched[0], folder / package.file)
            bar.update(package.bytes)
