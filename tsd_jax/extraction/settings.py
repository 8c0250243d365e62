"""Where and how directions are extracted; the result does not depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer

from tsd_jax.core.errors import check_choice
from tsd_jax.core.quantization import stored
from tsd_jax.extraction.chunks import MEMORY_BUDGET
from tsd_jax.extraction.devices import has_float64
from tsd_jax.extraction.ranking import SOLVERS
from tsd_jax.extraction.spectra_cache import SpectraStore


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Where and how directions are extracted; the result does not depend on it.

    Attributes:
      where: "devices", where the kernels are; "hosts", on the hosts' CPUs, each host
        its share; "auto", on the devices if they compute in float64.
      solver: see `RankSettings`.
      memory_budget: bytes of whole matrices that a device may hold at a time.
      store: where spectra of the base are kept for the next launch, or None.

    Raises:
      InputError: there is no such place or solver.
    """

    where: str = "auto"
    solver: str = "auto"
    memory_budget: int = MEMORY_BUDGET
    store: SpectraStore | None = None

    def __post_init__(self):
        """Refuse what could not be carried out."""
        check_choice("place of extraction", self.where, ("auto", "devices", "hosts"))
        check_choice("solver", self.solver, SOLVERS)

    def on_hosts(self, kernel: Any) -> bool:
        """Return whether a kernel's matrices are decomposed on the hosts.

        Args:
          kernel: as stored; None asks about the default devices.
        """
        kernel = stored(kernel)
        if self.where != "auto" or isinstance(kernel, Tracer):
            return self.where == "hosts"
        devices = getattr(kernel, "devices", lambda: set(jax.devices()))()
        return not all(has_float64(device.platform) for device in devices)
