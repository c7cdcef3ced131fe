"""Naive references, written from the papers' formulas one token at a time."""

import torch


def softmax(values):
    exponentials = [torch.exp(value - max(values).detach()) for value in values]
    return [e / sum(exponentials) for e in exponentials]


def logits(router, x):
    return [router.weight[i] @ x + router.bias[i] for i in range(len(router.weight))]


def expert_output(experts, i, x):
    hidden = torch.relu(experts.w1[i] @ x + experts.b1[i])
    return experts.w2[i] @ hidden + experts.b2[i]


def switch_layer(layer, x_TD, noise_TN=None):
    """y and the chosen experts of a Switch layer: gate p_D, D the arg-max."""
    rows, chosen = [], []
    for t, x in enumerate(x_TD):
        z = logits(layer.router, x)
        if noise_TN is not None:
            z = [z_i * u for z_i, u in zip(z, noise_TN[t])]
        p = softmax(z)
        d = max(range(len(z)), key=lambda i: z[i].item())
        rows.append(p[d] * expert_output(layer.experts, d, x))
        chosen.append(d)
    return torch.stack(rows), chosen


def kept_experts(z, eps):
    """Those with (max z - z_i) / max(|z_i|, max z) <= 2 eps."""
    top = max(z)
    kept = []
    for z_i in z:
        scale = max(abs(z_i), top)
        kept.append(top == z_i or (top - z_i) / scale <= 2 * eps)
    return kept


def sparsemixer_layer(layer, x_TD, choice_T, half_T, *, order=2, override=True):
    """y of a SparseMixer layer, its gradient to p~_D doubled, for given draws.

    choice_T: the expert of each token; half_T: whether the coin says m = 1/2.
    """
    eps = layer.router.jitter_eps
    rows = []
    for x, d, half in zip(x_TD, choice_T, half_T):
        z = logits(layer.router, x)
        kept = kept_experts([v.item() for v in z], eps)
        assert kept[d]
        places = [i for i in range(len(z)) if kept[i]]
        p = dict(zip(places, softmax([z[i] for i in places])))
        best = max(range(len(z)), key=lambda i: z[i].item())
        m = 0.5 if order == 2 and half and not (override and d == best) else 1.0
        gate = (m - 2.0) * p[d].detach() + 2.0 * p[d]
        rows.append(gate * expert_output(layer.experts, d, x) * layer.router.output_scale)
    return torch.stack(rows)


def assert_same_gradients(module, loss, reference_loss, inputs, *, allow_unused=False):
    """Of both losses to the parameters and the inputs; what the reference does not use has 0."""
    leaves = [*module.parameters(), *inputs]
    actual = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=allow_unused)
    expected = torch.autograd.grad(reference_loss, leaves, materialize_grads=True)
    for value, wanted in zip(actual, expected):
        value = torch.zeros_like(wanted) if value is None else value
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def assert_all_close(actual, expected, tolerance):
    """Of two dictionaries of tensors, within ``tolerance`` of each one's largest value."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        wanted = expected[name]
        size = wanted.float().abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(
            value,
            wanted,
            rtol=tolerance,
            atol=tolerance * max(1.0, size),
            msg=lambda text, name=name: f"{name}: {text}",
        )
