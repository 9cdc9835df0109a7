"""The settings that define a detector: frozen dataclasses, each of which validates itself.

Every class has ``to_json()`` and ``from_json()``; the latter treats its argument as untrusted: unknown and
missing keys, wrong types and values out of range raise :class:`ConfigError` with the field's path.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from advrad_fast.errors import ConfigError, expected

Prediction = Literal["eps", "x0", "v", "edm"]
PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v", "edm")

#: The scales of Algorithm 4, as downsampling factors.
SCALES: tuple[int, int, int, int] = (1, 2, 4, 8)

SPREAD_FLOOR = 0.5  #: added to a pixel's spread over normals, in quadrature, as a share of the spread's mean
MAX_SIDE = 4096  #: the largest network input side in pixels that a model file may ask for
MAX_FRAME_SIDE = 1 << 16  #: the largest side of a tiled frame whose positions have normals of their own
_MAX_CHANNELS = 4096

_T = TypeVar("_T", bound="_Config")


class _Config:
    """JSON in and out for the frozen dataclasses below, and the types of their fields."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            # Normalises as well: an integer given for a float becomes one, a list a tuple.
            object.__setattr__(self, name, _convert(getattr(self, name), hint, name))

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values, which :meth:`from_json` turns back into an equal object.

        Fields that were added later are left out at their defaults, so that what is older keeps its text and its hash.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not _is_left_out(f, self)}  # type: ignore[arg-type]
        return {name: value.to_json() if isinstance(value, _Config) else value for name, value in values.items()}

    @classmethod
    def from_json(cls: type[_T], value: object, path: str = "") -> _T:
        """Validate an untrusted JSON value.

        Raises:
            ConfigError: naming ``path.field``, for unknown or missing keys, wrong types, values out of range.
        """
        where = path or cls.__name__
        if not isinstance(value, dict):
            raise ConfigError(expected(where, "an object", value))
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls) if f.name in value or not f.metadata.get("added")}  # type: ignore[arg-type]
        if set(value) != names:
            unknown, missing = sorted(map(str, set(value) - names)), sorted(names - set(value))
            raise ConfigError(f"{where}: unknown fields {unknown}, missing fields {missing}")
        return cls(**{name: _convert(value[name], hints[name], f"{where}.{name}") for name in names})


def _is_left_out(field_: dataclasses.Field[Any], config: _Config) -> bool:
    return bool(field_.metadata.get("added")) and getattr(config, field_.name) == field_.default


