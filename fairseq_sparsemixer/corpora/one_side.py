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

INPUT, LABEL = "input0", "label"


def lay_out_side(corpus: Path, language: str) -> Path:
    """Make the folder, unless it is there; links are relative, so that the corpus can be moved.

    Raises:
        UserError: the corpus has no such language.
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
        if split in SPLITS:
            links[f"{split}{ending}"] = path
    for name, path in links.items():
        link = side / INPUT / name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "..", "bin", path.name))
    made = all((side / LABEL / f"{split}.idx").is_file() for split in SPLITS)
    if (corpus / "raw" / "train.domain").is_file() and not made:
        labels = {split: f"raw/{split}.domain" for split in SPLITS}
        build_one_text(corpus, labels, f"{language}/{LABEL}")
    return side


if __name__ == "__main__":
    try:
        lay_out_side(Path(sys.argv[1]), sys.argv[2])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
