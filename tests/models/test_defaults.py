"""What a setting is where nobody gives it: as docs/configuration.md says, wherever it is read."""

import inspect
from pathlib import Path

import pytest
from support.models import build

from fairseq_sparsemixer.criterions import ElectraWithRoutingConfig, RoutingLossesConfig
from fairseq_sparsemixer.models import SwitchTransformerConfig
from fairseq_sparsemixer.models.config import EXPERT_FIELDS
from fairseq_sparsemixer.moe import MoEFeedForward, Router, build_router
from fairseq_sparsemixer.moe.experts import Experts

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def documented(section):
    """The defaults in the table of one section, by field."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").split(f"\n## {section} ")[1].splitlines():
        if line.startswith("## "):
            break
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].startswith("`--"):
            flags = [flag.strip("`-").replace("-", "_") for flag in cells[1].split(", ")]
            values = [value.strip("`") for value in cells[2].split(", ")]
            rows.update(zip(flags, values * (len(flags) // len(values))))
    return rows


def as_documented(value):
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value:g}"


@pytest.mark.parametrize(
    ("section", "config", "names"),
    [
        ("Model", SwitchTransformerConfig, EXPERT_FIELDS),
        (
            "Criteria",
            ElectraWithRoutingConfig,
            [*RoutingLossesConfig.__annotations__, *ElectraWithRoutingConfig.__annotations__],
        ),
    ],
)
def test_defaults_are_those_that_are_documented(section, config, names):
    defaults = config()
    found = {}
    for name in names:
        value = getattr(defaults, name)
        number = isinstance(value, (bool, int, float))
        found[name] = as_documented(value) if number else "" if value is None else str(value)
    expected = documented(section)
    if section == "Model":
        assert expected["expert_activation_dropout"] == "--activation-dropout"
        expected["expert_activation_dropout"] = ""
        expected["router_init_scale"] = f"{float(expected['router_init_scale']):g}"
    assert found == expected


def arguments(function):
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def test_layer_and_router_have_the_same_defaults_from_python():
    flags = SwitchTransformerConfig()
    expected = {
        "router": flags.router,
        "top_k": flags.top_k,
        "jitter_eps": flags.jitter_eps,
        "bias": not flags.no_router_bias,
        "init_scale": flags.router_init_scale,
        "balance_bias_rate": flags.balance_bias_rate,
        "output_masking": flags.expert_output_masking,
        "backend": flags.moe_backend,
        "recompute": flags.moe_recompute,
        # fairseq's own
        "activation_fn": "relu",
        "activation_dropout": 0.0,
    }
    for function in (MoEFeedForward, Router, build_router, Experts):
        for name, value in arguments(function).items():
            assert value == expected[name], (function, name)


def test_a_model_has_the_layers_that_the_defaults_make():
    moe, alone = build().encoder.layers[0].moe, MoEFeedForward(16, 24, 4)
    for part, other in ((moe, alone), (moe.router, alone.router), (moe.experts, alone.experts)):
        settings, wanted = (
            {k: v for k, v in vars(each).items() if isinstance(v, (int, float, str))}
            for each in (part, other)
        )
        assert settings == wanted
    assert [name for name, _ in moe.named_parameters()] == [n for n, _ in alone.named_parameters()]