def _convert(value: object, hint: Any, path: str) -> Any:
    """``value`` as the type ``hint``, or a ConfigError.  Integers pass for floats; booleans for neither."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _convert(value, hint, path)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise ConfigError(expected(path, f"one of {list(args)}", value))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(expected(path, "a list", value))
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise ConfigError(expected(path, f"{len(args)} values", value))
        return tuple(_convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return hint.from_json(value, path)  # type: ignore[union-attr]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000:
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(expected(path, f"a value of type {hint.__name__}", value))
    return value


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(expected(name, "a number", value))
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(expected(name, f"a number in [{low:g}, {high:g}]", value))


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(expected(name, f"an integer in [{low}, {high}]", value))


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(expected(name, f"one of {list(choices)}", value))


@dataclass(frozen=True)
class UNetConfig(_Config):
    """The UNet of ADM (Dhariwal and Nichol, arXiv 2105.05233), with a patch stem.

    Attributes:
        in_channels: channels of the image, 1 (grey) or 3 (RGB).
        base_channels: width of the first level.
        channel_mult: width of each level as a multiple of ``base_channels``; its length is the number of levels.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        attention_resolutions: downsampling factors, counted from the image, at which self-attention stands
            (ADM's convention): 32 means the 8 x 8 maps of a 256 px image.
        num_heads: attention heads.
        norm_groups: groups of every GroupNorm; 0 for a network without normalisation, whose residual blocks are
            ``x + conv2(silu(scale * conv1(x) + shift))`` (as EDSR's, arXiv 1707.02921): at a fixed timestep nothing but
            convolutions, activations and sums is left of it.
        patch: the image is folded into ``patch**2`` times the channels at ``1/patch`` of the size before the
            first convolution (pixel-unshuffle) and unfolded after the last (pixel-shuffle).
        prediction: what the network's output stands for: the noise (``eps``, the paper's), the image (``x0``),
            ``v`` (Salimans and Ho, arXiv 2202.00512) or ``edm`` (the preconditioned residual of Karras et al.,
            arXiv 2206.00364, section 5).  At a fixed timestep they are affine in one another
            (:func:`advrad_fast.schedule.coefficients`).
        sigma_data: standard deviation of the images in [-1, 1] units, for ``edm``.
    """

    in_channels: int = 3
    base_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 2)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = ()
    num_heads: int = 1
    norm_groups: int = 32
    patch: int = 4
    prediction: Prediction = "x0"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels not in (1, 3):
            raise ConfigError(expected("in_channels", "1 or 3", self.in_channels))
        _integer("base_channels", self.base_channels, 1, _MAX_CHANNELS)
        if not 1 <= len(self.channel_mult) <= 8:
            raise ConfigError(expected("channel_mult", "1 to 8 levels", self.channel_mult))
        for mult in self.channel_mult:
            _integer("channel_mult", mult, 1, _MAX_CHANNELS // self.base_channels)
        _integer("num_res_blocks", self.num_res_blocks, 1, 8)
        _integer("norm_groups", self.norm_groups, 0, _MAX_CHANNELS)
        _integer("num_heads", self.num_heads, 1, 64)
        if self.patch not in (1, 2, 4, 8, 16):
            raise ConfigError(expected("patch", "1, 2, 4, 8 or 16", self.patch))
        _choice("prediction", self.prediction, PREDICTIONS)
        _number("sigma_data", self.sigma_data, 1e-3, 10.0)
        factors = [self.patch << level for level in range(self.levels)]
        for factor in self.attention_resolutions:
            if factor not in factors:
                raise ConfigError(expected("attention_resolutions", f"factors out of {factors}", factor))
        for channels in self.level_channels:
            if self.norm_groups and channels % self.norm_groups:
                raise ConfigError(expected("norm_groups", f"0 or a divisor of every level's width {channels}", self.norm_groups))
        if self.attention_resolutions and any(c % self.num_heads for c in self.level_channels):
            raise ConfigError(expected("num_heads", "a divisor of every level's width", self.num_heads))

    @property
    def levels(self) -> int:
        return len(self.channel_mult)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Width of each level."""
        return tuple(self.base_channels * mult for mult in self.channel_mult)

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this: the UNet's total downsampling and the largest error scale."""
        return max(self.patch << (self.levels - 1), SCALES[-1])


@dataclass(frozen=True)
class DiffusionConfig(_Config):
    """The noise schedule (Ho et al., arXiv 2006.11239: linear betas) and the one-shot timestep.

    Attributes:
        timesteps: T.
        beta_start, beta_end: the linear schedule's ends.
        timestep: k, 0-based: the timestep to which a frame is noised, in [0, T).
        draws: independent noise draws an inspection averages the error over.
    """

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timestep: int = 100
    draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer("timesteps", self.timesteps, 2, 100_000)
        _number("beta_start", self.beta_start, 1e-9, 0.5)
        _number("beta_end", self.beta_end, self.beta_start, 0.5)
        _integer("timestep", self.timestep, 0, self.timesteps - 1)
        _integer("draws", self.draws, 1, 64)


@dataclass(frozen=True)
class ScoreConfig(_Config):
    """Algorithm 4's free choices.

    The error map is ``E = mean_filter(sum_l scale_weights[l] * upsample(Err_l), filter_size)``; the anomaly map is
    ``|E - mu|`` divided by the spread map where the model has one; the score is the map's maximum.

    Attributes:
        scale_weights: weight of the error at the scales 1, 1/2, 1/4 and 1/8.  The paper: 1/4 each.
        filter_size: s, the side of the mean filter in pixels; odd.
        spread: whether the deviation is divided by the per-pixel standard deviation over normals.  The paper: no.
    """

    scale_weights: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)
    filter_size: int = 15
    spread: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in self.scale_weights:
            _number("scale_weights", weight, 0.0, 1e6)
        if not any(self.scale_weights):
            raise ConfigError(expected("scale_weights", "at least one above 0", self.scale_weights))
        _integer("filter_size", self.filter_size, 1, 255)
        if self.filter_size % 2 == 0:
            raise ConfigError(expected("filter_size", "an odd number", self.filter_size))


