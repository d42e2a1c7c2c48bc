"""Devices to train on: the figures of their makers' datasheets, and what is on this machine."""

import os
from dataclasses import dataclass, replace

import torch

CUDA_CONTEXT = 0.6e9  # bytes of the driver's context and the libraries' workspaces; differs by driver and device


@dataclass(frozen=True)
class Device:
    """A device: dense rates in FLOP/s without sparsity, bandwidth in bytes/s, memory in bytes; 0 where not known.

    `here`: it is on this machine, so that it can be timed.
    """

    name: str
    kind: str
    memory: float
    bf16_flops: float = 0
    fp32_flops: float = 0
    bandwidth: float = 0
    here: bool = False


def _cuda(name: str, gigabytes: float, bf16: float, fp32: float, terabytes: float) -> Device:
    return Device(name, "cuda", gigabytes * 1e9, bf16 * 1e12, fp32 * 1e12, terabytes * 1e12)


# NVIDIA's datasheets: "H200 Tensor Core GPU", "H100 Tensor Core GPU" (SXM and PCIe columns), "A100 Tensor Core GPU"
# (SXM), "L40S", "L4", and "Ada GPU Architecture" for the RTX 4090. Where a sheet gives rates with sparsity, half.
DEVICES = {
    device.name: device
    for device in (
        _cuda("h200", 141, 989.5, 67, 4.8),
        _cuda("h100", 80, 989.5, 67, 3.35),
        _cuda("h100-pcie", 80, 756, 51, 2.0),
        _cuda("a100-80", 80, 312, 19.5, 2.039),
        _cuda("a100-40", 40, 312, 19.5, 1.555),
        _cuda("l40s", 48, 362, 91.6, 0.864),
        _cuda("l4", 24, 121, 30.3, 0.3),
        _cuda("rtx4090", 24, 165.2, 82.6, 1.008),
    )
}


def this_cpu() -> Device:
    """The processor and main memory of this machine."""
    return Device("cpu", "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), here=True)


def this_cuda() -> Device | None:
    """The current CUDA device, with the datasheet's rates where it is a known one; None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    plain = found.name.lower().replace(" ", "").replace("-", "")
    fitting = [
        known
        for known in DEVICES.values()
        if known.name.split("-")[0] in plain
        and ("pcie" in known.name) == ("pcie" in plain)
        and abs(known.memory / found.total_memory - 1) < 0.2
    ]
    if not fitting:
        return Device(found.name, "cuda", found.total_memory, here=True)
    return replace(fitting[0], memory=found.total_memory, here=True)


def find_device(name: str) -> Device:
    """The device called `name`: `here` (CUDA where there is any), `cpu`, or one of DEVICES.

    Raises:
        ValueError: there is no such name.
    """
    cuda = this_cuda()
    if name == "here":
        return cuda or this_cpu()
    if name == "cpu":
        return this_cpu()
    if name not in DEVICES:
        raise ValueError(f"--device {name} is not known: one of here, cpu, {', '.join(DEVICES)}")
    return cuda if cuda is not None and cuda.name == name else DEVICES[name]
