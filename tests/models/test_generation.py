"""Validation and generation through fairseq's own command lines."""

import math
import shutil

import pytest
import torch
from support import commands
from support.commands import PACKAGE, SENTENCES, SIZE, flags
from support.training import assert_one_clear_line, generate, log_of

# Validation and generation


@pytest.fixture(scope="session")
def validated(shared, toy_corpus, trained):
    """fairseq-validate of the valid and test sets, called from another folder."""

    def build(directory):
        directory.mkdir()
        result = commands.run(
            "fairseq_cli.validate",
            toy_corpus / "joined",
            *flags(
                {
                    **commands.RUN,
                    "user-dir": f"{PACKAGE.name}/",
                    "task": "translation",
                    "path": trained / "checkpoint_last.pt",
                    "valid-subset": "valid,test",
                }
            ),
            cwd=PACKAGE.parent,
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("validated", build)


def test_validate_finds_what_training_logged(validated, trained):
    log = (validated / "log").read_text()
    assert "leaves out" not in log
    (after,) = log_of(validated, "valid")
    during = log_of(trained, "valid")[-1]
    assert after["bsz"] == SENTENCES["valid"]
    assert during["bsz"] == SENTENCES["valid"] / 2  # training logs the mean over batches
    for name in ("loss", "nll_loss"):
        assert after[name] == during[name]
    for name in ("z_loss", "router_entropy", "max_expert_share"):
        assert after[name] == pytest.approx(during[name], abs=3e-4)  # a mean of rounded means
    (test,) = log_of(validated, "test")
    assert test["bsz"] == SENTENCES["test"]


def test_validate_finds_the_balance_loss_that_training_logged(validated, trained):
    (after,) = log_of(validated, "valid")
    assert after["balance_loss"] == pytest.approx(log_of(trained, "valid")[-1]["balance_loss"])


def test_validate_warns_of_sentences_left_out(trained, toy_corpus):
    result = commands.run(
        "fairseq_cli.validate",
        toy_corpus / "joined",
        *flags(
            {
                **commands.RUN,
                "required-batch-size-multiple": None,
                "user-dir": PACKAGE,
                "task": "translation",
                "path": trained / "checkpoint_last.pt",
            }
        ),
    )
    assert "fairseq leaves out 5 of 29 sentences" in result.stdout
    assert "pass --required-batch-size-multiple 1" in result.stdout
    assert commands.logged(result.stdout, "valid")[0]["bsz"] == 24


@pytest.fixture(scope="session")
def generated(shared, toy_corpus, trained):
    """The test set translated with a beam of 4, 8 sentences at a time."""

    def build(directory):
        directory.mkdir()
        result = generate(toy_corpus / "joined", trained / "checkpoint_last.pt", beam=4)
        assert "leaves out" not in result.stderr
        (directory / "log").write_text(result.stdout)

    return (shared.directory("generated", build) / "log").read_text()


def scores(output):
    return {number: float(score) for number, (score, _) in commands.printed(output, "H").items()}


def test_generate_does_not_depend_on_the_batch(generated, trained, toy_corpus):
    # 25 sentences, 8 at a time: the last batch has one
    texts = commands.hypotheses(generated)
    assert sorted(texts) == list(range(SENTENCES["test"]))
    assert len(set(texts.values())) > SENTENCES["test"] / 2
    alone = generate(
        toy_corpus / "joined", trained / "checkpoint_last.pt", **{"beam": 4, "batch-size": 1}
    ).stdout
    assert commands.hypotheses(alone) == texts
    assert scores(alone) == pytest.approx(scores(generated), abs=2e-4)


def test_interactive_translates_as_generate_does(trained, toy_corpus):
    """Greedily; generate's default batches leave out a sentence, interactive's do not."""
    some = generate(
        toy_corpus / "joined",
        trained / "checkpoint_last.pt",
        **{"beam": 1, "required-batch-size-multiple": None},
    )
    assert "fairseq leaves out 1 of 25 sentences" in some.stderr
    some = some.stdout
    every = commands.run(
        "fairseq_cli.interactive",
        toy_corpus / "joined",
        *flags(
            {
                "user-dir": PACKAGE,
                "path": trained / "checkpoint_last.pt",
                "input": toy_corpus / "raw" / "test.en",
                "buffer-size": 100,
                "batch-size": 8,
                "beam": 1,
                "cpu": True,
            }
        ),
    ).stdout
    texts, expected = commands.hypotheses(every), commands.hypotheses(some)
    assert sorted(texts) == list(range(SENTENCES["test"]))
    assert len(expected) == 24
    assert {number: texts[number] for number in expected} == expected
    for number, score in scores(some).items():
        assert scores(every)[number] == pytest.approx(score, abs=2e-4)


def test_prefix_size_keeps_the_start_of_the_reference(generated, trained, toy_corpus):
    output = generate(
        toy_corpus / "joined", trained / "checkpoint_last.pt", **{"beam": 4, "prefix-size": 2}
    ).stdout
    texts = commands.hypotheses(output)
    references = {n: text for n, (text,) in commands.printed(output, "T").items()}
    assert sorted(texts) == sorted(references) == list(range(SENTENCES["test"]))
    for number, text in texts.items():
        assert text.split()[:2] == references[number].split()[:2]
    assert texts != commands.hypotheses(generated)


def test_reference_scores_and_ensembles(validated, trained, toy_corpus):
    last, middle = trained / "checkpoint_last.pt", trained / "checkpoint_5_50.pt"
    alone, other, both = (
        commands.positional_scores(
            generate(toy_corpus / "joined", *paths, **{"score-reference": True}).stdout
        )
        for paths in ([last], [middle], [last, middle])
    )
    # the same likelihood as in validation
    every = [score for scores_ in alone.values() for score in scores_]
    (test,) = log_of(validated, "test")
    assert len(alone) == SENTENCES["test"]
    assert len(every) == test["wpb"]
    assert -sum(every) / len(every) == pytest.approx(test["nll_loss"], abs=1e-3)
    # an ensemble is the mean of the probabilities
    for number, ensemble in both.items():
        expected = [math.log2((2**a + 2**b) / 2) for a, b in zip(alone[number], other[number])]
        assert ensemble == pytest.approx(expected, abs=3e-4)
    assert alone != other


@pytest.fixture(scope="session")
def pruned_by_hand(shared, trained, toy_corpus):
    """Translations of a checkpoint with the second encoder layer alone, which has no experts."""

    def build(directory):
        directory.mkdir()
        state = commands.load(trained / "checkpoint_last.pt")
        state["model"] = {
            name.replace("encoder.layers.1.", "encoder.layers.0."): value
            for name, value in state["model"].items()
            if not name.startswith("encoder.layers.0.")
        }
        state["cfg"]["model"].update(encoder_layers=1, encoder_moe_layers="none")
        torch.save(state, directory / "pruned.pt")
        result = generate(toy_corpus / "joined", directory / "pruned.pt", beam=4)
        (directory / "log").write_text(result.stdout)

    return (shared.directory("pruned_by_hand", build) / "log").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        {"encoder_layers_to_keep": "1", "decoder_layers_to_keep": "0,1"},
        {"encoder_layers_to_keep": "1"},
    ],
    ids=["both sides", "encoder"],
)
def test_layers_can_be_pruned(overrides, pruned_by_hand, generated, trained, toy_corpus):
    settings = {"beam": 4, "model-overrides": overrides}
    output = generate(toy_corpus / "joined", trained / "checkpoint_last.pt", **settings).stdout
    assert sorted(commands.hypotheses(output)) == list(range(SENTENCES["test"]))
    assert commands.hypotheses(output) == commands.hypotheses(pruned_by_hand)
    assert scores(output) == scores(pruned_by_hand)
    assert scores(output) != scores(generated)


def test_another_number_of_experts_does_not_fit_the_checkpoint(trained, toy_corpus, tmp_path):
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    command = commands.train_command(
        toy_corpus / "joined",
        tmp_path,
        arch={**SIZE, "num-experts": 8},
        share_all_embeddings=True,
        max_update=200,
    )
    overrides = {"model-overrides": "{'num_experts': 8}", "cpu": True}
    results = commands.finish(
        commands.start("fairseq_cli.train", *command),
        commands.start(
            "fairseq_cli.generate",
            toy_corpus / "joined",
            *("--user-dir", PACKAGE, "--path", trained / "checkpoint_last.pt"),
            *flags(overrides),
        ),
    )
    for result in results:
        assert_one_clear_line(result, "--num-experts", "there and (8")
