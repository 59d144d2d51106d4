"""Published peaks of chips, and the roofline: the shortest time that a step can take on them."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Published peak rates of one device as JAX counts devices (a core of v3, a chip of all others).

    Attributes:
      memory: HBM in bytes.
      flops: bfloat16 FLOP/s; a multiply-add counts as two.
      bandwidth: of HBM, in bytes/s.
      network: bytes/s that a device sends over one axis of the interconnect, both directions together.
    """

    memory: int
    flops: float
    bandwidth: float
    network: float


# cloud.google.com/tpu/docs (system architecture), the JAX scaling book's table of TPU specs, NVIDIA's data sheets.
CHIPS = {
    "v3": Chip(16 * GIB, 61.5e12, 450e9, 100e9),
    "v4": Chip(32 * GIB, 275e12, 1228e9, 90e9),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 90e9),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 180e9),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 180e9),
    "h100": Chip(80 * GIB, 989e12, 3350e9, 450e9),
    "h200": Chip(141 * GIB, 989e12, 4800e9, 450e9),
}


class Plan(NamedTuple):
    """The cost of one train step on one device, in bytes unless stated otherwise.

    Attributes:
      topology: the requested topology, such as "v3:4x8".
      devices: the number of devices that share the batch.
      batch_size: over all devices.
      parameters: parameters and the other collections, such as `batch_stats`.
      optimizer: the optimiser's state.
      batch: the examples.
      activations: kept from the forward pass for the backward pass, before the compiler fuses any of them away.
      temporary: everything allocated during a step, activations included, as the compiler reports it.
      total: the peak of allocated memory; for GPUs, where it is only counted, the sum of the others.
      capacity: the memory of the device.
      fits: whether the program fits, as the compiler reports it or by total <= capacity.
      over: by how much the total exceeds the capacity.
      flops: FLOPs of matrix products and convolutions.
      accessed: bytes read from and written to HBM.
      collectives: kind -> (count, bytes that a device receives).
      compute_seconds: `flops` at the peak rate.
      memory_seconds: `accessed` at the peak rate.
      network_seconds: `collectives` at the peak rate of one axis.

    For GPUs, for which nothing is compiled, `temporary`, `accessed`, `collectives` and the times that depend on them
    are None.
    """

    topology: str
    devices: int
    batch_size: int
    parameters: int
    optimizer: int
    batch: int
    activations: int
    temporary: int | None
    total: int
    capacity: int
    fits: bool
    over: int
    flops: float
    accessed: float | None
    collectives: dict[str, tuple[int, int]] | None
    compute_seconds: float
    memory_seconds: float | None
    network_seconds: float | None

    @property
    def bound(self) -> str:
        """The slowest of compute, memory and network by the roofline."""
        times = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds or 0.0,
            "network": self.network_seconds or 0.0,
        }
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        """The shortest possible time of a step in seconds."""
        return max(self.compute_seconds, self.memory_seconds or 0.0, self.network_seconds or 0.0)


def report(p: Plan) -> str:
    """Formats a plan as lines of text."""
    gib = lambda n: f"{n / GIB:8.2f} GiB"
    ms = lambda s: "" if s is None else f"{1e3 * s:.1f} ms"
    lines = [
        f"{p.topology}: {p.devices} devices, a batch of {p.batch_size}, {p.batch_size / p.devices:g} a device",
        f"  parameters  {gib(p.parameters)}",
        f"  optimiser   {gib(p.optimizer)}",
        f"  batch       {gib(p.batch)}",
        f"  activations {gib(p.activations)}  handed to the backward pass, before fusion",
    ]
    if p.temporary is not None:
        lines.append(f"  temporary   {gib(p.temporary)}  with the activations, as compiled")
    how = ", by count" if p.topology.startswith("h") else ""
    verdict = "fits" if p.fits else f"DOES NOT FIT: {p.over / GIB:.2f} GiB too much"
    lines.append(f"  total       {gib(p.total)}  of {p.capacity / GIB:.2f}{how}: {verdict}")
    lines.append(
        f"  {p.flops / 1e12:.2f} TFLOP a step and device"
        + ("" if p.accessed is None else f", {p.accessed / 1e9:.1f} GB accessed")
    )
    for kind, (number, size) in sorted((p.collectives or {}).items()):
        lines.append(f"  {kind:20} x {number:<4} {size / 2**20:10.1f} MiB")
    parts = {"compute": p.compute_seconds, "memory": p.memory_seconds, "network": p.network_seconds}
    times = ", ".join(f"{name} {ms(seconds)}" for name, seconds in parts.items() if seconds is not None)
    rate = p.batch_size / p.seconds
    lines.append(
        f"  roofline: {ms(p.seconds)} a step at least, {rate:,.0f} images/s at most, bound by {p.bound} ({times})"
    )
    return "\n".join(lines)
