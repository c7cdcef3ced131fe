"""WMT14 English-German: which archives of statmt.org, what is in them, and how it is cleaned.

Training text is Europarl v7, Common Crawl and News Commentary (v12 as in the reference recipe of
SparseMixer, or v9 as in the shared task of 2014); validation text newstest2013, test text the full
newstest2014 of 3003 sentences, which sacreBLEU calls ``wmt14/full``.
"""

import contextlib
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from fairseq_sparsemixer.corpora.binarise import (
    SPLITS,
    count_lines,
    paths_of,
    raw_path,
    useful_workers,
)
from fairseq_sparsemixer.corpora.bpe import token_path
from fairseq_sparsemixer.corpora.cleaning import Limits, drop_reason, normalise
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.wmt14.archives import extract_members
from fairseq_sparsemixer.corpora.wmt14.downloads import Checksums, RemoteFile, md5_of, obtain
from fairseq_sparsemixer.corpora.workers import map_chunks
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    atomic_path,
    decode_line,
    iterate_lines,
    report_full_disk,
    scratch_folder,
    write_lines,
)
from fairseq_sparsemixer.text import moses

LANGUAGES = ("en", "de")
TEST_SET = "wmt14/full"
"""sacreBLEU's name of the test set."""

DOWNLOAD_MEGABYTES = 2_000
MAX_TOKENS = 80
MAX_LENGTH_RATIO = 9.0
"""Of the longer side to the shorter, in tokens: what clean-corpus-n.perl of Moses uses."""
_MAX_WORD = 1000  # characters; clean-corpus-n.perl again
LIMITS = Limits(
    min_tokens=1,
    max_tokens=MAX_TOKENS,
    max_length_ratio=MAX_LENGTH_RATIO,
    min_letter_share=0.0,
    min_words=0,
)

