"""What the corpus ``debian`` is made of: packages, their texts, and how it is divided."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

from tqdm import tqdm

from fairseq_sparsemixer.corpora.cleaning import Limits, SentencePair, clean
from fairseq_sparsemixer.corpora.debian import apt, descriptions, ding, help_pages, manual_pages
from fairseq_sparsemixer.corpora.debian.deb_archives import read_files
from fairseq_sparsemixer.corpora.splitting import SplitSettings
from fairseq_sparsemixer.errors import UserError

LANGUAGES = ("en", "de")
SOURCE = LANGUAGES[0]
"""The language that descriptions are translated from."""
REVISION = 2
"""Of what is extracted and how: to be raised with every change, so that corpora are made anew."""
LIMITS = Limits()
DICTIONARY = "trans-de-en"
HELP = {"en": "libreoffice-help-en-us", "de": "libreoffice-help-de"}
GERMAN_MANUAL = "manpages-de"
_ENGLISH_MANUALS = """
    manpages acct anacron at binkd bsdextrautils bsdutils btrfs-progs bzip2 coreutils cpio cron
    cryptsetup ddate diffutils dosfstools e2fsprogs ed eject exif fdisk fdutils findutils gettext
    gettext-base grep groff-base grub-common grub-legacy grub-pc gzip hostname icedax info
    init-system-helpers install-info iptables irqtop kbd kmod less libnss-myhostname libnss-resolve
    libnss-systemd libpam-systemd libsane-common make mount mtools mutt nano ncurses-bin nfs-common
    nfs-kernel-server openssh-known-hosts parted psutils recutils rfkill sane-airscan sane-utils
    scanbd sed sharutils sysstat systemd systemd-boot systemd-container systemd-coredump
    systemd-homed systemd-journal-remote systemd-oomd systemd-resolved systemd-sysv
    systemd-timesyncd systemd-userdbd sysvinit-core tar texinfo thinkfan udev usbutils util-linux
    util-linux-extra uuid-runtime vlock vorbis-tools wdiff wodim x11-apps
"""
ENGLISH_MANUALS = tuple(_ENGLISH_MANUALS.split())
"""The packages of the pages that manpages-de translates, as far as they give about 50 pairs for
each megabyte. Where two of them have a page of the same name, the first one's is taken."""

REQUIRED = (DICTIONARY, *HELP.values(), GERMAN_MANUAL, *ENGLISH_MANUALS[:1])
"""The others may be missing from another release."""
OPTIONAL = ENGLISH_MANUALS[1:]
MEGABYTES = 200
"""Of disk for the corpus, downloads included."""

SPLIT = SplitSettings(
    held_out_share=0.0,  # each domain has its own
    # The first whole number whose draw holds out the intended share of every domain's pairs,
    # within 15 %; documents differ much in size.
    salt="84",
    min_held_out_tokens=6,
    max_cosine=0.70,
    domain_shares={"descriptions": 0.05, "ding": 0.05, "help": 0.06, "manpages": 0.06},
    max_held_out=400,
    max_held_out_tokens=60,
    whole_sentences=True,
)


LANGUAGES_SPLIT = SplitSettings(
    held_out_share=0.06,
    salt="1",
    min_held_out_tokens=SPLIT.min_held_out_tokens,
    max_cosine=SPLIT.max_cosine,
    max_held_out=500,
    max_held_out_tokens=SPLIT.max_held_out_tokens,
    whole_sentences=True,
    by_languages=True,
    max_train=20_000,
)
"""Of the descriptions in several languages, by pair of languages."""


