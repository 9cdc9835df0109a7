"""Batch normalisation for UNets without normalisation: there while they learn, gone when they have.

A network with ``norm_groups = 0`` is nothing but convolutions, activations and sums, which is what an inference engine runs
best, but it learns slowly.  So it is trained with batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) after the
convolutions of its residual blocks.  The statistics depend on the timestep: a training batch has one timestep, and as a
detector has one as well, the statistics of normals at that timestep are folded into the convolutions in the end.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from advrad_fast.config import UNetConfig
from advrad_fast.reference.unet import ResBlock, UNet

_EPSILON = 1e-5

#: Gain of the residual branches at the start: small, so that the blocks start near the identity; 0 would learn slowly.
_RESIDUAL_GAIN = 0.2


def training_network(config: UNetConfig) -> UNet:
    """The network as it is trained: with batch normalisation where ``config.norm_groups`` is 0."""
    net = UNet(config)
    if config.norm_groups == 0:
        for block in net.modules():
            if isinstance(block, ResBlock):
                block.conv1 = NormalisedConv(block.conv1, 1.0)
                block.conv2 = NormalisedConv(block.conv2, _RESIDUAL_GAIN)
    return net


class NormalisedConv(nn.Conv2d):
    """A 3 x 3 convolution, its output normalised over the batch of all processes; ``bias`` is the normalisation's."""

    bias: nn.Parameter

    def __init__(self, conv: nn.Conv2d, gain: float) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1)
        nn.init.zeros_(self.bias)
        self.gain = nn.Parameter(torch.full((conv.out_channels,), gain))

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return F.batch_norm(y, None, None, self.gain, self.bias, training=True, eps=_EPSILON)
        mean, variance = _moments(y)
        factor = self.gain * torch.rsqrt(variance + _EPSILON)
        return y * factor[:, None, None] + (self.bias - mean * factor)[:, None, None]


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over all processes' (N, C, H, W), equally large: fp32 (C,) each."""
    y, processes = y.float(), dist.get_world_size()
    mean: Tensor = all_reduce(y.mean(dim=(0, 2, 3))) / processes  # type: ignore[no-untyped-call]
    squares = (y - mean[:, None, None]).square().mean(dim=(0, 2, 3))
    return mean, all_reduce(squares) / processes  # type: ignore[no-untyped-call]


@torch.no_grad()
def fold(net: UNet, x: Tensor, timesteps: Tensor) -> UNet:
    """The plain UNet that does to every input what ``net`` does to this batch.

    Args:
        net: a :func:`training_network`.
        x: (N, C, H, W), noised normals as the network sees them; the more the better.
        timesteps: (N,), all the same.
    """
    plain = UNet(net.config)
    if net.config.norm_groups:
        plain.load_state_dict(net.state_dict())
        return plain.eval()
    folded: dict[str, Tensor] = {}

    def measure(conv: NormalisedConv, name: str, inputs: Tensor) -> None:
        variance, mean = torch.var_mean(conv.convolve(inputs).float(), dim=(0, 2, 3), correction=0)
        factor = conv.gain * torch.rsqrt(variance + _EPSILON)
        folded[f"{name}.weight"] = conv.weight * factor[:, None, None, None]
        folded[f"{name}.bias"] = conv.bias - mean * factor

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: measure(module, name, inputs[0]))
        for name, module in net.named_modules()
        if isinstance(module, NormalisedConv)
    ]
    try:
        net(x, timesteps)
    finally:
        for hook in hooks:
            hook.remove()
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith(".gain")}
    plain.load_state_dict(state | folded)
    return plain.eval()


@torch.no_grad()
def unfold(net: UNet, x: Tensor, timesteps: Tensor) -> UNet:
    """The inverse of :func:`fold`: a :func:`training_network` that does to this batch what the folded ``net`` does.

    It normalises, so at another timestep it is what the network before folding was, if ``x`` is what was folded.

    Args:
        net: a plain UNet with ``norm_groups`` 0.
        x, timesteps: as for :func:`fold`.
    """
    trained = training_network(net.config)
    state, hooks = dict(net.state_dict()), []
    for name, module in net.named_modules():
        if not isinstance(module, ResBlock):
            continue
        for conv in ("conv1", "conv2"):
            layer = getattr(module, conv)

            def measure(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor, name: str = f"{name}.{conv}") -> None:
                variance, mean = torch.var_mean(output.float(), dim=(0, 2, 3), correction=0)
                state[f"{name}.gain"], state[f"{name}.bias"] = (variance + _EPSILON).sqrt(), mean

            hooks.append(layer.register_forward_hook(measure))
    try:
        net(x, timesteps)
    finally:
        for hook in hooks:
            hook.remove()
    trained.load_state_dict(state)
    return trained
