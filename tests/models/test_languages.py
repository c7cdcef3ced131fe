"""Which language a model takes a token to be of, in training and while it translates."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import build_model
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import OmegaConf
from support.models import SMALL, Task, batch

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.laid_out import obstacle
from fairseq_sparsemixer.models.layers import switch_layers

PAIRS = ["en-fr", "en-de", "en-it"]
LANGUAGES = ["en", "de", "fr", "it"]


class SeveralLanguages(TranslationMultiSimpleEpochTask):
    """What a model reads of fairseq's task; the entries 12 to 15 are its languages."""

    def __init__(self, encoder="tgt", decoder="tgt", pairs=PAIRS):
        self.langs = LANGUAGES
        self.args = SimpleNamespace(
            langtoks={"main": (encoder, decoder)}, lang_pairs=pairs, lang_tok_style="multilingual"
        )
        self.dictionary = Dictionary()
        for symbol in [*"abcdefgh", *(f"__{language}__" for language in LANGUAGES)]:
            self.dictionary.add_symbol(symbol)

    @property
    def source_dictionary(self):
        return self.dictionary

    target_dictionary = source_dictionary


DE, FR, IT = 13, 14, 15


def build(task=None, **settings):
    torch.manual_seed(0)
    cfg = {"_name": "switch_transformer", "router": "language", "num_experts": 3, **SMALL}
    model = build_model(OmegaConf.create({**cfg, **settings}), task or SeveralLanguages())
    return model.eval()


def tagged(languages, at_begin=True):
    """A batch whose sentences, of two lengths, begin with tags, or whose source ends with them."""
    inputs = batch(((4, 4), (7, 6), (5, 3)))
    for row, language in enumerate(languages):
        source = inputs["src_tokens"][row]
        first = int(source.eq(1).sum())
        source[first if at_begin else -1] = language
        inputs["prev_output_tokens"][row, 1 if at_begin else 0] = language
    return inputs


def experts(model, inputs):
    """By layer, the expert of each token (batch, length), -1 at padding."""
    seen, handles = {}, []
    for name, layer in switch_layers(model).items():

        def note(module, args, output, name=name):
            length, sentences = args[0].shape[:2]
            seen[name] = output[1].expert_index.view(length, sentences).t()

        handles.append(layer.moe.register_forward_hook(note))
    output = model(**inputs)[0]
    for handle in handles:
        handle.remove()
    return output, seen


@pytest.mark.parametrize("at_begin", [True, False])
def test_every_token_goes_to_the_expert_of_its_sentences_language(at_begin):
    inputs = tagged([IT, DE, FR], at_begin)
    _, seen = experts(build(), inputs)
    for name, found in seen.items():
        side = "src_tokens" if name.startswith("encoder") else "prev_output_tokens"
        tokens = inputs[side]
        expected = torch.tensor([[2], [0], [1]]).repeat(1, tokens.shape[1])
        if side == "prev_output_tokens" and at_begin:
            expected[:, 0] = 0  # before the tag, nobody knows: the first language's
        assert torch.equal(found, expected.masked_fill(tokens.eq(1), -1)), name


def test_languages_are_numbered_among_those_of_the_side():
    task = SeveralLanguages(encoder="src", pairs=["de-fr", "it-fr", "fr-de"])
    model = build(task)
    assert model.encoder.language_tags.tolist() == [DE, FR, IT]
    assert model.decoder.language_tags.tolist() == [DE, FR]
    routers = {name: layer.moe.router for name, layer in switch_layers(model).items()}
    assert routers["encoder.0"].num_languages == 3
    assert routers["decoder.2"].num_languages == 2


@pytest.mark.parametrize("router", ["language", "hash"])
def test_step_by_step_it_chooses_as_under_teacher_forcing(router):
    model = build(router=router, num_experts=6)
    inputs = tagged([IT, DE, FR])
    whole, _ = experts(model, inputs)
    order = torch.tensor([2, 0, 1])
    encoder_out = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
    encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
    prefixes, state = inputs["prev_output_tokens"][order], {}
    for length in range(1, 5):
        step, _ = model.decoder(
            prefixes[:, :length], encoder_out=encoder_out, incremental_state=state
        )
        torch.testing.assert_close(step[:, 0], whole[order, length - 1], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_its_languages():
    trained, other = build(), build(SeveralLanguages(pairs=["en-it", "en-de", "en-en"]))
    assert trained.encoder.language_tags.tolist() != other.encoder.language_tags.tolist()
    other.load_state_dict(trained.state_dict())
    inputs = tagged([IT, DE, FR])
    assert torch.equal(trained(**inputs)[0], other(**inputs)[0])
    with pytest.raises(ConfigError, match=r"language_tags .*give the --lang-pairs and --langs"):
        build(SeveralLanguages(pairs=["en-it"])).load_state_dict(trained.state_dict())
    assert not [name for name in build(router="hash").state_dict() if "language" in name]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (Task(), {}, "finds no language in the encoder: train with --task translation_multi_simpl"),
        (SeveralLanguages(encoder=None), {}, "--encoder-langtok tgt, give --encoder-moe-layers no"),
        (SeveralLanguages(decoder=None), {}, "no language in the decoder: .* --decoder-langtok, "),
    ],
)
def test_text_without_tags_is_refused(task, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(task, **settings)


def test_a_side_without_experts_needs_no_tags():
    model = build(SeveralLanguages(encoder=None), encoder_moe_layers="none")
    assert model.encoder.language_tags is None
    assert list(switch_layers(model)) == ["decoder.0", "decoder.2"]


def test_it_is_translated_as_fairseq_does():
    """One token at a time does not tell the language of the sentence."""
    assert "by the language of the sentence" in obstacle(build())
    assert obstacle(build(router="hash")) is None
