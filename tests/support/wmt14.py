"""WMT14's settings and launches, also of machines that are not there, and a model that is tiny."""

from fairseq_sparsemixer.commands.train import request
from fairseq_sparsemixer.training import plan, settings
from fairseq_sparsemixer.training.machine import Machine
from support import commands

CONFIGS = settings.CONFIGS
SCRIPTS = settings.CHECKOUT / "scripts"
TINY_MODEL = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_embed_dim": 16 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": 16 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
TINY = [
    *(f"+model.{key}={value}" for key, value in TINY_MODEL.items()),
    "dataset.max_tokens=100",
    "optimization.update_freq=[2]",
    "optimization.lr=[0.01]",
    "lr_scheduler.warmup_updates=1",
    "dataset.num_workers=0",
    "common.log_interval=1",
    "checkpoint.save_interval_updates=4",
    "checkpoint.keep_interval_updates=2",
]


def compose(*overrides):
    """The settings of WMT14."""
    return settings.compose(CONFIGS, ["checkpoint.save_dir=unused", *overrides], "wmt14")


def plan_for(machine, monkeypatch, *arguments):
    """The plan of a command on another machine."""
    monkeypatch.setattr(plan, "find_machine", lambda *_: machine)
    return plan.plan_launch(request(commands.parse("train", *arguments)))


def gpus(number, nodes=1, name="NVIDIA A100-SXM4-80GB", **more):
    return Machine([name] * (number // nodes), True, nodes=nodes, **more)
