"""All geometric noise as one resampling and all colour noise as one matrix: `FusedAugmentation(flip=0.5, rotate_deg=15, hue=0.1)`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cnn.errors import ConfigurationError, raise_all
from lightning_cnn.functional import colour, warp
from lightning_cnn.nn._warped import Params, Warped

# The column of each parameter in the one draw a sample: fixed, so that turning one knob leaves the others' noise as it was.
DRAWS = (
    "flip",
    "flip_y",
    "area",
    "ratio",
    "window_x",
    "window_y",
    "scale",
    "stretch",
    "angle",
    "shear_x",
    "shear_y",
    "shift_x",
    "shift_y",
)
COLOURS = ("brightness", "contrast", "saturation", "hue")
LENS = ("k1", "k2", "p1", "p2")


class FusedAugmentation(Warped):
    """Flip, crop, scale, stretch, shear, rotate, shift and a lens in one resampling; every colour step in one matrix.

    Equal to the same steps one after the other, except that the picture is interpolated once instead of at every step, and that colours
    are clamped to [0, 1] once, at the end. A Kornia augmentation: it works inside Kornia's containers, where masks, boxes and keypoints
    follow.

    Args:
        flip, flip_vertical: Probability of mirroring left-right, top-bottom.
        crop: Range of the part of the area that fills the picture, (0.08, 1.0) in ImageNet training; its shape is within `crop_ratio`.
        pad_crop_px: Shift by up to so many whole pixels, which is CIFAR's "pad and crop".
        scale: Range of a zoom.
        stretch: Widen and flatten, or the reverse, by up to this factor (0.2 is 1.2).
        rotate_deg, shear_deg: Up to so many degrees either way.
        translate: Shift by up to this part of the picture's width and height.
        lens, lens_tangential: Brown-Conrady k1 and k2, and p1 and p2, are drawn up to this size.
        brightness, contrast, saturation: Factors are drawn from 1 - x to 1 + x.
        hue: Rotation up to this part of a turn.
        lighting: Standard deviation of the coefficients of the colours' principal components (AlexNet: 0.1).
        size: Height and width of the result; as the input when not given.
        fill: What is outside the picture: zeros, border or reflection.
    """

    def __init__(
        self,
        *,
        flip: float = 0.0,
        flip_vertical: float = 0.0,
        crop: Sequence[float] | None = None,
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        pad_crop_px: int = 0,
        scale: Sequence[float] = (1.0, 1.0),
        stretch: float = 0.0,
        rotate_deg: float = 0.0,
        shear_deg: float = 0.0,
        translate: float = 0.0,
        lens: float = 0.0,
        lens_tangential: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        lighting: float = 0.0,
        size: Sequence[int] | None = None,
        fill: str = "zeros",
        p: float = 1.0,
    ) -> None:
        knobs = dict(locals())
        raise_all(_problems(knobs))
        super().__init__(p=p, size=(size[0], size[1]) if size else None, fill=fill)
        self.knobs: dict[str, Any] = {name: knobs[name] for name in type(self).__init__.__kwdefaults__ or {}}
        self.bends = bool(lens or lens_tangential)
        self.colours = any(knobs[name] for name in (*COLOURS, "lighting"))
        identity = {"crop": None, "scale": (1.0, 1.0)}
        geometric = ("flip", "flip_vertical", "crop", "pad_crop_px", "scale", "stretch", "rotate_deg", "shear_deg", "translate")
        self.moves = self.bends or size is not None or any(self.knobs[n] != identity.get(n, 0) for n in geometric)
        changed = {n: v for n, v in self.knobs.items() if v != (type(self).__init__.__kwdefaults__ or {})[n]}
        self.described = ", ".join(f"{name}={value}" for name, value in changed.items())

    def __repr__(self) -> str:
        return f"FusedAugmentation({self.described})"

    def generate_parameters(self, batch_shape: Any) -> Params:
        params = {"u": torch.rand(batch_shape[0], len(DRAWS) + len(COLOURS) + len(LENS))}
        if self.knobs["lighting"]:
            params["alpha"] = torch.randn(batch_shape[0], 3)
        return params

    def lens_of(self, params: Params) -> Tensor | None:
        sizes = [self.knobs["lens"]] * 2 + [self.knobs["lens_tangential"]] * 2
        return (2 * params["u"][:, -4:] - 1) * params["u"].new_tensor(sizes) if self.bends else None

    def colour_of(self, params: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Gain, pivot and light, as `functional.colour` takes them."""
        first = len(DRAWS)
        sizes = params["u"].new_tensor([self.knobs[name] for name in COLOURS])
        brightness, contrast, saturation, turns = ((2 * params["u"][:, first : first + len(COLOURS)] - 1) * sizes).unbind(-1)
        factors = {"brightness": 1 + brightness, "contrast": 1 + contrast, "saturation": 1 + saturation}
        gain, pivot = colour.colour_gain(**factors, hue=turns * 2 * math.pi)
        return gain, pivot, self.light_of(params) if "alpha" in params else torch.zeros_like(pivot)

    def light_of(self, params: Params) -> Tensor:
        """The colour (b 3) that the lighting noise adds."""
        alpha = params["alpha"] * self.knobs["lighting"]
        return colour.lighting(alpha, alpha.new_tensor(colour.IMAGENET_VALUES), alpha.new_tensor(colour.IMAGENET_VECTORS))

    def apply_transform(self, input: Tensor, params: Params, flags: dict[str, Any], transform: Tensor | None = None) -> Tensor:
        if self.colours and input.shape[1] not in (1, 3):
            raise ConfigurationError(
                f"Colours are those of grey or RGB pictures; got {input.shape[1]} channels. Leave the colour knobs out."
            )
        if input.device.type == "cpu" and input.dtype == torch.float32 and not input.requires_grad and flags["fill"] != "reflection":
            return self._on_cpu(input, params, flags)
        output = super().apply_transform(input, params, flags, transform) if self.moves else input
        return self._coloured(output, params) if self.colours else output

    def _coloured(self, image: Tensor, params: Params) -> Tensor:
        gain, pivot, light = (part.to(image) for part in self.colour_of(params))
        mapped = colour.colour_map(gain, pivot, light, image.mean((2, 3)).expand(-1, 3))
        if image.shape[1] == 1:  # the first of the three equal channels that a grey picture stands for
            mapped = torch.cat([mapped[:, :1, :3].sum(-1, keepdim=True), mapped[:, :1, 3:]], -1)
        return colour.apply_colour(image, mapped).clamp_(0, 1)

    def _on_cpu(self, image: Tensor, params: Params, flags: dict[str, Any]) -> Tensor:
        """The same in one pass over each picture, compiled."""
        from lightning_cnn.kernels.augment import warp_colour

        _, size_out = self._sizes(params)
        layout = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        light = self.light_of(params) if "alpha" in params else torch.zeros(len(image), 3)
        u, light = (array.contiguous().numpy() for array in (params["u"].float(), light.float()))
        picture, border, threads = image.contiguous(memory_format=layout).numpy(), flags["fill"] == "border", torch.get_num_threads()
        knobs = self._compiled_knobs()
        return torch.from_numpy(warp_colour(picture, u, light, knobs, self.bends, border, self.moves, self.colours, size_out, threads))

    def _compiled_knobs(self) -> Any:
        from lightning_cnn.kernels.augment_terms import Knobs

        knob = self.knobs
        ranges = [*(knob["crop"] or (1.0, 1.0)), *map(math.log, knob["crop_ratio"]), knob["pad_crop_px"], *knob["scale"]]
        sizes = [math.log1p(knob["stretch"]), math.radians(knob["rotate_deg"]), math.radians(knob["shear_deg"]), knob["translate"]]
        sizes += [knob[name] for name in ("brightness", "contrast", "saturation")]
        sizes += [2 * math.pi * knob["hue"], knob["lens"], knob["lens_tangential"]]
        return Knobs._make([float(knob["flip"]), float(knob["flip_vertical"]), knob["crop"] is not None, *map(float, ranges + sizes)])

    def affine_of(self, params: Params) -> Tensor:
        knob, (size_in, out) = self.knobs, self._sizes(params)
        height, width = size_in
        u: Params = dict(zip(DRAWS, params["u"].unbind(-1), strict=False))
        mirror = torch.stack([1 - 2 * (u["flip"] < knob["flip"]).float(), 1 - 2 * (u["flip_y"] < knob["flip_vertical"]).float()], -1)
        spread = _between(u["scale"], *knob["scale"])
        stretch = ((2 * u["stretch"] - 1) * math.log1p(knob["stretch"]) / 2).exp()
        shear = torch.stack([u["shear_x"], u["shear_y"]], -1) * 2 - 1
        away = torch.stack([u["shift_x"], u["shift_y"]], -1) * 2 - 1
        pad = knob["pad_crop_px"]
        whole = torch.stack([u["window_x"], u["window_y"]], -1).mul(2 * pad + 1).floor() - pad
        return warp.affine_map(
            size_in=size_in,
            size_out=out,
            mirror=mirror,
            angle=(2 * u["angle"] - 1) * math.radians(knob["rotate_deg"]),
            scale=torch.stack([spread * stretch, spread / stretch], -1),
            shear=torch.tan(shear * math.radians(knob["shear_deg"])),
            shift=away * knob["translate"] * away.new_tensor([out[1], out[0]]) + whole,
            window=self._window(u, height, width),
        )

    def _window(self, u: Params, height: int, width: int) -> Tensor:
        if self.knobs["crop"] is None:
            return u["area"].new_tensor([0.0, 0.0, width, height]).expand(len(u["area"]), 4)
        area = _between(u["area"], *self.knobs["crop"]) * height * width
        ratio = _between(u["ratio"], *(math.log(r) for r in self.knobs["crop_ratio"])).exp()
        w, h = (area * ratio).sqrt().clamp(max=width), (area / ratio).sqrt().clamp(max=height)
        return torch.stack([(u["window_x"] - 0.5) * (width - w), (u["window_y"] - 0.5) * (height - h), w, h], -1)


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + u * (high - low)


