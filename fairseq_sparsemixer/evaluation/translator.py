"""Raw text in, translations out: one for each line, whatever the line holds.

Beam search, models and dictionaries are fairseq's. What is added is the bookkeeping that its
command lines leave to the user: where the dictionaries are, blank and over-long lines, and
that as many lines come out as went in.
"""

import copy
import logging
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.data import data_utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from fairseq_sparsemixer.corpora.folder import sides_of
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.average import average_in_run
from fairseq_sparsemixer.evaluation.options import ModelChoice
from fairseq_sparsemixer.evaluation.precision import DTYPES, check_precision, prepare_model
from fairseq_sparsemixer.models.laid_out import lay_out
from fairseq_sparsemixer.models.search import best_hypotheses
from fairseq_sparsemixer.models.teacher_forcing import EncodedPair
from fairseq_sparsemixer.runs.checkpoints import building, check_finite, load_state, num_updates
from fairseq_sparsemixer.text.subwords import Subwords, find_subwords, not_found

logger = logging.getLogger(__name__)

# Output is at most so many tokens long: fairseq's own default.
MAX_LEN_B = 200

# Parts of a model's config worth reporting beside its score.
MODEL_KEYS = ("router", "num_experts", "top_k")


class Translation(NamedTuple):
    """The translation of one line.

    Attributes:
        text: detokenised text; empty where the source line is blank.
        score: log-probability (base e) over length ** lenpen; 0 for a blank line.
        source_cut: the source was longer than the model can read, and was cut.
        at_length_limit: the output ends where no longer output is allowed.
        tokens: the text before it was detokenised, separated by spaces; None for a model of
            SentencePiece, which has none.
    """

    text: str
    score: float = 0.0
    source_cut: bool = False
    at_length_limit: bool = False
    tokens: Optional[str] = None


class NoTranslationError(UserError):
    """The model is a language model and the like."""


class Hypothesis(NamedTuple):
    """The best translation of one line, with what the model put out.

    Attributes:
        translation: of the line.
        tokens: (length,) int64, the end of the sentence included.
        log_probs: (length,) float32, that of each token (base e).
    """

    translation: Translation
    tokens: torch.Tensor
    log_probs: torch.Tensor


class CheckpointInfo(NamedTuple):
    """Where a model came from: file, optimiser updates, and inputs if it is an average."""

    path: Path
    updates: int
    averaged_from: List[str]


class _Source(NamedTuple):
    """A line as the model reads it: its place in the input, tokens (length,), whether cut."""

    place: int
    tokens: torch.Tensor
    cut: bool


