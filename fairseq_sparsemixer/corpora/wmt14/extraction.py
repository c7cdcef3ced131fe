"""WMT14 English-German: which archives of statmt.org, and what of them becomes ``raw/``.

Training text is Europarl v7, Common Crawl and News Commentary (v12 as in the reference recipe of
SparseMixer, or v9 as in the shared task of 2014); validation text newstest2013, test text the full
newstest2014 of 3003 sentences, which sacreBLEU calls ``wmt14/full``.
"""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from fairseq_sparsemixer.corpora.archives import unpack
from fairseq_sparsemixer.corpora.cleaning import normalise
from fairseq_sparsemixer.corpora.downloads import RemoteFile, Shelf, md5_of
from fairseq_sparsemixer.corpora.folder import SPLITS, paths_of, raw_path
from fairseq_sparsemixer.corpora.parallel_text import (
    ParallelFiles,
    iterate_segments,
    parallel_files,
    write_parallel,
)
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.files import iterate_lines, scratch_folder, write_lines

LANGUAGES = ("en", "de")
TEST_SET = "wmt14/full"
"""sacreBLEU's name of the test set."""

DOWNLOAD_MEGABYTES = 2_000


class Archive(NamedTuple):
    """A file of statmt.org, and the member that holds each language."""

    url: str
    member: str  # with {} in place of the language

    @property
    def remote(self) -> RemoteFile:
        """What to download."""
        return RemoteFile(self.url, _published_md5(self.url))

    def members(self, folder: Path) -> Dict[str, Path]:
        """For each member of the archive a path in ``folder``, in the order of the languages."""
        names = [self.member.format(language) for language in LANGUAGES]
        return {name: folder / Path(name).name for name in names}


EUROPARL = Archive(
    "https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz",
    "training/europarl-v7.de-en.{}",
)
COMMON_CRAWL = Archive(
    "https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{}"
)
NEWS_COMMENTARY = {
    "v12": Archive(
        "https://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz",
        "training/news-commentary-v12.de-en.{}",
    ),
    "v9": Archive(
        "https://www.statmt.org/wmt14/training-parallel-nc-v9.tgz",
        "training/news-commentary-v9.de-en.{}",
    ),
}
VALID = Archive("https://data.statmt.org/wmt17/translation-task/dev.tgz", "dev/newstest2013.{}")
TEST = Archive("https://statmt.org/wmt14/test-full.tgz", "test-full/newstest2014-deen-{}.sgm")
_TEST_SIDES = {"en": "src.en", "de": "ref.de"}


def archives(news_commentary: str) -> List[Archive]:
    """Training archives in order, then validation and test."""
    return [EUROPARL, COMMON_CRAWL, NEWS_COMMENTARY[news_commentary], VALID, TEST]


def _published_md5(url: str) -> Optional[str]:
    """The checksum that sacreBLEU has of a file, if it has one."""
    from sacrebleu.dataset import DATASETS

    for dataset in DATASETS.values():
        published = dict(zip(dataset.data or [], dataset.md5 or []))
        if url in published:
            return published[url]
    return None


def extract(
    folder: Path,
    shelf: Shelf,
    news_commentary: str,
) -> StepResult:
    """Download what is missing, and write ``raw/``.

    Returns:
        Paths of the six files, and a JSON object: ``archives`` (URL, size and SHA-256 of each),
        ``pairs`` by training corpus, ``dropped`` training pairs by reason, ``test`` (what the test
        set is to sacreBLEU; null unless the archive has the published checksum), and
        ``held_out_sources``, the training sentences that are also in the validation or test text.

    Raises:
        UserError: see :func:`.archives.unpack`; or two languages of one text have different
            numbers of lines.
    """
    sources = archives(news_commentary)
    with scratch_folder(folder / ".raw.partial") as scratch:
        # The small archives of validation and test come first: what is wrong shows early.
        texts = {archive: _unpack(archive, shelf, scratch) for archive in reversed(sources)}
        pairs, dropped, also_held_out = _write_raw(
            folder, [texts[archive] for archive in sources[:-2]], texts[VALID], texts[TEST]
        )
    is_published = md5_of(shelf.folder / TEST.remote.name) == TEST.remote.md5
    return paths_of(raw_path, folder, LANGUAGES), {
        "archives": {
            archive.remote.name: shelf.checksums.entries[archive.remote.name] for archive in sources
        },
        "pairs": dict(zip(("europarl", "common_crawl", "news_commentary"), pairs)),
        "dropped": dropped,
        "held_out_sources": also_held_out,
        "test": {"sacrebleu": TEST_SET} if is_published else None,
    }


def copy_text(folder: Path, raw_dir: Path) -> StepResult:
    """Write ``raw/`` from ``raw_dir/{train,valid,test}.{en,de}``; result as of :func:`extract`.

    Raises:
        UserError: the languages of a split have different numbers of lines.
    """
    texts = {
        split: (raw_dir / f"{split}.{LANGUAGES[0]}", raw_dir / f"{split}.{LANGUAGES[1]}")
        for split in SPLITS
    }
    pairs, dropped, also_held_out = _write_raw(
        folder, [texts["train"]], texts["valid"], texts["test"]
    )
    return paths_of(raw_path, folder, LANGUAGES), {
        "pairs": {"train": pairs[0]},
        "dropped": dropped,
        "held_out_sources": also_held_out,
        "test": None,
    }


def _write_raw(
    folder: Path, train: Sequence[ParallelFiles], valid: ParallelFiles, test: ParallelFiles
) -> Tuple[List[int], Dict[str, int], int]:
    """Write ``raw/``; what :func:`write_parallel` says of the training text."""
    for split, text in (("valid", valid), ("test", test)):
        # A line of these that cannot be read is an error: what is scored is never shortened.
        write_parallel([text], raw_paths(folder, split))
    held_out = {
        normalise(line)
        for split in ("valid", "test")
        for line in iterate_lines(raw_path(folder, split, LANGUAGES[0]))
    }
    return write_parallel(train, raw_paths(folder, "train"), held_out - {""})


def raw_paths(folder: Path, split: str) -> ParallelFiles:
    """The files of a split in both languages."""
    return parallel_files(raw_path, folder, split, LANGUAGES)


def _unpack(
    archive: Archive,
    shelf: Shelf,
    scratch: Path,
) -> ParallelFiles:
    """The text of an archive in both languages, as files in ``scratch``."""
    if archive is TEST:
        members = {
            TEST.member.format(side): scratch / f"newstest2014.{language}.sgm"
            for language, side in _TEST_SIDES.items()
        }
    else:
        members = archive.members(scratch)
    unpack(archive.remote, members, shelf, DOWNLOAD_MEGABYTES)
    source, target = members.values()
    if archive is TEST:
        source, target = (_plain_text(side) for side in (source, target))
    return source, target


def _plain_text(sgm: Path) -> Path:
    """The segments of an SGM file, a line each, exactly as sacreBLEU reads them."""
    text = sgm.with_suffix("")
    write_lines(text, iterate_segments(sgm))
    return text
