"""The matrix of a curvature by PyTorch's own functional derivatives."""

from __future__ import annotations

import torch
from torch.func import functional_call, hessian, jacrev

from lightning_imaml.curvature import Hessian


def dense(curvature, loss, net, flat, row, inputs, targets):
    def outputs(p):
        named = {k: v.squeeze(0) for k, v in flat.unflatten(p.unsqueeze(0)).items()}
        return functional_call(net, named, (inputs,))

    if isinstance(curvature, Hessian):
        matrix = hessian(lambda p: loss(outputs(p), targets))(row)
    else:
        jacobian = jacrev(outputs)(row).flatten(0, 1)
        out = outputs(row)
        bend = hessian(lambda o: loss(o, targets))(out).reshape(out.numel(), out.numel())
        matrix = jacobian.T @ bend @ jacobian
    return matrix + (0.7 + curvature.damping) * torch.eye(len(row), dtype=row.dtype)
