"""Build a translation corpus: text, SentencePiece pieces and fairseq's binary data."""

import argparse
from typing import Any, Dict

from fairseq_sparsemixer.corpora.debian.preparation import DEBIAN_VOCAB_SIZE, prepare_debian
from fairseq_sparsemixer.corpora.flags import refuse
from fairseq_sparsemixer.corpora.homeassistant import extraction as homeassistant
from fairseq_sparsemixer.corpora.homeassistant.preparation import (
    DEFAULT_VOCAB_SIZE,
    prepare_homeassistant,
)
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.corpora.wmt14.preparation import (
    WMT14_FLAGS,
    run_wmt14,
)
from fairseq_sparsemixer.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Build the corpus that the flags ask for, and print a summary."""
    for flag, value in (("--vocab-size", args.vocab_size), ("--merges", args.merges)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} makes no vocabulary; give 1 or more")
    if args.downloads is not None and args.downloads.exists() and not args.downloads.is_dir():
        raise UserError(f"--downloads {args.downloads} is not a folder")
    if args.corpus == "wmt14":
        print(summary(run_wmt14(args)))
        return
    refuse(args, WMT14_FLAGS, "go with the corpus wmt14 only")
    if args.corpus != "debian":
        refuse(args, ["downloads"], "go with the corpora debian and wmt14 only")
    if args.output is None:
        raise UserError("say where to with --output DIR")
    if args.raw_dir is None:
        if args.corpus is None:
            raise UserError(
                "say what to prepare: the name of a corpus (homeassistant, debian, wmt14) or "
                "--raw-dir"
            )
        if (args.source_lang, args.target_lang) != homeassistant.LANGUAGES:
            raise UserError("--source-lang and --target-lang only go with --raw-dir")
        if args.corpus == "debian":
            refuse(args, ["wheel"], "go with the corpus homeassistant only")
            record = prepare_debian(
                args.output,
                vocab_size=args.vocab_size or DEBIAN_VOCAB_SIZE,
                downloads=args.downloads,
            )
        else:
            record = prepare_homeassistant(
                args.output, vocab_size=args.vocab_size or DEFAULT_VOCAB_SIZE, wheel=args.wheel
            )
    else:
        if args.corpus is not None or args.wheel is not None:
            raise UserError("--raw-dir replaces the download: leave out the corpus and --wheel")
        record = prepare_raw_text(
            args.output,
            args.raw_dir,
            source_lang=args.source_lang,
            target_lang=args.target_lang,
            vocab_size=args.vocab_size or DEFAULT_VOCAB_SIZE,
        )
    print(summary(record))


def summary(record: Dict[str, Any]) -> str:
    """A short table of a record: sizes, unknown pieces and copy scores of the splits."""
    source, target = record["languages"]
    rows = [["", "sentences", f"pieces {source}", f"pieces {target}", "<unk>", "copy BLEU"]]
    for split, counts in record["splits"].items():
        sides = [counts[source], counts[target]]
        score = record.get("copy_score", {}).get(split)
        rows.append(
            [
                split,
                f"{sides[0]['sentences']:,}",
                *(f"{side['pieces']:,}" for side in sides),
                f"{sum(side['unknown'] for side in sides):,}",
                f"{score['bleu']:.1f}" if score else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    if "copy_score" in record:
        lines.append(
            "copy BLEU: what copying the most similar training sentence's translation scores "
            f"({record['copy_score']['test']['signature']})"
        )
    if "leaks" in record:
        for name, leak in record["leaks"].items():
            lines.append(
                f"split ({name.replace('_', ' ')}): copy BLEU {leak['bleu']:.1f}, "
                f"{100 * leak['near']:.1f} % of the held-out text has a near duplicate in training"
            )
    if "cleaning" in record:
        for name, counts in (("raw text", record["raw"]), ("cleaning", record["cleaning"])):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
            lines.append(f"{name}: dropped {reasons or 'nothing'}")
        lines.append(
            f"{record['raw']['held_out_sources']:,} sources of the raw training text are also in "
            "the validation or test text; none was dropped for that"
        )
    return "\n".join(lines)
