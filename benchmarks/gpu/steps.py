"""The steps of ``python -m benchmarks.gpu``, in their order, and how long each is thought to take.

The seconds are those of an H100 with 16 cores, the start of the process included.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

MACHINE, CHECKS, KERNELS, LAYER = "machine", "checks", "kernels", "layer"
TRAIN, GENERATE, TESTS, STUDY = "train", "generate", "tests", "study"
COMPILE, OPERATORS, SWEEP = "compile", "operators", "sweep"
STUDY_SECONDS = 60
"""The least that a study is begun for: its trainings take half of it to start."""


class Step(NamedTuple):
    """One process."""

    name: str
    command: Tuple[str, ...]
    """Without ``--output``."""
    seconds: float
    """That it is thought to take."""
    timed: bool = True
    """Whether it measures time, and so must have the machine to itself."""
    until_the_end: bool = False
    """Whether it takes ``--minutes``, and all that are left."""


class Sizes(NamedTuple):
    """What is measured."""

    device: str
    layers: Tuple[Tuple[int, int, Tuple[int, ...]], ...]
    """(embed_dim, ffn_dim, numbers of experts)."""
    profiled: Tuple[str, ...]
    tokens: int
    dtypes: Tuple[str, ...]
    """Of layers and of training; none for the float32 that training on a CPU knows alone."""
    checked_dtypes: Tuple[str, ...]
    backends: Tuple[str, ...]
    batches: Tuple[int, ...]
    """Tokens of a batch in training."""
    model: Mapping[str, int]
    check: Mapping[str, int]
    repetitions: int


GPU = Sizes(
    device="cuda",
    layers=((512, 2048, (8, 32, 64)), (1024, 4096, (8, 64))),
    profiled=("512,2048,8", "1024,4096,8", "1024,4096,64"),
    tokens=8192,
    dtypes=("bfloat16", "float16"),
    checked_dtypes=("float32", "bfloat16", "float16"),
    backends=("sorted", "triton"),
    batches=(32768, 4096),
    model={},
    check={},
    repetitions=8,
)
DRY = Sizes(
    device="cpu",
    layers=((16, 32, (2,)),),
    profiled=("16,32,2",),
    tokens=40,
    dtypes=("float32",),
    checked_dtypes=("float32",),
    backends=("sorted",),
    batches=(100,),
    model={
        "embed-dim": 16,
        "ffn-dim": 32,
        "heads": 2,
        "layers": 2,
        "vocabulary": 100,
        "num-experts": 2,
    },
    check={"tokens": 40, "embed-dim": 16, "ffn-dim": 32, "num-experts": 3},
    repetitions=2,
)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _command(module: str, device: Optional[str], *words: Any, **flags: Any) -> Tuple[str, ...]:
    named = [word for name, value in flags.items() for word in (f"--{name}", value)]
    on = () if device is None else ("--device", device)
    return (sys.executable, "-m", module, *map(str, (*words, *named, *on)))


def _layers(sizes: Sizes) -> List[Step]:
    """Training first: it is what the aims are about."""
    graph = ("--graph",) if sizes.device == "cuda" else ()
    return [
        Step(
            f"{LAYER} {SHORT[dtype]} d={embed_dim}",
            _command(
                "benchmarks.layer",
                sizes.device,
                *graph,
                *("--mode", "forward+backward", "forward", "--dtype", dtype),
                *("--num-experts", *numbers, "--backend", *sizes.backends),
                tokens=sizes.tokens,
                size=f"{embed_dim},{ffn_dim}",
                repetitions=sizes.repetitions,
            ),
            seconds=35 if embed_dim > 512 else 25,
        )
        for dtype in sizes.dtypes
        for embed_dim, ffn_dim, numbers in sizes.layers
    ]


def _checks(sizes: Sizes) -> List[Step]:
    """With them, kernels are compiled for all that is timed later."""
    steps = [
        Step(
            f"{CHECKS} {SHORT[dtype]}",
            _command("benchmarks.gpu.checks", sizes.device, dtype=dtype, **sizes.check),
            seconds=40,
            timed=False,
        )
        for dtype in sizes.checked_dtypes
    ]
    if sizes.device == "cpu":
        return steps  # where there is no cache to fill, and Triton's interpreter is not compiled
    for dtype, (embed_dim, ffn_dim, numbers) in itertools.product(sizes.dtypes, sizes.layers):
        for number in numbers:
            layer = f"{embed_dim},{ffn_dim},{number}"
            flags = {"layer": layer, "dtype": dtype, "backend": "triton", "tokens": sizes.tokens}
            module = "benchmarks.gpu.kernels"
            command = _command(module, sizes.device, "--compile-only", **flags)
            name = f"{COMPILE} {SHORT[dtype]} d={embed_dim} N={number}"
            steps.append(Step(name, command, seconds=40, timed=False))
    return steps


def _models(sizes: Sizes) -> List[Step]:
    steps = []
    for batch, dtype in itertools.product(sizes.batches, sizes.dtypes):
        precision = () if sizes.device == "cpu" else (f"--{SHORT[dtype]}",)
        flags = {"max-tokens": batch, "repetitions": 3 * sizes.repetitions, **sizes.model}
        command = _command("benchmarks.train", sizes.device, *precision, **flags)
        # The cost of that flag is measured once, in the batches that take least time.
        both = (batch, dtype) == (sizes.batches[-1], sizes.dtypes[0])
        command += ("--deterministic",) if both else ()
        name = f"{TRAIN} {SHORT[dtype]} {batch}"
        steps.append(Step(name, command, seconds=42 if both else 35))
    words = ("--beam", 4, "--sentences", *((1, 32) if sizes.device == "cuda" else (1,)))
    flags = {"dtype": sizes.dtypes[-1], "repetitions": 3, **sizes.model}
    command = _command("benchmarks.generate", sizes.device, *words, **flags)
    return [*steps, Step(f"{GENERATE} {SHORT[sizes.dtypes[-1]]}", command, seconds=40)]


def plan(sizes: Sizes, study: Optional[Path], only: Sequence[str] = ()) -> List[Step]:
    """All steps in their order.

    Args:
        sizes: what is measured.
        study: a folder that ``study --prepare-only`` laid out.
        only: the first words of the names of those that are wanted; all where there is none.
    """
    flags = {"tokens": sizes.tokens, "dtype": sizes.dtypes[0]}
    layers = ("--layer", *sizes.profiled)
    profile = _command("benchmarks.gpu.kernels", sizes.device, *layers, **flags)
    operators = _command("benchmarks.gpu.sweep", sizes.device, *layers, **flags)
    steps = [
        Step(MACHINE, _command("benchmarks.gpu.ceilings", sizes.device), seconds=12),
        *_checks(sizes),
        Step(KERNELS, profile, seconds=25),
        *_layers(sizes),
        *_models(sizes),
        Step(OPERATORS, operators, seconds=15),
    ]
    if SWEEP in only:  # for those who change kernels
        steps.append(Step(SWEEP, (*operators, "--settings"), seconds=60))
    if sizes.device == "cuda":
        command = _command("benchmarks.gpu.tests", None)
        steps.append(Step(TESTS, command, seconds=80, timed=False))
        command = _command("benchmarks.gpu.checks", sizes.device, "--compiled", **sizes.check)
        steps.append(Step(f"{CHECKS} torch.compile", command, seconds=60, timed=False))
    if study is not None:
        command = _command("benchmarks.gpu.study", None, study)
        steps.append(Step(STUDY, command, STUDY_SECONDS, timed=False, until_the_end=True))
    return [step for step in steps if not only or step.name.split()[0] in only]


def stages(steps: Sequence[Step]) -> List[List[Step]]:
    """Steps that run at the same time: timed ones alone, the others with their neighbours."""
    groups = itertools.groupby(enumerate(steps), lambda item: item[0] if item[1].timed else -1)
    return [[step for _, step in group] for _, group in groups]
