"""Training runs through fairseq's command line, and what is compared of them."""

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from support import commands
from support.commands import EVERY_SENTENCE, PACKAGE, SIZE, flags

LAYERS = ("encoder.0", "decoder.0")
BALANCE_BIAS_RATE = 0.25


def configure(data, save_dir, router="switch", arch=None, **settings):
    """fairseq's configuration of a training."""
    arch = {
        **SIZE,
        "router": router,
        "jitter-eps": 0.1,
        "balance-bias-rate": BALANCE_BIAS_RATE,
        **(arch or {}),
    }
    command = commands.train_command(data, save_dir, arch=arch, **settings)
    args = options.parse_args_and_arch(options.get_training_parser(), list(map(str, command)))
    return convert_namespace_to_omegaconf(args)


def build_trainer(cfg, subset="test1"):
    """fairseq's trainer, and the batches of a part of the corpus."""
    task = tasks.setup_task(cfg.task)
    task.load_dataset(subset)
    torch.manual_seed(0)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    sizes = {"max_sentences": cfg.dataset.batch_size, "max_tokens": cfg.dataset.max_tokens}
    batches = task.get_batch_iterator(task.dataset(subset), **sizes)
    return Trainer(cfg, task, model, criterion), list(batches.next_epoch_itr(shuffle=False))


def step(trainer, batch):
    """An update."""
    with metrics.aggregate(new_root=True):
        trainer.train_step([batch])


def train_on_workers(server, data, save_dir, ddp_backend=None, workers=1, **settings):
    """Train with so many processes that share this machine; what they printed."""
    save_dir.mkdir(exist_ok=True)
    rendezvous = save_dir / "rendezvous"  # each start makes its own
    rendezvous.unlink(missing_ok=True)
    sharded = ddp_backend == "fully_sharded"
    module = "support.fairscale_on_a_cpu" if sharded else "fairseq_cli.train"
    started = [
        (module, *commands.train_command(data, save_dir, **settings, **distributed))
        for distributed in (
            {
                "ddp_backend": ddp_backend,
                "distributed_world_size": workers,
                "distributed_init_method": f"file://{rendezvous}" if workers > 1 else None,
                "distributed_no_spawn": True,
                "distributed_rank": rank,
            }
            for rank in range(workers)
        )
    ]
    log = save_dir / "log"
    before = log.stat().st_size if log.exists() else 0
    statuses = server.run(*started, output=log)
    text = log.read_text()[before:]
    assert not any(statuses), text[-5000:]
    return text


def log_of(directory, tag):
    return commands.logged((directory / "log").read_text(), tag)


def assert_same(left, right):
    """Two models are the same, bit for bit."""
    assert list(left) == list(right)
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing


def same(one, other, place=""):
    """Assert that two values are equal, tensors bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other)):
            same(*pair, f"{place}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other or (one != one and other != other), place


def last_line(text):
    return text.strip().splitlines()[-1]


def generate(data, *checkpoints, **settings):
    """fairseq-generate's output; all sentences of the test set unless told otherwise."""
    settings = {"batch-size": 8, **EVERY_SENTENCE, "cpu": True, **settings}
    path = ":".join(map(str, checkpoints))
    words = [data, "--user-dir", PACKAGE, "--path", path, *flags(settings)]
    return commands.run("fairseq_cli.generate", *words)


def assert_one_clear_line(result, *parts):
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert last_line(result.stderr).startswith("error: ")
    assert result.stderr.count("error: ") == 1
    for part in parts:
        assert part in last_line(result.stderr)
