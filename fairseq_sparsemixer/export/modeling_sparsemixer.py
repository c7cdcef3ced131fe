"""A translation model trained with fairseq-sparsemixer, for transformers.

This file goes with the weights: it needs torch and transformers, and nothing of fairseq. It is
fairseq's encoder-decoder transformer with experts in some layers. Parameters have the names that
they have in fairseq, so that a folder of this kind can be made a checkpoint of fairseq again.

Routing is that of evaluation, in training mode too: the experts with the largest logits (or those
that a hash of the token names) and their gates, without noise, capacity, dropout or further losses.

Shape suffixes: B sentences, L tokens of each, T = B L, D the width, N experts, K of them chosen.
"""

import math
from functools import partial
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.generation.logits_process import (
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

gelu_by_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: Dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_fast": gelu_by_tanh,
    "gelu_accurate": gelu_by_tanh,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}
"""By the names that fairseq gives them."""


class SparseMixerConfig(PretrainedConfig):
    """What the model is built from; names are fairseq's.

    Args:
        source_vocab_size, vocab_size: entries of the vocabularies of source and target.
        shared_embeddings: ``"all"`` for one matrix that embeds source and target and projects to
            the vocabulary, ``"decoder"`` for one of the last two, or ``"none"``.
        decoder_input_dim, decoder_output_dim: widths of the target's embeddings and of what is
            projected to the vocabulary.
        encoder_final_norm, decoder_final_norm: whether a norm follows the last layer.
        encoder_moe_layers, decoder_moe_layers: layers that hold experts, counted from 0.
        num_experts: N.
        router: how experts are chosen, see :class:`Router`.
        fairseq: settings and languages of the training, which only the way back to fairseq reads.
    """

    model_type = "fairseq_sparsemixer"
    keys_to_ignore_at_inference: ClassVar[List[str]] = ["past_key_values"]

    source_vocab_size: int = 8
    vocab_size: int = 8
    shared_embeddings: str = "all"
    encoder_embed_dim: int = 8
    encoder_ffn_embed_dim: int = 8
    encoder_layers: int = 1
    encoder_attention_heads: int = 1
    encoder_normalize_before: bool = False
    encoder_final_norm: bool = False
    encoder_learned_pos: bool = False
    encoder_moe_layers: Tuple[int, ...] = ()
    decoder_embed_dim: int = 8
    decoder_input_dim: int = 8
    decoder_output_dim: int = 8
    decoder_ffn_embed_dim: int = 8
    decoder_layers: int = 1
    decoder_attention_heads: int = 1
    decoder_normalize_before: bool = False
    decoder_final_norm: bool = False
    decoder_learned_pos: bool = False
    decoder_moe_layers: Tuple[int, ...] = ()
    max_source_positions: int = 1024
    max_target_positions: int = 1024
    no_token_positional_embeddings: bool = False
    layernorm_embedding: bool = False
    no_scale_embedding: bool = False
    activation_fn: str = "relu"
    num_experts: int = 1
    router: Any = None
    fairseq: Optional[Dict[str, Any]] = None
    # fairseq's numbers of <s>, <pad> and </s>; a translation begins with the last.
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int = 2
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.tie_word_embeddings = self.shared_embeddings != "none"
        # What caches are made by.
        self.hidden_size = self.decoder_embed_dim
        self.num_hidden_layers = self.decoder_layers
        self.num_attention_heads = self.decoder_attention_heads
        super().__post_init__(**kwargs)


class Positions(nn.Module):
    """Learned or sinusoidal positions; the first token has number ``padding + 1``."""

    def __init__(self, size: int, width: int, padding: int, learned: bool) -> None:
        super().__init__()
        self.width, self.padding = width, padding
        table = torch.zeros(size + padding + 1, width)
        self.weight = nn.Parameter(table) if learned else None

    def forward(self, mask_BL: Tensor, last: int, dtype: torch.dtype) -> Tensor:
        """(B, last, D): of the last tokens, by how many that are not padding come before.

        Args:
            mask_BL: bool, False at padding.
            last: how many of the L.
            dtype: of the result.
        """
        number_BL = (mask_BL.long().cumsum(1) * mask_BL + self.padding)[:, -last:]
        if self.weight is not None:
            return F.embedding(number_BL, self.weight)
        half = self.width // 2
        step = -math.log(10000) / (half - 1)
        rate = torch.exp(torch.arange(half, device=mask_BL.device, dtype=torch.float32) * step)
        angle = number_BL.unsqueeze(-1).float() * rate
        waves = F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, self.width % 2))
        return (waves * (number_BL != self.padding).unsqueeze(-1)).to(dtype)


