"""Linen modules that only look like linear ones, and linear ones that do not."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.helpers.trees import filled

WIDTH = 6
NORMAL = nn.initializers.normal(0.5)


class Through(nn.Dense):
    """Call the class it derives from, and nothing else."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs)


class Scaled(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return 3 * super().__call__(inputs)


class Activated(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return jnp.tanh(super().__call__(inputs))


class Recursive(nn.Dense):
    """Call itself past what wraps it, scaled."""

    @nn.compact
    def __call__(self, inputs, again: bool = True):
        if again:
            return 2 * self(inputs, again=False)
        return super().__call__(inputs)


class Inverted(nn.Dense):
    """Call itself, and contract without the class it derives from."""

    @nn.compact
    def __call__(self, inputs, again: bool = True):
        if again:
            return self(inputs, again=False)
        shape = (inputs.shape[-1], self.features)
        return inputs @ self.param("kernel", NORMAL, shape)


class Replaced(nn.Dense):
    """Scale within a method of its own."""

    @nn.compact
    def __call__(self, inputs):
        shape = (inputs.shape[-1], self.features)
        return 2 * (inputs @ self.param("kernel", NORMAL, shape))


class Standardised(nn.Module):
    """Contract with a kernel of mean zero."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", NORMAL, (x.shape[-1], WIDTH))
        return x @ (kernel - kernel.mean(0, keepdims=True))


class Untied(nn.Module):
    """An autoencoder that decodes with the encoder's kernel, read raw."""

    def setup(self):
        self.e = nn.Dense(4, use_bias=False)

    def __call__(self, x):
        h = jnp.tanh(self.e(x))
        return h @ self.e.variables["params"]["kernel"].T


class TableAndHead(nn.Module):
    """Look a table up, and contract with it too."""

    @nn.compact
    def __call__(self, x):
        table = self.param("kernel", NORMAL, (WIDTH, WIDTH))
        return x @ table + table[jnp.array([0, 1])].sum()


class Mapped(nn.Module):
    """Double the parameters on their way in."""

    @nn.compact
    def __call__(self, x):
        double = lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree)  # noqa: E731
        dense = nn.map_variables(
            nn.Dense, "params", double, init=self.is_initializing()
        )
        return dense(WIDTH, name="d")(x)


class OwnDot(nn.Module):
    """Give Dense a product of one's own, which doubles."""

    @nn.compact
    def __call__(self, x):
        def doubled(*args: Any, **kwargs: Any) -> jax.Array:
            return 2 * jax.lax.dot_general(*args, **kwargs)

        return nn.Dense(WIDTH, dot_general=doubled, name="d")(x)


class Sown(nn.Module):
    """Let a product out of its module by two ways."""

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", NORMAL, (x.shape[-1], WIDTH))
        self.sow("intermediates", "size", (y**2).sum())
        return y


class Normalised(nn.Module):
    """Contract what is not the module's own input."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", NORMAL, (x.shape[-1], WIDTH))
        return nn.LayerNorm()(x) @ kernel


class Spectral(nn.Module):
    """Divide a kernel by an estimate of its largest singular value."""

    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(WIDTH))(x, update_stats=False)


class Conv1D(nn.Module):
    """GPT-2's: a kernel (out, in), transposed where it is used."""

    features: int = WIDTH
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        shape = (self.features, inputs.shape[-1])
        kernel = jnp.asarray(self.param("kernel", NORMAL, shape).T, self.dtype)
        dims = (((inputs.ndim - 1,), (0,)), ((), ()))
        y = jax.lax.dot_general(inputs.astype(self.dtype), kernel, dims)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + jnp.asarray(bias, self.dtype)[None, None]


class Einsum(nn.Module):
    """Gemma's: a weight "w", and an equation given by the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.param("w", NORMAL, self.shape))


class Heads(nn.Module):
    """Project to heads and back by einsums of one's own class."""

    @nn.compact
    def __call__(self, x):
        h = Einsum((2, WIDTH, 3), name="q")("BTD,NDH->BTNH", x)
        return x + Einsum((2, 3, WIDTH), name="o")("BTNH,NHD->BTD", jnp.tanh(h))


class Flattened(nn.Module):
    """Contract examples and positions in one axis, heads in one axis."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", NORMAL, (WIDTH, 2, 3))
        y = x.reshape(-1, WIDTH) @ kernel.reshape(WIDTH, 6)
        return y.reshape(*x.shape[:-1], 2, 3)


class FromSetup(nn.Module):
    """Hold the kernel as an attribute; a method of its own contracts it."""

    def setup(self):
        self.kernel = self.param("kernel", NORMAL, (WIDTH, WIDTH))
        self.shift = self.param("shift", NORMAL, (WIDTH,))

    def project(self, x):
        return x @ self.kernel + self.shift[None, None]

    def __call__(self, x):
        return jnp.tanh(self.project(x))


class Holder(nn.Module):
    """Put a module between two others."""

    module: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="after")(jnp.tanh(self.module(x)))


RIGHT: dict[str, nn.Module] = {
    "calls super": Through(WIDTH),
    "scales super": Scaled(WIDTH),
    "activates super": Activated(WIDTH),
    "conv1d of gpt-2": Conv1D(),
    "calls itself": Recursive(WIDTH),
    "einsums of gemma": Heads(),
    "reshapes": Flattened(),
    "from setup": FromSetup(),
    "inside": Holder(Through(WIDTH)),
}

REFUSED: dict[str, tuple[nn.Module, str]] = {
    "calls itself": (Inverted(WIDTH), "0 times by one call of .*Inverted.__call__"),
    "replaces the call": (Replaced(WIDTH), "product is multiplied"),
    "standardises": (Standardised(), "reduce_sum|sub"),
    "reads raw": (Untied(), "contracted"),
    "looks up": (TableAndHead(), "read by index"),
    "maps variables": (Mapped(), "is multiplied"),
    "own dot_general": (OwnDot(), "product is multiplied"),
    "no input": (Normalised(), "with what its method computes"),
    "convolves": (nn.Conv(WIDTH, (3,)), "is convolved in"),
    "spectral norm": (Spectral(), ""),
    "weight norm": (nn.WeightNorm(nn.Dense(WIDTH)), ""),
}


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    """Return two examples of three positions."""
    return filled(7, jax.ShapeDtypeStruct((2, 3, WIDTH), dtype))