class Translator:
    """A model, or an ensemble, that translates raw lines.

    Args:
        run: run folder, or checkpoint files joined by ``:``.
        checkpoint: file in the run folder; several joined by ``:`` are an ensemble. Not used
            when ``run`` names files.
        data: prepared corpus, searched for dictionaries and the SentencePiece model or BPE codes
            after the run folder and the folder that the model was trained on, whose vocabulary is
            the model's even where a corpus of other text is scored.
        source_lang, target_lang: where neither the checkpoint nor the data tell them; of several
            pairs of languages those to translate.
        precision: ``"fp32"``; ``"fp16"`` or ``"bf16"`` on a GPU; ``"int8"`` for weights of 8 bits
            on a CPU (:mod:`.models.laid_out`).

    Attributes:
        checkpoints: a :class:`CheckpointInfo` for each model.
        source_lang, target_lang: as in the names of the dictionaries.
        pairs: the pairs of languages, if it was trained on several, that ``source_lang`` and
            ``target_lang`` leave; the first is that of this translator (see :meth:`of_pair`).
        trained_on: the folder of binarised data that the model was trained on.
        subwords: how text becomes what the model reads, and back.
        model_settings: ``arch``, ``router`` and the like, as far as the model has them.
        device: a GPU if there is one.

    Raises:
        UserError: a file is missing, damaged or does not fit the others, or the precision cannot
            be had here, or of this model.
    """

    def __init__(
        self,
        run: str,
        checkpoint: str = "checkpoint_best.pt",
        data: Optional[Path] = None,
        source_lang: Optional[str] = None,
        target_lang: Optional[str] = None,
        precision: str = "fp32",
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_precision(precision, self.device)
        paths = find_checkpoints(run, checkpoint)
        state = load_state(paths[0])
        cfg = state["cfg"]
        with building(paths[0]):
            _check_task(cfg, paths[0])
            self.trained_on = Path(utils.split_paths(cfg.task.data)[0])
        data_folders = [self.trained_on, *_corpus_folders(data)]
        self.pairs = _pairs_of(cfg, source_lang, target_lang)
        if self.pairs:
            source_lang, target_lang = self.pairs[0]
        self.source_lang, self.target_lang = find_languages(
            source_lang or cfg.task.source_lang, target_lang or cfg.task.target_lang, data_folders
        )
        folders = [paths[0].parent, *data_folders]
        self.dictionary_folder = find_dictionaries(folders, self.source_lang, self.target_lang)
        self.subwords = find_subwords([self.dictionary_folder, *folders])
        self.model_settings = _model_settings(cfg.model)
        with building(paths[0]):
            task = _build_task(cfg, self.dictionary_folder, (self.source_lang, self.target_lang))
        self.checkpoints: List[CheckpointInfo] = []
        models = []
        # The first file has been read already, and each may be large.
        already_read = [state]
        for path in paths:
            state = already_read.pop() if already_read else load_state(path)
            check_finite(path, state)
            models.append(_build_model(path, state, task, self.dictionary_folder))
            averaged_from = list(state.get("averaged_from", []))
            self.checkpoints.append(CheckpointInfo(path, num_updates(state), averaged_from))
        with building(paths[0]):
            self._hub = _build_hub(cfg, task, models, self.subwords)
        self._hub.to(self.device, DTYPES.get(precision, torch.float32)).eval()
        for path, model in zip(paths, self._hub.models):
            prepare_model(path, model, precision)

    @property
    def endings(self) -> Tuple[str, str]:
        """Of the files of a prepared corpus in its languages."""
        pair = self.source_lang, self.target_lang
        return sides_of("-".join(pair)) if self.pairs else pair

    @property
    def max_source_positions(self) -> int:
        """The longest source that the model can read, in tokens, end of sentence included."""
        task = self.task
        of_several = isinstance(task, TranslationMultiSimpleEpochTask)
        tagged = of_several and task.args.langtoks["main"][0] is not None
        return self._hub.max_positions[0] - int(tagged)

    @property
    def max_target_positions(self) -> int:
        """The longest translation, in tokens, end of sentence included."""
        return self._hub.max_positions[1]

    @property
    def model(self) -> torch.nn.Module:
        """The model, the first of an ensemble."""
        return next(iter(self._hub.models))

    def of_pair(self, languages: Tuple[str, str]) -> "Translator":
        """The same models for another of :attr:`pairs`."""
        other = copy.copy(self)
        other.pairs, (other.source_lang, other.target_lang) = [languages], languages
        cfg = copy.deepcopy(self.cfg)
        task = _build_task(cfg, self.dictionary_folder, languages)
        other._hub = _build_hub(cfg, task, list(self._hub.models), self.subwords)
        other._hub.to(self.device).eval()
        return other

    def with_model(self, model: torch.nn.Module) -> "Translator":
        """One that translates with another model of the same dictionaries, in float32."""
        other = copy.copy(self)
        other._hub = _build_hub(self._hub.cfg, self._hub.task, [model], self.subwords)
        other._hub.to(self.device).eval()
        lay_out(model)
        return other

    @property
    def task(self) -> FairseqTask:
        """fairseq's task, with the dictionaries."""
        return self._hub.task

    @property
    def cfg(self) -> DictConfig:
        """fairseq's settings of the first checkpoint."""
        return self._hub.cfg

    @property
    def target_dictionary(self) -> Any:
        """fairseq's dictionary of the output."""
        return self.task.target_dictionary

    def encode_pair(self, source: str, target: str) -> EncodedPair:
        """A sentence and its translation as tokens; with those of languages, where the model has
        learnt with them.

        Raises:
            UserError: the model begins its translations with the token of a language in place of
                the end of a sentence.
        """
        target = self._hub.tokenize(self.subwords.tokenise(target, self.target_lang))
        pieces = self._hub.apply_bpe(target)
        encoded = self.target_dictionary.encode_line(pieces, add_if_not_exist=False).long()
        tokens = self._encode_source(source)
        data = self.task.build_dataset_for_inference([tokens], torch.tensor([len(tokens)]))
        read = data.collater([data[0]])["net_input"]["src_tokens"][0]
        return EncodedPair(read, torch.cat([self._begin(encoded), encoded]))

    def _begin(self, target: torch.Tensor) -> torch.Tensor:
        """The tokens before those of a target's text."""
        task = self.task
        if not isinstance(task, TranslationMultiSimpleEpochTask):
            return target[:0]
        if task.args.lang_tok_replacing_bos_eos:
            raise UserError(
                "experts and gradients are not measured of a model that was trained with "
                "--lang-tok-replacing-bos-eos"
            )
        token = task.data_manager.get_decoder_langtok(
            self.target_lang, task.args.langtoks["main"][1]
        )
        return target[:0] if token is None else target.new_tensor([token])

    def translate(
        self,
        lines: Iterable[str],
        beam: int = 5,
        lenpen: float = 1.0,
        max_tokens: int = 4096,
        batch_size: Optional[int] = None,
        progress: bool = False,
    ) -> List[Translation]:
        """Translate raw lines: exactly one :class:`Translation` for each, in their order.

        Args:
            lines: raw text, not tokenised. Blank lines stay blank and skip the model; lines
                longer than :attr:`max_source_positions` are cut, with one warning.
            beam: beam size.
            lenpen: length penalty.
            max_tokens: source tokens in a batch, padding included (raised to the longest line).
            batch_size: at most this many lines in a batch.
            progress: show a progress bar on stderr.

        Raises:
            UserError: ``beam`` or ``max_tokens`` is below 1.
        """
        _check_search(beam, max_tokens)
        lines = list(lines)
        sources = self._encode_all(lines)
        text, tokens = self.subwords.decode("", self.target_lang)
        results = [Translation(text, tokens=tokens)] * len(lines)
        missing = {source.place for source in sources}
        with tqdm(
            total=len(lines),
            initial=len(lines) - len(sources),
            unit=" lines",
            file=sys.stderr,
            disable=not progress,
        ) as bar:
            found = self._search(sources, beam, lenpen, max_tokens, batch_size)
            for source, hypothesis in found:
                results[source.place] = self._decode(hypothesis, source.cut)
                missing.remove(source.place)
                bar.update()
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(lines)} lines came back without a translation"
            )
        return results

    def hypothesis(self, line: str, beam: int = 5, lenpen: float = 1.0) -> Optional[Hypothesis]:
        """The translation of one line, see :meth:`translate`; None where the line is blank."""
        _check_search(beam)
        source = self._encode(line, 0)
        if source is None:
            return None
        ((_, found),) = self._search([source], beam, lenpen, 1, None)
        tokens, log_probs = found["tokens"].cpu(), found["positional_scores"].cpu()
        return Hypothesis(self._decode(found, source.cut), tokens, log_probs)

    def _encode_all(self, lines: List[str]) -> List["_Source"]:
        """What the model has to read; warns once of lines that were cut."""
        encoded = (self._encode(line, place) for place, line in enumerate(lines))
        sources = [source for source in encoded if source is not None]
        cut = sum(source.cut for source in sources)
        if cut:
            logger.warning(
                "%d of %d lines are longer than the model's %d tokens and were cut",
                cut,
                len(lines),
                self.max_source_positions,
            )
        return sources

    def _encode(self, line: str, place: int) -> Optional["_Source"]:
        """One line as the model reads it, or None where it is blank."""
        # Invisible characters are dropped: end of sentence may be all that is left.
        if not line.strip() or len(tokens := self._encode_source(line)) == 1:
            return None
        if len(tokens) <= self.max_source_positions:
            return _Source(place, tokens, cut=False)
        kept = torch.cat([tokens[: self.max_source_positions - 1], tokens[-1:]])
        return _Source(place, kept, cut=True)

    def _encode_source(self, line: str) -> torch.Tensor:
        """A raw line of the source as int64 tokens (length,), end of sentence included."""
        return self._hub.encode(self.subwords.tokenise(line, self.source_lang))

    def _search(
        self,
        sources: List["_Source"],
        beam: int,
        lenpen: float,
        max_tokens: int,
        batch_size: Optional[int],
    ) -> Iterator[Tuple["_Source", Dict[str, Any]]]:
        """Yield each source with its best hypothesis, shortest source first."""
        if not sources:
            return
        task = self.task
        tokens = [source.tokens for source in sources]
        lengths = torch.tensor([len(line) for line in tokens])
        batches = task.get_batch_iterator(
            dataset=task.build_dataset_for_inference(tokens, lengths),
            max_tokens=max(max_tokens, int(lengths.max())),
            max_sentences=batch_size,
            max_positions=self._hub.max_positions,
            # Any other multiple makes fairseq drop the last lines without a word.
            required_batch_size_multiple=1,
            disable_iterator_cache=True,
        ).next_epoch_itr(shuffle=False)
        found = best_hypotheses(
            task,
            list(self._hub.models),
            batches,
            max_output=MAX_LEN_B,
            beam=beam,
            lenpen=lenpen,
        )
        for index, hypothesis in found:
            yield sources[index], hypothesis

    def _decode(self, hypothesis: Dict[str, Any], source_cut: bool) -> Translation:
        """The :class:`Translation` of one of fairseq's hypotheses."""
        longest = min(MAX_LEN_B + 1, self.max_target_positions)
        pieces = self._hub.decode(hypothesis["text_tokens"].cpu())
        text, text_tokens = self.subwords.decode(pieces, self.target_lang)
        return Translation(
            text=text,
            score=float(hypothesis["score"]),
            source_cut=source_cut,
            at_length_limit=len(hypothesis["tokens"]) >= longest,
            tokens=text_tokens,
        )


