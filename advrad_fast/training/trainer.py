"""The training loop: stateless steps, atomic checkpoints, exact resumption, data parallelism.

Step i draws its batch, timesteps, noise and augmentation from a generator seeded with (seed, i), for the whole global batch;
a process takes its share.  So a resumed run repeats an uninterrupted one, and n processes see what one would.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn
from tqdm import tqdm

from advrad_fast import schedule
from advrad_fast.config import DiffusionConfig, UNetConfig
from advrad_fast.errors import TrainingError, expected
from advrad_fast.files import write_atomically
from advrad_fast.reference.device import torch_device
from advrad_fast.reference.diffusion import normalise
from advrad_fast.training.batchnorm import training_network
from advrad_fast.training.settings import TrainSettings


class Interrupted(TrainingError):
    """Training was asked to stop; a checkpoint has been written."""


def tune_malloc() -> None:
    """Keep freed pages: on glibc, PyTorch's large buffers otherwise go back to the kernel every step and fault in again."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 512 * 2**20)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
        mallopt(parameter, value)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step: a hash, so that neighbouring seeds and steps are unrelated."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Trainer:
    """Trains a UNet on prepared images.

    Args:
        images: uint8 (N, H, W, C), all normal.
        unet, diffusion, settings: what to train and how.
        checkpoint: file to resume from if it exists, and to write to; None for neither.
        device: torch device; default CUDA if there is one.
        rank, world_size: data parallelism; a process group must exist when ``world_size`` > 1.

    Raises:
        TrainingError: no images, a batch that does not divide, or a checkpoint of another run.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        unet: UNetConfig,
        diffusion: DiffusionConfig,
        settings: TrainSettings,
        *,
        checkpoint: Path | None = None,
        device: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise TrainingError(expected("images", "uint8 (N, H, W, C) with N >= 1", images.shape))
        if settings.batch_size % world_size:
            raise TrainingError(expected("batch_size", f"a multiple of the {world_size} processes", settings.batch_size))
        if settings.timestep_high >= diffusion.timesteps:
            raise TrainingError(expected("timestep_high", f"below T = {diffusion.timesteps}", settings.timestep_high))
        self.settings, self.unet, self.diffusion = settings, unet, diffusion
        self.checkpoint, self.rank, self.world_size = checkpoint, rank, world_size
        self.device = torch_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.images = torch.from_numpy(images)
        self.bf16 = uses_bf16(settings.precision, self.device)
        self.step = 0

        torch.manual_seed(settings.seed)
        self.net = training_network(unet).to(self.device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        bars = schedule.alpha_bar(diffusion)
        rows = [schedule.coefficients(unet.prediction, float(bar), unet.sigma_data) for bar in bars]
        self._table = torch.tensor(rows, dtype=torch.float32)  # (T, 5), by timestep
        # What a checkpoint must agree on: everything that decides the sequence of steps.
        identity = json.dumps([unet.to_json(), diffusion.to_json(), settings.to_json()], sort_keys=True)
        data = hashlib.sha256(images.tobytes()).hexdigest()
        self._identity = hashlib.sha256(f"{identity}{images.shape}{data}".encode()).hexdigest()
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's share of step ``step``: network inputs, timesteps, targets."""
        s = self.settings
        generator = step_generator(s.seed, step)
        count = s.batch_size
        # A permutation of the data per epoch, so that every image is seen equally often.
        index = torch.cat([self._epoch(e) for e in self._epochs(step)])[self._offset(step) :][:count]
        # Without a norm of its own the network learns with batch statistics, which belong to one timestep.
        different = count if self.unet.norm_groups else 1
        timesteps = torch.randint(s.timestep_low, s.timestep_high + 1, (different,), generator=generator).expand(count)
        flips = torch.rand((count, 2), generator=generator) < 0.5
        shifts = torch.randint(-s.shift, s.shift + 1, (count, 2), generator=generator)
        share = slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)
        x = normalise(self.images[index])
        eps = torch.randn(x.shape, generator=generator)
        x, eps, timesteps = self._augment(x[share], flips[share], shifts[share]), eps[share], timesteps[share]
        signal_, noise, scale, skip, out = self._table[timesteps].T[:, :, None, None, None]
        x_k = signal_ * x + noise * eps
        return scale * x_k, timesteps, (x - skip * x_k) / out

    def _epochs(self, step: int) -> range:
        first = step * self.settings.batch_size
        return range(first // len(self.images), (first + self.settings.batch_size - 1) // len(self.images) + 1)

    def _offset(self, step: int) -> int:
        return step * self.settings.batch_size % len(self.images)

    def _epoch(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.images), generator=step_generator(self.settings.seed, -1 - epoch))

    def _augment(self, x: Tensor, flips: Tensor, shifts: Tensor) -> Tensor:
        s = self.settings
        if not (s.flip_horizontal or s.flip_vertical or s.shift):
            return x
        rows = []
        for image, (horizontal, vertical), (dy, dx) in zip(x, flips.tolist(), shifts.tolist(), strict=True):
            if horizontal and s.flip_horizontal:
                image = image.flip(-1)
            if vertical and s.flip_vertical:
                image = image.flip(-2)
            if dy or dx:
                padded = nn.functional.pad(image[None], (s.shift,) * 4, mode="replicate")[0]
                top, left = s.shift + dy, s.shift + dx
                image = padded[:, top : top + x.shape[2], left : left + x.shape[3]]
            rows.append(image)
        return torch.stack(rows)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        s = self.settings
        if step < s.warmup:
            return s.learning_rate * (step + 1) / s.warmup
        progress = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))

    def run(self, *, progress: bool = True, until: int | None = None) -> dict[str, Tensor]:
        """Train to the end (or to step ``until``) and return the averaged weights.

        SIGINT and SIGTERM write a checkpoint and raise :class:`Interrupted`.
        """
        tune_malloc()
        s = self.settings
        end = s.steps if until is None else min(until, s.steps)
        net: nn.Module = self.net
        if self.world_size > 1:
            net = nn.parallel.DistributedDataParallel(self.net)
        bar = tqdm(total=s.steps, initial=self.step, unit="step", disable=not progress or self.rank > 0, desc="training")
        running = math.nan
        with bar, _stop_requests() as stopped:
            while self.step < end:
                loss = self._step(net)
                if not math.isfinite(loss):
                    raise TrainingError(f"the loss became {loss} at step {self.step}; the last checkpoint is intact")
                running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
                bar.update()
                bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                if stopped.is_set() or self.step % s.checkpoint_every == 0 or self.step == end:
                    self.save()
                if stopped.is_set():
                    raise Interrupted(f"stopped at step {self.step} of {s.steps}; the same command goes on from there")
        return {name: tensor.detach().cpu() for name, tensor in self.ema.state_dict().items()}

    def _step(self, net: nn.Module) -> float:
        x, timesteps, target = (t.to(self.device) for t in self.batch(self.step))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = net(x, timesteps)
        loss = (output.float() - target).square().mean()
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        self.optimiser.step()
        self.step += 1
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))  # short at first: forget the start
        torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in self.net.parameters()], 1.0 - decay)
        return float(loss.detach())

    def save(self) -> None:
        """Write the checkpoint (rank 0 only), atomically."""
        if self.checkpoint is None or self.rank > 0:
            return
        tensors: dict[str, Tensor] = {}
        for prefix, module in (("net", self.net), ("ema", self.ema)):
            tensors |= {f"{prefix}.{name}": t.contiguous() for name, t in module.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            state = self.optimiser.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    tensors[f"{key}.{name}"] = state[key].contiguous()
        metadata = {"identity": self._identity, "step": str(self.step)}
        write_atomically(self.checkpoint, serialise(tensors, metadata))

    def _resume(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("identity") != self._identity:
                raise TrainingError(
                    f"{path}: this checkpoint is of another run (other images, settings or network); remove it to start anew"
                )
            step = int(metadata["step"])
            if not 0 <= step <= self.settings.steps:
                raise TrainingError(expected(f"{path}: step", f"0 to {self.settings.steps}", step))
            for prefix, module in (("net.", self.net), ("ema.", self.ema)):
                module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            for name, parameter in self.net.named_parameters():
                if step > 0:
                    averages = {key: tensors[f"{key}.{name}"].to(self.device) for key in ("exp_avg", "exp_avg_sq")}
                    for key, average in averages.items():
                        if (average.shape, average.dtype) != (parameter.shape, parameter.dtype):
                            wanted = f"{parameter.dtype} {tuple(parameter.shape)}"
                            raise TrainingError(expected(f"{path}: {key}.{name}", wanted, (average.dtype, tuple(average.shape))))
                    self.optimiser.state[parameter] = {"step": torch.tensor(float(step), device=self.device), **averages}
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, TrainingError):
                raise
            raise TrainingError(f"{path}: not a readable checkpoint ({error}); remove it to start anew") from error
        self.step = step


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event instead of ending the process, in the main thread."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def request(number: int, frame: FrameType | None) -> None:
        del number, frame
        stopped.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def distributed() -> tuple[int, int]:
    """(rank, world size), joining the process group that ``torchrun`` describes in the environment, if any."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return dist.get_rank(), world_size
