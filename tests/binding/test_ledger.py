from __future__ import annotations

from tsd_jax.binding.ledger import Ledger
from tsd_jax.binding.marks import Recorder
from tsd_jax.binding.values import Param, Product, View, identity

KERNEL = Param(0, identity("k", (2, 3)))


def test_only_candidates_are_accounted_for():
    ledger = Ledger(Recorder(), [0])
    ledger.consume(KERNEL, "is used")
    ledger.consume(KERNEL._replace(source=1), "is used")
    ledger.consume(None, "is used")
    assert ledger.uses == {0: ["is used"]}


def test_a_contraction_is_spoiled_by_its_first_other_use():
    ledger = Ledger(Recorder(), [0])
    view = View(0, 0, identity("x", (4, 2)))
    total = ledger.contract(KERNEL, [Product(view, ((1, 0),), (), ())])
    ledger.consume(total, "is squared")
    ledger.consume(total, "is doubled")
    assert ledger.spoiled == {0: "is squared"}
    assert ledger.uses == {}


def test_a_fork_leaves_the_ledger_alone():
    ledger = Ledger(Recorder(), [0])
    ledger.fork().consume(KERNEL, "is used")
    assert ledger.uses == {}
