"""Which tokeniser sacreBLEU scores a language with."""

import importlib.util

import pytest
from sacrebleu.metrics import BLEU

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.text.bleu import find_tokeniser


def test_the_tokeniser_is_sacrebleus_of_the_language():
    for language in ("de", "en", "zh", "tlh"):
        assert find_tokeniser(language) == BLEU(trg_lang=language).tokenizer_signature
    for language in ("zh_CN", "zh-TW", "zho_Hant", "ZH", "cmn", "yue_Hant"):
        assert find_tokeniser(language) == "zh"
    assert find_tokeniser("zh", "char") == find_tokeniser("tha_Thai") == "char"


@pytest.mark.parametrize(("language", "package"), [("ja", "MeCab"), ("ko_KR", "mecab_ko")])
def test_an_analyser_that_is_not_installed(language, package):
    short = language[:2]
    if importlib.util.find_spec(package):
        assert find_tokeniser(language) == f"{short}-mecab"
    else:
        with pytest.raises(UserError, match=rf"pip install 'sacrebleu\[{short}\]'.*--tokenize"):
            find_tokeniser(language)
    assert find_tokeniser(language, "char") == "char"


def test_a_tokeniser_that_there_is_not():
    with pytest.raises(UserError, match=r"--tokenize: .* no tokeniser spaces; choose .*13a"):
        find_tokeniser("de", "spaces")