@dataclass(frozen=True)
class PoseConfig(_Config):
    """A rule that finds an elongated part against a plain background and lays it level, thick end left.

    Fitted on normals by :func:`advrad_fast.pose.fit_pose`.  All lengths are fractions of the frame's shorter side,
    so the rule holds at any camera resolution.

    Attributes:
        dark_part: the part is darker than its background.
        min_contrast: grey-level distance from the background, in [0, 1], at which a pixel belongs to the part.
        length: the part's median extent along its axis.
        min_length, max_length: extents outside this range are not the part.
        min_area, max_area: areas (fractions of the squared shorter side) outside this range are not the part.
        crop_length, crop_width: the window around the part that becomes the network's input.
        profile: the part's outline, as 24 half-widths from its thick end to its thin one on the side of positive y of the level
            part, and 24 on the other: what finds it among clutter and shadows.  Empty, as in models of before: the largest thing
            that stands out is taken for the part.
        min_fit: of a part that the outline finds, the least :func:`advrad_fast.template.worth`; with a profile only.
        trusted_fit: of the largest thing that stands out, the worth from which it is the part and nothing else.
    """

    dark_part: bool = True
    min_contrast: float = 0.15
    length: float = 0.8
    min_length: float = 0.4
    max_length: float = 1.4
    min_area: float = 0.01
    max_area: float = 0.5
    crop_length: float = 1.0
    crop_width: float = 0.375
    profile: tuple[float, ...] = field(default=(), metadata={"added": True})
    min_fit: float = field(default=0.0, metadata={"added": True})
    trusted_fit: float = field(default=0.0, metadata={"added": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("min_contrast", self.min_contrast, 1e-3, 1.0)
        for name in ("length", "min_length", "max_length", "min_area", "max_area", "crop_length", "crop_width"):
            _number(name, getattr(self, name), 1e-4, 4.0)
        if len(self.profile) not in (0, 48):
            raise ConfigError(expected("profile", "48 half-widths, or none", len(self.profile)))
        for width in self.profile:
            _number("profile", width, 0.0, 2.0)
        if self.profile and max(self.profile) <= 0.0:
            raise ConfigError(expected("profile", "a half-width above 0", 0.0))
        if self.profile and max(self.profile) > 2.0 * self.length:
            raise ConfigError(expected("profile", "half-widths up to twice the length", max(self.profile)))
        for name in ("min_fit", "trusted_fit"):
            _number(name, getattr(self, name), 0.0, 1.0)
        if self.min_length >= self.max_length or self.min_area >= self.max_area:
            raise ConfigError(
                f"pose: an empty range: length {self.min_length}..{self.max_length}, area {self.min_area}..{self.max_area}"
            )


@dataclass(frozen=True)
class ImageConfig(_Config):
    """How a frame becomes the network's uint8 image.

    Attributes:
        height, width: of the network's input, pixels.
        channels: 1 (grey) or 3 (RGB).
        brightness: if set, the median grey level, in (0, 1), that every image is scaled to, so that exposure is not
            an anomaly.  The gain is limited to [1/4, 4].
        pose: the rule that aligns the part first, if any.
    """

    height: int = 256
    width: int = 256
    channels: int = 3
    brightness: float | None = None
    pose: PoseConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width"):
            value = getattr(self, name)
            _integer(name, value, SCALES[-1], MAX_SIDE)
            if value % SCALES[-1]:
                raise ConfigError(expected(name, f"a multiple of {SCALES[-1]}", value))
        if self.channels not in (1, 3):
            raise ConfigError(expected("channels", "1 or 3", self.channels))
        if self.brightness is not None:
            _number("brightness", self.brightness, 0.01, 0.99)


@dataclass(frozen=True)
class TilingConfig(_Config):
    """How a frame larger than the network's input is inspected: in tiles of that size, at the frame's own resolution.

    Attributes:
        overlap: neighbouring tiles lie over one another by at least so many pixels; at most half a tile.
        frame: (H, W) if every frame shows the same thing at the same place: then the normal map and its spread
            are of that size, each position has its own, and other frames are refused.  None: frames of any size, every tile
            of which is held against the same normal map.
    """

    overlap: int = 32
    frame: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer("overlap", self.overlap, 1, MAX_SIDE)
        for side in self.frame or ():
            _integer("frame", side, SCALES[-1], MAX_FRAME_SIDE)


@dataclass(frozen=True)
class DetectorConfig(_Config):
    """All settings of one detector, checked against each other."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet.in_channels != self.image.channels:
            raise ConfigError(expected("unet.in_channels", f"image.channels = {self.image.channels}", self.unet.in_channels))
        for name in ("height", "width"):
            if getattr(self.image, name) % self.unet.size_multiple:
                raise ConfigError(
                    expected(f"image.{name}", f"a multiple of {self.unet.size_multiple} for this UNet", getattr(self.image, name))
                )
