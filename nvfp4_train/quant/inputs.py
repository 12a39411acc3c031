"""Quantizes the inputs of linears as serving engines do (W4A4): one quantizer for each group of siblings, whose input is one tensor.

The scale of an input is static, a power of two, and lives in the run's state, which calibration fills. `linear` has the modules that
call these quantizers; `kernels.reference.quantize_input` has the arithmetic.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nvfp4_train.kernels.fp4_kernel import is_input_scale
from nvfp4_train.quant.experts import input_module
from nvfp4_train.quant.policy import SERVINGS
from nvfp4_train.quant.undisturbed import undisturbed

TOKENS_OF_A_SAMPLE = 64


class QuantizedInput(NamedTuple):
    """An input [..., K] as the linears of a group compute with it."""

    values: Tensor
    """Decoded, in the shape and dtype of the input."""
    packed: Tensor | None = None
    """Codes, uint8 [..., K / 2], from which a backward decodes the values again. None where there will be no backward."""
    scales: Tensor | None = None
    """Block scales, float8_e4m3fn [..., K / 16]."""
    input_scale: Tensor | None = None
    """float32 [1]."""


class _Kept(NamedTuple):
    """A quantized input that siblings have yet to use."""

    x: "weakref.ref[Tensor]"
    quantized: QuantizedInput
    num_left: int
    """Siblings that have not used it."""


class InputQuantizer:
    """Quantizes the input of a group, once for all of its linears.

    The result is kept until every sibling has used it, and never longer than the input lives: a sibling that is not called, an error,
    or a recomputation that stops early leaves nothing behind.
    """

    def __init__(self, group: str, num_siblings: int, read_scale: Callable[[], Tensor]) -> None:
        """`group` is a name for errors. `read_scale` returns the float32 [1] scale from where it lives when it is called."""
        self.group = group
        self.is_enabled = False
        """Whether the linears of the group compute with quantized inputs."""
        self.scale = torch.empty(0)
        """The scale when it was last read."""
        self._read_scale = read_scale
        self._num_siblings = num_siblings
        self._kept: _Kept | None = None

    def __call__(self, x: Tensor) -> QuantizedInput:
        """Quantize x [..., K]; with codes where gradients are recorded. Raises ValueError where the scale is on another device."""
        if torch.compiler.is_compiling():
            # The operator has no side effects, so the compiler keeps one call of several with the same arguments.
            return self._quantize(x)
        kept, self._kept = self._kept, None
        if kept is not None and kept.x() is x and (kept.quantized.packed is not None or not torch.is_grad_enabled()):
            quantized, num_left = kept.quantized, kept.num_left - 1
        else:
            if self.scale.device != x.device:
                self.follow()
            quantized, num_left = self._quantize(x), self._num_siblings - 1
        if num_left:
            self._kept = _Kept(weakref.ref(x, self._drop), quantized, num_left)
        return quantized

    def fake_quant(self, x: Tensor) -> Tensor:
        """x [..., K] as products compute with it, without codes and without a gradient. Raises as a call does."""
        if not torch.compiler.is_compiling() and self.scale.device != x.device:
            self.follow()
        self._check_device(x)
        return torch.ops.nvfp4.fake_quant_input(x, self.scale)

    def follow(self) -> None:
        """Read the scale anew, from where it lives now. Forwards do so themselves after a move to another device, compiled ones not."""
        self.scale, self._kept = self._read_scale(), None

    def _quantize(self, x: Tensor) -> QuantizedInput:
        scale = self.scale
        self._check_device(x)
        if torch.is_grad_enabled():
            x_hat, packed, scales = torch.ops.nvfp4.quantize_input(x, scale)
            return QuantizedInput(x_hat, packed, scales, scale)
        return QuantizedInput(torch.ops.nvfp4.fake_quant_input(x, scale))

    def _check_device(self, x: Tensor) -> None:
        if self.scale.device != x.device:
            raise ValueError(
                f"the input scale of {self.group} must be on the device of its input, {x.device}, got {self.scale.device}; call "
                "InputQuantizers.enable after a move"
            )

    def _drop(self, dead: "weakref.ref[Tensor]") -> None:
        if self._kept is not None and self._kept.x is dead:
            self._kept = None


class InputQuantizers:
    """The input quantizers of a model, by group: the name of its first parameter.

    All of them are enabled, or none, but for those inside `quantizing`.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], num_siblings: Mapping[str, int], scale_of: Callable[[str], Tensor]
    ) -> None:
        self.groups = groups
        self._of_group = {
            group[0]: InputQuantizer(group[0], num_siblings[group[0]], partial(scale_of, group[0])) for group in groups
        }

    def __getitem__(self, group: str) -> InputQuantizer:
        return self._of_group[group]

    @property
    def is_enabled(self) -> bool:
        """Whether the forward computes with quantized inputs."""
        return any(quantizer.is_enabled for quantizer in self._of_group.values())

    def enable(self, is_enabled: bool = True) -> None:
        """Let forwards from now on compute with quantized inputs, or as they are. Reads the scales anew, wherever they are now."""
        for quantizer in self._of_group.values():
            quantizer.follow()
            quantizer.is_enabled = is_enabled

    @contextmanager
    def serving(self, serving: str) -> Iterator[None]:
        """Compute inside the context as a model that is served as one of `SERVINGS`, by name."""
        with self._as_they_were():
            self.enable(SERVINGS[serving] == "nvfp4")
            yield

    @contextmanager
    def quantizing(self, names: Collection[str]) -> Iterator[None]:
        """Compute inside the context with quantized inputs of the groups that have one of these parameters, and of no others."""
        with self._as_they_were():
            for group in self.groups:
                quantizer = self._of_group[group[0]]
                quantizer.follow()
                quantizer.is_enabled = not set(group).isdisjoint(names)
            yield

    @contextmanager
    def _as_they_were(self) -> Iterator[None]:
        """Enable after the context what was enabled before it."""
        were_enabled = {group: quantizer.is_enabled for group, quantizer in self._of_group.items()}
        try:
            yield
        finally:
            for group, was_enabled in were_enabled.items():
                self._of_group[group].follow()
                self._of_group[group].is_enabled = was_enabled

    def scales(self) -> dict[str, Tensor]:
        """The input scale of every quantized parameter by name, float32 [1], live and on the device."""
        for quantizer in self._of_group.values():
            quantizer.follow()
        return {name: self._of_group[group[0]].scale for group in self.groups for name in group}

    @property
    def is_calibrated(self) -> bool:
        """Whether every input has a scale. Waits for the device."""
        return not self._uncalibrated()

    def check_calibrated(self) -> None:
        """Raise ValueError, naming the linears, where calibration has left no scale. Waits for the device."""
        if bad := self._uncalibrated():
            named = "; ".join(f"{', '.join(group)}: {value}" for group, value in list(bad.items())[:3])
            more = f"; and {len(bad) - 3} more groups" if len(bad) > 3 else ""
            raise ValueError(
                "W4A4 needs an input scale for every quantized linear, a power of two from calibration (0 where there was none), got "
                f"{named}{more}; see quant.calibration, or set quant.activations=none and quant.serve=w4a16"
            )

    def _uncalibrated(self) -> dict[Sequence[str], float]:
        """What stands for a scale, by group."""
        scales = self.scales()
        values = torch.cat([scales[group[0]].reshape(1) for group in self.groups]).tolist()
        return {group: value for group, value in zip(self.groups, values, strict=True) if not is_input_scale(value)}


