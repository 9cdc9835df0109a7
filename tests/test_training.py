"""Training: exact resumption, parallelism, refusals, and the whole way from a folder to a model file."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import dataset, disc, scratched
from safetensors.torch import load_file

from advrad_fast import Detector, ModelFile, Outcome
from advrad_fast.config import DiffusionConfig, UNetConfig
from advrad_fast.errors import ConfigError, DatasetError, TrainingError
from advrad_fast.evaluation.datasets import load_dataset
from advrad_fast.evaluation.evaluate import evaluate
from advrad_fast.reference.unet import UNet
from advrad_fast.training.batchnorm import fold
from advrad_fast.training.dataset import image_config, load_split
from advrad_fast.training.pipeline import train
from advrad_fast.training.settings import TrainSettings, preset
from advrad_fast.training.synthetic import benign_changes, light, synthetic_defects
from advrad_fast.training.trainer import Trainer

UNET = UNetConfig(base_channels=8, channel_mult=(1, 2), norm_groups=4, prediction="x0")
PLAIN = dataclasses.replace(UNET, norm_groups=0)  # trained with batch normalisation
BOTH = pytest.mark.parametrize("unet", [UNET, PLAIN], ids=["group norm", "no norm"])
SETTINGS = TrainSettings(steps=8, batch_size=4, warmup=2, checkpoint_every=2, precision="fp32", flip_horizontal=True, shift=2)


def images(count: int = 10, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([disc(rng, size) for _ in range(count)])


def trainer(
    checkpoint: Path | None = None,
    settings: TrainSettings = SETTINGS,
    data: np.ndarray | None = None,
    unet: UNetConfig = UNET,
    device: str = "cpu",
) -> Trainer:
    return Trainer(images() if data is None else data, unet, DiffusionConfig(), settings, checkpoint=checkpoint, device=device)


@pytest.mark.gpu
def test_a_run_stopped_on_a_gpu_goes_on_there(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    trainer(path, device="cuda").run(progress=False, until=3)
    resumed = trainer(path, device="cuda")
    resumed.run(progress=False)
    assert resumed.step == SETTINGS.steps


@BOTH
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, unet: UNetConfig) -> None:
    whole = trainer(unet=unet).run(progress=False)
    path = tmp_path / "checkpoint"
    trainer(path, unet=unet).run(progress=False, until=3)
    resumed = trainer(path, unet=unet)
    assert resumed.step == 3
    for name, weight in resumed.run(progress=False).items():
        assert torch.equal(weight, whole[name]), name


_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_training import *
from advrad_fast.training.trainer import distributed
torch.set_num_threads(1)
rank, world_size = distributed()
settings = dataclasses.replace(SETTINGS, steps=int(sys.argv[2]))
unet = dataclasses.replace(UNET, norm_groups=int(sys.argv[3]))
options = {{"checkpoint": Path(sys.argv[1]), "device": "cpu", "rank": rank, "world_size": world_size}}
t = Trainer(images(), unet, DiffusionConfig(), settings, **options)
t.run(progress=False)
if world_size > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(_SCRIPT.format(tests=str(Path(__file__).parent)))
    return path


def test_killed_run_goes_on(script: Path, tmp_path: Path) -> None:
    """kill -9 loses at most the steps since the last checkpoint, and nothing in the end."""
    path, steps = tmp_path / "checkpoint", 60
    process = subprocess.Popen([sys.executable, str(script), str(path), str(steps), "4"])
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    settings = dataclasses.replace(SETTINGS, steps=steps)
    resumed = trainer(path, settings)
    assert resumed.step >= 2
    whole = trainer(settings=settings).run(progress=False)
    for name, weight in resumed.run(progress=False).items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-5)  # another thread count before the kill


def test_sigterm_checkpoints_and_stops(script: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    process = subprocess.Popen([sys.executable, str(script), str(path), "100000", "4"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped at step" in errors
    assert trainer(path, dataclasses.replace(SETTINGS, steps=100_000)).step > 0


@BOTH
def test_two_processes_equal_one(script: Path, tmp_path: Path, unet: UNetConfig) -> None:
    """torchrun with two gloo processes, half the batch each, against one process with the whole batch."""
    path = tmp_path / "checkpoint"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(path), "8", str(unet.norm_groups)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONWARNINGS="ignore")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    single = trainer(unet=unet)
    single.run(progress=False)
    both = load_file(path)
    worst = max(float((both[f"net.{n}"] - p.detach()).abs().max()) for n, p in single.net.named_parameters())
    moved = max(float((both[f"net.{n}"] - p.detach()).abs().max()) for n, p in trainer(unet=unet).net.named_parameters())
    # Sums are in another order: worst seen 4.9e-7, without norm 1.6e-6, where weights moved by 6.0e-3; factor 6.
    assert worst < 1e-5 < moved / 100


def test_every_image_is_seen_equally_often() -> None:
    settings = TrainSettings(steps=5, batch_size=4)
    t = trainer(settings=settings)
    seen = torch.cat([torch.cat([t._epoch(e) for e in t._epochs(s)])[t._offset(s) :][:4] for s in range(5)])
    assert torch.bincount(seen, minlength=10).tolist() == [2] * 10


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    trainer(path).run(progress=False, until=2)
    with pytest.raises(TrainingError, match="another run"):
        trainer(path, data=images()[::-1].copy())


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_damaged_checkpoint_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "checkpoint"
    trainer(path).run(progress=False, until=2)
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    with pytest.raises(TrainingError, match="not a readable checkpoint"):
        trainer(path)


def test_no_images_and_odd_batches_are_refused() -> None:
    with pytest.raises(TrainingError, match="images"):
        trainer(data=images()[:0])
    with pytest.raises(TrainingError, match="batch_size"):
        Trainer(images(), UNET, DiffusionConfig(), TrainSettings(batch_size=3), world_size=2)
    with pytest.raises(TrainingError, match="timestep_high"):
        Trainer(images(), UNET, DiffusionConfig(timesteps=200), TrainSettings())


def test_a_loss_that_is_not_finite_stops_training() -> None:
    t = trainer()
    with torch.no_grad():
        next(t.net.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss became nan"):
        t.run(progress=False)


def test_it_learns() -> None:
    settings = TrainSettings(steps=60, batch_size=8, warmup=5, precision="fp32", learning_rate=3e-3)
    t = trainer(settings=settings)
    losses = [t._step(t.net) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_presets() -> None:
    assert preset("paper").unet.prediction == "eps"
    with pytest.raises(ConfigError, match="fast"):
        preset("quick")


def test_synthetic_defects_are_visible_small_and_repeatable() -> None:
    normals = images(size=64)
    defects = synthetic_defects(normals, 12, seed=1)
    assert defects.shape == (12, 64, 64, 3)
    assert np.array_equal(defects, synthetic_defects(normals, 12, seed=1))
    for defect in defects:
        change = np.abs(defect.astype(int) - normals.astype(int)).max(axis=3)  # against every normal
        nearest = change[(change > 0).sum(axis=(1, 2)).argmin()]
        assert nearest.max() >= 20
        assert (nearest > 0).mean() < 0.25


def test_benign_changes_are_small_and_change_the_light_alone() -> None:
    normals = images(size=64)
    changed = benign_changes(normals, normals, seed=1)
    assert np.array_equal(changed, benign_changes(normals, normals, seed=1))
    reach = np.maximum(2 * light(normals).std(axis=0), 0.01)
    ratio = (changed.astype(float) + 0.5) / (normals + 0.5)
    bright = normals > 60
    assert (np.abs(ratio - 1)[bright] < reach @ [1, 0.5, 0.5] + 0.01).all()
    assert (changed != normals).mean() > 0.5


def test_light_is_measured() -> None:
    """Gain and slopes put into copies of one image come out again, relative to their mean."""
    rng = np.random.default_rng(0)
    base = np.full((40, 60), 150.0) + 20 * rng.random((40, 60))
    wanted = rng.uniform(-0.1, 0.1, (12, 3))
    wanted -= wanted.mean(axis=0)
    y, x = np.linspace(-0.5, 0.5, 40)[:, None], np.linspace(-0.5, 0.5, 60)
    copies = np.stack([base * (1 + g + a * y + b * x) for g, a, b in wanted])
    got = light(np.rint(copies)[..., None].astype(np.uint8))
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_blank_normals_have_no_defects() -> None:
    """Pieces of a blank image can't be seen on it."""
    with pytest.raises(TrainingError, match="blank"):
        synthetic_defects(np.zeros((3, 32, 32, 3), dtype=np.uint8), 1, seed=0)


