"""``advrad-fast recalibrate`` and ``advrad-fast selftest``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advrad_fast.cli.common import OK, Adder, Progress, load_detector, model_options, region_of, roi_options, say
from advrad_fast.errors import ConfigError, ModelFileError, expected


def add(command: Adder) -> None:
    """Add the commands."""
    parser = command(
        "recalibrate",
        _recalibrate,
        "Make the calibration scores and thresholds of a model anew from good frames, without training.",
    )
    model_options(parser, seed_help="of the noise: the one that the line's detector has (default 0)")
    roi_options(parser)
    parser.add_argument("frames", type=Path, help="a folder of good frames, none of them trained on, or one image")
    parser.add_argument("--out", type=Path, required=True, help="the new model file")
    parser.add_argument("--force", action="store_true", help="overwrite it")
    parser.add_argument("--mu", action="store_true", help="also make the normal map, from half of the frames")
    parser.add_argument("--false-alarm-rate", type=float, help="target of the thresholds (default: the model's)")

    parser = command(
        "selftest",
        _selftest,
        "Run the frames with known results that a model has: exit code 0 if it has them and passes, 2 if not.",
    )
    model_options(parser)
    parser.add_argument("--record", action="store_true", help="write a model that has them, computed here in fp32, to --out")
    parser.add_argument("--out", type=Path, help="the new model file")
    parser.add_argument("--force", action="store_true", help="overwrite it")


class _Images(Sequence[object]):
    """Image files, loaded as they are taken: they need not all be in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        from advrad_fast.images import load_image

        return load_image(self._paths[index])


def _recalibrate(options: argparse.Namespace) -> int:
    from advrad_fast.image_paths import list_images
    from advrad_fast.model import ModelFile
    from advrad_fast.recalibrate import recalibrate

    _free(options.out, options.force)
    model, roi = ModelFile.load(options.model), region_of(options)
    paths = list_images(options.frames)
    given = {"precision": options.precision, "threads": options.threads, "cache_dir": options.cache}
    with Progress(len(paths), "frames") as progress:
        new = recalibrate(
            model,
            _Images(paths),
            false_alarm_rate=options.false_alarm_rate,
            mu=options.mu,
            seed=options.seed,
            roi=roi,
            backend=options.backend,
            on_frame=lambda *_: progress.step(),
            **{key: value for key, value in given.items() if value is not None},
        )
    new.save(options.out, half=new.half)
    say(f"wrote {options.out}: {len(new.calibration_scores)} calibration scores, threshold {new.threshold:.6g}")
    above = int((new.calibration_scores > model.threshold).sum()) if not options.mu else None
    before = f"before: {len(model.calibration_scores)}, {model.threshold:.6g}"
    say(before if above is None else f"{before}, which {above} of the {len(new.calibration_scores)} frames are above")
    if roi is not None:
        say("the threshold is of this region of interest: give the same to what inspects with the model")
    if model.smoothing:
        kept = "; their normal maps are as they were (`advrad-fast certify --fit` makes them anew)" if options.mu else ""
        say(f"the thresholds at sigma {', '.join(map(str, model.sigmas))} are new, too{kept}")
    return OK


def _selftest(options: argparse.Namespace) -> int:
    from advrad_fast.model import ModelFile
    from advrad_fast.selftest_record import with_self_test

    if options.record != (options.out is not None):
        raise ConfigError("--record: expected it with --out, and --out with it")
    if options.record:
        _free(options.out, options.force)
        new = with_self_test(ModelFile.load(options.model))
        if new.self_test is None:
            raise ConfigError("--record: expected a model whose scores of the frames are above 0, got one without")
        new.save(options.out, half=new.half)
        say(f"wrote {options.out}")
        return OK
    detector: Any = load_detector(options)
    passed = detector.self_test()
    if passed is None:
        raise ModelFileError(
            f"{options.model}: expected frames with known results, got a model without; `advrad-fast selftest --record` adds them"
        )
    say(f"{detector.backend}: passed; off by {passed.deviation:.2e} of what was expected, allowed {passed.bound:.2e}")
    return OK


def _free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise ConfigError(expected("--out", "a new file, or --force", str(path)))