def extract(
    folder: Path, downloads: apt.Downloads, languages: Sequence[str] = ()
) -> Tuple[List[SentencePair], Dict[str, Any]]:
    """Read all texts of the downloads.

    Args:
        folder: where the files are.
        downloads: which they are.
        languages: read the descriptions alone, in each of these; the domains are then the pairs of
            languages.

    Returns:
        The cleaned pairs, and a JSON object: by domain the aligned ``segments`` and the ``pairs``
        after cleaning, and ``segments_dropped`` by reason.

    Raises:
        UserError: a file is damaged, or a domain has no text.
    """
    segments: Counter = Counter()

    def counted(pairs: Iterable[SentencePair]) -> Iterator[SentencePair]:
        for pair in tqdm(pairs, desc="texts", unit=" segments", leave=False, disable=None):
            segments[pair.domain] += 1
            yield pair

    domains = [pair_of(language) for language in languages] or list(SPLIT.domain_shares)
    if languages:
        parts = [_descriptions(folder, downloads, *part) for part in zip(languages, domains)]
    else:
        read_all = (_descriptions, _dictionary, _help_pages, _manual_pages)
        parts = [read(folder, downloads) for read in read_all]
    texts = itertools.chain.from_iterable(parts)
    pairs, dropped = clean(counted(texts), LIMITS)
    kept = Counter(pair.domain for pair in pairs)
    for domain in domains:
        if not kept[domain]:
            raise UserError(
                f"the downloads in {folder} hold no text for {domain}: build the corpus on a "
                "machine with another release of Debian or Ubuntu"
            )
    return pairs, {
        "segments": dict(segments),
        "segments_dropped": dropped,
        "pairs": dict(kept),
    }


def pair_of(language: str) -> str:
    """``en-de`` for ``de``."""
    return f"{SOURCE}-{language}"


def _descriptions(
    folder: Path, downloads: apt.Downloads, language: str = "de", domain: str = "descriptions"
) -> Iterator[SentencePair]:
    for index in downloads.indices:
        if index.language == SOURCE:
            english = index
        elif index.language == language:
            yield from descriptions.pairs(
                apt.index_lines(folder, english),
                apt.index_lines(folder, index),
                language,
                domain,
            )


def _dictionary(folder: Path, downloads: apt.Downloads) -> Iterator[SentencePair]:
    for path, content in _files(folder, downloads, [DICTIONARY], lambda path: path == ding.PATH):
        yield from ding.pairs(_utf8(content, path).split("\n"))


def _help_pages(folder: Path, downloads: apt.Downloads) -> Iterator[SentencePair]:
    sides = {
        language: _pages(folder, downloads, [package], language, help_pages.page_of, _utf8)
        for language, package in HELP.items()
    }
    return help_pages.pairs(sides["en"], sides["de"])


def _manual_pages(folder: Path, downloads: apt.Downloads) -> Iterator[SentencePair]:
    sides = {
        language: _pages(
            folder, downloads, packages, language, manual_pages.page_of, manual_pages.read_page
        )
        for language, packages in (("en", ENGLISH_MANUALS), ("de", [GERMAN_MANUAL]))
    }
    return manual_pages.pairs(sides["en"], sides["de"])


def _pages(
    folder: Path,
    downloads: apt.Downloads,
    packages: Sequence[str],
    language: str,
    page_of: Callable[[str], Tuple[str, str]],
    decode: Callable[[bytes, str], str],
) -> Dict[str, str]:
    """The text of the pages in one language by their names."""
    found: Dict[str, str] = {}
    files = _files(folder, downloads, packages, lambda path: page_of(path)[0] == language)
    for path, content in files:
        _, page = page_of(path)
        if page not in found:
            found[page] = decode(content, path)
    return found


def _files(
    folder: Path,
    downloads: apt.Downloads,
    names: Sequence[str],
    wanted: Callable[[str], bool],
) -> Iterator[Tuple[str, bytes]]:
    """The wanted files of packages, in the order of their names."""
    by_name = {package.name: package for package in downloads.packages}
    for name in names:
        if name in by_name:
            yield from read_files(folder / by_name[name].file, wanted)


def _utf8(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: build the corpus on a machine with another release of Debian or "
            "Ubuntu"
        ) from error