Lines = Tuple[str, str]
Text = Tuple[Path, Path]
"""Two files, whose lines correspond."""


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
    downloads: Path,
    checksums: Checksums,
    mirror: Optional[str],
    news_commentary: str,
) -> StepResult:
    """Download what is missing, and write ``raw/``.

    Returns:
        Paths of the six files, and a JSON object: ``archives`` (URL, size and SHA-256 of each),
        ``pairs`` by training corpus, ``dropped`` training pairs by reason, ``test`` (what the test
        set is to sacreBLEU; null unless the archive has the published checksum), and
        ``held_out_sources``, the training sentences that are also in the validation or test text.

    Raises:
        UserError: see :func:`.downloads.obtain` and :func:`.archives.extract_members`; or two
            languages of one text have different numbers of lines.
    """
    sources = archives(news_commentary)
    with scratch_folder(folder / ".raw.partial") as scratch:
        # The small archives of validation and test come first: what is wrong shows early.
        texts = {
            archive: _unpack(archive, downloads, checksums, mirror, scratch)
            for archive in reversed(sources)
        }
        pairs, dropped, also_held_out = _write_raw(
            folder, [texts[archive] for archive in sources[:-2]], texts[VALID], texts[TEST]
        )
    is_published = md5_of(downloads / TEST.remote.name) == TEST.remote.md5
    return paths_of(raw_path, folder, LANGUAGES), {
        "archives": {
            archive.remote.name: checksums.entries[archive.remote.name] for archive in sources
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
    folder: Path, train: Sequence[Text], valid: Text, test: Text
) -> Tuple[List[int], Dict[str, int], int]:
    """Write ``raw/``; what :func:`write_parallel` says of the training text."""
    for split, text in (("valid", valid), ("test", test)):
        # A line of these that cannot be read is an error: what is scored is never shortened.
        write_parallel([text], _raw_paths(folder, split))
    held_out = {
        normalise(line)
        for split in ("valid", "test")
        for line in iterate_lines(raw_path(folder, split, LANGUAGES[0]))
    }
    return write_parallel(train, _raw_paths(folder, "train"), held_out - {""})


def _raw_paths(folder: Path, split: str) -> Tuple[Path, Path]:
    source, target = (raw_path(folder, split, language) for language in LANGUAGES)
    return source, target


def _unpack(
    archive: Archive,
    downloads: Path,
    checksums: Checksums,
    mirror: Optional[str],
    scratch: Path,
) -> Tuple[Path, Path]:
    """The text of an archive in both languages, as files in ``scratch``."""
    was_there = (downloads / archive.remote.name).exists()
    with report_full_disk(downloads, DOWNLOAD_MEGABYTES, "--downloads"):
        path = obtain(archive.remote, downloads, checksums, mirror)
    if archive is TEST:
        members = {
            TEST.member.format(side): scratch / f"newstest2014.{language}.sgm"
            for language, side in _TEST_SIDES.items()
        }
    else:
        members = archive.members(scratch)
    try:
        extract_members(path, members)
    except UserError as error:
        if was_there:
            raise UserError(f"{error}; remove it and run the command again") from error
        path.unlink()
        raise UserError(
            f"{error}; it was removed: run the command again to download it anew, or name another "
            "server with --mirror"
        ) from error
    checksums.record(archive.remote, path)
    source, target = members.values()
    if archive is TEST:
        source, target = (_plain_text(side) for side in (source, target))
    return source, target


_SEGMENT = re.compile(r"<seg.*?>(.*)</seg>.*?")
_SPACES = re.compile(r"\s+")


def _plain_text(sgm: Path) -> Path:
    """The segments of an SGM file, a line each, exactly as sacreBLEU reads them."""
    text = sgm.with_suffix("")
    segments = (line for line in iterate_lines(sgm) if line.startswith("<seg "))
    cleaned = (_SPACES.sub(" ", _SEGMENT.sub(r"\1", line).strip()) for line in segments)
    write_lines(text, cleaned)
    return text


def write_parallel(
    texts: Sequence[Text],
    targets: Tuple[Path, Path],
    held_out: Optional[Set[str]] = None,
) -> Tuple[List[int], Dict[str, int], int]:
    """Join parallel texts.

    Args:
        texts: for each text its two files.
        targets: the files to write, whole or not at all.
        held_out: normalised source lines of validation and test, where ``texts`` are for training:
            lines of these that are not UTF-8 are left out with their translations.

    Returns:
        Pairs written of each text, pairs dropped by reason, and how many sources of those written
        are in ``held_out``.

    Raises:
        UserError: the two files of a text have different numbers of lines, or hold no text; or a
            line is not UTF-8 and ``held_out`` is None.
    """
    from tqdm import tqdm

    pairs: List[int] = []
    dropped: Counter = Counter()
    also_held_out = 0
    with _pair_writer(targets) as write:
        for text in texts:
            written = 0
            name = text[0].name
            for pair in tqdm(_pairs(text), desc=name, unit=" lines", leave=False, disable=None):
                if isinstance(pair, UserError):
                    if held_out is None:
                        raise pair
                    dropped["not_utf8"] += 1
                    continue
                write(pair)
                written += 1
                also_held_out += held_out is not None and normalise(pair[0]) in held_out
            if not written:
                raise UserError(f"{text[0]} and {text[1]} hold no text")
            pairs.append(written)
    return pairs, dict(dropped), also_held_out


@contextlib.contextmanager
def _pair_writer(targets: Tuple[Path, Path]) -> Iterator[Callable[[Lines], None]]:
    """Yield what writes a pair to two files, which appear when the block ends without error."""
    with contextlib.ExitStack() as stack:
        partials = [stack.enter_context(atomic_path(path)) for path in targets]
        # Closed before the files get their names.
        with contextlib.ExitStack() as files:
            source, target = (
                files.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for path in partials
            )

            def write(pair: Lines) -> None:
                source.write(f"{pair[0]}\n")
                target.write(f"{pair[1]}\n")

            yield write


def _pairs(text: Text) -> Iterator[Union[Lines, UserError]]:
    """Yield the pairs of two files; for one that is not UTF-8 the error that says where."""
    with text[0].open("rb") as sources, text[1].open("rb") as targets:
        for number, (source, target) in enumerate(itertools.zip_longest(sources, targets), 1):
            if source is None or target is None:
                raise UserError(
                    f"{text[0]} has {count_lines(text[0])} lines and {text[1]} has "
                    f"{count_lines(text[1])}: line N of one must translate line N of the other"
                )
            try:
                yield (
                    decode_line(source, str(text[0]), number),
                    decode_line(target, str(text[1]), number),
                )
            except UserError as error:
                yield error


Filtered = Tuple[List[Lines], Counter]


def clean_text(folder: Path, workers: Optional[int]) -> StepResult:
    """Write ``clean/train.*``: normalised pairs of ``raw/`` within :data:`LIMITS`.

    Returns:
        Paths, and how many pairs were kept and dropped for each reason.
    """
    targets = (clean_path(folder, "train", "en"), clean_path(folder, "train", "de"))
    return list(targets), _filter(folder, "train", targets, _clean_chunk, workers)


def clean_path(folder: Path, split: str, language: str) -> Path:
    """``clean/train.en``; validation and test text stay as they are: ``raw/valid.en``."""
    if split != "train":
        return raw_path(folder, split, language)
    return folder / "clean" / f"{split}.{language}"


def _clean_chunk(pairs: List[Lines]) -> Filtered:
    kept: List[Lines] = []
    dropped: Counter = Counter()
    for source, target in pairs:
        source, target = normalise(source), normalise(target)
        reason = drop_reason(source, target, LIMITS)
        if reason is None:
            kept.append((source, target))
        else:
            dropped[reason] += 1
    return kept, dropped


def tokenise(folder: Path, workers: Optional[int]) -> StepResult:
    """Write ``tokens/``: Moses tokens as the reference recipe makes them.

    Training and validation text has its punctuation normalised, test text has not; training pairs
    are kept as ``clean-corpus-n.perl`` with 1 and 80 keeps them.

    Returns:
        Paths, and how many training pairs were kept and dropped for each reason.
    """
    outputs: List[Path] = []
    result: Dict[str, Any] = {}
    for split, function in (
        ("train", _tokenise_training_chunk),
        ("valid", _tokenise_valid_chunk),
        ("test", _tokenise_test_chunk),
    ):
        source, target = (token_path(folder, split, language) for language in LANGUAGES)
        counts = _filter(folder, split, (source, target), function, workers)
        outputs += [source, target]
        if split == "train":
            result = counts
    return outputs, result


def _tokenise_training_chunk(pairs: List[Lines]) -> Filtered:
    kept: List[Lines] = []
    dropped: Counter = Counter()
    for pair in _tokens(pairs, moses.training_tokens):
        reason = moses_drop_reason(*pair)
        if reason is None:
            kept.append(pair)
        else:
            dropped[reason] += 1
    return kept, dropped


def _tokenise_valid_chunk(pairs: List[Lines]) -> Filtered:
    return _tokens(pairs, moses.training_tokens), Counter()


def _tokenise_test_chunk(pairs: List[Lines]) -> Filtered:
    return _tokens(pairs, moses.test_tokens), Counter()


def _tokens(pairs: List[Lines], tokenise_line: Callable[[str, str], str]) -> List[Lines]:
    source_lang, target_lang = LANGUAGES
    return [
        (tokenise_line(source, source_lang), tokenise_line(target, target_lang))
        for source, target in pairs
    ]


def moses_drop_reason(source: str, target: str) -> Optional[str]:
    """Why ``clean-corpus-n.perl ... 1 80`` drops a pair of tokenised lines, or None."""
    words = [source.split(), target.split()]
    lengths = [len(side) for side in words]
    if not all(lengths):
        return "empty"
    if max(lengths) > MAX_TOKENS:
        return "too_long"
    if max(lengths) > MAX_LENGTH_RATIO * min(lengths):
        return "length_ratio"
    if any(len(word) > _MAX_WORD for side in words for word in side):
        return "long_word"
    return None


def _filter(
    folder: Path,
    split: str,
    targets: Tuple[Path, Path],
    function: Callable[[List[Lines]], Filtered],
    workers: Optional[int],
) -> Dict[str, Any]:
    """Write what ``function`` makes of the pairs of a split; its counts."""
    paths = _raw_paths(folder, split)
    lines = count_lines(paths[0])
    pairs = zip(iterate_lines(paths[0]), iterate_lines(paths[1]))
    total: Counter = Counter()
    processes = useful_workers(lines, workers)
    with _pair_writer(targets) as write:
        for kept, dropped in map_chunks(function, pairs, processes, total=lines, name=split):
            total.update(dropped)
            for pair in kept:
                write(pair)
    pairs_kept = lines - sum(total.values())
    if not pairs_kept:
        raise UserError(f"cleaning leaves nothing of {paths[0]} and {paths[1]}: {dict(total)}")
    return {"pairs": pairs_kept, "dropped": dict(sorted(total.items()))}
