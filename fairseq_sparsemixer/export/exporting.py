"""A run as a folder that is loaded where fairseq is not installed: transformers' or of ONNX."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Dict

import torch
from fairseq.models.transformer import TransformerModelBase
from fairseq.tasks.translation import TranslationTask
from torch import Tensor

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import ModelChoice
from fairseq_sparsemixer.evaluation.translator import MAX_LEN_B, Translator, load_translator
from fairseq_sparsemixer.export import graphs
from fairseq_sparsemixer.export.description import describe, settings_of
from fairseq_sparsemixer.files import atomic_folder
from fairseq_sparsemixer.requirements import load
from fairseq_sparsemixer.tasks.translation_with_routing import TranslationWithRoutingTask
from fairseq_sparsemixer.text.subwords import SentencePiece

MODELING = "fairseq_sparsemixer.export.modeling_sparsemixer"
TOKENIZATION = "fairseq_sparsemixer.export.tokenization_sparsemixer"
MODEL_TYPE = "fairseq_sparsemixer"
"""What the folder's config.json says it is."""
OWN = re.compile(
    r"(config|generation_config|tokenizer_config|model\.safetensors\.index)\.json"
    r"|model.*\.safetensors|(en|de)coder\.onnx(\.data)?|dict\.(source|target)\.txt"
    r"|(modeling|tokenization)_sparsemixer\.py|sentencepiece\.bpe\.model"
)
"""Names of the files that are written."""
TASKS = (TranslationTask, TranslationWithRoutingTask)
LARGEST_DIFFERENCE = 1e-3
"""Between the logits of both models, in the median over tokens: single ones may differ, where two
experts tie."""


def export(choice: ModelChoice, to: str, beam: int, lenpen: float, output: Path) -> int:
    """Write a folder, whole or not at all.

    Args:
        choice: the model.
        to: ``"transformers"``, or ``"onnx"`` for graphs in place of weights.
        beam, lenpen: how ``generate`` searches by default.
        output: a new folder, or one that was exported before.

    Returns:
        The bytes of the folder.

    Raises:
        UserError: the model cannot be exported, or the folder is of something else.
    """
    modeling = load(MODELING, "export")
    with atomic_folder(output, is_export) as partial:
        translator = load_translator(choice, "fp32")
        _check_kind(translator)
        config = modeling.SparseMixerConfig(
            **describe(translator.model, translator.task), fairseq=_origin(translator)
        )
        tokenizer = _tokenizer(translator, partial)
        model = modeling.SparseMixerForSeq2SeqLM(config).eval()
        state = untied(translator.model.state_dict(), model)
        fill(model, state, translator.checkpoints[0].path)
        _check_equal(translator, model)
        model.generation_config = _generation(translator, beam, lenpen)
        if to == "onnx":
            model.config.save_pretrained(partial)
            model.generation_config.save_pretrained(partial)
            graphs.write(model, partial)
        else:
            # With what only training reads, so that nothing is lost on the way back.
            _save(model, partial, state)
        tokenizer.save_pretrained(partial)
        return sum(path.stat().st_size for path in partial.iterdir())


def is_export(folder: Path) -> bool:
    """Whether a folder was written by :func:`export`, and nothing was added to it."""
    if not all(OWN.fullmatch(path.name) for path in folder.iterdir()):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def _check_kind(translator: Translator) -> None:
    """Refuse what is no single transformer for translation."""
    path, model, task = translator.checkpoints[0].path, translator.model, translator.task
    if len(translator.checkpoints) > 1:
        raise UserError("an ensemble cannot be exported; name one checkpoint alone")
    if type(task) not in TASKS or not isinstance(model, TransformerModelBase):
        raise UserError(
            f"{path} cannot be exported: it is a {type(model).__name__} of a "
            f"{type(task).__name__}, and only transformers of fairseq's task translation are"
        )


def _origin(translator: Translator) -> Dict[str, Any]:
    """What the way back to fairseq needs."""
    return {
        "model": settings_of(translator.cfg.model),
        "source_lang": translator.source_lang,
        "target_lang": translator.target_lang,
        "updates": translator.checkpoints[0].updates,
    }


