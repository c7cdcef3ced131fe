"""A language model: fairseq's decoder-only transformer with experts in some layers."""

import argparse

from fairseq.models import register_model
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.tasks import FairseqTask

from fairseq_sparsemixer.models.building import (
    INPUTS,
    PAIRS,
    Settings,
    SwitchModel,
    naming_conflicts,
)
from fairseq_sparsemixer.models.config import SwitchTransformerLanguageModelConfig
from fairseq_sparsemixer.models.switch_transformer import SwitchTransformerModel


@register_model("switch_transformer_lm", dataclass=SwitchTransformerLanguageModelConfig)
class SwitchTransformerLanguageModel(SwitchModel, TransformerLanguageModel):
    """fairseq's transformer_lm, whose layers 0, 2, 4, ... have experts.

    Everything that fairseq's can do, it can do, apart from quantization noise and ``scale_fc``.

    >>> model = SwitchTransformerLanguageModel.from_pretrained(
    ...     "runs/lm", "checkpoint_best.pt", "corpus/mono", bpe="sentencepiece"
    ... )
    >>> model.score("The device is not available.")["positional_scores"]
    """

    config = SwitchTransformerLanguageModelConfig
    sides = ("decoder",)
    tasks = "language_modeling"
    refused_tasks = (*PAIRS, *INPUTS)

    @classmethod
    def build_model(cls, settings: Settings, task: FairseqTask) -> "SwitchTransformerLanguageModel":
        """Build the model from flags or from hydra's node.

        Raises:
            ConfigError: for a setting that is unknown, out of range or not supported.
        """
        args = cls._read(settings, task)
        args.checkpoint_activations |= args.offload_activations
        without_layers = argparse.Namespace(**vars(args))
        without_layers.decoder_layers, without_layers.decoder_layers_to_keep = 0, None
        with naming_conflicts():
            # Its embeddings, however they are made, and its checks.
            model = super().build_model(without_layers, task)
            args.max_target_positions = without_layers.max_target_positions
            cfg = cls._expand(args, task)
            cfg.decoder.layers = len(cfg.experts.decoder_kept)
            cfg.no_cross_attention = True
            model.decoder = SwitchTransformerModel.build_decoder(
                cfg, task.target_dictionary, model.decoder.embed_tokens
            )
        return cls._finished(model, cfg)
