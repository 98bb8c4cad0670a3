"""Where a program is compiled for."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The devices that a program is compiled for.

    Attributes:
        platform: JAX's platform name, `"cpu"` or `"gpu"`.
        description: What a person calls the device, e.g. `"cpu"` or `"NVIDIA H200"`.
        device_count: How many devices the target has.
    """

    platform: str
    description: str
    device_count: int

    @classmethod
    def local(cls) -> "Target":
        """The first device that JAX finds in this process."""
        device = jax.devices()[0]
        return cls(platform=device.platform, description=device.device_kind, device_count=1)