def _tokenizer(translator: Translator, folder: Path) -> Any:
    """That of transformers, whose files are put into the folder.

    Raises:
        UserError: the model reads Moses tokens, or its dictionary is not that of its file.
    """
    if not isinstance(translator.subwords, SentencePiece):
        raise UserError(
            f"the model reads Moses tokens cut by {translator.subwords.path}, which transformers "
            "has nothing for: only models of SentencePiece can be exported"
        )
    module = load(TOKENIZATION, "export")
    files = {name: folder / file for name, file in module.FILES.items()}
    shutil.copyfile(translator.subwords.path, files["vocab_file"])
    for side, language in (("source", translator.source_lang), ("target", translator.target_lang)):
        name = f"dict.{language}.txt"
        shutil.copyfile(translator.dictionary_folder / name, files[f"{side}_dictionary"])
    tokenizer = module.SparseMixerTokenizer(
        **{name: str(path) for name, path in files.items()},
        model_max_length=translator.max_source_positions,
    )
    for side in ("source", "target"):
        dictionary = getattr(translator.task, f"{side}_dictionary")
        if tokenizer.numbers[side] != dictionary.indices:
            raise UserError(
                f"the model's dictionary of the {side} is not that of its file in "
                f"{translator.dictionary_folder}: it cannot be exported"
            )
    return tokenizer


def _generation(translator: Translator, beam: int, lenpen: float) -> Any:
    """What makes ``generate`` search as fairseq does."""
    dictionary = translator.target_dictionary
    longest = min(MAX_LEN_B + 1, translator.max_target_positions)
    return load("transformers", "export").GenerationConfig(
        num_beams=beam,
        length_penalty=lenpen,
        early_stopping=True,  # where as many translations as beams have ended
        max_length=1 + longest,  # with the end of a sentence that it starts from
        min_new_tokens=1,
        suppress_tokens=[dictionary.pad()],
        forced_eos_token_id=dictionary.eos(),
        decoder_start_token_id=dictionary.eos(),
        bos_token_id=dictionary.bos(),
        eos_token_id=dictionary.eos(),
        pad_token_id=dictionary.pad(),
    )


def _save(model: Any, folder: Path, state: Dict[str, Tensor]) -> None:
    """As transformers does, without a bar, and for whoever may read the other files."""
    logging = load("transformers.utils.logging", "export")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        if bars:
            logging.enable_progress_bar()
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def untied(state: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """``state`` without the second names of matrices that are one."""
    return {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}


def fill(model: Any, state: Dict[str, Tensor], path: Path) -> None:
    """Load the parameters of fairseq's model.

    Args:
        model: of transformers.
        state: see :func:`untied`.
        path: of the checkpoint, for the error.

    Raises:
        UserError: it has others than the model has room for.
    """
    found = model.load_state_dict(state, strict=False)
    left_out = model._keys_to_ignore_on_load_unexpected
    unknown = [
        f"its model has {name}"
        for name in found.unexpected_keys
        if not any(re.search(pattern, name) for pattern in left_out)
    ]
    missing = [
        f"its model has no {name}"
        for name in found.missing_keys
        if name not in model.all_tied_weights_keys
    ]
    for what in (*unknown, *missing):
        raise UserError(
            f"{path} cannot be exported: {what}, unlike fairseq's usual transformer, which is all "
            "that is exported, with experts or without"
        )
    model.tie_weights()


def _check_equal(translator: Translator, model: Any) -> None:
    """See that both models compute the same.

    Raises:
        UserError: they do not.
    """
    difference = _difference(translator, model)
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{translator.checkpoints[0].path} cannot be exported: its logits differ by "
            f"{difference:.2g} from those of the exported model, which does not know all of its "
            "settings"
        )


@torch.no_grad()
def _difference(translator: Translator, model: Any) -> float:
    """The median over tokens of how far the logits of both models are apart."""
    generator = torch.Generator().manual_seed(1)
    length = min(12, translator.max_source_positions, translator.max_target_positions)

    def draw(side: str) -> Tensor:
        entries = len(getattr(translator.task, f"{side}_dictionary"))
        return torch.randint(4, entries, (4, length), generator=generator)

    source, target = draw("source"), draw("target")
    source[0, : length // 2] = translator.task.source_dictionary.pad()
    device = translator.device
    theirs, _ = translator.model(source.to(device), None, target.to(device))
    ours = model(input_ids=source, decoder_input_ids=target).logits
    return (theirs.cpu() - ours).abs().amax(-1).median().item()