def _problems(knobs: dict[str, Any]) -> list[str]:
    found = [
        f"{n} is a probability between 0 and 1; got {knobs[n]!r}." for n in ("flip", "flip_vertical", "p") if not 0 <= knobs[n] <= 1
    ]
    sizes = ("pad_crop_px", "stretch", "rotate_deg", "shear_deg", "translate", "lens", "lens_tangential", *COLOURS, "lighting")
    found += [f"{n} is a size and not negative; got {knobs[n]!r}." for n in sizes if knobs[n] < 0]
    ranges = [n for n in ("crop", "crop_ratio", "scale") if knobs[n] is not None]
    found += [
        f"{n} is a range 0 < low <= high; got {knobs[n]!r}." for n in ranges if len(knobs[n]) != 2 or not 0 < knobs[n][0] <= knobs[n][1]
    ]
    if knobs["crop"] is not None and knobs["pad_crop_px"]:
        found.append("crop and pad_crop_px are two ways to choose a part of the picture. Give one.")
    if knobs["shear_deg"] >= 45:
        found.append(f"shear_deg is below 45; got {knobs['shear_deg']!r}.")
    if knobs["lens"] + knobs["lens_tangential"] > 0.2:
        both = f"{knobs['lens']} + {knobs['lens_tangential']}"
        found.append(f"lens + lens_tangential is at most 0.2, where the lens still maps no two points to one; got {both}.")
    if knobs["fill"] not in ("zeros", "border", "reflection"):
        found.append(f"fill is zeros, border or reflection; got {knobs['fill']!r}.")
    return found
