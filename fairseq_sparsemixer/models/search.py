"""Beam search over batches of a fairseq task."""

from typing import Any, Dict, Iterable, Iterator, Sequence, Tuple

import torch
from fairseq import utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.tasks import FairseqTask
from omegaconf import OmegaConf
from torch import nn

MAX_LEN_A = 0
"""Tokens of output that each token of the source allows for. Any other number, fairseq's default
is 0, too, would make a line's limit depend on the longest line of its batch."""


def best_hypotheses(
    task: FairseqTask,
    models: Sequence[nn.Module],
    samples: Iterable[Dict[str, Any]],
    *,
    max_output: int,
    beam: int,
    lenpen: float = 1.0,
) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """Yield the number (``id``) of each sentence with its best hypothesis, in their order.

    Args:
        task: builds the generator.
        models: one, or an ensemble; in evaluation mode.
        samples: batches, as the collater of the task's dataset makes them.
        max_output: tokens of a translation at most, its end not counted.
        beam: beam size.
        lenpen: length penalty; all else has fairseq's defaults.

    Returns:
        fairseq's hypotheses, with ``text_tokens`` besides ``tokens``: without what the task says is
        no text, such as the token of the target language.
    """
    generation = GenerationConfig(
        beam=beam, lenpen=lenpen, max_len_a=MAX_LEN_A, max_len_b=max_output
    )
    generator = task.build_generator(models, OmegaConf.structured(generation))
    device = next(models[0].parameters()).device
    no_text = torch.tensor(sorted(generator.symbols_to_strip_from_output), device=device)
    for sample in samples:
        sample = utils.apply_to_sample(lambda tensor: tensor.to(device), sample)
        found = task.inference_step(generator, models, sample)
        for number, best_first in zip(sample["id"].tolist(), found):
            tokens = best_first[0]["tokens"]
            text_tokens = tokens[~torch.isin(tokens, no_text)]
            yield number, {**best_first[0], "text_tokens": text_tokens}