def _check_search(beam: int, max_tokens: int = 1) -> None:
    """Raise UserError where nothing would be found."""
    for flag, value in (("--beam", beam), ("--max-tokens", max_tokens)):
        if value < 1:
            raise UserError(f"{flag} {value} makes no search; give 1 or more")


def load_translator(model: ModelChoice, precision: str) -> Translator:
    """The translator of a model.

    Raises:
        UserError: see :func:`chosen` and :class:`Translator`.
    """
    return Translator(
        model.run, chosen(model), model.data, model.source_lang, model.target_lang, precision
    )


def chosen(model: ModelChoice) -> str:
    """The checkpoint of a choice; an average is made first, where there is none yet.

    Raises:
        UserError: see :func:`.average.average_in_run`.
    """
    if model.average is None:
        return model.checkpoint
    return average_in_run(Path(model.run), *model.average).name


def find_checkpoints(run: str, checkpoint: str) -> List[Path]:
    """The checkpoint files that ``RUN_DIR`` and ``--checkpoint`` name.

    Raises:
        UserError: one of them does not exist; the message lists those that do.
    """
    folder = Path(run)
    if not folder.is_dir():
        paths = [Path(name) for name in utils.split_paths(str(run))]
        for path in paths:
            if not path.is_file():
                raise UserError(f"there is no run folder or checkpoint {path}; check RUN_DIR")
        return paths
    names = [checkpoint] if (folder / checkpoint).is_file() else checkpoint.split(":")
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            others = ", ".join(sorted(other.name for other in folder.glob("*.pt"))) or "none"
            raise UserError(
                f"there is no checkpoint {path}; choose another with --checkpoint (there: {others})"
            )
    return paths