class InputSample(NamedTuple):
    """Tokens that a forward multiplied with a quantized weight, and their codes by the operator that trains."""

    name: str
    """Name of the parameter, the first of its group."""
    x: Tensor
    """[tokens, K], bf16 or fp32, on the CPU."""
    packed: Tensor
    """uint8 [tokens, K / 2], on the CPU."""
    scales: Tensor
    """float8_e4m3fn [tokens, K / 16], on the CPU."""


@contextmanager
def inputs_watched(model: nn.Module, quantizers: InputQuantizers, see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(group, x, scale)` before a group uses its input x [.., K], in every forward of the model inside the context.

    Forwards there are undisturbed, see `undisturbed`. `scale` is float32 [1]. Under FSDP2 enter it on every rank.
    """

    def watch(module: nn.Module, args: tuple[Tensor, ...], group: str, scale: Tensor) -> None:
        see(group, args[0].detach(), scale)

    with undisturbed(model):
        scales = quantizers.scales()
        handles = [
            input_module(model, group[0]).register_forward_pre_hook(partial(watch, group=group[0], scale=scales[group[0]]))
            for group in quantizers.groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def record_inputs(model: nn.Module, quantizers: InputQuantizers, run: Callable[[], Any]) -> list[InputSample]:
    """The first tokens of every group's input while `run` makes forwards of the model with quantized inputs.

    A group whose weights are not used has no sample. Under FSDP2 call it on every rank; the samples are those of this rank.
    """
    samples: dict[str, InputSample] = {}

    def keep(name: str, x: Tensor, scale: Tensor) -> None:
        if name not in samples and x.numel():
            x = x.reshape(-1, x.shape[-1])[:TOKENS_OF_A_SAMPLE]
            _, packed, scales = torch.ops.nvfp4.quantize_input(x, scale)
            samples[name] = InputSample(name, x.cpu(), packed.cpu(), scales.cpu())

    with quantizers.serving("w4a4"), inputs_watched(model, quantizers, keep):
        run()
    return list(samples.values())
