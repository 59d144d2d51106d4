"""Chips, and the least time of a step on them: what one step takes of one device, beside the device's peaks."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Published peaks of one device as JAX counts devices (of v3 a core, of the others a chip).

    Attributes:
      memory: HBM in bytes.
      flops: bfloat16 multiply-adds count two, a second.
      bandwidth: of HBM, bytes a second.
      network: bytes a second that a device sends over one axis of the interconnect, both directions together.
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
    """The cost of one step on one device, in bytes unless said otherwise.

    Attributes:
      topology: as asked for.
      devices: how many share the batch.
      batch_size: of all devices.
      parameters: with the other collections, such as `batch_stats`.
      optimizer: what the optimiser keeps.
      batch: the examples.
      activations: what the forward pass hands to the backward pass, before the compiler fuses any of it away.
      temporary: everything that lives during a step, activations included; the compiler's figure, None by count.
      total: the most that is alive at once; by count, the sum of the others.
      capacity: of the device.
      fits: total <= capacity; what the compiler says.
      over: how much is missing.
      flops: of matrix products and convolutions.
      accessed: read and written in HBM; None by count.
      collectives: kind -> (count, bytes that a device receives). None by count.
      compute_seconds: flops at the peak rate.
      memory_seconds: accessed at the peak rate; None by count.
      network_seconds: collectives at the peak rate of one axis; None by count.
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
        """Returns the slowest of compute, memory and network by the roofline."""
        times = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds or 0.0,
            "network": self.network_seconds or 0.0,
        }
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        """Returns the least time of a step."""
        return max(self.compute_seconds, self.memory_seconds or 0.0, self.network_seconds or 0.0)


def report(p: Plan) -> str:
    """Returns a plan as lines to read."""
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
