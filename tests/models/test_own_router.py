"""A router of the user's own, in a --user-dir of its own that imports this package."""

from support import commands

OWN = '''
import torch
from fairseq_sparsemixer.moe import Router, Routing, register_router


@register_router("own-first")
class FirstRouter(Router):
    """Every token to expert 0, with the gate that its softmax gives it."""

    takes_balance_bias = False

    def select(self, logits_TN, context):
        probs_TN = logits_TN.softmax(dim=-1)
        index_T1 = torch.zeros_like(logits_TN[:, :1], dtype=torch.int64)
        return Routing(index_T1, probs_TN[:, :1], logits_TN, probs_TN, probs_TN)
'''


def test_a_router_in_a_user_dir_of_its_own_trains_and_translates(toy_corpus, tmp_path):
    user_dir = tmp_path / "my_router"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text(OWN)
    data, saved = toy_corpus / "joined", tmp_path / "saved"
    # The last --user-dir counts.
    trained = commands.run(
        "fairseq_cli.train",
        *commands.train_command(data, saved, router="own-first", max_update=2),
        *("--user-dir", user_dir),
    )
    entry = commands.logged(trained.stdout, "train_inner")[-1]
    assert entry["max_expert_share/encoder.0"] == 1
    generated = commands.run(
        "fairseq_cli.generate",
        *(data, "--user-dir", user_dir, "--path", saved / "checkpoint_last.pt", "--cpu"),
        *commands.flags(commands.EVERY_SENTENCE),
    )
    assert "Generate test with beam=5" in generated.stdout
