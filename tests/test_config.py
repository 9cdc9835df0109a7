"""The settings: JSON there and back, and that untrusted JSON is refused with a ConfigError and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advrad_fast.config import DetectorConfig, DiffusionConfig, ImageConfig, PoseConfig, ScoreConfig, UNetConfig
from advrad_fast.errors import AdvRADError, ConfigError

FULL = DetectorConfig(
    unet=UNetConfig(
        in_channels=1, base_channels=32, channel_mult=(1, 2), attention_resolutions=(8,), num_heads=2, prediction="v"
    ),
    diffusion=DiffusionConfig(timestep=145, draws=3),
    score=ScoreConfig(scale_weights=(0.0, 0.5, 0.25, 1.0), filter_size=7, spread=True),
    image=ImageConfig(height=128, width=64, channels=1, brightness=0.4, pose=PoseConfig(length=0.7)),
)


@pytest.mark.parametrize("config", [DetectorConfig(), FULL])
def test_json_there_and_back(config: DetectorConfig) -> None:
    text = json.dumps(config.to_json(), allow_nan=False)
    back = DetectorConfig.from_json(json.loads(text))
    assert back == config
    assert hash(back) == hash(config)
    assert json.dumps(back.to_json()) == text


def test_integers_pass_for_floats() -> None:
    value = {**DiffusionConfig().to_json(), "beta_start": 0.1, "beta_end": 0.5}
    assert DiffusionConfig.from_json(value).beta_end == 0.5
    weights = ScoreConfig.from_json({**ScoreConfig().to_json(), "scale_weights": [1, 0, 0, 2]}).scale_weights
    assert weights == (1.0, 0.0, 0.0, 2.0)
    assert all(type(weight) is float for weight in weights)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    found = [at]
    if isinstance(value, dict | list | tuple):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            found += paths(child, (*at, key))
    return found


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


DOCUMENT = json.loads(json.dumps(FULL.to_json()))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 5000)
    | st.sampled_from([2**53, 2**63, -(2**64), 10**400, math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7e308, "", "eps", "edm"])
    | st.floats()
    | st.text(max_size=5)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)


@settings(max_examples=1000)
@given(path=st.sampled_from(paths(DOCUMENT)), value=anything)
def test_a_changed_document_is_valid_or_a_config_error(path: tuple[Any, ...], value: Any) -> None:
    try:
        config = DetectorConfig.from_json(replaced(DOCUMENT, path, value))
    except ConfigError as error:
        assert str(error)
    else:  # it was accepted: so it is as good as any
        assert DetectorConfig.from_json(json.loads(json.dumps(config.to_json(), allow_nan=False))) == config


@given(anything)
def test_any_document_is_a_config_error(value: Any) -> None:
    for kind in (DetectorConfig, UNetConfig, DiffusionConfig, ScoreConfig, ImageConfig, PoseConfig):
        with pytest.raises(ConfigError):
            kind.from_json(value)


@pytest.mark.parametrize("path", paths(DOCUMENT))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400), [[[[]]]], {"a": 1}, "1"])
def test_never_valid_anywhere(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ConfigError):
        DetectorConfig.from_json(replaced(DOCUMENT, path, value))


@pytest.mark.parametrize(
    "path", [path for path in paths(DOCUMENT) if path != ("score", "spread") and path != ("image", "pose", "dark_part")]
)
@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_not_numbers(path: tuple[Any, ...], value: bool) -> None:
    with pytest.raises(ConfigError):
        DetectorConfig.from_json(replaced(DOCUMENT, path, value))


def test_messages_name_the_field() -> None:
    with pytest.raises(ConfigError, match=r"DetectorConfig\.diffusion\.draws"):
        DetectorConfig.from_json(replaced(DOCUMENT, ("diffusion", "draws"), "many"))
    with pytest.raises(ConfigError, match=r"model\.score\.scale_weights\[2\]"):
        DetectorConfig.from_json(replaced(DOCUMENT, ("score", "scale_weights", 2), None), "model")
    with pytest.raises(ConfigError, match=r"unknown fields \['extra'\], missing fields \['draws'\]"):
        document = {**DiffusionConfig().to_json(), "extra": 1}
        del document["draws"]
        DiffusionConfig.from_json(document)


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        (UNetConfig, {"in_channels": 2}, "in_channels"),
        (UNetConfig, {"base_channels": 0}, "base_channels"),
        (UNetConfig, {"base_channels": 4096}, "channel_mult"),
        (UNetConfig, {"base_channels": 48}, "norm_groups"),
        (UNetConfig, {"channel_mult": ()}, "channel_mult"),
        (UNetConfig, {"channel_mult": (1,) * 9}, "channel_mult"),
        (UNetConfig, {"num_res_blocks": 9}, "num_res_blocks"),
        (UNetConfig, {"attention_resolutions": (2,)}, "attention_resolutions"),
        (UNetConfig, {"attention_resolutions": (4,), "num_heads": 3}, "num_heads"),
        (UNetConfig, {"patch": 3}, "patch"),
        (UNetConfig, {"prediction": "score"}, "prediction"),
        (UNetConfig, {"sigma_data": 0.0}, "sigma_data"),
        (DiffusionConfig, {"timesteps": 1}, "timesteps"),
        (DiffusionConfig, {"beta_start": 0.03}, "beta_end"),
        (DiffusionConfig, {"beta_end": 0.6}, "beta_end"),
        (DiffusionConfig, {"timestep": 1000}, "timestep"),
        (DiffusionConfig, {"timestep": -1}, "timestep"),
        (DiffusionConfig, {"draws": 65}, "draws"),
        (DiffusionConfig, {"draws": True}, "draws"),
        (ScoreConfig, {"scale_weights": (0.0, 0.0, 0.0, 0.0)}, "scale_weights"),
        (ScoreConfig, {"scale_weights": (-0.1, 0.0, 0.0, 1.0)}, "scale_weights"),
        (ScoreConfig, {"scale_weights": (math.nan, 0.0, 0.0, 1.0)}, "scale_weights"),
        (ScoreConfig, {"filter_size": 14}, "filter_size"),
        (ScoreConfig, {"filter_size": 257}, "filter_size"),
        (ImageConfig, {"height": 260}, "height"),
        (ImageConfig, {"width": 0}, "width"),
        (ImageConfig, {"width": 8192}, "width"),
        (ImageConfig, {"channels": 4}, "channels"),
        (ImageConfig, {"brightness": 1.0}, "brightness"),
        (PoseConfig, {"length": 0.0}, "length"),
        (PoseConfig, {"min_length": 2.0}, "length"),
        (PoseConfig, {"max_area": 0.01}, "area"),
    ],
)
def test_refusals(kind: type[Any], change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        dataclasses.replace(kind(), **change)
    assert isinstance(caught.value, AdvRADError) and isinstance(caught.value, ValueError)


def test_parts_must_fit_each_other() -> None:
    with pytest.raises(ConfigError, match="in_channels"):
        DetectorConfig(image=ImageConfig(channels=1))
    with pytest.raises(ConfigError, match=r"image\.width"):
        DetectorConfig(image=ImageConfig(width=264))


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DetectorConfig().image = ImageConfig()  # type: ignore[misc]
