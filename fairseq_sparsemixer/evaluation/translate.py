"""Translate raw text: a file, a pipe, or lines typed at a prompt."""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ContextManager, Iterator, Optional, TextIO

from fairseq_sparsemixer.commands.translate import FILE_BUFFER, PIPE_BUFFER
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import (
    build_translator,
)
from fairseq_sparsemixer.files import atomic_path, check_writable, decode_line

if TYPE_CHECKING:
    from fairseq_sparsemixer.evaluation.translator import Translator


def run(args: argparse.Namespace) -> None:
    """Translate until the input ends."""
    if args.buffer_size is not None and args.buffer_size < 1:
        raise UserError(f"--buffer-size {args.buffer_size} translates nothing; give 1 or more")
    if args.output is not None:
        check_writable(args.output)
    prompt = args.input == "-" and sys.stdin.isatty()
    size = args.buffer_size or (1 if prompt else PIPE_BUFFER if args.input == "-" else FILE_BUFFER)
    # A bar would tear translations apart that go to the same terminal.
    progress = args.output is not None or not sys.stdout.isatty()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open_input(args.input))
        sink = stack.enter_context(_open_output(args.output))
        # Whatever the libraries print must not land among the translations.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        translator = build_translator(args)
        lines = _read_lines(source, args.input, sys.stderr if prompt else None)
        _translate_lines(translator, lines, sink, size, args, progress and not prompt)


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


def _read_lines(source: BinaryIO, name: str, prompt: Optional[TextIO]) -> Iterator[str]:
    """Yield the lines of ``source`` as they come, asking for each on ``prompt`` if given."""
    for number in itertools.count(1):
        if prompt is not None:
            prompt.write("> ")
            prompt.flush()
        line = source.readline()
        if not line:
            if prompt is not None:
                # Ctrl-D leaves the cursor behind the last prompt.
                prompt.write("\n")
            return
        yield decode_line(line, "stdin" if name == "-" else name, number)


def _translate_lines(
    translator: "Translator",
    lines: Iterator[str],
    sink: BinaryIO,
    size: int,
    args: argparse.Namespace,
    progress: bool,
) -> None:
    """Write the translation of each of ``lines`` to ``sink``, ``size`` lines at a time."""
    from tqdm import tqdm

    with tqdm(unit=" lines", file=sys.stderr, disable=not progress) as bar:
        for buffer in iter(lambda: list(itertools.islice(lines, size)), []):
            translations = translator.translate(
                buffer, beam=args.beam, lenpen=args.lenpen, max_tokens=args.max_tokens
            )
            for translation in translations:
                sink.write(f"{translation.text}\n".encode())
            sink.flush()
            bar.update(len(buffer))
