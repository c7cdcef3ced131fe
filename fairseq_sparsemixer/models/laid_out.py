"""fairseq's transformer laid out for translating on a CPU: what its modules compute, step by step.

fairseq runs a decoder as it is trained: each projection for itself, the source once for each
hypothesis, and all that was computed before copied at each step, twice. Here the weights lie as
oneDNN multiplies them, the hypotheses of a sentence share its source, and what they have in common
of their own past: a mask tells them whose it is, so that nothing moves when they change places.

Shape suffixes: S sentences, B hypotheses of each, R = S * B rows, T source tokens, L tokens written
so far, H heads, D width, E width of a head, V vocabulary.
"""

import math
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from fairseq.models.transformer import (
    TransformerDecoder,
    TransformerDecoderBase,
    TransformerEncoder,
    TransformerEncoderBase,
)
from fairseq.modules import FairseqDropout, MultiheadAttention
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayer,
    TransformerDecoderLayerBase,
    TransformerEncoderLayer,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_sparsemixer.models.layers import (
    SwitchLayer,
    SwitchTransformerDecoderLayer,
    SwitchTransformerEncoderLayer,
    switch_layers,
)
from fairseq_sparsemixer.moe.backends.products import (
    PackedParameters,
    Weight,
    is_small,
    linear,
    packed,
)

_LAYERS = (
    *(TransformerEncoderLayer, TransformerEncoderLayerBase, SwitchTransformerEncoderLayer),
    *(TransformerDecoderLayer, TransformerDecoderLayerBase, SwitchTransformerDecoderLayer),
)
_PARTS = (MultiheadAttention, FairseqDropout, nn.Linear)
"""Of layers: what is computed without a call of the module."""
SIDE_TYPES = {
    TransformerEncoder,
    TransformerEncoderBase,
    TransformerDecoder,
    TransformerDecoderBase,
}
"""Encoders and decoders that compute what is computed here; ours add themselves."""
FIRST_TOKENS = 32
"""There is room for so many tokens of each hypothesis at first, and then for twice as many."""


class Layout:
    """How a model is to be laid out; it is, once it translates on a CPU.

    Args:
        dtype: of the weights: float32, or int8, which also rounds what they are multiplied with.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._made: Optional[LaidOut] = None

    def __reduce__(self) -> Tuple[Any, ...]:
        return Layout, (self.dtype,)

    def of(self, model: nn.Module) -> "LaidOut":
        """The model, for which :func:`obstacle` finds nothing, as its parameters are now."""
        made = self._made
        if made is None or not made.fits(model):
            self._made = made = None  # not both in memory
            self._made = made = LaidOut(model, self.dtype)
        return made


def lay_out(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Have a model translate in this way from now on, wherever it can."""
    model.layout = Layout(dtype)  # type: ignore[assignment]


def obstacle(model: nn.Module) -> Optional[str]:
    """Why a model cannot be laid out, None if it can be."""
    encoder: Any = getattr(model, "encoder", None)
    decoder: Any = getattr(model, "decoder", None)
    for side in (encoder, decoder):
        if type(side) not in SIDE_TYPES:
            return f"{type(side).__name__} is not fairseq's transformer"
        if not all(type(layer) in _LAYERS for layer in side.layers.children()):
            return "its layers are not those of fairseq's transformer"
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        return "its weights are not float32 on a CPU"
    if any(p.is_inference() for p in model.parameters()):
        return "its weights were made in inference mode"  # torch does not tell when these change
    if decoder.adaptive_softmax is not None or decoder.cross_self_attention:
        return "it has an adaptive softmax or attends to both sides at once"
    if any(getattr(side, "language_tags", None) is not None for side in (encoder, decoder)):
        return "its experts are chosen by the language of the sentence"
    if encoder.quant_noise is not None or decoder.quant_noise is not None:
        return "it has quantization noise"
    for module in model.modules():
        if isinstance(module, FairseqDropout) and module.apply_during_inference:
            return "it drops out when it translates"
        if isinstance(module, MultiheadAttention) and not _is_plain(module):
            return "it has unusual attention"
        if type(module) in _LAYERS and not _is_plain_layer(module):
            return "it has unusual layers"
        hooks = module._forward_hooks or module._forward_pre_hooks
        if hooks and type(module) in (*_LAYERS, *_PARTS):
            return "there are hooks on what would not be called"
    return None


