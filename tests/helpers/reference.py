"""The whole method in plain float64 NumPy; shares no code with the library.

The layers are written as in the paper, with a residual weight and dense products;
backward pass, AdamW, clipping, schedule and launch are written out:

    y = x W + bias,   W = W_res + gamma A B + U diag(g) V^T
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

EPSILON = 1e-6  # of the change rate
FLOAT32_EPS = 2.0**-23  # of the type the kernels are stored in
# Not the defaults, with which float32 Adam loses digits: 1 - 0.999 has four, and a
# gradient near zero would move its weight as much as any other.
B1, B2, ADAM_EPSILON = 0.8, 0.99, 1e-4


class Adam:
    """The moments of one array, and the number of its steps."""

    def __init__(self):
        self.m, self.v, self.count = np.float64(0), np.float64(0), 0

    def __call__(self, grad: np.ndarray) -> np.ndarray:
        """Return the bias-corrected direction to subtract."""
        self.count += 1
        self.m = B1 * self.m + (1 - B1) * grad
        self.v = B2 * self.v + (1 - B2) * grad**2
        m, v = self.m / (1 - B1**self.count), self.v / (1 - B2**self.count)
        return m / (np.sqrt(v) + ADAM_EPSILON)


class Launched(NamedTuple):
    """What one layer's launch saw."""

    order: np.ndarray
    sigma: np.ndarray
    rates: np.ndarray


class Layer:
    """A dense layer with an adapter; `trained` and `adams` have keys a, b and g."""

    def __init__(self, kernel: Any, bias: Any, a: Any, *, gamma: float, s: int):
        self.kernel, self.bias, first = (
            np.asarray(x, np.float64) for x in (kernel, bias, a)
        )
        self.residual, self.gamma, self.s = self.kernel, gamma, s
        (m, n), r = self.kernel.shape, first.shape[1]
        self.trained = {"a": first, "b": np.zeros((r, n)), "g": np.zeros(s)}
        self.adams = {name: Adam() for name in self.trained}
        self.u, self.v = np.zeros((m, s)), np.zeros((n, s))

    @property
    def delta(self) -> np.ndarray:
        """What the adapter adds to the pretrained kernel."""
        a, b, g = self.trained.values()
        along = (self.u * g) @ self.v.T
        return self.residual - self.kernel + self.gamma * a @ b + along

    def backward(self, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
        """Return the gradients of a, b and g, by the dense gradient of W."""
        dW, (a, b, _) = x.T @ dy, self.trained.values()
        along = np.diag(self.u.T @ dW @ self.v)
        return {"a": self.gamma * dW @ b.T, "b": self.gamma * a.T @ dW, "g": along}

    def launch(self, *, gains: bool, restart: bool, keep: bool) -> Launched:
        """Rank the core directions, and start on the first of them."""
        U, sigma, Vt = np.linalg.svd(self.kernel, full_matrices=False)
        learned = self.gamma * self.trained["a"] @ self.trained["b"]
        rates = np.abs(np.diag(U.T @ learned @ Vt.T)) / (sigma + EPSILON)
        rates[sigma <= max(self.kernel.shape) * FLOAT32_EPS * sigma[0]] = 0
        order = np.argsort(-rates)
        if gains:
            top = order[: self.s]
            self.u, self.v = U[:, top], Vt[top].T
            self.adams["g"] = Adam()
        if restart:
            top = order[: self.trained["a"].shape[1]]
            root = np.sqrt(sigma[top] / self.gamma)
            self.residual = self.kernel - (U[:, top] * sigma[top]) @ Vt[top]
            self.residual = self.residual + learned * keep
            self.trained["a"] = U[:, top] * root
            self.trained["b"] = root[:, None] * Vt[top]
            self.adams["a"], self.adams["b"] = Adam(), Adam()
        return Launched(order, sigma, rates)


def linear_schedule(step: int, peak: float, warmup: int, steps: int) -> float:
    """Return the rate: from 0 up to `peak` at `warmup`, then down to 0 at `steps`."""
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)


class Network:
    """Embedding, up, tanh, down and softmax cross-entropy, trained step by step."""

    def __init__(self, embedding: Any, up: Layer, down: Layer):
        self.embedding = np.asarray(embedding, np.float64)
        self.up, self.down = up, down

    def gradients(self, batch: Mapping[str, np.ndarray]) -> tuple[float, list]:
        """Return the mean loss over counted targets, and each layer's gradients."""
        tokens, targets = batch["tokens"].ravel(), batch["targets"].ravel()
        weights = batch["weights"].ravel().astype(np.float64)
        weights = weights / weights.sum()
        x = self.embedding[tokens]
        h = np.tanh(x @ (self.up.kernel + self.up.delta) + self.up.bias)
        down = self.down.kernel + self.down.delta
        z = h @ down + self.down.bias
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        chosen = np.arange(len(targets)), targets
        loss = -(weights * np.log(p[chosen])).sum()
        p[chosen] -= 1
        dz = weights[:, None] * p
        dh = (dz @ down.T) * (1 - h**2)
        return loss, [self.up.backward(x, dh), self.down.backward(h, dz)]

    def step(
        self,
        batch: Mapping[str, np.ndarray],
        rates: Mapping[str, float],
        *,
        clip: float,
        decay: float,
    ) -> tuple[float, float]:
        """Take one AdamW step; return the loss and the gradient norm before it."""
        loss, gradients = self.gradients(batch)
        every = [grad for layer in gradients for grad in layer.values()]
        norm = np.sqrt(sum((grad**2).sum() for grad in every))
        for layer, grads in zip((self.up, self.down), gradients, strict=True):
            for name, grad in grads.items():
                move = layer.adams[name](grad * min(1.0, clip / norm))
                if name != "g":
                    move = move + decay * layer.trained[name]
                layer.trained[name] = layer.trained[name] - rates[name] * move
        return loss, norm
