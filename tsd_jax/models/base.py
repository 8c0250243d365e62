"""Base classes of the models and their parts: number types, and the stack of layers."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


class ModelPart(nn.Module):
    """A module inside a model.

    Attributes:
      config: the model's config.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    config: Any
    dtype: DTypeLike
    param_dtype: DTypeLike

    @property
    def settings(self) -> tuple[Any, Any, Any]:
        """The positional arguments of a part inside this one."""
        return self.config, self.dtype, self.param_dtype

    def dense(self, features: int, name: str, *, use_bias: bool = True) -> nn.Dense:
        """Create a projection of this module, in its number types."""
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )


class LayeredModel(nn.Module):
    """A model whose layers are all of one shape.

    Attributes:
      config: the model's config.
      dtype: of the computation; what needs float32 is computed in float32 regardless.
      param_dtype: of the parameters that `init` creates.
      scan_layers: stack the parameters of all layers and compile one block, not L.
      remat: keep only the input of each block for the gradient; recompute the rest.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    scan_layers: bool = True
    remat: bool = False

    @property
    def settings(self) -> tuple[Any, Any, Any]:
        """The positional arguments of a part of this model."""
        return self.config, self.dtype, self.param_dtype

    def run_layers(
        self, block: Any, settings: tuple[Any, ...], x: Array, shared: Any, own: Any
    ) -> Array:
        """Apply all layers to `x`, within the model's `__call__`.

        Args:
          block: the module of one layer, called as (x, shared, own) -> (x, None).
          settings: positional arguments of `block`.
          x: (B, T, D), the hidden states.
          shared: pytree that every layer gets.
          own: pytree whose leaves have a leading axis L, one entry for each layer.

        Returns:
          (B, T, D).
        """
        layers = self.config.num_hidden_layers
        if self.remat:
            # A scan merges nothing across iterations, so it needs no barrier.
            block = nn.remat(block, prevent_cse=not self.scan_layers)
        if not self.scan_layers:
            for layer in range(layers):
                of_layer = jax.tree.map(lambda leaf, layer=layer: leaf[layer], own)
                x, _ = block(*settings, name=f"layers_{layer}")(x, shared, of_layer)
            return x
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (nn.broadcast, 0)),  # `shared` is not scanned over
            length=layers,
        )
        x, _ = scanned(*settings, name="layers")(x, shared, own)
        return x