def _is_plain(attention: MultiheadAttention) -> bool:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    unusual = (attention.bias_k, attention.bias_v) != (None, None) or attention.add_zero_attn
    plain = all(type(projection) is nn.Linear for projection in projections)
    return plain and not unusual and not attention.use_xformers


def _is_plain_layer(layer: Any) -> bool:
    scales = ("attn_ln", "c_attn", "ffn_layernorm", "w_resid")
    if any(getattr(layer, name, None) is not None for name in scales):
        return False
    if getattr(layer, "encoder_attn", layer) is None:
        return False
    if isinstance(layer, SwitchLayer):
        return layer.moe.experts.parallel is None
    return type(layer.fc1) is type(layer.fc2) is nn.Linear


class _Linear:
    """Projections of one input, one beside the other.

    Args:
        dtype: of weights that are worth it.
        modules: with the same width of input.
    """

    def __init__(self, dtype: torch.dtype, *modules: Any) -> None:
        w = torch.cat([module.weight.detach() for module in modules])
        self.weight: Weight = w if is_small(w) else packed(w, dtype)
        biases = [module.bias for module in modules]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])

    def __call__(self, x: Tensor, relu: bool = False) -> Tensor:
        """(X, O) of (X, I)."""
        return linear(x, self.weight, self.bias, relu)


