"""What the clouds' machine types hold, as far as clusters for Ingot are made of them: cores, memory, GPUs.

From the clouds' own lists (docs.aws.amazon.com/ec2/latest/instancetypes,
cloud.google.com/compute/docs/machine-resource, learn.microsoft.com/azure/virtual-machines/sizes). Types that are not
here are not wrong, only unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What one machine holds."""

    cpus: int
    """Virtual CPUs."""
    memory: float
    """GiB."""
    gpus: int = 0
    accelerator: str = ""
    """As Ray names the GPU: L40S, A100, H100."""


# Name: vCPUs, GiB, GPUs.
_AWS_GPUS = {
    "A10G": {"g5.xlarge": (4, 16, 1), "g5.2xlarge": (8, 32, 1), "g5.4xlarge": (16, 64, 1), "g5.8xlarge": (32, 128, 1),
             "g5.12xlarge": (48, 192, 4), "g5.16xlarge": (64, 256, 1), "g5.24xlarge": (96, 384, 4),
             "g5.48xlarge": (192, 768, 8)},
    "L4": {"g6.xlarge": (4, 16, 1), "g6.2xlarge": (8, 32, 1), "g6.4xlarge": (16, 64, 1), "g6.8xlarge": (32, 128, 1),
           "g6.12xlarge": (48, 192, 4), "g6.16xlarge": (64, 256, 1), "g6.24xlarge": (96, 384, 4),
           "g6.48xlarge": (192, 768, 8)},
    "L40S": {"g6e.xlarge": (4, 32, 1), "g6e.2xlarge": (8, 64, 1), "g6e.4xlarge": (16, 128, 1),
             "g6e.8xlarge": (32, 256, 1), "g6e.12xlarge": (48, 384, 4), "g6e.16xlarge": (64, 512, 1),
             "g6e.24xlarge": (96, 768, 4), "g6e.48xlarge": (192, 1536, 8)},
    "A100": {"p4d.24xlarge": (96, 1152, 8), "p4de.24xlarge": (96, 1152, 8)},
    "H100": {"p5.4xlarge": (16, 256, 1), "p5.48xlarge": (192, 2048, 8)},
    "H200": {"p5e.48xlarge": (192, 2048, 8), "p5en.48xlarge": (192, 2048, 8)},
    "B200": {"p6-b200.48xlarge": (192, 2048, 8)},
}  # fmt: skip
_GOOGLE_GPUS = {
    "L4": {f"g2-standard-{n}": (n, 4 * n, gpus)
           for n, gpus in {4: 1, 8: 1, 12: 1, 16: 1, 24: 2, 32: 1, 48: 4, 96: 8}.items()},
    "A100": {**{f"a2-highgpu-{n}g": (12 * n, 85 * n, n) for n in (1, 2, 4, 8)}, "a2-megagpu-16g": (96, 1360, 16),
             **{f"a2-ultragpu-{n}g": (12 * n, 170 * n, n) for n in (1, 2, 4, 8)}},
    "H100": {**{f"a3-highgpu-{n}g": (26 * n, 234 * n, n) for n in (1, 2, 4, 8)}, "a3-megagpu-8g": (208, 1872, 8),
             "a3-edgegpu-8g": (208, 1872, 8)},
    "H200": {"a3-ultragpu-8g": (224, 2952, 8)},
    "B200": {"a4-highgpu-8g": (224, 3968, 8)},
}  # fmt: skip
_AZURE_GPUS = {
    "A10": {"Standard_NV36ads_A10_v5": (36, 440, 1), "Standard_NV72ads_A10_v5": (72, 880, 2)},
    "A100": {"Standard_NC24ads_A100_v4": (24, 220, 1), "Standard_NC48ads_A100_v4": (48, 440, 2),
             "Standard_NC96ads_A100_v4": (96, 880, 4), "Standard_ND96asr_v4": (96, 900, 8),
             "Standard_ND96amsr_A100_v4": (96, 1900, 8)},
    "H100": {"Standard_NC40ads_H100_v5": (40, 320, 1), "Standard_NC80adis_H100_v5": (80, 640, 2),
             "Standard_ND96isr_H100_v5": (96, 1900, 8)},
    "H200": {"Standard_ND96isr_H200_v5": (96, 1850, 8)},
}  # fmt: skip
_WITH_GPUS = {
    name: Machine(*held, accelerator)
    for table in (_AWS_GPUS, _GOOGLE_GPUS, _AZURE_GPUS)
    for accelerator, machines in table.items()
    for name, held in machines.items()
}


def machine(name: str) -> Machine | None:
    """What a machine type of AWS, Google Cloud or Azure holds; None when it is not known here."""
    if name in _WITH_GPUS:
        return _WITH_GPUS[name]
    # The plain families: so many GiB for each core.
    if found := re.fullmatch(r"(?!c5n)([cmr])[5-8][a-z]{0,3}\.(?:(large)|(\d*)xlarge)", name):
        cpus = 2 if found[2] else 4 * int(found[3] or 1)
        return Machine(cpus, {"c": 2, "m": 4, "r": 8}[found[1]] * cpus)
    if found := re.fullmatch(r"(?:n2d?|e2)-(standard|highmem|highcpu)-(\d+)", name):
        return Machine(int(found[2]), {"standard": 4, "highmem": 8, "highcpu": 1}[found[1]] * int(found[2]))
    if found := re.fullmatch(r"Standard_([DE])(\d+)a?d?s_v[3-6]", name):
        return Machine(int(found[2]), {"D": 4, "E": 8}[found[1]] * int(found[2]))
    return None
