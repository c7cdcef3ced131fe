"""The translator that flags stand for."""

import argparse

from fairseq_sparsemixer.commands.flags import precision_of
from fairseq_sparsemixer.evaluation.translator import Translator


def build_translator(args: argparse.Namespace) -> Translator:
    """The translator that the flags name."""
    return Translator(
        args.run_dir,
        args.checkpoint,
        data=args.data,
        source_lang=args.source_lang,
        target_lang=args.target_lang,
        precision=precision_of(args),
    )
