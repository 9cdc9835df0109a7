"""What others do under the attacks that AdvRAD is measured with: an autoencoder, plain and adversarially trained, a purifier,
GANomaly, DRAEM and PatchCore (the last three: ``pip install 'advrad-fast[baselines]'``).

    python benchmarks/baselines.py screw/ --work runs/ --limit 10 --out benchmarks/results/baselines.jsonl

Each detector is trained on the data's normals, prepared as AdvRAD's are; autoencoders and diffusion models are kept in the work
folder.  Each row is one detector under one budget.  Rows that are there are not computed again;
``python benchmarks/robustness.py`` makes their table.  Runs alone: PyTorch on all cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advrad_fast import images
from advrad_fast.bench.timing import commit, machine
from advrad_fast.evaluation import metrics
from advrad_fast.evaluation.attacks.pgd import PGD, pgd
from advrad_fast.evaluation.attacks.pipeline import generator
from advrad_fast.evaluation.baselines.anomalib import AnomalibSettings, Draem, Ganomaly
from advrad_fast.evaluation.baselines.autoencoder import Autoencoder, AutoencoderSettings, MeanSquaredError
from advrad_fast.evaluation.baselines.base import Baseline, as_tensor
from advrad_fast.evaluation.baselines.patchcore import PatchCore
from advrad_fast.evaluation.baselines.purifier import Purifier
from advrad_fast.evaluation.datasets import Dataset, load_dataset
from advrad_fast.evaluation.robust import choose_samples
from advrad_fast.evaluation.rows import Budget, append_line
from advrad_fast.model import ModelFile
from advrad_fast.training import pipeline

BUDGETS = ("linf 2/255", "l2 0.2")
STRENGTHS = (20, 60, 120, 180, 250)  # timesteps of the purifier; the network is trained on 20 to 260
EPSILON = 2 / 255  # of the adversarial training
# Widths and steps that one core trains in some minutes.
GANOMALY = AnomalibSettings(width=16, steps=200, batch_size=8, learning_rate=2e-4)
DRAEM = AnomalibSettings(width=16, steps=400, batch_size=8, learning_rate=1e-3)


def diffusion_model(data: Path, work: Path, steps: int) -> ModelFile:
    """A network with GroupNorm, which denoises at every timestep it was trained on."""
    file = work / f"{data.name}-groupnorm.safetensors"
    if not file.exists():
        pipeline.train(data, file, unet={"norm_groups": 32}, settings={"steps": steps, "seed": 0}, certify=())
    return ModelFile.load(file)


def autoencoder(normals: NDArray[np.uint8], data: Path, work: Path, steps: int, epsilon: float, device: str) -> Autoencoder:
    """Trained, or as it was kept."""
    file = work / f"{data.name}-{'adversarial' if epsilon else 'plain'}-autoencoder.safetensors"
    if not file.exists():
        # Adversarial training costs three passes for an attack of two steps: as long, it sees a third of the batches.
        settings = AutoencoderSettings(steps=steps // 3 if epsilon else steps, epsilon=epsilon, attack_steps=2)
        made = Autoencoder(settings).to(device)
        made.fit(normals, progress=True)
        made.save(file)
    return Autoencoder.load(file)


def prepared(paths: list[Path], model: ModelFile) -> NDArray[np.uint8]:
    return np.stack([images.prepare(images.load_image(path), model.config.image).image for path in paths])


def detectors(data: Path, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Baseline], ModelFile]]:
    model = diffusion_model(data, options.work, options.diffusion_steps)

    @functools.cache
    def normals() -> NDArray[np.uint8]:
        return prepared(load_dataset(data).train, model)

    @functools.cache
    def encoder(epsilon: float) -> Autoencoder:
        return autoencoder(normals(), data, options.work, options.steps, epsilon, options.device)

    def fitted(detector: Baseline) -> Baseline:
        detector.to(options.device).fit(normals())
        return detector

    yield "autoencoder", lambda: encoder(0.0), model
    yield "autoencoder, mean squared error", lambda: MeanSquaredError(encoder(0.0)), model
    yield "adversarially trained autoencoder", lambda: encoder(EPSILON), model
    for t in STRENGTHS:
        yield f"purifier, t = {t}", lambda t=t: Purifier.from_model(model, encoder(0.0), timestep=t, steps=options.denoise), model
    yield Ganomaly.name, lambda: fitted(Ganomaly(GANOMALY)), model
    yield Draem.name, lambda: fitted(Draem(DRAEM)), model
    yield PatchCore.name, lambda: fitted(PatchCore()), model


def run(
    name: str, detector: Baseline, data: Dataset, model: ModelFile, budget: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Every image attacked and scored as uint8, with noise that the attack has not seen; each at its worst of both."""
    samples = choose_samples(data, options.limit)
    labels = np.array([s.label for s in samples])
    lattice = prepared([s.path for s in samples], model)
    deterministic = detector.noise_shape == (0,)
    eot = 1 if deterministic else options.eot
    start = time.monotonic()
    clean, attacked = [], []
    with torch.no_grad():
        for image in lattice:
            clean.append(float(detector.score(as_tensor(image[None]).to(detector.device), 1)[0]))
    for sample, image in zip(samples, lattice, strict=True):
        settings = PGD(options.attack_steps, eot, checks=1 if deterministic else 8)
        g = [generator("baseline", name, budget, sample.path.name, sample.defect)]
        found = pgd(detector, image[None], [sample.label], Budget.parse(budget), settings, generators=g)  # type: ignore[arg-type]
        with torch.no_grad():
            attacked.append(float(detector.score(as_tensor(found.rounded).to(detector.device), 1)[0]))
    a, b = np.array(clean), np.array(attacked)
    worst = np.where(labels == 1, np.minimum(a, b), np.maximum(a, b))
    return {
        "detector": name,
        "data": data.name,
        "n_good": int((labels == 0).sum()),
        "n_bad": int((labels == 1).sum()),
        "budget": budget,
        "image_auroc": metrics.auroc(labels, a),
        "robust_auroc": metrics.auroc(labels, worst),
        "attack": f"PGD-{options.attack_steps}, EOT {eot}",
        "seconds": round(time.monotonic() - start, 1),
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if detector.device.type == "cuda" else machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*")
    parser.add_argument("--work", type=Path, help="where trained detectors are kept")
    parser.add_argument("--out", type=Path, help="rows")
    parser.add_argument("--limit", type=int, help="attack N good and N bad images only")
    parser.add_argument("--steps", type=int, default=900, help="of the autoencoder's training (default 900)")
    parser.add_argument("--diffusion-steps", type=int, default=1000, help="of the purifier's network (default 1000)")
    parser.add_argument("--denoise", type=int, default=1, help="denoising steps of the purifier (default 1)")
    parser.add_argument("--attack-steps", type=int, default=40, help="of PGD (default 40)")
    parser.add_argument("--eot", type=int, default=4, help="draws a gradient is averaged over, where there is noise (default 4)")
    parser.add_argument("--only", default="", metavar="WORD", help="detectors that have this in their name")
    parser.add_argument("--device", default="cpu", help="PyTorch's (default cpu)")
    options = parser.parse_args()
    if not options.data or not options.work or not options.out:
        parser.error("DATA, --work and --out are needed")
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["detector"], row["data"], row["budget"]) for row in rows}
    for folder in options.data:
        data = load_dataset(folder)
        for name, make, model in detectors(folder, options):
            missing = [budget for budget in BUDGETS if options.only in name and (name, data.name, budget) not in done]
            if missing:
                detector = make().to(options.device)
                for budget in missing:
                    row = run(name, detector, data, model, budget, options)
                    append_line(options.out, json.dumps(row))
                    sys.stderr.write(f"{row}\n")


if __name__ == "__main__":
    main()
