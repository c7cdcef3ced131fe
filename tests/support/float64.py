"""What a backend computes, held against float64."""

import dataclasses

import torch

from benchmarks.gpu import exact
from fairseq_sparsemixer.moe.dispatch import dispatch


def _with_gradients(mix, x, gate, scale, weights, upstream):
    """Output and gradients of a mixture."""
    y = mix(x, gate) if scale is None else mix(x, gate) * scale
    y.to(upstream.dtype).backward(upstream)
    scales = {} if scale is None else {"scale": scale.grad}
    gradients = {name: weight.grad for name, weight in weights.items()}
    return {"y": y, "x": x.grad, "gate": gate.grad, **scales, **gradients}


def _by_formula(layer, x, routing, upstream):
    weights = exact.weights_of(layer.experts)
    scale = layer.router.output_scale
    return _with_gradients(
        lambda x, gate: exact.mixture(
            x, routing.expert_index, gate, weights, layer.experts.activation_fn
        ),
        exact.leaf(x),
        exact.leaf(routing.gate),
        None if scale is None else exact.leaf(scale),
        weights,
        upstream.double(),
    )


def _by_backend(layer, x, routing, upstream, backend):
    layer.zero_grad()
    weights = {name: getattr(layer.experts, name) for name in exact.WEIGHTS}
    gate = exact.leaf(routing.gate, routing.gate.dtype)
    chosen = dataclasses.replace(routing, gate=gate)
    found = _with_gradients(
        lambda x, _: dispatch(x, chosen, layer.experts, backend),
        exact.leaf(x, x.dtype),
        gate,
        layer.router.output_scale,
        weights,
        upstream,
    )
    return {name: value.clone() for name, value in found.items()}


def errors(layer, x, padding_mask, backend):
    """{tensor: (the backend's error, that of its yardstick)} for one routing of x."""
    torch.manual_seed(2)
    routing = layer.router(x, padding_mask)
    upstream = torch.randn_like(x)
    wanted = _by_formula(layer, x, routing, upstream)
    actual = _by_backend(layer, x, routing, upstream, backend)
    other = _by_backend(layer, x, routing, upstream, exact.YARDSTICK)
    return {
        name: (exact.error(value, wanted[name]), exact.error(other[name], wanted[name]))
        for name, value in actual.items()
    }


def assert_as_exact_as_its_yardstick(layer, x, padding_mask, backend):
    """Every tensor; see :mod:`benchmarks.gpu.exact`."""
    for name, (error, yardstick) in errors(layer, x, padding_mask, backend).items():
        assert error <= exact.allowed(yardstick), (name, error, yardstick)
