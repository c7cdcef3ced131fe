"""hydra's settings of a run, composed of configs/."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Set, Union

import hydra
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults, hydra_init
from omegaconf import OmegaConf

import fairseq_sparsemixer  # noqa: F401  (registers the model)
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.ranges import check_numbers

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent
CONFIGS = CHECKOUT / "configs"
PYTHON = (sys.executable, "-m")


def quoted(value: Union[Path, str]) -> str:
    """A path or a text as a value that hydra takes as it is."""
    text = str(value)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII):
        return text
    # Backslashes escape only before a quote, that at the end included.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def overridden(overrides: Iterable[str]) -> Set[str]:
    """The keys that hydra's overrides set."""
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def refuse_decided(overrides: Iterable[str], decided: Mapping[str, str], where: str = "") -> None:
    """Refuse overrides of what a command decides itself.

    Args:
        overrides: of hydra, as a user gave them.
        decided: settings, and what decides each.
        where: begins the message.

    Raises:
        UserError: one is set, alone or in a group that is set as a whole.
    """
    decided = {**decided, **_DECIDED_BY_ALL}
    for override in sorted(overrides):
        (key,) = overridden([override])
        if key in decided:
            raise UserError(f"{where}{key} is not set here: use {decided[key]}")
        whole = override.partition("=")[2].lstrip().startswith(("{", "$"))
        inside = next((each for each in decided if each.startswith(f"{key}.")), None)
        if whole and inside is not None:
            raise UserError(
                f"{where}{key} is not set as a whole, since {inside} is decided by "
                f"{decided[inside]}: set {key}.NAME=VALUE one by one"
            )


_DECIDED_BY_ALL = {"common.user_dir": "fairseq-hydra-train, with a package that imports this one"}
"""What no command that trains lets others decide."""


def training_command(
    configs: Path,
    name: str,
    folder: Path,
    overrides: Sequence[str],
    launcher: Sequence[str] = PYTHON,
) -> List[str]:
    """The command line that trains.

    Args:
        configs: folder of the configs.
        name: of the config.
        folder: of the run.
        overrides: of hydra.
        launcher: what starts a Python module.
    """
    return [
        *(*launcher, "fairseq_cli.hydra_train"),
        *("--config-dir", str(configs), "--config-name", name),
        *(f"hydra.run.dir={quoted(folder)}", *overrides),
    ]


def compose(configs: Path, overrides: List[str], name: str) -> Any:
    """The settings that ``fairseq-hydra-train`` would train with, defaults filled in.

    Args:
        configs: folder of the configs, absolute.
        overrides: of hydra.
        name: of the config.

    Raises:
        UserError: hydra refuses an override.
    """
    hydra_init(name)
    try:
        with warnings.catch_warnings():
            # fairseq's schema has the name of the config, which hydra 1.1 still allowed.
            warnings.simplefilter("ignore")
            with hydra.initialize_config_dir(str(configs), version_base="1.1"):
                cfg = hydra.compose(name, overrides)
            add_defaults(cfg)
            resolved(cfg)  # what refers to nothing is found out here
            check_numbers(cfg)
    except UserError:
        raise
    except Exception as error:  # of any kind: hydra stumbles over odd overrides where it may
        raise UserError(f"hydra: {error}") from error
    for key in sorted(cfg.keys() - FairseqConfig.__dataclass_fields__.keys()):
        raise UserError(f"{key}: fairseq has no such group of settings")
    return cfg


def resolved(cfg: Any) -> Dict[str, Any]:
    """Composed settings as plain values."""
    values = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
