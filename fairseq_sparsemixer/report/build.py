"""The files of a report: the page, and the folder of its figures beside it."""

import shutil
from pathlib import Path
from typing import Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import check_writable, scratch_folder, write_lines
from fairseq_sparsemixer.report.content import gather_content
from fairseq_sparsemixer.report.drawing import FILES
from fairseq_sparsemixer.report.page import render
from fairseq_sparsemixer.runs.grouping import read_arms


def build_report(
    paths: Sequence[Path], scores: Optional[str], baseline: Optional[str], output: Path
) -> None:
    """Gather, draw and write.

    Args:
        paths: folders of runs, or of such folders.
        scores: which evaluation to take where a run has several.
        baseline: name of an arm, or None for the default.
        output: the page, REPORT.html; figures go to the folder REPORT_figures.

    Raises:
        UserError: something else would be overwritten; runs or files that are not there or damaged,
            or that cannot be compared.
        ImportError: jinja2 or matplotlib is not installed.
    """
    check_writable(output)
    folder = output.with_name(f"{output.stem}_figures")
    _check_figures(folder)
    arms = read_arms(paths, scores)
    with scratch_folder(folder.with_name(f".{folder.name}.partial")) as partial:
        partial.joinpath(folder.name).mkdir()
        content = gather_content(arms, baseline, partial / folder.name)
        text = render({**content, "title": output.stem, "figures_folder": folder.name})
        if folder.exists():
            shutil.rmtree(folder)
        partial.joinpath(folder.name).replace(folder)
        # While no other report can bring other figures.
        write_lines(output, [text])
    print(f"written: {output} and {folder}")


def _check_figures(folder: Path) -> None:
    """Refuse to replace anything but a folder of a report's figures."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(
            f"{folder} would be replaced and is no folder; move it away, or choose another --output"
        )
    others = [] if not folder.exists() else sorted(path.name for path in folder.iterdir())
    others = [name for name in others if not FILES.fullmatch(name)]
    if others:
        raise UserError(
            f"{folder} would be replaced and holds other files than a report's figures "
            f"({others[0]}); move it away, or choose another --output"
        )
