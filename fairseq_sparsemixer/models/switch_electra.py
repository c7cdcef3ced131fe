"""ELECTRA with experts: a generator replaces words, and the model with experts tells which.

Shapes: B sentences, L positions, M masked positions of them all, V entries of the vocabulary.
"""

import argparse
from typing import Any, Optional, Tuple

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.models import register_model
from fairseq.models.roberta.model import RobertaLMHead
from fairseq.models.transformer import TransformerConfig, TransformerEncoderBase
from fairseq.modules import LayerNorm
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from fairseq.tasks import FairseqTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from torch import Tensor, nn

from fairseq_sparsemixer.models.building import PAIRS, TEXTS, Settings, given
from fairseq_sparsemixer.models.config import ConfigError, SwitchElectraConfig
from fairseq_sparsemixer.models.switch_roberta import SwitchRobertaEncoder, SwitchRobertaModel

REPLACED = "replaced_tokens"
"""The key under which the model puts out what the discriminator says of each token, and is told."""
_ROWS = 256
"""Whose probabilities are summed up at a time: 100 MB with 50,000 words."""
_RESOLUTION = 2**40


@register_model("switch_electra", dataclass=SwitchElectraConfig)
class SwitchElectraModel(SwitchRobertaModel):
    """ELECTRA (arXiv 2003.10555), whose discriminator is :class:`SwitchRobertaModel`'s encoder.

    A small dense generator learns to predict masked words; the discriminator, which is what is
    kept, learns which words of a text are the generator's. Both share what they know of a token
    and of its place: the embeddings, which the generator projects to its own width. It is
    fine-tuned as ``switch_roberta``, which takes the discriminator out of a checkpoint.

    >>> model = SwitchElectraModel.from_pretrained(
    ...     "runs/pretrained", "checkpoint_best.pt", "corpus/mono", bpe="sentencepiece"
    ... )
    >>> tokens = model.encode("The device is not available.")
    >>> model.extract_features(tokens)  # (1, L, width)
    >>> model.model(tokens[None])[0].sigmoid()  # (1, L), the probability that each was replaced
    """

    config = SwitchElectraConfig
    tasks = "masked_lm (what it has learnt is fine-tuned as switch_roberta)"
    refused_tasks = (*PAIRS, *TEXTS, SentencePredictionTask)
    num_updates = 0
    """Of its training, so far."""

    def __init__(self, args: Any, encoder: "SwitchElectraEncoder") -> None:
        super().__init__(args, encoder)
        self.generator = Generator(_generator_settings(args), encoder)
        self.generator.apply(init_bert_params)

    @classmethod
    def build_model(cls, settings: Settings, task: FairseqTask) -> "SwitchRobertaModel":
        """See :meth:`SwitchRobertaModel.build_model`."""
        if getattr(settings, "encoder_layers_to_keep", None):
            # fairseq would leave the generator's out of the checkpoint.
            raise ConfigError(
                "--encoder-layers-to-keep must not be given to --arch switch_electra: leave out "
                "layers where it is fine-tuned, as switch_roberta"
            )
        return super().build_model(settings, task)

    @classmethod
    def _built(cls, args: Any, dictionary: Dictionary) -> "SwitchElectraModel":
        return cls(args, SwitchElectraEncoder(args, dictionary))

    def set_num_updates(self, num_updates: int) -> None:
        """See fairseq, which calls it before each forward of a training."""
        super().set_num_updates(num_updates)
        self.num_updates = num_updates

    def forward(
        self,
        src_tokens: Tensor,
        *args: Any,
        masked_tokens: Optional[Tensor] = None,
        target: Optional[Tensor] = None,
        draws: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple[Tensor, Any]:
        """The discriminator's answers (B, L) for ``src_tokens``, or what fairseq's RoBERTa gives.

        With ``target``, as in training, ``src_tokens`` are masked.

        Args:
            src_tokens: (B, L) int64.
            masked_tokens: (B, L) bool, those to predict; None for all.
            target: (B, L) int64, what was masked, and padding elsewhere.
            draws: (B, L), uniform in [0, 1): which word of the generator's a masked one becomes.

        Returns:
            The generator's logits (M, V), and a dict that holds, besides the routing statistics,
            ``replaced_tokens``: the discriminator's logits (B, L), above 0 where it takes a token
            for replaced, and whether it is (B, L), bool.
        """
        if target is None:
            if masked_tokens is not None:
                raise ConfigError(
                    "--arch switch_electra predicts no masked words by itself: train it with "
                    "--criterion electra_with_routing"
                )
            return super().forward(src_tokens, *args, **kwargs)
        assert draws is not None
        predicted_MV = self.generator(src_tokens, masked_tokens)
        rows = (
            torch.ones_like(src_tokens, dtype=torch.bool)
            if masked_tokens is None
            else masked_tokens
        )
        pad = self.encoder.dictionary.pad()
        words = src_tokens.clone()
        words[rows] = sample_words(predicted_MV.detach().flatten(0, -2), draws[rows], pad)
        masked = target.ne(pad)
        words = torch.where(masked, words, src_tokens)
        logits_BL, extra = super().forward(words)
        return predicted_MV, {**extra, REPLACED: (logits_BL, masked & words.ne(target))}


class SwitchElectraEncoder(SwitchRobertaEncoder):
    """The discriminator: an encoder with a head that takes each token for replaced or not."""

    def build_lm_head(
        self, embed_dim: int, output_dim: int, activation_fn: str, weight: Any
    ) -> nn.Module:
        """The head, called by fairseq's constructor for one that predicts words."""
        return _ReplacedTokenHead(embed_dim, activation_fn)


class _ReplacedTokenHead(nn.Module):
    """From features (B, L, width) to logits (B, L)."""

    def __init__(self, embed_dim: int, activation_fn: str) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.activation_fn = utils.get_activation_fn(activation_fn)
        self.out_proj = nn.Linear(embed_dim, 1)

    def forward(self, features: Tensor, masked_tokens: None = None) -> Tensor:
        return self.out_proj(self.activation_fn(self.dense(features))).squeeze(-1)


def _generator_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Those of the discriminator, but for its size: heads as wide, and four times it inside.

    Raises:
        ConfigError: for a size that cannot be.
    """
    width = args.generator_embed_dim
    width = max(1, args.encoder_embed_dim // 4) if width is None else width
    layers = args.encoder_layers if args.generator_layers is None else args.generator_layers
    for flag, value in (("--generator-embed-dim", width), ("--generator-layers", layers)):
        if not 1 <= value < 1 << 31:
            raise ConfigError(f"{flag} must be at least 1, not {value}")
    of_head = args.encoder_embed_dim // args.encoder_attention_heads
    heads = max(1, width // of_head)
    if width % heads:
        raise ConfigError(
            f"--generator-embed-dim ({width}) must be a multiple of the width of a head ({of_head}:"
            " --encoder-embed-dim by --encoder-attention-heads), or below it"
        )
    return argparse.Namespace(
        **{
            **vars(given(args)),
            "encoder_embed_dim": width,
            "encoder_ffn_embed_dim": 4 * width,
            "encoder_attention_heads": heads,
            "encoder_layers": layers,
        }
    )


class Generator(TransformerEncoderBase):
    """fairseq's encoder over another's embeddings, with a head that predicts masked words.

    Args:
        args: its settings.
        of: the other.
    """

    def __init__(self, args: argparse.Namespace, of: SwitchElectraEncoder) -> None:
        shared = of.sentence_encoder
        cfg = TransformerConfig.from_namespace(args)
        super().__init__(cfg, of.dictionary, shared.embed_tokens)
        self.embed_positions = shared.embed_positions
        self.layernorm_embedding = shared.layernorm_embedding
        outside, inside = shared.embed_tokens.embedding_dim, cfg.encoder.embed_dim
        self.embed_projection = nn.Linear(outside, inside)
        if cfg.encoder.normalize_before:
            self.layer_norm = LayerNorm(inside, export=cfg.export)
        weight = None if args.untie_weights_roberta else shared.embed_tokens.weight
        self.lm_head = RobertaLMHead(outside, len(of.dictionary), cfg.activation_fn, weight)
        self.lm_head.dense = nn.Linear(inside, outside)

    def forward_embedding(
        self, src_tokens: Tensor, token_embedding: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """See fairseq; projected."""
        x, embedded = super().forward_embedding(src_tokens, token_embedding)
        return self.embed_projection(x), embedded

    def forward(self, src_tokens: Tensor, masked_tokens: Optional[Tensor]) -> Tensor:
        """Logits (M, V) of the masked tokens, or (B, L, V) of all."""
        features = self.forward_scriptable(src_tokens)["encoder_out"][0]
        return self.lm_head(features.transpose(0, 1), masked_tokens)


def sample_words(logits_MV: Tensor, draws_M: Tensor, never: int) -> Tensor:
    """A word for each row, drawn from its softmax; the same for the same draws.

    Args:
        logits_MV: of any floating type.
        draws_M: uniform in [0, 1).
        never: a word that is not drawn.

    Returns:
        (M,) int64.
    """
    found = []
    for logits_RV, draws_R in zip(logits_MV.split(_ROWS), draws_M.split(_ROWS)):
        probs_RV = logits_RV.softmax(-1, dtype=torch.float32)
        probs_RV[:, never] = 0
        # In whole numbers, whose sums are the same in whichever order, on any device.
        upto_RV = (probs_RV * _RESOLUTION).long().cumsum(-1)
        drawn_R1 = (draws_R.unsqueeze(-1) * upto_RV[:, -1:]).long()
        found.append((upto_RV <= drawn_R1).sum(-1))
    # After an overflow, which fairseq finds in the loss, the sums are none.
    return torch.cat(found).clamp_max(logits_MV.size(-1) - 1)


def uniform_draws(seed: int, update: int, sentences_B: Tensor, length: int) -> Tensor:
    """Numbers in [0, 1) that follow from what they are for, in whichever batch this is.

    Args:
        seed, update: of the training.
        sentences_B: int64, the number of each sentence.
        length: of the longest.

    Returns:
        (B, length) float64.
    """
    state = sentences_B.new_tensor(seed)
    positions_L = torch.arange(length, device=sentences_B.device)
    for part in (update, sentences_B.unsqueeze(-1), positions_L):
        state = _mixed(state) + part
    return _shifted(_mixed(state), 11).double() / 2**53


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's mixing of int64, as if they had no sign: each bit turns about half of them."""
    x = x - 0x61C8864680B583EB  # plus the golden ratio's 0x9E3779B97F4A7C15
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (1 << 64 - bits) - 1
