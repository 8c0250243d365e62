from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsd_jax.core.errors import InputError
from tsd_jax.extraction.devices import has_float64, host_device, run_on_hosts
from tsd_jax.training.sharding import make_mesh


def test_platforms():
    assert has_float64("cpu")
    assert has_float64("gpu")
    for platform in ("tpu", "METAL", "neuron"):
        assert not has_float64(platform)


def test_hosts_need_a_cpu(monkeypatch):
    def refuse(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", refuse)
    with pytest.raises(InputError, match=r"JAX_PLATFORMS='cpu' leaves out: add ',cpu'"):
        host_device()


@pytest.mark.parametrize("spec", [None, P(("data", "fsdp")), P("fsdp")], ids=str)
def test_hosts_compute_every_shard_and_put_it_back(spec):
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    rows = jnp.asarray(values)
    if spec is not None:
        rows = jax.device_put(values, NamedSharding(make_mesh((2, 2, 2)), spec))
    seen = []

    def run(part, scale):
        seen.append(part.shape)
        return {"scaled": part * scale, "sum": part.sum(1)}

    got = run_on_hosts(run, rows, jnp.ones_like(rows) + 1)
    np.testing.assert_array_equal(got["scaled"], 2 * values)
    np.testing.assert_array_equal(got["sum"], values.sum(1))
    assert got["scaled"].sharding == rows.sharding
    assert len(seen) == len(rows.addressable_shards)
