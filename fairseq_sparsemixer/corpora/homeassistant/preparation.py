"""The corpus ``homeassistant``, from the wheel to ``bin/``."""

import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional

from fairseq_sparsemixer.corpora.cleaning import clean
from fairseq_sparsemixer.corpora.homeassistant import extraction as homeassistant
from fairseq_sparsemixer.corpora.homeassistant.wheels import check_given, obtain_wheel
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.split_step import finish, split_step
from fairseq_sparsemixer.corpora.text_to_binary import (
    steps_in,
    write_pairs,
)
from fairseq_sparsemixer.version import __version__

DEFAULT_VOCAB_SIZE = 4000


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
    source = homeassistant.WHEEL
    languages = homeassistant.LANGUAGES
    if wheel is not None:
        check_given(source, wheel)

    def extract() -> StepResult:
        path = obtain_wheel(source, output / "download", wheel)
        extraction = homeassistant.extract(path)
        pairs, dropped = clean(extraction.pairs, homeassistant.LIMITS)
        write_pairs(pairs_path, pairs)
        return [pairs_path], {
            "messages": extraction.messages,
            "messages_dropped": extraction.dropped_messages,
            "segments": len(extraction.pairs),
            "segments_dropped": dropped,
            "pairs": len(pairs),
        }

    with steps_in(output, megabytes=150) as steps:
        pairs_path = output / "raw" / "all.tsv"
        settings = {
            "version": __version__,
            "sha256": source.sha256,
            "limits": dataclasses.asdict(homeassistant.LIMITS),
        }
        extraction = steps.run("extract", settings, [], extract)
        split = split_step(steps, pairs_path, languages, homeassistant.SPLIT)
        record = {
            "corpus": "homeassistant",
            "source": {
                key: getattr(source, key)
                for key in ("name", "version", "file", "sha256", "licence")
            },
            "settings": {
                "vocab_size": vocab_size,
                "limits": dataclasses.asdict(homeassistant.LIMITS),
                "split": homeassistant.SPLIT.describe(),
            },
            "extraction": extraction,
            "split": split["counts"],
        }
        return finish(steps, languages, vocab_size, record, split)
