"""The tokeniser that sacreBLEU's BLEU cuts text with, by target language."""

from typing import Any, Optional

from fairseq_sparsemixer.errors import UserError

DEFAULT_TOKENISER = "13a"
_BY_LANGUAGE = {
    # sacreBLEU's own choice for zh, ja and ko; the others are names of the same languages.
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue", "wuu", "lzh", "cn"), "zh"),
    **dict.fromkeys(("ja", "jpn", "jp"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
    # Thai, Lao, Khmer, Burmese, Tibetan and Dzongkha have no spaces between words and no tokeniser
    # in sacreBLEU: with 13a a whole sentence would be one token, and its BLEU 0.
    **dict.fromkeys(("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bur"), "char"),
    **dict.fromkeys(("bo", "bod", "tib", "dz", "dzo"), "char"),
}


def find_tokeniser(language: str, chosen: Optional[str] = None) -> str:
    """The name of the tokeniser for a target language, which can be used here.

    Args:
        language: such as ``zh`` or ``zh_CN``.
        chosen: taken in place of the language's own.

    Raises:
        UserError: there is no such tokeniser, or what it needs is not here.
    """
    name = chosen or _BY_LANGUAGE.get(
        language.replace("-", "_").split("_")[0].lower(), DEFAULT_TOKENISER
    )
    make_bleu(name)
    return name


def make_bleu(tokeniser: str, **options: Any) -> Any:
    """:class:`sacrebleu.metrics.BLEU` with a tokeniser; ``options`` are its other arguments.

    Raises:
        UserError: there is no such tokeniser, or what it needs is not here.
    """
    from sacrebleu.metrics import BLEU

    if tokeniser not in BLEU.TOKENIZERS:
        known = ", ".join(BLEU.TOKENIZERS)
        raise UserError(f"--tokenize: sacreBLEU has no tokeniser {tokeniser}; choose from {known}")
    try:
        return BLEU(tokenize=tokeniser, **options)
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        language, _, analyser = tokeniser.partition("-")
        if analyser == "mecab":
            cure = f"run `pip install 'sacrebleu[{language}]'`"
        else:
            cure = "give it access to the network once, for its model"
        raise UserError(
            f"BLEU with sacreBLEU's tokeniser {tokeniser} cannot be computed here: {cure}, or "
            "choose another with --tokenize of `fairseq-sparsemixer evaluate`, such as char"
        ) from error
