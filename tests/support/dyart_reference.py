"""One DyART step, written from the paper's formulas."""

import torch
from support.boundary_reference import phi, published_filter, published_search
from support.stepping import K, N
from torch import Tensor, nn

from fastdynat.attacks.boundary_search import BoundarySpec


def reference_step(
    net: nn.Module, x: Tensor, y: Tensor, start: Tensor, spec: BoundarySpec, r0: float
) -> list[str]:
    """Algorithms B.3 and B.4 on `net`: sets its gradients and buffers, returns each image's outcome."""
    net.eval()
    points, weights, fates = [], [], []
    for i in range(N):
        point, radius = published_search(net, x[i], int(y[i]), start[i], spec)
        points.append(point)
        weights.append(0.0)
        if radius is None:
            fates.append("not found")
        elif not published_filter(net, x[i], int(y[i]), point, spec.temperature):
            fates.append("dropped")
        elif radius >= r0:
            fates.append("far")
        else:
            fates.append("used")
            leaf = point.detach().requires_grad_()
            slope = torch.autograd.grad(phi(net, leaf, int(y[i]), spec.temperature), leaf)[0]
            weights[i] = float(
                torch.exp(torch.tensor(-3.0 * radius, dtype=torch.float64)) / slope.abs().sum()
            )
    net.train()
    logits = net(torch.stack(points).detach())
    boundary_loss = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        others = [k for k in range(K) if k != int(y[i])]
        margin = (
            logits[i, y[i]]
            - torch.log(torch.exp(spec.temperature * logits[i, others]).sum()) / spec.temperature
        )
        boundary_loss = boundary_loss - weights[i] * margin / N
    clean = net(x)
    loss = sum(-torch.log_softmax(clean[i], 0)[y[i]] for i in range(N)) / N + 1000.0 * boundary_loss
    loss.backward()
    return fates
