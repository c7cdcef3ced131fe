"""One language of a prepared corpus, laid out as fairseq's tasks of one text read it.

=====================  ==========================================================================
``LANG/input0``        links to the binary data of the language, and its dictionary
``LANG/label``          the domain of each sentence, binary, where ``raw/train.domain`` tells it
=====================  ==========================================================================

Run as a program it takes CORPUS and LANG (scripts/pretrain.sh).
"""

import sys
from pathlib import Path

from fairseq_sparsemixer.corpora.binarise import build_one_text
from fairseq_sparsemixer.corpora.folder import SPLITS
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import iterate_lines, scratch_folder, write_lines

INPUT, LABEL = "input0", "label"


def lay_out_side(corpus: Path, language: str) -> Path:
    """Make the folder, unless it is there; links are relative, so that the corpus can be moved.

    Raises:
        UserError: the corpus has no such language, or several texts in it.
    """
    side, binary = corpus / language, corpus / "bin"
    dictionary = binary / f"dict.{language}.txt"
    if not dictionary.is_file():
        languages = sorted(path.name.split(".")[1] for path in binary.glob("dict.*.txt"))
        raise UserError(
            f"{corpus} holds no language {language}: choose from {', '.join(languages) or 'none'} "
            "of a folder that `fairseq-sparsemixer prepare` made"
        )
    (side / INPUT).mkdir(parents=True, exist_ok=True)
    links = {"dict.txt": dictionary}
    for path in sorted(binary.glob(f"*.{language}.*")):
        split, ending = path.name.split(".")[0], path.suffix
        if split not in SPLITS:
            continue
        other = links.setdefault(f"{split}{ending}", path)
        if other != path:
            pairs = ", ".join(name.name.split(".")[1] for name in (other, path))
            raise UserError(
                f"{corpus} has several texts in {language} ({pairs}, ...): take a corpus of one "
                "pair of languages, such as debian"
            )
    for name, path in links.items():
        link = side / INPUT / name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "..", "bin", path.name))
    if (corpus / "raw" / "train.domain").is_file():
        _label(corpus, f"{language}/{LABEL}")
    return side


def _label(corpus: Path, destination: str) -> None:
    """Make the labels, unless they are those of the domains as they are now."""
    domains = {split: corpus / "raw" / f"{split}.domain" for split in SPLITS}
    made = {split: corpus / destination / f"{split}.idx" for split in SPLITS}
    if all(
        made[split].is_file() and made[split].stat().st_mtime_ns >= path.stat().st_mtime_ns
        for split, path in domains.items()
    ):
        return
    with scratch_folder(corpus / destination.replace("/", "/.words.")) as scratch:
        for split, path in domains.items():
            # A label is a word to fairseq.
            write_lines(scratch / split, ("_".join(line.split()) for line in iterate_lines(path)))
        words = {split: (scratch / split).relative_to(corpus).as_posix() for split in SPLITS}
        build_one_text(corpus, words, destination)


if __name__ == "__main__":
    try:
        lay_out_side(Path(sys.argv[1]), sys.argv[2])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
