"""The Linen binding: adapters beside the kernels of a Flax Linen model."""

from tsd_jax.binding.linen.binding import adapted as adapted
from tsd_jax.binding.linen.binding import bind as bind
from tsd_jax.binding.linen.binding import bind_variables as bind_variables
from tsd_jax.binding.linen.binding import check as check
from tsd_jax.binding.linen.binding import einsum as einsum
from tsd_jax.binding.linen.binding import make_spec as make_spec
