from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.binding.contraction import Contraction, low_rank, spread_outputs
from tsd_jax.core.errors import InputError


@pytest.mark.parametrize(
    ("subscripts", "ndim", "labels", "axes"),
    [
        ("...a,ab->...b", 3, ("cda", "ab", "cdb"), ((), (0,), (1,))),
        ("...a,ab->...b", 1, ("a", "ab", "b"), ((), (0,), (1,))),
        ("...hd,hde->...he", 4, ("abhd", "hde", "abhe"), ((0,), (1,), (2,))),
        ("bthd,hdo->bto", 4, ("bthd", "hdo", "bto"), ((), (0, 1), (2,))),
        ("bti, iho -> btho", 3, ("bti", "iho", "btho"), ((), (0,), (1, 2))),
        ("bi,obi->bo", 2, ("bi", "obi", "bo"), ((1,), (2,), (0,))),
    ],
)
def test_roles_follow_from_who_shares_a_label(subscripts, ndim, labels, axes):
    contraction = Contraction.parse(subscripts, ndim)
    assert (contraction.x, contraction.kernel, contraction.y) == labels
    assert contraction.axes() == axes


@pytest.mark.parametrize(
    ("subscripts", "message"),
    [
        ("bi,io", "not of the form"),
        ("bi->bo", "not of the form"),
        ("bi,io,o->bo", "not of the form"),
        ("bi,...io->bo", "not of the form"),
        ("bii,io->bo", "stands twice"),
        ("bi,ii->bi", "stands twice"),
        ("bi,iso->bo", "in the kernel alone"),
        ("", "not of the form"),
    ],
)
def test_other_subscripts_are_refused(subscripts, message):
    with pytest.raises(InputError, match=message):
        Contraction.parse(subscripts, 2)


SIZES = dict(zip("abcdeh", (2, 3, 5, 7, 4, 6), strict=True))


@pytest.mark.parametrize(
    ("subscripts", "batch"),
    [
        ("abc,cd->abd", ()),
        ("abc,cde->abde", ()),
        ("abcd,cde->abe", ()),
        ("ahc,hcd->ahd", (0,)),
        ("ahc,cdh->adh", (2,)),
        ("abc,dc->dab", ()),
        ("abcd,dce->aeb", ()),
        # A rule may take an output or an input axis for a stack.
        ("abc,chd->abhd", (1,)),
        ("abhc,hcd->abd", (0,)),
        ("abhc,hce->abe", (0,)),
    ],
)
def test_two_thin_products_are_the_thick_one(subscripts, batch):
    """For any axis order, against einsum with the product in the kernel's shape."""
    contraction = Contraction.parse(subscripts, 0)
    shapes = {
        part: tuple(SIZES[label] for label in getattr(contraction, part))
        for part in ("x", "kernel", "y")
    }
    stored = range(len(contraction.kernel))
    rows = [n for n in stored if contraction.kernel[n] in contraction.x]
    rows = [n for n in rows if n not in batch]
    columns = [n for n in stored if n not in (*batch, *rows)]

    def size(axes):
        return [shapes["kernel"][axis] for axis in axes]

    rng = np.random.default_rng(0)
    x = rng.normal(size=shapes["x"])
    down = rng.normal(size=(*size(batch), np.prod(size(rows)), 2))
    up = rng.normal(size=(*size(batch), 2, np.prod(size(columns))))
    product = (down @ up).reshape(size((*batch, *rows, *columns)))
    kernel = np.moveaxis(product, stored, (*batch, *rows, *columns))
    want = np.einsum(subscripts, x, kernel)
    got = low_rank(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(down, jnp.float32),
        jnp.asarray(up, jnp.float32),
        contraction,
        batch=batch,
        y_shape=want.shape,
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("subscripts", "batch"),
    [
        ("abc,cd->abd", ()),
        ("abc,cde->aedb", ()),
        ("ahc,cdh->adh", (2,)),
        ("abc,chd->abhd", (1,)),
    ],
)
def test_one_value_an_output_is_laid_along_y(subscripts, batch):
    """Scaling y by it is scaling the kernel's columns."""
    contraction = Contraction.parse(subscripts, 0)
    kernel_shape, x_shape, y_shape = (
        [SIZES[label] for label in getattr(contraction, part)]
        for part in ("kernel", "x", "y")
    )
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=kernel_shape), rng.normal(size=x_shape)
    stored = range(len(contraction.kernel))
    kept = [n for n in stored if contraction.kernel[n] in contraction.y]
    columns = [*batch, *(n for n in kept if n not in batch)]
    values = rng.normal(size=[kernel_shape[n] for n in columns])
    flat = values.reshape(*(kernel_shape[n] for n in batch), -1)
    got = spread_outputs(
        jnp.asarray(flat, jnp.float32),
        contraction,
        batch=batch,
        y_shape=tuple(y_shape),
    )
    labels = "".join(contraction.kernel[n] for n in columns)
    scaled = np.einsum(
        f"{contraction.kernel},{labels}->{contraction.kernel}", kernel, values
    )
    want = np.einsum(subscripts, x, scaled)
    assert got.ndim == len(y_shape)
    plain = np.einsum(subscripts, x, kernel)
    np.testing.assert_allclose(np.asarray(got) * plain, want, rtol=1e-5, atol=1e-5)


def test_low_precision_inputs_are_accumulated_in_float32():
    x = jnp.full((1, 512), 1.0, jnp.bfloat16)
    down, up = jnp.full((512, 1), 1.001), jnp.ones((1, 1))
    contraction = Contraction.parse("ab,bc->ac", 2)
    y = low_rank(x, down, up, contraction, batch=(), y_shape=(1, 1))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 512 * 1.001, rtol=1e-5)


def test_the_product_is_never_formed():
    """No array of the kernel's size lives in the program."""
    contraction = Contraction.parse("ab,bc->ac", 2)

    def path(x, down, up):
        return low_rank(x, down, up, contraction, batch=(), y_shape=(4, 300))

    shapes = ((4, 200), (200, 2), (2, 300))
    jaxpr = jax.make_jaxpr(path)(*(jnp.zeros(shape) for shape in shapes))
    sizes = [v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars]  # pyright: ignore[reportAttributeAccessIssue]
    assert max(sizes) <= 4 * 300
