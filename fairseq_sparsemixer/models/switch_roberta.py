"""RoBERTa with experts in some layers: pre-trained on masked words, fine-tuned on sentences."""

from typing import Any, Dict, Tuple, Type

from fairseq.data import Dictionary
from fairseq.models import register_model
from fairseq.models.roberta import RobertaEncoder, RobertaModel
from fairseq.models.roberta import model as roberta
from fairseq.models.transformer import TransformerEncoderBase
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from fairseq_sparsemixer.models.building import (
    PAIRS,
    TEXTS,
    Settings,
    SwitchModel,
    naming_conflicts,
)
from fairseq_sparsemixer.models.config import ConfigError, SwitchRobertaConfig
from fairseq_sparsemixer.models.layers import STATISTICS, Call, Recorded
from fairseq_sparsemixer.models.switch_transformer import SwitchTransformerModel
from fairseq_sparsemixer.moe.experts import Experts


def _init_experts(experts: Experts) -> None:
    """As :func:`init_bert_params` does fairseq's feed-forward network."""
    for weight, bias in ((experts.w1, experts.b1), (experts.w2, experts.b2)):
        nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(bias)


class _Heads(nn.ModuleDict):
    """Classification heads by their names."""

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self:
            raise ConfigError(
                f"--classification-head-name: the model has no head {name!r}, but "
                f"{', '.join(map(repr, self)) or 'none'}; give the name that it was fine-tuned with"
            )
        return super().__getitem__(name)


@register_model("switch_roberta", dataclass=SwitchRobertaConfig)
class SwitchRobertaModel(SwitchModel, RobertaModel):
    """fairseq's RoBERTa (arXiv 1907.11692), whose layers 0, 2, 4, ... have experts.

    Everything that fairseq's RoBERTa can do, it can do, apart from quantization noise, and from
    pruning and penalties of the feed-forward network.

    >>> model = SwitchRobertaModel.from_pretrained(
    ...     "runs/pretrained", "checkpoint_best.pt", "corpus/mono", bpe="sentencepiece"
    ... )
    >>> model.extract_features(model.encode("The device is not available."))
    """

    config = SwitchRobertaConfig
    base_architecture = staticmethod(roberta.base_architecture)
    sides = ("encoder",)
    tasks = "masked_lm or sentence_prediction"
    refused_tasks: Tuple[Type, ...] = (*PAIRS, *TEXTS)

    def __init__(self, args: Any, encoder: RobertaEncoder) -> None:
        super().__init__(args, encoder)
        self.classification_heads = _Heads()

    @classmethod
    def hub_models(cls) -> Dict[str, str]:
        """None to download: fairseq's have no experts."""
        return {}

    @classmethod
    def build_model(cls, settings: Settings, task: FairseqTask) -> "SwitchRobertaModel":
        """Build the model from flags or from hydra's node.

        Raises:
            ConfigError: for a setting that is unknown, out of range or not supported.
        """
        args = cls._read(settings, task)
        for flag, off in (("ffn_reg_scale_factor", 0), ("ffn_blocks_to_remove", -1)):
            if getattr(args, flag) != off:
                raise ConfigError(
                    f"--{flag.replace('_', '-')} must be {off}: it is about one feed-forward "
                    "network in each layer"
                )
        if args.max_positions is None:
            args.max_positions = task.max_positions()
        args.max_source_positions = args.max_positions
        args.checkpoint_activations |= args.offload_activations
        cfg = cls._expand(args)
        cfg.init_experts = _init_experts
        args.cfg = cfg
        with naming_conflicts():
            return cls._finished(cls._built(args, task.source_dictionary), cfg)

    @classmethod
    def _built(cls, args: Any, dictionary: Dictionary) -> "SwitchRobertaModel":
        return cls(args, SwitchRobertaEncoder(args, dictionary))

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        """See fairseq; of a checkpoint of ``switch_electra`` the discriminator's layers are left.

        It has no head that predicts masked words: that stays as it was drawn.
        """
        if not hasattr(self, "generator") and any(
            key.startswith("generator.") for key in state_dict
        ):
            for key in list(state_dict):
                if key.startswith(("generator.", "encoder.lm_head.")):
                    del state_dict[key]
            head = self.encoder.lm_head.state_dict(prefix="encoder.lm_head.")
            if not self.args.untie_weights_roberta:
                head["encoder.lm_head.weight"] = state_dict[
                    "encoder.sentence_encoder.embed_tokens.weight"
                ]
            state_dict.update(head)
        super().upgrade_state_dict_named(state_dict, name)


class SwitchRobertaEncoder(RobertaEncoder):
    """fairseq's encoder of RoBERTa over :class:`SwitchTransformerEncoder`."""

    def build_encoder(
        self, args: Any, dictionary: Dictionary, embed_tokens: nn.Embedding
    ) -> TransformerEncoderBase:
        """The layers, called by fairseq's constructor."""
        args.cfg.encoder.layers = args.encoder_layers  # without those that are left out
        encoder = SwitchTransformerModel.build_encoder(args.cfg, dictionary, embed_tokens)
        encoder.apply(init_bert_params)
        return encoder

    def extract_features(self, *args: Any, **kwargs: Any) -> Any:
        """See fairseq; the second output holds the routing statistics, too."""
        call: Any = Call(self)
        call.sentence_encoder = Recorded(self.sentence_encoder)
        features, extra = RobertaEncoder.extract_features(call, *args, **kwargs)
        return features, {**extra, STATISTICS: call.sentence_encoder.output.get(STATISTICS, {})}
