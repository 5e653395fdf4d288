"""Where layers are quantized: on the processor, or on a GPU that holds one layer and a few rows at a time.

Nothing but the two functions at the end takes tensors there and back: what is kept, rows and results, is on the host.
"""

from __future__ import annotations

import re

import torch

from .errors import DeviceError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device called ``cpu``, ``cuda`` or ``cuda:N``; ``cuda`` is the first one.

    Raises:
        DeviceError: no such name, or this machine or its PyTorch lacks the device.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise DeviceError(f"there is no device {name!r}.", seen=name, limit="cpu, cuda or cuda:N")
    if name == "cpu":
        return CPU
    if torch.version.cuda is None:
        raise DeviceError(
            f"the device {name} was asked for, and PyTorch {torch.__version__} was built without CUDA.",
            seen=name,
            remedy="Install PyPI's torch for Linux, which brings CUDA, or use --device cpu.",
        )
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"the device {name} was asked for, and PyTorch finds {count} GPUs here.",
            seen=name,
            limit=f"below cuda:{count}" if count else "cpu",
            remedy="Look at nvidia-smi, the driver and CUDA_VISIBLE_DEVICES, or use --device cpu.",
        )
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """What quantized bytes depend on: ``cpu``, or the model of the GPU; which one of several does not matter."""
    return "cpu" if device == CPU else f"cuda: {torch.cuda.get_device_name(device)}"


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` of any floating dtype on ``device``, float32; itself, where it is there as float32 already."""
    return tensor.to(device, torch.float32)


def returned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the host."""
    return tensor.cpu()
