"""fairseq_cli.train with fully_sharded on a CPU, which fairscale itself is not for.

Run as a module. Streams of CUDA, which order what fairscale does, stand still; what it computes and
sends is its own.
"""

import contextlib

import fairscale.nn.data_parallel.fully_sharded_data_parallel as sharding
import torch
import torch.distributed
from fairseq_cli.train import cli_main

from fairseq_sparsemixer import workers


class Stream:
    """All that happens, in the order in which it is asked for."""

    def wait_stream(self, other):
        pass

    synchronize = wait_stream


def reduce_scatter(output, parts, **options):
    """gloo wants them flat."""
    torch.distributed.reduce_scatter_tensor(output.view(-1), parts.reshape(-1), **options)


def install():
    the_only = Stream()
    fully_sharded, names = sharding.FullyShardedDataParallel, ("all_gather", "post_backward")
    original = fully_sharded._setup_streams

    def setup_streams(self):
        original(self)
        self._streams.update(dict.fromkeys((*names, "fp32_to_fp16"), the_only))

    fully_sharded._setup_streams = setup_streams
    sharding._get_default_cuda_device = lambda _: torch.device("cpu")
    torch.cuda.current_stream = lambda *_: the_only
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.Tensor.record_stream = lambda *_: None
    torch.distributed._reduce_scatter_base = reduce_scatter
    workers._check_sharding = lambda: None


if __name__ == "__main__":
    install()
    cli_main()
