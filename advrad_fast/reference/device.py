"""A device of PyTorch that works, or an error that says why not."""

from __future__ import annotations

import torch

from advrad_fast.errors import BackendUnavailableError, ConfigError, expected


def torch_device(device: str | torch.device) -> torch.device:
    """A device that has computed something.

    Args:
        device: its name, such as ``cpu`` or ``cuda:1``.

    Raises:
        ConfigError: no name of a device.
        BackendUnavailableError: none here, or it does not compute.
    """
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(expected("device", "one of PyTorch's, such as cpu or cuda", device)) from error
    try:
        torch.ones(1, device=made).add(1.0).item()
    except Exception as error:  # an AssertionError where PyTorch was built without it, any of a driver's
        reason = str(error).partition("\n")[0]
        raise BackendUnavailableError(f"PyTorch cannot compute on the device {str(made)!r}: {reason}") from error
    return made


__all__ = ["torch_device"]
