"""hydra's settings of a run, composed of configs/."""

import re
import warnings
from pathlib import Path
from typing import Any, List

from fairseq_sparsemixer.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent
CONFIG_NAME = "wmt14"


def quoted(path: Path) -> str:
    """A path as a value that hydra takes as it is."""
    if re.fullmatch(r"[\w./-]+", str(path)):
        return str(path)
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


def compose(configs: Path, overrides: List[str], name: str = CONFIG_NAME) -> Any:
    """The settings that ``fairseq-hydra-train`` would train with, defaults filled in.

    Args:
        configs: folder of the configs, absolute.
        overrides: of hydra.
        name: of the config.

    Raises:
        UserError: hydra refuses an override.
    """
    import hydra
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.dataclass.initialize import add_defaults, hydra_init
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    import fairseq_sparsemixer  # noqa: F401  (registers the model)

    hydra_init(name)
    try:
        with warnings.catch_warnings():
            # fairseq's schema has the name of the config, which hydra 1.1 still allowed.
            warnings.simplefilter("ignore")
            with hydra.initialize_config_dir(str(configs), version_base="1.1"):
                cfg = hydra.compose(name, overrides)
            add_defaults(cfg)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"hydra: {' '.join(str(error).split())}") from error
    for key in sorted(cfg.keys() - FairseqConfig.__dataclass_fields__.keys()):
        raise UserError(f"{key}: fairseq has no such group of settings")
    return cfg
