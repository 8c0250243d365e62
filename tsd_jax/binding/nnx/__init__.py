"""The NNX binding: adapters beside the kernels of a copy of a Flax NNX model."""

from tsd_jax.binding.nnx.binding import bind as bind
from tsd_jax.binding.nnx.binding import check as check
from tsd_jax.binding.nnx.binding import einsum as einsum
from tsd_jax.binding.nnx.binding import make_bind as make_bind
from tsd_jax.binding.nnx.binding import make_spec as make_spec
from tsd_jax.binding.nnx.binding import merge as merge
from tsd_jax.binding.nnx.binding import params as params
from tsd_jax.binding.nnx.handlers import HANDLERS as HANDLERS
