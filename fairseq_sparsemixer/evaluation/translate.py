"""Translate raw text: a file, a pipe, or lines typed at a prompt."""

import contextlib
import itertools
import sys
from pathlib import Path
from typing import BinaryIO, ContextManager, Iterator, List, Optional, TextIO

from tqdm import tqdm

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import ModelChoice, Search
from fairseq_sparsemixer.evaluation.several import check_one
from fairseq_sparsemixer.evaluation.translator import load_translator
from fairseq_sparsemixer.files import atomic_path, decode_line


def translate(
    model: ModelChoice,
    search: Search,
    source: str,
    output: Optional[Path],
    buffer_size: int,
    at_prompt: bool,
) -> None:
    """Translate until the input ends.

    Args:
        model, search: what translates, and how.
        source: a file, or ``-`` for stdin.
        output: a file; None for stdout.
        buffer_size: lines translated together.
        at_prompt: whether lines are typed, so that each is asked for.

    Raises:
        UserError: there is no such model or input, or a line is not UTF-8; the lines before it
            were translated.
    """
    # A bar would tear translations apart that go to the same terminal.
    progress = output is not None or not sys.stdout.isatty()
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_open_input(source))
        sink = stack.enter_context(_open_output(output))
        # Whatever the libraries print must not land among the translations.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        translator = load_translator(model, search.precision)
        check_one(translator.pairs)
        lines = _read_lines(stream, source, sys.stderr if at_prompt else None)
        bar = stack.enter_context(
            tqdm(unit=" lines", file=sys.stderr, disable=at_prompt or not progress)
        )
        for buffer in _buffers(lines, buffer_size):
            translations = translator.translate(
                buffer, beam=search.beam, lenpen=search.lenpen, max_tokens=search.max_tokens
            )
            for translation in translations:
                sink.write(f"{translation.text}\n".encode())
            sink.flush()
            bar.update(len(buffer))


def _open_input(name: str) -> ContextManager[BinaryIO]:
    """The input as bytes, so that the locale does not matter."""
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(name, "rb")
    except OSError as error:
        raise UserError(f"cannot read {name} ({error.strerror}); check --input") from error


@contextlib.contextmanager
def _open_output(path: Optional[Path]) -> Iterator[BinaryIO]:
    """The output as bytes: stdout, or a file that appears when it is complete."""
    if path is None:
        yield sys.stdout.buffer
        return
    with atomic_path(path) as partial, partial.open("wb") as file:
        yield file


def _buffers(lines: Iterator[str], size: int) -> Iterator[List[str]]:
    """Yield so many lines at a time; where one cannot be read, first those before it."""
    error: Optional[UserError] = None
    while error is None:
        buffer = []
        try:
            for line in itertools.islice(lines, size):
                buffer.append(line)
        except UserError as reason:
            error = reason
        if buffer:
            yield buffer
        elif error is None:
            return
    raise error


def _read_lines(source: BinaryIO, name: str, prompt: Optional[TextIO]) -> Iterator[str]:
    """Yield the lines of ``source`` as they come, asking for each on ``prompt`` if given."""
    name = "stdin" if name == "-" else name
    for number in itertools.count(1):
        if prompt is not None:
            prompt.write("> ")
            prompt.flush()
        try:
            line = source.readline()
        except OSError as error:
            raise UserError(f"cannot read line {number} of {name} ({error.strerror})") from error
        if not line:
            if prompt is not None:
                # Ctrl-D leaves the cursor behind the last prompt.
                prompt.write("\n")
            return
        yield decode_line(line, name, number)
