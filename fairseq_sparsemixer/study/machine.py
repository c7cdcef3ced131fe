"""Precision and batch of a study, chosen by the machine that begins it and kept by all of its runs.

On a GPU: bf16 where it has it, else fp16, and batches that it is not idle with. On a CPU: fp32 and
the batch of the config. Overrides of the plan come first.
"""

from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs.arms import Variant
from fairseq_sparsemixer.study.layout import KEY, read_run_state
from fairseq_sparsemixer.study.plan import Plan
from fairseq_sparsemixer.training.machine import (
    PRECISION,
    Machine,
    precision_of,
    precision_overrides,
)
from fairseq_sparsemixer.training.settings import compose, overridden

GPU_TOKENS = 16384
"""Of an update on a GPU, unless the config has more."""
_BATCH = {"dataset.max_tokens", "dataset.batch_size", "optimization.update_freq"}
"""Settings that decide the batch: one of them in a plan, and the plan's is taken."""


class Choice(NamedTuple):
    """What a study takes by the machine.

    Attributes:
        overrides: of hydra, for all runs.
        text: what it comes to, for people.
    """

    overrides: List[str]
    text: str

    def of(self, run: Variant) -> List[str]:
        """The overrides of a run, without those on which the plan decides."""
        given = overridden(run.overrides)
        left_out = {"common.cpu"}
        if given & {*PRECISION, "recipe"}:
            left_out |= PRECISION
        # On a CPU, by the plan's wish, the config's batch is large enough.
        if given & {*_BATCH, "common.cpu"}:
            left_out |= _BATCH
        return [each for each in self.overrides if not overridden([each]) & left_out]

    def check(self, run: Variant, folder: Path, machine: Machine) -> None:
        """Refuse to go on with a run where its precision is not to be had.

        Raises:
            UserError: as said.
        """
        overrides = self.of(run)
        if "common.bf16=true" in overrides and not machine.bf16:
            missing = "a GPU that computes in bf16"
        elif "common.fp16=true" in overrides and not machine.gpus:
            missing = "a GPU"
        else:
            return
        raise UserError(
            f"{folder} was begun with {_in_words(overrides)}: go on on a machine with {missing}, "
            "or name another folder with --output"
        )


def choose(folder: Path, plan: Plan, machine: Machine) -> Choice:
    """As the study was begun; by the machine where it was not.

    Args:
        folder: of the study, laid out.
        plan: of the study.
        machine: that trains now.

    Raises:
        UserError: runs were begun with different choices.
    """
    begun = _begun(folder, plan)
    configs = (folder / "configs").resolve()
    overrides = _by_machine(configs, plan, machine) if begun is None else begun
    cfg = compose(configs, [*overrides, "checkpoint.save_dir=."], plan.config)
    tokens, times = cfg.dataset.max_tokens, cfg.optimization.update_freq[0]
    batch = f"{tokens:,} tokens" if tokens else "the batch of the config"
    if times > 1:
        batch += f" x {times}"
    where = "as it was begun" if begun is not None else machine.gpus[0] if machine.gpus else "CPU"
    return Choice(
        overrides,
        f"precision and batch ({where}), where the plan does not say: "
        f"{precision_of(cfg.common)}, {batch} in an update",
    )


def _by_machine(configs: Path, plan: Plan, machine: Machine) -> List[str]:
    overrides = precision_overrides(machine)
    cfg = compose(configs, ["checkpoint.save_dir=."], plan.config)
    tokens, times = cfg.dataset.max_tokens, cfg.optimization.update_freq[0]
    if machine.gpus and tokens and tokens * times < GPU_TOKENS:
        overrides.append(f"dataset.max_tokens={GPU_TOKENS // times}")
    return [each for each in overrides if not each.startswith("common.cpu=")]


def _begun(folder: Path, plan: Plan) -> Optional[List[str]]:
    """The overrides that the runs were begun with; None where none was."""
    states = {run.name: read_run_state(folder / run.name) for run in plan.runs()}
    # Runs of earlier versions had the config's own precision and batch.
    begun = {name: state.get(KEY, []) for name, state in states.items() if state}
    for name, overrides in begun.items():
        first = next(iter(begun))
        if overrides != begun[first]:
            raise UserError(
                f"{folder / first} was begun with {_in_words(begun[first])}, {folder / name} with "
                f"{_in_words(overrides)}: move one of them to another folder"
            )
    return next(iter(begun.values()), None)


def _in_words(overrides: Sequence[str]) -> str:
    return " ".join(overrides) or "the precision and batch of its config"