def find_dictionaries(folders: List[Path], source_lang: str, target_lang: str) -> Path:
    """The first of ``folders`` that holds both dictionaries.

    Raises:
        UserError: none does.
    """
    names = [f"dict.{source_lang}.txt", f"dict.{target_lang}.txt"]
    for folder in folders:
        if all((folder / name).is_file() for name in names):
            return folder
    raise UserError(not_found(" and ".join(names), folders))


def _corpus_folders(data: Optional[Path]) -> List[Path]:
    """Where a prepared corpus (or a folder of binarised data) may hold the dictionaries."""
    return [] if data is None else [data, data / "bin"]


def _check_task(cfg: DictConfig, path: Path) -> None:
    """Raise NoTranslationError for a model of another task."""
    if "source_lang" not in cfg.task:
        raise NoTranslationError(
            f"{path} was not trained to translate (its task is {cfg.task.get('_name')}); choose "
            "another with --checkpoint"
        )


def find_languages(
    source_lang: Optional[str], target_lang: Optional[str], data_folders: List[Path]
) -> Tuple[str, str]:
    """The given languages, or those in the names of binarised data, as fairseq finds them.

    fairseq-train keeps them in the checkpoint only where they were given as flags.

    Raises:
        UserError: no folder holds binarised data, or both languages are one.
    """
    if source_lang and target_lang:
        if source_lang == target_lang:
            raise UserError(
                f"source and target language are both {source_lang}; give those of the model with "
                "--source-lang and --target-lang"
            )
        return source_lang, target_lang
    for folder in filter(Path.is_dir, data_folders):
        pair = data_utils.infer_language_pair(str(folder))
        if None not in pair:
            return tuple(pair)
    raise UserError(
        "neither the checkpoint nor its data tell the languages; give --source-lang and "
        "--target-lang, or the data with --data"
    )