def test_split_is_disjoint_complete_and_repeatable(tmp_path: Path) -> None:
    paths = load_dataset(dataset(tmp_path / "data", train=20)).train
    config = image_config([disc(np.random.default_rng(0))], UNET, size=64, align="off")
    split = load_split(paths, config, seed=3)
    again = load_split(paths, config, seed=3)
    assert np.array_equal(split.train, again.train)
    assert split.data_hash == again.data_hash
    together = np.concatenate([split.train, split.selection, split.calibration]).reshape(20, -1)
    assert len(np.unique(together, axis=0)) == 20
    assert len(split.calibration) >= 3
    with pytest.raises(DatasetError, match="at least 10"):
        load_split(paths[:9], config, seed=3)


def test_a_batch_of_a_network_without_norm_has_one_timestep() -> None:
    plain, grouped = trainer(unet=PLAIN), trainer()
    assert all(len(plain.batch(step)[1].unique()) == 1 for step in range(5))
    assert len({int(plain.batch(step)[1][0]) for step in range(20)}) > 10
    assert any(len(grouped.batch(step)[1].unique()) > 1 for step in range(5))


@BOTH
def test_folding_changes_nothing_for_the_batch_it_was_made_with(unet: UNetConfig) -> None:
    t = trainer(settings=dataclasses.replace(SETTINGS, learning_rate=1e-2), unet=unet)
    t.run(progress=False)
    x, timesteps, _ = t.batch(100)
    timesteps = torch.full_like(timesteps, 70)
    plain = fold(t.net, x, timesteps)
    assert type(plain) is UNet and not plain.training
    with torch.no_grad():
        trained, folded, alone = t.net(x, timesteps), plain(x, timesteps), plain(x[:1], timesteps[:1])
    assert trained.std() > 0.01
    torch.testing.assert_close(folded, trained, rtol=1e-5, atol=1e-5 * float(trained.abs().max()))
    torch.testing.assert_close(alone, folded[:1], rtol=1e-5, atol=1e-5 * float(trained.abs().max()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, model file) of a detector of drawn discs, trained for 150 small steps."""
    root = tmp_path_factory.mktemp("trained")
    data, out = dataset(root / "data"), root / "disc.safetensors"
    settings: dict[str, object] = {"steps": 150, "warmup": 10, "precision": "fp32", "learning_rate": 2e-3}
    train(data, out, size=64, settings=settings, progress=False)
    return data, out


def test_from_a_folder_to_decisions(trained: tuple[Path, Path]) -> None:
    data, out = trained
    assert not out.with_name(out.name + ".checkpoint").exists()
    detector = Detector.load(out, backend="reference")
    rng = np.random.default_rng(99)
    good, bad = ([detector.inspect(make(rng)) for _ in range(20)] for make in (disc, scratched))
    assert all(i.outcome is Outcome.DEFECT for i in bad)
    assert max(i.score for i in good) < min(i.score for i in bad)
    # Ten calibration scores leave the rate of false alarms wide open (Beta(1, 10)), but p-values of good parts are spread out.
    assert 0.25 < np.mean([i.p_value for i in good]) < 0.75
    figures = evaluate(detector, load_dataset(data)).figures
    assert figures["image_auroc"] == 1.0
    assert figures["pixel_auroc"] > 0.9


def test_model_file_tells_where_it_came_from(trained: tuple[Path, Path]) -> None:
    model = ModelFile.load(trained[1])
    assert model.provenance["images"] == 40
    assert len(str(model.provenance["data_sha256"])) == 64
    assert model.config.unet.in_channels == 3
    assert model.false_alarm_rate == pytest.approx(max(0.05, 1 / (1 + len(model.calibration_scores))))


def test_what_would_fail_at_the_end_fails_at_the_start(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    with pytest.raises(TrainingError, match="folder does not exist"):
        train(data, tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(ConfigError, match="false_alarm_rate"):
        train(data, tmp_path / "model.safetensors", false_alarm_rate=1.5)


def test_training_needs_good_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        train(tmp_path, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
