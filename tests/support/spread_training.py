"""fairseq-train as one of several workers, which writes down what it computes, and may fail.

As a module: a file for what it computes, or "-", and fairseq's arguments. :data:`FAULT` in the
environment says what happens to which worker, and when.
"""

import json
import os
import runpy
import signal
import sys
import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist

FAULT = "FAULT"
VOCABULARY = 1000
"""More entries than the corpus has."""
KINDS = ("step", "exchange", "gathering", "saving")
"""In what a worker may be killed: an update, an exchange of tokens, and writing a checkpoint."""


def command(data, folder, workers, *, record="-", meeting=None, **settings):
    """The commands of all workers, for the fork server; ``size`` is that of a group."""
    from support import commands

    size = settings.pop("size", 1)
    meeting = meeting or folder / "rendezvous"
    arch = {**commands.SIZE, "router": "switch", "jitter-eps": 0, **settings.pop("arch", {})}
    if size > 1:
        arch["expert-parallel-size"] = size
    distributed = {
        "ddp_backend": "legacy_ddp",
        "distributed_world_size": workers,
        "distributed_init_method": f"file://{meeting}",
        "distributed_no_spawn": True,
        "distributed_backend": "gloo",
    }
    settings = {**(distributed if workers > 1 else {}), **settings}
    return [
        [
            "support.spread_training",
            record,
            *commands.train_command(
                data,
                folder,
                arch=arch,
                **settings,
                **({"distributed_rank": rank} if workers > 1 else {}),
            ),
        ]
        for rank in range(workers)
    ]


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def pin_noise():
    """Let SparseMixer draw by token: of a table with a row for each entry of the vocabulary."""
    from fairseq_sparsemixer.moe import ROUTERS

    kind = ROUTERS["sparsemixer"]
    route = kind.forward
    exponential, rand_like = torch.Tensor.exponential_, torch.rand_like

    def forward(self, x, padding_mask=None, token_ids=None):
        generator = torch.Generator().manual_seed(self.num_experts)
        noise = torch.empty(VOCABULARY, self.num_experts).exponential_(generator=generator)
        coins = torch.rand(VOCABULARY, 1, generator=generator)
        rows = token_ids.flatten()
        torch.Tensor.exponential_ = lambda tensor: tensor.copy_(noise[rows])
        torch.rand_like = lambda tensor: coins[rows].to(tensor)
        try:
            return route(self, x, padding_mask, token_ids)
        finally:
            torch.Tensor.exponential_, torch.rand_like = exponential, rand_like

    kind.forward, kind.needs_token_ids = forward, True


def write_down(file):
    """Write losses, gradients and their norm at each update, and what was loaded, saved again."""
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    updates = []
    clip, log, load = (
        Trainer.clip_grad_norm,
        Trainer._reduce_and_log_stats,
        checkpoint_utils.load_checkpoint,
    )

    def clip_grad_norm(self, clip_norm):
        named = self.get_model().named_parameters()
        gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        norm = clip(self, clip_norm)
        updates.append({"gradients": gradients, "norm": norm.clone()})
        return norm

    def reduce_and_log(self, outputs, sample_size, grad_norm=None):
        if grad_norm is not None:
            summed = float(sum(output["loss"] for output in outputs))
            updates[-1]["loss"] = summed / float(sample_size)
            torch.save(updates, f"{file}.{rank()}")
        return log(self, outputs, sample_size, grad_norm)

    def load_checkpoint(cfg, trainer, **more):
        extra, iterator = load(cfg, trainer, **more)
        if trainer.get_num_updates() > 0:
            again = cfg.copy()
            again.save_dir = f"{file}.again"
            before = SimpleNamespace(epoch=1, end_of_epoch=lambda: False, state_dict=dict)
            checkpoint_utils.save_checkpoint(again, trainer, before, None)
        return extra, iterator

    Trainer.clip_grad_norm, Trainer._reduce_and_log_stats = clip_grad_norm, reduce_and_log
    checkpoint_utils.load_checkpoint = load_checkpoint


def install(fault):
    """Let one worker fail: ``kind``, ``rank``, at the how-manieth ``count``, after ``seconds``."""
    from fairseq.trainer import Trainer

    from fairseq_sparsemixer.moe.parallel import ExpertParallel

    owner, name = {
        "step": (Trainer, "train_step"),
        "exchange": (dist, "all_to_all_single"),
        "memory": (dist, "all_to_all_single"),
        "gathering": (ExpertParallel, "gather"),
        "saving": (torch, "save"),
        "infinite": (Trainer, "clip_grad_norm"),
    }[fault["kind"]]
    original = getattr(owner, name)
    left = [fault["count"]]

    def call(*arguments, **more):
        left[0] -= rank() == fault["rank"]
        if left[0] == 0:
            left[0] -= 1
            if fault["kind"] == "memory":
                raise RuntimeError("out of memory")
            if fault["kind"] == "infinite":
                layer = arguments[0].get_model().encoder.layers[0]
                layer.moe.experts.w1.grad[0, 0, 0] = float("inf")
            else:
                kill = threading.Timer(fault["seconds"], os.kill, (os.getpid(), signal.SIGKILL))
                kill.start()
                if not fault["seconds"]:
                    kill.join()
        return original(*arguments, **more)

    setattr(owner, name, call)
    torch.Tensor.cuda = lambda self: self  # of the norm that fairseq has none of after an overflow


if __name__ == "__main__":
    program, record, *arguments = sys.argv
    pin_noise()
    if record != "-":
        write_down(record)
    if os.environ.get(FAULT):
        install(json.loads(os.environ[FAULT]))
    sys.argv = ["fairseq_cli.train", *arguments]
    runpy.run_module("fairseq_cli.train", run_name="__main__", alter_sys=True)