def _pairs_of(
    cfg: DictConfig, source_lang: Optional[str], target_lang: Optional[str]
) -> List[Tuple[str, str]]:
    """The pairs of languages that a model was trained on and that are asked for.

    None of a model of one pair, which does not know its languages.

    Raises:
        UserError: none is asked for.
    """
    names = cfg.task.get("lang_pairs")
    if not names:
        return []
    names = names.split(",") if isinstance(names, str) else list(names)
    pairs: List[Tuple[str, str]] = [tuple(name.split("-")) for name in names]
    wanted = [
        pair for pair in pairs if source_lang in (None, pair[0]) and target_lang in (None, pair[1])
    ]
    if not wanted:
        asked = [("--source-lang", source_lang), ("--target-lang", target_lang)]
        given = " ".join(f"{flag} {language}" for flag, language in asked if language)
        raise UserError(f"{given}: the model was trained on {', '.join(names)}; choose one of them")
    return wanted


def _model_settings(model_cfg: Any) -> Dict[str, Any]:
    """``arch``, and the entries of :data:`MODEL_KEYS` that a checkpoint's model config has."""
    # A Namespace from fairseq-train, a config from fairseq-hydra-train: getattr reads both.
    settings = {key: getattr(model_cfg, key, None) for key in ("arch", "_name", *MODEL_KEYS)}
    name = settings.pop("_name")
    settings["arch"] = settings["arch"] or name
    return {key: value for key, value in settings.items() if value is not None}


def _build_task(cfg: DictConfig, folder: Path, languages: Tuple[str, str]) -> Any:
    """The checkpoint's fairseq task, with the dictionaries of ``folder``."""
    with open_dict(cfg):
        cfg.task.data = str(folder)
        cfg.task.source_lang, cfg.task.target_lang = languages
        # Scoring during training needs its own detokeniser, which may not be here.
        cfg.task.eval_bleu = False
    return tasks.setup_task(cfg.task, from_checkpoint=True)


def _build_model(path: Path, state: Dict[str, Any], task: Any, folder: Path) -> torch.nn.Module:
    """The model of one checkpoint, whose dictionaries came from ``folder``."""
    for side, dictionary in (
        ("encoder", task.source_dictionary),
        ("decoder", task.target_dictionary),
    ):
        embedding = state["model"].get(f"{side}.embed_tokens.weight")
        if embedding is not None and len(embedding) != len(dictionary):
            raise UserError(
                f"the checkpoint {path} was trained with dictionaries of {len(embedding)} entries "
                f"and those in {folder} have {len(dictionary)}; copy the right ones into "
                f"{path.parent}"
            )
    with building(path):
        return checkpoint_utils.load_model_ensemble([str(path)], task=task, state=state)[0][0]


def _build_hub(
    cfg: DictConfig, task: Any, models: List[torch.nn.Module], subwords: Subwords
) -> GeneratorHubInterface:
    """fairseq's wrapper of models, text encoding and decoding."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.bpe = None
        if subwords.pipeline == "moses":
            # Tokenised twice, text would be escaped twice.
            cfg.tokenizer = None
        cfg.generation = OmegaConf.structured(GenerationConfig())
    hub = GeneratorHubInterface(cfg, task, models)
    hub.bpe = subwords.encoder()
    return hub
