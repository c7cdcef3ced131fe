"""From raw lines to what a model reads, and back: SentencePiece, or Moses tokens cut by BPE.

Which of the two a model was trained on is told by the file beside its dictionaries. Only what
stands around fairseq's own encoders is here: where the file is, and the tokens of Moses.
"""

from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPE

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_json
from fairseq_sparsemixer.requirements import load
from fairseq_sparsemixer.text import BPE_CODES, MOSES_TOKENS, SENTENCEPIECE_MODEL, moses

_TOKENS = ({"split_hyphens": bool, "lowercase": bool}, None)
_CURE = "copy it again, or give the folder of the right one with --data"


class SentencePiece:
    """Pieces of the raw text; ``path`` is the SentencePiece model."""

    file_name = SENTENCEPIECE_MODEL
    pipeline = "sentencepiece"
    packages = ("sentencepiece",)

    def __init__(self, path: Path):
        self.path = path

    def encoder(self) -> Any:
        """fairseq's encoder of pieces.

        Raises:
            UserError: sentencepiece is not installed, or the model is damaged.
        """
        try:
            return SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(self.path)))
        except ImportError as error:
            raise UserError(f"{self.path} needs sentencepiece: install it with pip") from error
        except Exception as error:  # whatever its bytes lead to
            raise UserError(
                f"cannot read the SentencePiece model {self.path} ({error}); {_CURE}"
            ) from error

    def tokenise(self, line: str, language: str) -> str:
        """A raw line as the encoder takes it: without NUL, which no rule of the model can name."""
        return line.replace("\0", "")

    def decode(self, line: str, language: str) -> Tuple[str, Optional[str]]:
        """The text of an output line whose pieces are joined; it has no tokens."""
        return line, None


class MosesBPE:
    """Moses tokens, cut by subword-nmt; ``path`` is the file of its codes.

    Attributes:
        split_hyphens: whether the tokens are those of ``tokenizer.perl -a``.
        lowercase: whether all is in small letters.

    Raises:
        UserError: ``tokenise`` and ``decode`` where sacremoses is not installed; what says how the
            tokens are made cannot be read.
    """

    file_name = BPE_CODES
    pipeline = "moses"
    packages = ("sacremoses", "subword-nmt")

    def __init__(self, path: Path):
        self.path = path
        settings = path.with_name(MOSES_TOKENS)
        made = read_json(settings, _TOKENS, _CURE) if settings.is_file() else {}
        self.split_hyphens = made.get("split_hyphens", True)
        self.lowercase = made.get("lowercase", False)

    @property
    def tokens(self) -> str:
        """What the tokens are."""
        hyphens = "with -a (hyphens split)" if self.split_hyphens else "without -a"
        return f"Moses tokens {hyphens}{', small letters' if self.lowercase else ''}"

    def encoder(self) -> Any:
        """fairseq's encoder of BPE.

        Raises:
            UserError: subword-nmt is not installed, or the codes are damaged.
        """
        return _SubwordNMT(self.path)

    def tokenise(self, line: str, language: str) -> str:
        """The tokens of a raw line, as those of the test set were made for fairseq."""
        tokens = moses.test_tokens(line, language, self.split_hyphens)
        return tokens.lower() if self.lowercase else tokens

    def decode(self, line: str, language: str) -> Tuple[str, Optional[str]]:
        """The text of an output line whose BPE is removed, and the line: its tokens."""
        return moses.detokenise(line, language), line


Subwords = Union[SentencePiece, MosesBPE]


class _SubwordNMT(SubwordNMTBPE):
    """fairseq's ``subword_nmt``, which alone would read the codes in the locale's encoding."""

    def __init__(self, codes: Path):
        apply_bpe = load("subword_nmt.apply_bpe", "wmt")
        try:
            with codes.open(encoding="utf-8") as file:
                self.bpe = apply_bpe.BPE(file)
        # subword-nmt exits where a line is not two symbols.
        except (OSError, ValueError, SystemExit) as error:
            raise UserError(f"{codes} holds no codes of subword-nmt; {_CURE}") from error
        self.bpe_symbol = f"{self.bpe.separator} "


def find_subwords(folders: List[Path]) -> Subwords:
    """The SentencePiece model or BPE codes in the first of ``folders`` that has any.

    Raises:
        UserError: there are none, or both in one folder.
    """
    kinds = (SentencePiece, MosesBPE)
    for folder in folders:
        found = [kind for kind in kinds if (folder / kind.file_name).is_file()]
        if len(found) > 1:
            raise UserError(
                f"{folder} holds both {' and '.join(kind.file_name for kind in found)}; remove "
                "the one that the model was not trained with, or give another folder with --data"
            )
        if found:
            return found[0](folder / found[0].file_name)
    raise UserError(not_found(" or ".join(kind.file_name for kind in kinds), folders))


def not_found(what: str, folders: List[Path]) -> str:
    """What a UserError says when ``what`` is in none of ``folders``."""
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    return f"found no {what} in {looked}; give the folder that holds it with --data"
