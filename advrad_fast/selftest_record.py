"""Gives a model the results that a detector must have of known frames (:mod:`advrad_fast.selftest`)."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from advrad_fast import backends, selftest
from advrad_fast.errors import InferenceError, expected
from advrad_fast.model import ModelFile

_log = logging.getLogger(__name__)

#: Smaller ones can't be told apart from nothing at all.
_LEAST = 1e-9


def with_self_test(model: ModelFile, *, backend: str = "cpu", **options: Any) -> ModelFile:
    """The model with what it must say, in fp32, of the frames of :mod:`advrad_fast.selftest`.

    To be made anew whenever weights, normal map or settings change.  A model whose scores or maps are all zero gets no self-test:
    it could not be told apart from an engine that returns nothing.

    Args:
        backend, options: what computes it, without a precision (:func:`advrad_fast.backends.create`).

    Raises:
        BackendUnavailableError: the backend is unusable here.
        InferenceError: it failed.
    """
    mu, inverse_spread = model.network_maps
    engine = backends.create(backend, model.config, model.weights, mu, inverse_spread, precision="fp32", **options)
    scores, means = [], []
    for frame in selftest.frames(model.config.image):  # one by one, as an inspection does
        result = engine.score(frame[None], seed=selftest.SEED, want_maps=True)
        if result.maps is None:
            raise InferenceError(expected("maps", "an array", None))
        scores.append(float(result.scores[0]))
        means.append(float(result.maps.astype(np.float64).mean()))
    if not np.isfinite([scores, means]).all():
        raise InferenceError(expected("self-test", "finite scores and maps", f"scores {scores}, means {means}"))
    if min(*scores, *means) < _LEAST:
        _log.warning("no self-test: scores %s, means of the maps %s", scores, means)
        return dataclasses.replace(model, self_test=None)
    return dataclasses.replace(model, self_test=selftest.Expected(tuple(scores), tuple(means)))
