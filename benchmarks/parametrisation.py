"""How fast a network learns to denoise, by parametrisation: x0 error on held-out normals after a short training.

    python benchmarks/parametrisation.py FOLDER [--size 128] [--steps 300] [--held 20] [--rates 4e-4 1.2e-3]

FOLDER is in MVTec AD layout or a plain folder of good images.  The parametrisations are affine in one another at a
fixed timestep, so the errors compare like with like.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, UNetConfig
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.images import load_image, prepare
from advrad_fast.reference import diffusion
from advrad_fast.training.settings import PRESETS, replace
from advrad_fast.training.trainer import Trainer

TIMESTEPS = (50, 100, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--held", type=int, default=20, help="good images kept out of the training")
    parser.add_argument("--rates", type=float, nargs="+", default=[PRESETS["fast"].settings.learning_rate])
    options = parser.parse_args()
    base = PRESETS["fast"].unet
    config = ImageConfig(options.size, options.size, base.in_channels)
    images = np.stack([prepare(load_image(p), config).image for p in load_dataset(options.folder).train])
    held, train = images[: options.held], images[options.held :]
    networks = {
        "eps": dataclasses.replace(base, prediction="eps"),
        "v": dataclasses.replace(base, prediction="v"),
        "edm, sigma_data 0.35": dataclasses.replace(base, prediction="edm", sigma_data=0.35),
        "edm, sigma_data 0.1": dataclasses.replace(base, prediction="edm", sigma_data=0.1),
        "x0": dataclasses.replace(base, prediction="x0"),
    }
    print("| parametrisation | learning rate | " + " | ".join(f"k={k}" for k in TIMESTEPS) + " | s |")
    print("|---|---|" + "---|" * (len(TIMESTEPS) + 1))
    for name, unet in networks.items():
        for rate in options.rates:
            settings = replace(PRESETS["fast"].settings, steps=options.steps, warmup=options.steps // 10, learning_rate=rate)
            trainer = Trainer(train, unet, DiffusionConfig(), settings)
            start = time.perf_counter()
            trainer.run(progress=False)
            seconds = time.perf_counter() - start
            errors = " | ".join(f"{error(trainer, unet, held, k):.4f}" for k in TIMESTEPS)
            print(f"| {name} | {rate:g} | {errors} | {seconds:.0f} |", flush=True)


@torch.inference_mode()
def error(trainer: Trainer, unet: UNetConfig, held: np.ndarray, k: int) -> float:
    """Mean squared error of the one-shot reconstruction, pixels in [-1, 1]."""
    size = held.shape[1]
    config = DetectorConfig(unet, DiffusionConfig(timestep=k), image=ImageConfig(size, held.shape[2], unet.in_channels))
    x = diffusion.normalise(torch.from_numpy(held))
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return float((x - diffusion.one_shot(trainer.ema, x, eps, config)).square().mean())


if __name__ == "__main__":
    main()
