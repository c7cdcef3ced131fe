"""The corpus ``homeassistant``, from the wheel to ``bin/``."""

import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional

from fairseq_sparsemixer.corpora.cleaning import clean
from fairseq_sparsemixer.corpora.folder import steps_in, write_pairs
from fairseq_sparsemixer.corpora.homeassistant import extraction
from fairseq_sparsemixer.corpora.homeassistant.wheels import check_given, obtain_wheel
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.split_step import split_step
from fairseq_sparsemixer.corpora.text_to_binary import DEFAULT_VOCAB_SIZE, finish
from fairseq_sparsemixer.version import __version__


def prepare_homeassistant(
    output: Path, *, vocab_size: int = DEFAULT_VOCAB_SIZE, wheel: Optional[Path] = None
) -> Dict[str, Any]:
    """Build the ``homeassistant`` corpus in ``output``; finished steps are skipped.

    Args:
        output: folder of the corpus; made if need be.
        vocab_size: size of the joint vocabulary, special symbols included.
        wheel: a copy of the download, used in place; by default pip fetches it.

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: no network, a damaged file, no disk space, an unsuitable ``vocab_size``.
    """
    source = extraction.WHEEL
    languages = extraction.LANGUAGES
    if wheel is not None:
        check_given(source, wheel)

    def extract() -> StepResult:
        path = obtain_wheel(source, output / "download", wheel)
        extracted = extraction.extract(path)
        pairs, dropped = clean(extracted.pairs, extraction.LIMITS)
        write_pairs(pairs_path, pairs)
        return [pairs_path], {
            "messages": extracted.messages,
            "messages_dropped": extracted.dropped_messages,
            "segments": len(extracted.pairs),
            "segments_dropped": dropped,
            "pairs": len(pairs),
        }

    with steps_in(output, 150, "homeassistant") as steps:
        pairs_path = output / "raw" / "all.tsv"
        limits = dataclasses.asdict(extraction.LIMITS)
        settings = {"version": __version__, "sha256": source.sha256, "limits": limits}
        counts = steps.run("extract", settings, [], extract)
        split = split_step(steps, pairs_path, languages, extraction.SPLIT)
        record = {
            "corpus": "homeassistant",
            "source": {
                key: getattr(source, key)
                for key in ("name", "version", "file", "sha256", "licence")
            },
            "settings": {
                "vocab_size": vocab_size,
                "limits": limits,
                "split": extraction.SPLIT.describe(),
            },
            "extraction": counts,
            "split": split["counts"],
        }
        return finish(steps, languages, vocab_size, record, split)
