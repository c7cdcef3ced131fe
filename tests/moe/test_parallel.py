"""Experts that are spread over workers compute what experts in one place do."""

import pytest
import torch
from support.spread_layers import CASES, IDENTITY, WIDTH, build, compute


@pytest.fixture(scope="module")
def workers(server, tmp_path_factory):
    """For each case what each of its workers computed."""
    folder = tmp_path_factory.mktemp("spread_layers")
    found = {}
    for count in (2, 4):
        names = [name for name, case in CASES.items() if len(case.tokens) == count]
        processes = [
            ("support.spread_layers", rank, count, folder / f"meet{count}", folder / str(count))
            for rank in range(count)
        ]
        log = folder / "log"
        statuses = server.run(*[[*process, *names] for process in processes], output=log)
        assert statuses == [0] * count, log.read_text()
        each = [torch.load(folder / f"{count}.{rank}") for rank in range(count)]
        found |= {name: [one[name] for one in each] for name in each[0]}
    return found


@pytest.mark.parametrize("name", CASES)
def test_workers_compute_what_one_process_does(name, workers):
    case, found = CASES[name], workers[name]
    layer = build(case)
    y_TD, grad_TD = compute(case, layer)
    close = {"rtol": 2e-2, "atol": 2e-2} if case.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.cat([one["y"] for one in found]), y_TD, **close)
    torch.testing.assert_close(torch.cat([one["x"] for one in found]), grad_TD, **close)
    gradients = {n: p.grad for n, p in layer.experts.named_parameters()}
    for parameter, gradient in gradients.items():
        for first in range(0, len(found), case.size):  # each group holds all experts
            group = found[first : first + case.size]
            together = torch.cat([one["experts"][parameter] for one in group])
            torch.testing.assert_close(together, gradient, **close)
    norm = (4 + sum((g / len(found)).square().sum() for g in gradients.values())).sqrt()
    for one in found:
        torch.testing.assert_close(one["norm"], norm, rtol=1e-3 if case.bfloat16 else 1e-6, atol=0)
        assert one["norm"] == found[0]["norm"]


def test_means_and_balance_bias_are_those_of_the_whole_batch(workers):
    case = CASES["means"]
    layer = build(case)
    compute(case, layer)
    layer.end_update()
    expected = dict(layer.router.named_buffers())
    assert expected["expert_means.updates"].sum() > 0
    for one in workers["means"]:
        assert one["buffers"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(one["buffers"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_first_worker_gathers_all_experts(name, workers):
    whole = dict(build(CASES[name]).experts.named_parameters())
    first, *others = [one["gathered"] for one in workers[name]]
    assert first.keys() == whole.keys()
    assert all(torch.equal(first[parameter], value) for parameter, value in whole.items())
    assert all(value is None for other in others for value in other.values())


@pytest.mark.parametrize(
    ("name", "travelling", "element"),
    [
        # Everyone's tokens go to the last expert, on the second worker: five travel.
        ("all to one", (5, 0), 4),
        # Of (0, 2, 2, 0) two stay with the first worker, of (2, 0, 0) one with the second.
        ("none to some", (2, 2), 4),
        ("no tokens anywhere", (0, 0), 4),
    ],
)
def test_bytes_are_counted(name, travelling, element, workers):
    """Rows go there and their outputs back, forward and backward; beside them two counts each."""
    counts = 2 * 8
    for rank, one in enumerate(workers[name]):
        rows = travelling[rank] + travelling[1 - rank]  # its own, and outputs of others'
        assert one["bytes"] == 2 * rows * WIDTH * element + counts


def test_autocast_halves_what_travels(workers):
    counts = 2 * 8
    in_float32, in_bfloat16 = (
        sum(one["bytes"] - counts for one in workers[name]) for name in ("recompute", "autocast")
    )
    assert in_float32 == 2 * in_bfloat16 > 0


@pytest.mark.parametrize("name", IDENTITY)
def test_identity_experts_give_back_input_and_gradient(name, workers):
    for experts, one in zip(IDENTITY[name], workers[name]):
        kept = torch.tensor(experts).ge(0).unsqueeze(-1)
        assert torch.equal(one["y"], one["x"] * kept)
        assert torch.equal(one["grad"], one["weight"] * kept)


@pytest.mark.parametrize(
    ("name", "rows", "experts"),
    [
        # A row is its worker's number times ten plus its place there: first those of the first
        # worker by expert, then those of the second. Experts are counted from each worker's first.
        ("some", ([1, 4, 10, 11], [3, 0, 12]), ([0, 0, 1, 1], [0, 1, 1])),
        ("one-sided", (None, [0, 1, 2]), (None, [0, 1, 1])),
        ("none", (None, None), (None, None)),
    ],
)
def test_rows_come_to_their_experts(name, rows, experts, workers):
    for one, expected_rows, expected_experts in zip(workers[name], rows, experts):
        assert ("rows" in one) == (expected_rows is not None)  # nothing to compute
        if expected_rows is not None:
            assert one["rows"][:, 0].tolist() == expected_rows
            assert one["experts"].tolist() == expected_experts
