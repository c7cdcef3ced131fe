"""Score a trained model on a test set, by translating it: sacreBLEU's BLEU and chrF.

  fairseq-sparsemixer evaluate RUN_DIR --data data/homeassistant
  fairseq-sparsemixer evaluate RUN_DIR --last 5 --beam 4 --lenpen 0.6
  fairseq-sparsemixer evaluate RUN_DIR --source news.en --reference news.de
  fairseq-sparsemixer evaluate RUN_DIR --data data/homeassistant --baseline OTHER_RUN

Writes the translations, and beside them a JSON file with the scores and all it takes to get
them again. The scores are those that sacrebleu's own command prints for the written file.
With a prepared corpus, the score of copying the nearest training sentence stands beside the
model's: what memory alone reaches on this data. With --baseline, a paired bootstrap test says
whether the two runs differ.

Older papers score tokens. For a model of Moses tokens their BLEU stands below, with its label; for
a model of SentencePiece --compound-split tokenises and splits as Vaswani et al. did. The tokens
lie beside the translations. Never compare such a score with sacreBLEU.

Models that do not translate (masked words, classes of sentences, language models) are scored on
--subset of the data of their task, which --data may name: the loss in bits, accuracy, perplexity
and bits per byte.
"""

import argparse
from pathlib import Path

from fairseq_sparsemixer.commands.flags import (
    PRECISIONS,
    SEARCH,
    add_translation_arguments,
    model_of,
    refuse_without_effect,
    search_of,
    whole_number,
)
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import ScoreChoice
from fairseq_sparsemixer.files import check_writable

DEFAULT_SUBSET = "test"
DEFAULT_COMET = "Unbabel/wmt22-comet-da"
HELP = "score a trained model on a test set, by its translations or losses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer evaluate``."""
    choice = add_translation_arguments(parser)
    for name, which in (
        ("last", "newest N checkpoints by epoch or update"),
        ("best", "best N checkpoints of fairseq's --keep-best-checkpoints"),
    ):
        choice.add_argument(
            f"--{name}",
            type=whole_number,
            metavar="N",
            help=f"score the mean of the {which}, kept in RUN_DIR/checkpoint_averageN{name}.pt",
        )
    parser.add_argument(
        "--subset",
        metavar="NAME",
        help=f"raw/NAME.* of the corpus (default: {DEFAULT_SUBSET})",
    )
    parser.add_argument("--source", type=Path, metavar="FILE", help="raw text to translate instead")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="its translation, line by line"
    )
    parser.add_argument(
        "--baseline",
        metavar="OTHER_RUN",
        help="run folder or checkpoint file to compare with, by paired bootstrap",
    )
    parser.add_argument(
        "--tokenize",
        metavar="NAME",
        help="sacreBLEU's tokeniser, such as 13a, zh, char or flores200 (default: that of the "
        "target language)",
    )
    parser.add_argument(
        "--compound-split",
        action="store_true",
        help="for a model of SentencePiece: also BLEU over Moses tokens with compounds split",
    )
    parser.add_argument(
        "--comet",
        nargs="?",
        const=DEFAULT_COMET,
        metavar="MODEL",
        help="also score with COMET (needs the package unbabel-comet; default MODEL: %(const)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="where scores go, with translations beside them (default: below RUN_DIR/evaluation)",
    )


def run(args: argparse.Namespace) -> None:
    """Translate, score, write and print.

    Raises:
        UserError: the flags do not fit together, or see :func:`.evaluation.evaluate.evaluate`.
    """
    from fairseq_sparsemixer.evaluation.evaluate import evaluate
    from fairseq_sparsemixer.evaluation.losses import evaluate_losses
    from fairseq_sparsemixer.evaluation.translator import NoTranslationError

    if args.output is not None:
        if args.output.suffix != ".json":
            raise UserError(f"--output {args.output} holds scores; give it a name ending in .json")
        check_writable(args.output)
    if (args.source is None) != (args.reference is None):
        raise UserError("--source and --reference go together; give both or neither")
    if args.source is not None:
        refuse_without_effect(args, ["subset"], "choose from a corpus, and --source is the text")
    model = model_of(args)
    for choice in ("last", "best"):
        count = getattr(args, choice)
        if count is not None:
            model = model._replace(average=(choice, count))
    subset = args.subset or DEFAULT_SUBSET
    try:
        evaluate(
            model,
            search_of(args),
            ScoreChoice(args.tokenize, args.compound_split, args.comet),
            subset=subset,
            files=None if args.source is None else (args.source, args.reference),
            baseline=args.baseline,
            output=args.output,
        )
    except NoTranslationError:
        why = "are for models that translate, which this is none of"
        scored = ("source", "reference", "baseline", "tokenize", "compound_split", "comet")
        languages = ("source_lang", "target_lang")
        other = [name for name, usual in SEARCH.items() if getattr(args, name) != usual]
        refuse_without_effect(args, [*scored, *languages, *PRECISIONS, *other], why)
        evaluate_losses(model, subset, args.output)
