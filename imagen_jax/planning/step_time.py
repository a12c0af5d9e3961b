"""Predicted time of a compiled program: what its schedule takes at the chip's peaks.

Every operation takes the larger of FLOPs / peak and bytes / bandwidth of HBM; operations run one
after the other in the order of the compiled text. A collective takes the time of its bytes on the
links of the torus (parallel/links.py), and a microsecond per hop. Between its start and its end
other operations run; what remains at its end is exposed. On TPUs the prediction is a lower bound:
no operation reaches a peak, and elementwise work, start-up of operations and padding of arrays are
left out. On a CPU, with measured peaks, all but the padding of arrays counts.

A program that was compiled quickly waits for each collective where it starts. What a scheduler can
hide is estimated by a second pass (`exposed_beside`), list scheduling in the order of the text: a
collective starts when its operands are computed, the links are free and its result has room; an
operation that needs a result that does not exist yet is deferred, and the device runs those that
follow until it does. The room, `ahead`, is the bytes of collectives' results not yet used; results
of the operations that run meanwhile are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from imagen_jax.parallel import hlo, instructions, links, peaks
from imagen_jax.parallel.topology import Slice
from imagen_jax.planning.clock import Clock, Network
from imagen_jax.planning.list_schedule import Beside


class StepTime(NamedTuple):
    """Seconds of one run of a program on one device.

    Attributes:
      products: operations with matrix products or convolutions.
      others: all other operations on the device.
      exposed: waiting for collectives.
      hidden: collectives while other operations run.
      exposed_beside: waiting for collectives if each ran beside the operations that do not need it.
      between_slices: sending over the data-centre network, taken as hidden.
    """

    products: float
    others: float
    exposed: float
    hidden: float
    exposed_beside: float
    between_slices: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return max(self.products + self.others + self.exposed, self.between_slices)

    @property
    def seconds_beside(self) -> float:
        """Of the whole run, if each collective ran beside the operations that do not need it."""
        return max(self.products + self.others + self.exposed_beside, self.between_slices)


def predict(
    text: str,
    peak: peaks.Peaks,
    *,
    devices: int = 1,
    torus: links.Torus | None = None,
    unknown_trips: int = 1,
    ahead: float = math.inf,
) -> StepTime:
    """The predicted time of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      peak: of one device.
      devices: of the whole mesh, for collectives over all.
      torus: their positions; None: every group of devices is a ring.
      unknown_trips: iterations of a loop whose bounds are arguments.
      ahead: bytes of collectives' results that are not yet used, for `exposed_beside`.
    """
    program = instructions.parse(text)
    sent = sum(send.count * send.bytes for send in hlo.sends(text))
    network = Network(devices, torus)
    clock = Clock(program, peak, network, unknown_trips)
    clock.run(program.entry)
    beside = Beside(program, peak, network, unknown_trips, ahead)
    beside.run(program.entry)
    entry = program.computations[program.entry]
    returned = next(one.result for one in entry if one.line.lstrip().startswith("ROOT "))
    calling = peak.argument * sum(one.opcode == "parameter" for one in entry)
    calling += peak.result * len(instructions.shapes(returned))
    return StepTime(
        clock.products,
        clock.others + calling,
        clock.exposed,
        max(0.0, round(clock.busy - clock.exposed, 12)),  # Sums of the same times may differ.
        beside.exposed,
        sent / peak.dcn if sent else 0.0,
    )


def of_slice(
    text: str, where: Slice, mesh: Iterable[Any], unknown_trips: int, peak_bytes: int
) -> StepTime | None:
    """`predict` for the devices of a slice; None if their bandwidths are unknown.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      where: the slice.
      mesh: its devices in the order of the program's mesh.
      unknown_trips: as for `predict`.
      peak_bytes: memory of the program per chip. `ahead` is half of what it leaves free; the other
        half is for results of operations that run before their turn.
    """
    peak = peaks.of(where.devices[0].device_kind)
    per_chip = len(where.devices) // where.chips
    return peak and predict(
        text,
        peak,
        devices=len(where.devices),
        torus=links.torus(mesh),
        unknown_trips=unknown_trips,
        ahead=max(0.0, where.hbm - peak_bytes) / 2.0 / per_chip,
    )
