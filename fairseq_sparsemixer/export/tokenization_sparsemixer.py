"""The pieces of a model trained with fairseq-sparsemixer, for transformers.

This file goes with the model's own: it needs transformers and sentencepiece, and nothing of
fairseq. Text is cut by the SentencePiece model, and pieces get the numbers that fairseq's
dictionaries give them.
"""

import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import sentencepiece
from transformers import PreTrainedTokenizer

FILES = {
    "vocab_file": "sentencepiece.bpe.model",
    "source_dictionary": "dict.source.txt",
    "target_dictionary": "dict.target.txt",
}
SPACE = "\u2581"
"""Stands for a space in pieces."""


def read_dictionary(path: str) -> Dict[str, int]:
    """Numbers of the pieces in a dictionary of fairseq: after its own four, one for each line."""
    numbers = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    number = len(numbers)
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        if line.strip():
            piece, _, count = line.rstrip().rpartition(" ")
            if count == "#fairseq:overwrite":
                piece = piece.rpartition(" ")[0]
            numbers[piece] = number
            number += 1
    return numbers


class SparseMixerTokenizer(PreTrainedTokenizer):
    """Text to the numbers of its pieces, the end of a sentence behind them, and back.

    Texts given as ``text_target`` are numbered by the dictionary of the target, and so is what is
    decoded. Special tokens are not looked for in texts: ``</s>`` in a text is text.
    """

    vocab_files_names = FILES
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str, source_dictionary: str, target_dictionary: str, **kwargs: Any
    ) -> None:
        self.files = (vocab_file, source_dictionary, target_dictionary)
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.numbers = {
            "source": read_dictionary(source_dictionary),
            "target": read_dictionary(target_dictionary),
        }
        self.symbols = {
            side: {number: piece for piece, number in numbers.items()}
            for side, numbers in self.numbers.items()
        }
        self.side = "source"
        special = {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "split_special_tokens": True,
        }
        super().__init__(**{**special, **kwargs})

    @property
    def vocab_size(self) -> int:
        """Entries of the source's dictionary; of the target's in target mode."""
        return len(self.symbols[self.side])

    def get_vocab(self) -> Dict[str, int]:
        """Numbers of the pieces."""
        return {**self.numbers[self.side], **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> List[str]:
        return self.pieces.encode(text.replace("\0", ""), out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        numbers = self.numbers[self.side]
        return numbers.get(token, numbers["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self.symbols["target"].get(index, "<unk>")

    def convert_tokens_to_string(self, tokens: List[str]) -> str:
        """The text of pieces."""
        return "".join(tokens).replace(SPACE, " ").strip()

    def build_inputs_with_special_tokens(
        self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None
    ) -> List[int]:
        """A sentence and its end."""
        return [*token_ids_0, *(token_ids_1 or []), self.eos_token_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: List[int],
        token_ids_1: Optional[List[int]] = None,
        already_has_special_tokens: bool = False,
    ) -> List[int]:
        """1 at the end of a sentence, 0 at its tokens."""
        if already_has_special_tokens:
            return [int(number in self.all_special_ids) for number in token_ids_0]
        return [*[0] * (len(token_ids_0) + len(token_ids_1 or [])), 1]

    def _switch_to_input_mode(self) -> None:
        self.side = "source"

    def _switch_to_target_mode(self) -> None:
        self.side = "target"

    def save_vocabulary(
        self, save_directory: str, filename_prefix: Optional[str] = None
    ) -> Tuple[str, ...]:
        """Copy the three files into a folder."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        saved = []
        for source, name in zip(self.files, FILES.values()):
            target = Path(save_directory, f"{prefix}{name}")
            if Path(source).resolve() != target.resolve():
                shutil.copyfile(source, target)
            saved.append(str(target))
        return tuple(saved)


SparseMixerTokenizer.register_for_auto_class()
