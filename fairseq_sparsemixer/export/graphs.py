"""The exported model as two ONNX graphs: an encoder, and a step of the decoder with its cache.

===========  =================================================================================
encoder      ``input_ids`` and ``attention_mask`` (B, L) int64, the latter 0 at padding, to
             ``memory.I.key`` and ``memory.I.value`` (B, heads, L, D / heads) of each layer I of
             the decoder, which stay the same while it writes
decoder      ``input_ids`` (B, L') int64, tokens that are new; ``attention_mask`` and ``memory.*``
             as above; ``past.I.key`` and ``past.I.value`` (B, heads, P, D / heads) of P tokens
             before, at first 0; to ``logits`` (B, L', entries) and ``present.*``, the next past
===========  =================================================================================
"""

import logging
import warnings
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.requirements import load

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
LARGEST_DIFFERENCE = 1e-4
"""Between what the graphs and the model put out, in the median over tokens: see
:data:`.exporting.LARGEST_DIFFERENCE`."""


class _Pair(NamedTuple):
    keys: Tensor
    values: Tensor


class _Kept:
    """A cache for one call: what was given to it, and what the layers then have."""

    def __init__(self, past: List[Tensor], memory: List[Tensor]) -> None:
        self._past = _pairs(past)
        self.layers = _pairs(memory)
        self.is_updated = dict.fromkeys(range(len(self.layers)), True)
        self.self_attention_cache = self.cross_attention_cache = self
        self.present: List[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int) -> Tuple[Tensor, Tensor]:
        """The keys and values of all tokens up to here."""
        both = tuple(torch.cat(pair, dim=2) for pair in zip(self._past[layer], (keys, values)))
        self.present += both
        return both[0], both[1]


def _pairs(tensors: List[Tensor]) -> List[_Pair]:
    return [_Pair(*pair) for pair in zip(tensors[::2], tensors[1::2])]


class _EncoderGraph(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> List[Tensor]:
        memory = self.model.encoder(input_ids, attention_mask)[0]
        layers = self.model.decoder.layers
        return [each for layer in layers for each in layer.encoder_attn.keys_and_values(memory)]


class _DecoderGraph(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        memory: List[Tensor],
        past: List[Tensor],
    ) -> List[Tensor]:
        cache = _Kept(past, memory)
        length = past[0].shape[2] + input_ids.shape[1]
        mask = input_ids.new_ones(input_ids.shape[0], length, dtype=torch.bool)
        # Of the memory itself nothing is read, since its keys and values are there.
        logits = self.model.decoder(input_ids, mask, memory[0], attention_mask.bool(), cache)
        return [logits, *cache.present]


def write(model: Any, folder: Path) -> None:
    """Write both graphs, and see that onnxruntime computes with them what the model does.

    Args:
        model: of transformers, see :mod:`.modeling_sparsemixer`.
        folder: gets :data:`ENCODER` and :data:`DECODER`.

    Raises:
        UserError: what makes or runs graphs is not installed, or the results differ.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        load(module, "onnx")
    layers = range(len(model.decoder.layers))
    memory, past, present = (
        [f"{name}.{layer}.{part}" for layer in layers for part in ("key", "value")]
        for name in ("memory", "past", "present")
    )
    both = ["input_ids", "attention_mask"]
    inputs = {ENCODER: both, DECODER: [*both, *memory, *past]}
    outputs = {ENCODER: memory, DECODER: ["logits", *present]}
    graphs = {ENCODER: _EncoderGraph(model), DECODER: _DecoderGraph(model)}
    for name, arguments in _arguments(model, batch=3, source=7, new=2, before=3).items():
        _write(graphs[name], arguments, folder / name, inputs[name], outputs[name])
    for sizes in ((2, 5, 1, 4), (1, 3, 1, 0)):
        for name, arguments in _arguments(model, *sizes).items():
            difference = _difference(graphs[name], arguments, folder / name, inputs[name])
            if not difference <= LARGEST_DIFFERENCE:
                raise UserError(
                    f"onnxruntime computes {name} with a difference of {difference:.2g}: the "
                    "model cannot be exported to ONNX with what is installed"
                )


@torch.no_grad()
def _arguments(model: Any, batch: int, source: int, new: int, before: int) -> Dict[str, Any]:
    """Of both graphs, for so many sentences and tokens."""
    generator = torch.Generator().manual_seed(batch)
    config = model.config
    read = torch.randint(4, config.source_vocab_size, (batch, source), generator=generator)
    written = torch.randint(4, config.vocab_size, (batch, new), generator=generator)
    mask = torch.ones_like(read)
    mask[0, : source // 3] = 0
    memory = _EncoderGraph(model)(read, mask)
    past = [torch.randn(*each.shape[:2], before, each.shape[3]) for each in memory]
    return {ENCODER: (read, mask), DECODER: (written, mask, memory, past)}


def _write(
    graph: nn.Module, arguments: Any, path: Path, inputs: List[str], outputs: List[str]
) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    tokens, keys = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    shapes = tuple(tokens if torch.is_tensor(each) else [keys] * len(each) for each in arguments)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # fairseq has others print all that they do
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.eval(),
                arguments,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    finally:
        logging.disable(before)
    assert program is not None
    program.save(str(path))


@torch.no_grad()
def _difference(graph: nn.Module, arguments: Any, path: Path, inputs: List[str]) -> float:
    """The median over tokens of how far what onnxruntime puts out is from what the model does."""
    session = load("onnxruntime", "onnx").InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    flat = [tensor for each in arguments for tensor in (each if isinstance(each, list) else [each])]
    found = session.run(None, {name: each.numpy() for name, each in zip(inputs, flat)})
    apart = [
        (torch.from_numpy(ours) - expected).abs().amax(-1).flatten()
        for ours, expected in zip(found, graph(*arguments))
    ]
    return max(each.median().item() for each in apart)