class _Attention:
    """What the kinds of attention share."""

    def __init__(self, module: MultiheadAttention, dtype: torch.dtype) -> None:
        self.heads = module.num_heads
        self.output = _Linear(dtype, module.out_proj)

    def _split(self, x: Tensor, sentences: int) -> Tensor:
        """(S, H, X, E) of (S * X, D)."""
        return x.view(sentences, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        """(S * X, D) of (S, H, X, E)."""
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.output(y.transpose(1, 2).reshape(-1, y.shape[1] * y.shape[3]))


class _SelfAttention(_Attention):
    def __init__(self, module: MultiheadAttention, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        self.qkv = _Linear(dtype, module.q_proj, module.k_proj, module.v_proj)

    def __call__(
        self, x: Tensor, sentences: int, past: Optional["_Past"], mask: Optional[Tensor]
    ) -> Tensor:
        """(S * X, D): of each row to those of its sentence, and to the past."""
        q, k, v = (self._split(part, sentences) for part in self.qkv(x).chunk(3, dim=-1))
        if past is not None:
            k, v = past.append(k, v)
        return self._attend(q, k, v, mask)


class _SourceAttention(_Attention):
    def __init__(self, module: MultiheadAttention, dtype: torch.dtype) -> None:
        super().__init__(module, dtype)
        self.q = _Linear(dtype, module.q_proj)
        self.kv = _Linear(dtype, module.k_proj, module.v_proj)

    def read(self, source: Tensor, sentences: int) -> Tuple[Tensor, Tensor]:
        """Keys and values (S, H, T, E) of (S * T, D)."""
        k, v = (self._split(part, sentences) for part in self.kv(source).chunk(2, dim=-1))
        return k.contiguous(), v.contiguous()

    def __call__(self, x_RD: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        """(R, D)."""
        return self._attend(self._split(self.q(x_RD), len(k)), k, v, mask)


class _Past:
    """Keys and values of what the hypotheses of each sentence wrote, (S, H, L * B, E)."""

    def __init__(self) -> None:
        self._kv: List[Tensor] = []
        self._used = 0

    def append(self, *new: Tensor) -> Sequence[Tensor]:
        """All keys and values, after those of another token were added."""
        count = new[0].shape[2]
        start, self._used = self._used, self._used + count
        room = self._kv[0].shape[2] if self._kv else 0
        if self._used > room:
            room = max(2 * room, FIRST_TOKENS * count)
            grown = [n.new_empty(*n.shape[:2], room, n.shape[3]) for n in new]
            for old, large in zip(self._kv, grown):
                large[:, :, :start] = old[:, :, :start]
            self._kv = grown
        for kept, n in zip(self._kv, new):
            kept[:, :, start : self._used] = n
        return [kept[:, :, : self._used] for kept in self._kv]

    def keep(self, sentences_S: Tensor) -> None:
        """Drop the other sentences."""
        self._kv = [kept[:, :, : self._used].index_select(0, sentences_S) for kept in self._kv]


class _Layer:
    """A layer of either side.

    Args:
        layer: fairseq's, or ours with experts.
        dtype: of the weights; experts have theirs already.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.norm_first: bool = layer.normalize_before
        self.attention = _SelfAttention(layer.self_attn, dtype)
        self.norm = layer.self_attn_layer_norm
        self.final_norm = layer.final_layer_norm
        self.source_attention: Any = None
        if hasattr(layer, "encoder_attn"):
            self.source_attention = _SourceAttention(layer.encoder_attn, dtype)
            self.source_norm = layer.encoder_attn_layer_norm
        self.moe = layer.moe if isinstance(layer, SwitchLayer) else None
        if self.moe is None:
            self.activation: Callable[[Tensor], Tensor] = layer.activation_fn
            self.relu = layer.activation_fn is F.relu
            self.inner, self.outer = _Linear(dtype, layer.fc1), _Linear(dtype, layer.fc2)

    def residual(self, norm: nn.Module, x: Tensor, part: Callable[..., Tensor], *more: Any) -> Any:
        """``x + part(x, *more)`` and the norm, in the order of this model."""
        if self.norm_first:
            return part(norm(x), *more).add_(x)
        return norm(part(x, *more).add_(x))

    def feed_forward(
        self, x: Tensor, tokens_SL: Tensor, padding_SL: Optional[Tensor] = None
    ) -> Tensor:
        """(S * L, D) of (S * L, D); the tokens, and whether they are padding, are for experts."""
        if self.moe is not None:
            # (L, S, D), as fairseq's layers have it: whoever watches routers relies on that.
            x_LSD = x.view(*tokens_SL.shape, -1).transpose(0, 1)
            mask = None if padding_SL is None else padding_SL.t()
            y, _ = self.moe(x_LSD, mask, tokens_SL.t())
            return y.transpose(0, 1).reshape(x.shape)
        inner = self.inner(x, self.relu)
        return self.outer(inner if self.relu else self.activation(inner))


class LaidOut(PackedParameters):
    """A model laid out.

    Args:
        model: without an :func:`obstacle`, in evaluation mode.
        dtype: see :class:`Layout`.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model)
        for layer in switch_layers(model).values():
            own = layer.moe.experts.packed
            if dtype == torch.int8:
                layer.moe.prepare_for_inference(dtype)
            elif own is None or own.dtype == torch.int8:
                layer.make_generation_fast_()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.encoder_layers = [_Layer(layer, dtype) for layer in self.encoder.layers.children()]
        self.decoder_layers = [_Layer(layer, dtype) for layer in self.decoder.layers.children()]
        self.project = _Linear(dtype, self.decoder.output_projection)

    @torch.inference_mode()
    def read(self, tokens_ST: Tensor, beam: int) -> "Hypotheses":
        """Encode sentences, of which ``beam`` hypotheses each are to be written."""
        encoder = self.encoder
        padding_ST = tokens_ST.eq(encoder.padding_idx)
        x, _ = encoder.forward_embedding(tokens_ST)
        sentences, _, width = x.shape
        x = x.reshape(-1, width)
        padding = mask = None
        if padding_ST.any():
            padding = padding_ST
            x = x.masked_fill(padding_ST.view(-1, 1), 0.0)
            mask = x.new_zeros(padding_ST.shape).masked_fill(padding_ST, -math.inf)[:, None, None]
        for layer in self.encoder_layers:
            x = layer.residual(layer.norm, x, layer.attention, sentences, None, mask)
            x = layer.residual(layer.final_norm, x, layer.feed_forward, tokens_ST, padding)
        if encoder.layer_norm is not None:
            x = encoder.layer_norm(x)
        sources = [layer.source_attention.read(x, sentences) for layer in self.decoder_layers]
        return Hypotheses(self, beam, sources, mask)


class Hypotheses:
    """What is known of the sentences, and of what was written of their translations.

    Args:
        model: laid out.
        beam: B.
        sources: keys and values of each decoder layer.
        mask: (S, 1, 1, T) float, -inf at padding; None without any.
    """

    def __init__(
        self,
        model: LaidOut,
        beam: int,
        sources: List[Tuple[Tensor, Tensor]],
        mask: Optional[Tensor],
    ) -> None:
        self._model, self._beam = model, beam
        self._sources, self._source_mask = sources, mask
        self._pasts = [_Past() for _ in sources]
        sentences = len(sources[0][0])
        self._own_BB = sources[0][0].new_full((beam, beam), -math.inf).fill_diagonal_(0.0)
        self._past_mask = self._own_BB.new_empty(sentences, beam, 0)
        self._length = 0

    @torch.inference_mode()
    def step(self, tokens_R: Tensor) -> Tensor:
        """(R, V): logits of what follows the last token of each hypothesis."""
        decoder, layers = self._model.decoder, self._model.decoder_layers
        self._length += 1
        sentences = len(self._past_mask)
        own = self._own_BB.expand(sentences, -1, -1)
        self._past_mask = torch.cat([self._past_mask, own], dim=-1)
        mask = self._past_mask.unsqueeze(1)
        x = self._embed(decoder, tokens_R)
        for layer, past, (k, v) in zip(layers, self._pasts, self._sources):
            x = layer.residual(layer.norm, x, layer.attention, sentences, past, mask)
            look = layer.source_attention
            x = layer.residual(layer.source_norm, x, look, k, v, self._source_mask)
            x = layer.residual(layer.final_norm, x, layer.feed_forward, tokens_R.unsqueeze(1))
        if decoder.layer_norm is not None:
            x = decoder.layer_norm(x)
        if decoder.project_out_dim is not None:
            x = decoder.project_out_dim(x)
        return self._model.project(x)

    def _embed(self, decoder: Any, tokens_R: Tensor) -> Tensor:
        x = decoder.embed_scale * decoder.embed_tokens(tokens_R)
        if decoder.project_in_dim is not None:
            x = decoder.project_in_dim(x)
        if decoder.embed_positions is not None:
            # Its position follows from the number of tokens, and not from what they are.
            tokens = tokens_R.new_empty(1, self._length)
            x = x + decoder.embed_positions(tokens, incremental_state={})[0]
        if decoder.layernorm_embedding is not None:
            x = decoder.layernorm_embedding(x)
        return x

    @torch.inference_mode()
    def follow(self, parents_SB: Tensor) -> None:
        """Each hypothesis goes on from another one of its sentence; nothing else moves."""
        index = parents_SB.unsqueeze(-1).expand(-1, -1, self._past_mask.shape[-1])
        self._past_mask = self._past_mask.gather(1, index)

    @torch.inference_mode()
    def keep(self, sentences_S: Tensor) -> None:
        """Drop the other sentences, which are finished."""
        self._past_mask = self._past_mask.index_select(0, sentences_S)
        if self._source_mask is not None:
            self._source_mask = self._source_mask.index_select(0, sentences_S)
        self._sources = [
            (k.index_select(0, sentences_S), v.index_select(0, sentences_S))
            for k, v in self._sources
        ]
        for past in self._pasts:
            past.keep(sentences_S)