class Attention(nn.Module):
    """Several heads; keys and values may come from elsewhere."""

    def __init__(self, width: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(key_width, width)
        self.v_proj = nn.Linear(key_width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def keys_and_values(self, x_BLD: Tensor) -> Tuple[Tensor, Tensor]:
        """(B, heads, L, D / heads) each."""
        return self._split(self.k_proj(x_BLD)), self._split(self.v_proj(x_BLD))

    def forward(self, x_BLD: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D); ``mask`` is added to the scores."""
        query = self._split(self.q_proj(x_BLD))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Router(nn.Module):
    """Chooses the experts of each token and their gates.

    ``config.router`` holds:

    - ``top_k``: K.
    - ``hash_seed``: None where the experts with the largest logits are chosen (balance bias
      included); else the expert is a hash of the token's number.
    - ``gate``: ``"one"``; ``"all"``, softmax over all experts; ``"chosen"``, softmax over the
      chosen ones (both without the balance bias); ``"left"``, softmax over all that are not chosen
      yet; or ``"masked"``, over those of them that jitter could have made the largest.
    - ``jitter_eps``: of the mask. ``temperature``: logits are divided by it for the gate.
    - ``tensors``: what the router holds, of the names in :attr:`SHAPES`.
    """

    SHAPES: ClassVar[Dict[str, str]] = {
        "weight": "ND",
        "bias": "N",
        "projection": "ND",
        "output_scale": "D",
        "balance_bias.bias": "N",
        "expert_means.mean": "ND",
    }

    def __init__(self, rule: Dict[str, Any], width: int, num_experts: int) -> None:
        super().__init__()
        self.rule, self.num_experts, size = rule, num_experts, {"N": num_experts, "D": width}
        for name in rule["tensors"]:
            module: nn.Module = self
            *outer, inner = name.split(".")
            for part in outer:
                module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            tensor = torch.zeros([size[letter] for letter in self.SHAPES[name]])
            if name in ("weight", "bias", "output_scale"):
                module.register_parameter(inner, nn.Parameter(tensor))
            else:
                module.register_buffer(inner, tensor)

    def held(self, name: str) -> Optional[Tensor]:
        """One of its tensors as float32, None if it has none of that name."""
        if name not in self.rule["tensors"]:
            return None
        return getattr(self.get_submodule(name.rpartition(".")[0]), name.split(".")[-1]).float()

    def forward(self, x_TD: Tensor, token_T: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Experts (T, K) int64, gates (T, K) and logits (T, N), both float32."""
        weight = self.held("weight")
        matrix = self.held("projection") if weight is None else weight
        if matrix is None:
            logits_TN = x_TD.new_zeros(len(x_TD), self.num_experts, dtype=torch.float32)
        else:
            logits_TN = F.linear(x_TD.float(), matrix, self.held("bias"))
        bias = self.held("balance_bias.bias")
        left_TN = logits_TN if bias is None else logits_TN + bias
        if self.rule["gate"] not in ("left", "masked"):
            if self.rule["hash_seed"] is None:
                index_TK = left_TN.topk(self.rule["top_k"], dim=-1).indices
            else:
                index_TK = (self._hash(token_T) % self.num_experts).unsqueeze(-1)
            return index_TK, self._gates(logits_TN, index_TK), logits_TN
        chosen, gates = [], []
        for _ in range(self.rule["top_k"]):
            best_T1 = left_TN.argmax(dim=-1, keepdim=True)
            chosen.append(best_T1)
            gates.append(self._gate_of_best(left_TN, best_T1))
            left_TN = left_TN.scatter(-1, best_T1, -math.inf)
        return torch.cat(chosen, dim=-1), torch.cat(gates, dim=-1), logits_TN

    def _gates(self, logits_TN: Tensor, index_TK: Tensor) -> Tensor:
        if self.rule["gate"] == "one":
            return torch.ones_like(index_TK, dtype=torch.float32)
        gate_TK = logits_TN.softmax(dim=-1).gather(-1, index_TK)
        return gate_TK / gate_TK.sum(-1, keepdim=True) if self.rule["gate"] == "chosen" else gate_TK

    def _gate_of_best(self, left_TN: Tensor, best_T1: Tensor) -> Tensor:
        """(T, 1): of the largest of the logits that are left."""
        if self.rule["gate"] == "masked":
            max_T1 = left_TN.gather(-1, best_T1)
            least_TN = max_T1 - 2 * self.rule["jitter_eps"] * torch.maximum(left_TN.abs(), max_T1)
            left_TN = left_TN.masked_fill(left_TN < least_TN, -math.inf)
        return (left_TN / self.rule["temperature"]).softmax(dim=-1).gather(-1, best_T1)

    def _hash(self, token_T: Tensor) -> Tensor:
        """A number of 31 bits for each token."""
        value = (token_T + (1 + self.rule["hash_seed"] * 0x9E3779B1 & 0xFFFFFFFF)) & 0xFFFFFFFF
        for _ in range(2):
            value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return (value ^ (value >> 16)) & 0x7FFFFFFF


class Experts(nn.Module):
    """N two-layer perceptrons, as stacked weights."""

    def __init__(self, width: int, inner: int, num_experts: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.w1 = nn.Parameter(torch.zeros(num_experts, inner, width))
        self.b1 = nn.Parameter(torch.zeros(num_experts, inner))
        self.w2 = nn.Parameter(torch.zeros(num_experts, width, inner))
        self.b2 = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """(T, D): the sum of the chosen experts' outputs times their gates."""
        y_TD = torch.zeros_like(x_TD)
        for i in range(len(self.w1)):
            token, slot = torch.where(index_TK == i)
            hidden = self.activation(F.linear(x_TD[token], self.w1[i], self.b1[i]))
            out = F.linear(hidden, self.w2[i], self.b2[i])
            gate = gate_TK[token, slot].unsqueeze(-1)
            y_TD = y_TD.index_add(0, token, out * gate.to(out.dtype))
        return y_TD


class Mixture(nn.Module):
    """The experts in place of a feed-forward network."""

    def __init__(self, config: SparseMixerConfig, width: int, inner: int) -> None:
        super().__init__()
        self.router = Router(config.router, width, config.num_experts)
        self.experts = Experts(width, inner, config.num_experts, config.activation_fn)

    def forward(self, x_BLD: Tensor, token_BL: Tensor) -> Tensor:
        """(B, L, D)."""
        x_TD = x_BLD.flatten(0, 1)
        index_TK, gate_TK, logits_TN = self.router(x_TD, token_BL.flatten())
        y_TD = self.experts(x_TD, index_TK, gate_TK)
        means_ND, scale_D = self.router.held("expert_means.mean"), self.router.held("output_scale")
        if means_ND is not None:
            others_TN = logits_TN.softmax(dim=-1).scatter(-1, index_TK, 0.0)
            y_TD = y_TD + (others_TN @ means_ND).to(y_TD.dtype)
        if scale_D is not None:
            y_TD = y_TD * scale_D.to(y_TD.dtype)
        return y_TD.view_as(x_BLD)


class Layer(nn.Module):
    """One layer of the encoder, or of the decoder, which attends to the encoder's output too."""

    def __init__(self, config: SparseMixerConfig, side: str, number: int) -> None:
        super().__init__()
        settings = ("embed_dim", "ffn_embed_dim", "attention_heads", "normalize_before")
        width, inner, heads, self.norm_first = (
            getattr(config, f"{side}_{name}") for name in settings
        )
        self.number = number
        self.self_attn = Attention(width, heads, width)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        if side == "decoder":
            self.encoder_attn = Attention(width, heads, config.encoder_embed_dim)
            self.encoder_attn_layer_norm = nn.LayerNorm(width)
        if number in getattr(config, f"{side}_moe_layers"):
            self.moe: Optional[Mixture] = Mixture(config, width, inner)
        else:
            self.moe = None
            self.activation = ACTIVATIONS[config.activation_fn]
            self.fc1 = nn.Linear(width, inner)
            self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor,
        token_BL: Tensor,
        memory: Optional[Tensor] = None,
        memory_mask: Optional[Tensor] = None,
        cache: Optional[EncoderDecoderCache] = None,
    ) -> Tensor:
        """(B, L, D).

        Args:
            x_BLD: what comes in.
            mask: (B or 1, 1, L or 1, keys) added to the scores of the own tokens.
            token_BL: numbers of the tokens.
            memory, memory_mask: the encoder's output, and what is added to its scores.
            cache: of keys and values; None to compute all anew.
        """

        def self_attention(x_BLD: Tensor) -> Tensor:
            keys, values = self.self_attn.keys_and_values(x_BLD)
            if cache is not None:
                keys, values = cache.self_attention_cache.update(keys, values, self.number)
            return self.self_attn(x_BLD, keys, values, mask)

        def attention_to_memory(x_BLD: Tensor) -> Tensor:
            keys, values = self._memory_keys(memory, cache)
            return self.encoder_attn(x_BLD, keys, values, memory_mask)

        def feed_forward(x_BLD: Tensor) -> Tensor:
            if self.moe is not None:
                return self.moe(x_BLD, token_BL)
            return self.fc2(self.activation(self.fc1(x_BLD)))

        x_BLD = self._with_norm(x_BLD, self_attention, self.self_attn_layer_norm)
        if memory is not None:
            x_BLD = self._with_norm(x_BLD, attention_to_memory, self.encoder_attn_layer_norm)
        return self._with_norm(x_BLD, feed_forward, self.final_layer_norm)

    def _with_norm(self, x: Tensor, block: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """The block with its residual connection, normalised before it or after."""
        return x + block(norm(x)) if self.norm_first else norm(x + block(x))

    def _memory_keys(
        self, memory: Any, cache: Optional[EncoderDecoderCache]
    ) -> Tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, which stay the same while decoding."""
        if cache is not None and cache.is_updated.get(self.number):
            kept: Any = cache.cross_attention_cache.layers[self.number]
            return kept.keys, kept.values
        keys, values = self.encoder_attn.keys_and_values(memory)
        if cache is not None:
            keys, values = cache.cross_attention_cache.update(keys, values, self.number)
            cache.is_updated[self.number] = True
        return keys, values


class Side(nn.Module):
    """What encoder and decoder share: embeddings, layers and the last norm."""

    def __init__(self, config: SparseMixerConfig, side: str, entries: int, input_dim: int) -> None:
        super().__init__()
        width, normal = getattr(config, f"{side}_embed_dim"), nn.LayerNorm
        longest = config.max_source_positions if side == "encoder" else config.max_target_positions
        learned = getattr(config, f"{side}_learned_pos")
        self.padding = config.pad_token_id
        self.scale = 1.0 if config.no_scale_embedding else math.sqrt(width)
        self.embed_tokens = nn.Embedding(entries, input_dim, self.padding)
        positions = Positions(longest, width, self.padding, learned)
        self.embed_positions = None if config.no_token_positional_embeddings else positions
        self.project_in_dim = (
            nn.Linear(input_dim, width, bias=False) if input_dim != width else None
        )
        self.layernorm_embedding = normal(width) if config.layernorm_embedding else None
        count = getattr(config, f"{side}_layers")
        self.layers = nn.ModuleList([Layer(config, side, number) for number in range(count)])
        self.layer_norm = normal(width) if getattr(config, f"{side}_final_norm") else None

    def embedded(self, token_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, L, D); the mask may also hold tokens before these."""
        x_BLD = self.scale * self.embed_tokens(token_BL)
        if self.project_in_dim is not None:
            x_BLD = self.project_in_dim(x_BLD)
        if self.embed_positions is not None:
            x_BLD = x_BLD + self.embed_positions(mask_BL, token_BL.shape[1], x_BLD.dtype)
        return x_BLD if self.layernorm_embedding is None else self.layernorm_embedding(x_BLD)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: nothing where ``mask`` is True, else the least number there is."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class Encoder(Side):
    """Reads a source."""

    main_input_name = "input_ids"

    def __init__(self, config: SparseMixerConfig) -> None:
        super().__init__(config, "encoder", config.source_vocab_size, config.encoder_embed_dim)

    def forward(
        self, input_ids: Tensor, attention_mask: Optional[Tensor] = None, **_: Any
    ) -> BaseModelOutput:
        """Tokens (B, L) and their mask, 0 at padding, which may be on either side."""
        mask_BL = input_ids != self.padding if attention_mask is None else attention_mask.bool()
        x_BLD = self.embedded(input_ids, mask_BL)
        mask = added(mask_BL[:, None, None], x_BLD.dtype)
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask, input_ids)
        return BaseModelOutput(x_BLD if self.layer_norm is None else self.layer_norm(x_BLD))


class Decoder(Side):
    """Predicts the next token of a target."""

    def __init__(self, config: SparseMixerConfig) -> None:
        super().__init__(config, "decoder", config.vocab_size, config.decoder_input_dim)
        width, output_dim = config.decoder_embed_dim, config.decoder_output_dim
        projects = width != output_dim
        self.project_out_dim = nn.Linear(width, output_dim, bias=False) if projects else None
        self.output_projection = nn.Linear(output_dim, config.vocab_size, bias=False)

    def forward(
        self,
        token_BL: Tensor,
        mask_BL: Tensor,
        memory: Tensor,
        memory_mask_BL: Tensor,
        cache: Optional[EncoderDecoderCache] = None,
    ) -> Tensor:
        """Logits (B, L, entries).

        Args:
            token_BL: new tokens.
            mask_BL: True for tokens, those in the cache too, False for padding.
            memory: (B, L', D') the encoder's output.
            memory_mask_BL: (B, L') likewise.
            cache: of what came before.
        """
        x_BLD = self.embedded(token_BL, mask_BL)
        place = torch.arange(mask_BL.shape[1], device=token_BL.device)
        not_later = place <= place[-token_BL.shape[1] :, None]
        mask = added(not_later & mask_BL[:, None, None], x_BLD.dtype)
        memory_mask = added(memory_mask_BL[:, None, None], x_BLD.dtype)
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask, token_BL, memory, memory_mask, cache)
        x_BLD = x_BLD if self.layer_norm is None else self.layer_norm(x_BLD)
        x_BLD = x_BLD if self.project_out_dim is None else self.project_out_dim(x_BLD)
        return self.output_projection(x_BLD)


class EndAtLimit(LogitsProcessor):
    """Leaves the end of a sentence alone to be chosen where a translation gets too long.

    With the score that it has, as in fairseq's search; transformers would give it probability 1.
    """

    def __init__(self, max_length: int, end: Tensor) -> None:
        self.max_length, self.end = max_length, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, entries) for the tokens after ``input_ids`` (B, L)."""
        if input_ids.shape[1] < self.max_length - 1:
            return scores
        ends = torch.full_like(scores, -math.inf)
        ends[:, self.end] = scores[:, self.end]
        return ends


class SparseMixerForSeq2SeqLM(PreTrainedModel, GenerationMixin):
    """The translation model."""

    config_class = SparseMixerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    # What only training with fairseq reads and changes.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(en|de)coder\.version$",
        r"\.router\.(noise_weight|expert_means\.\w+|balance_bias\.token_count)$",
    ]

    def __init__(self, config: SparseMixerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        source, target = (f"{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
        projection = "decoder.output_projection.weight"
        self._tied_weights_keys = {
            "all": {target: source, projection: source},
            "decoder": {projection: target},
            "none": {},
        }[config.shared_embeddings]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the source."""
        return self.encoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary of the target."""
        return self.decoder.output_projection

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, L): the labels one place later, behind the end of a sentence."""
        first = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted = torch.cat([first, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        decoder_input_ids: Optional[Tensor] = None,
        decoder_attention_mask: Optional[Tensor] = None,
        encoder_outputs: Optional[BaseModelOutput] = None,
        past_key_values: Optional[EncoderDecoderCache] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **_: Any,
    ) -> Any:
        """Teacher forcing, or a step of decoding; see transformers' models of this kind.

        Args:
            input_ids, attention_mask: (B, L) the source and its mask, 0 at padding.
            decoder_input_ids: (B, L') the target up to here, or what the cache lacks of it; by
                default ``labels``, one place later.
            decoder_attention_mask: (B, L' and what is cached) 0 at padding.
            encoder_outputs: of the source, to compute it once.
            past_key_values: the cache, which is added to.
            labels: (B, L') what is to be predicted, -100 where nothing is.
            use_cache: whether to make a cache; not by default.
            return_dict: False for a tuple.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids or labels; translate with generate()")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("give input_ids or encoder_outputs")
            encoder_outputs = self.encoder(input_ids, attention_mask)
        memory = encoder_outputs[0]
        if attention_mask is None:
            ones = memory.new_ones(memory.shape[:2])
            attention_mask = ones if input_ids is None else input_ids != self.config.pad_token_id
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        mask = self._decoder_mask(decoder_input_ids, decoder_attention_mask, past_key_values)
        logits = self.decoder(
            decoder_input_ids, mask, memory, attention_mask.bool(), past_key_values
        )
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = Seq2SeqLMOutput(loss, logits, past_key_values, encoder_last_hidden_state=memory)
        return output.to_tuple() if return_dict is False else output

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """transformers' own, but for the limit of length."""
        usual: Any = super()
        processors = usual._get_logits_processor(*args, **kwargs)
        for place, each in enumerate(processors):
            if isinstance(each, ForcedEOSTokenLogitsProcessor):
                processors[place] = EndAtLimit(each.max_length, each.eos_token_id)
        return processors

    def _decoder_mask(
        self, token_BL: Tensor, mask_BL: Optional[Tensor], cache: Optional[EncoderDecoderCache]
    ) -> Tensor:
        """(B, tokens cached and new) bool, False at padding."""
        if mask_BL is not None:
            return mask_BL.bool()
        cached = 0 if cache is None else cache.get_seq_length()
        if cached == 0:
            return token_BL != self.config.pad_token_id
        return token_BL.new_ones(len(token_BL), cached + token_BL.shape[1], dtype=torch.bool)


SparseMixerConfig.register_for_auto_class()
SparseMixerForSeq2SeqLM.register_for_auto_class("AutoModelForSeq2SeqLM")
