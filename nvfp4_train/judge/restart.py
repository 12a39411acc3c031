"""Forwards that begin at a later decoder layer, with what an earlier forward has left there.

A forward of a model of which only layer i and later ones have changed repeats, up to layer i, what it computed before. So the outputs
of all layers are kept, and a restarted forward takes the first ones from there: the model's own forward runs, and only calls of the
layers ahead of i are left out. This is the same computation where layers hand on nothing but their outputs, which
`Comparison.prove_restarts` tests on the model at hand.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class LayerOutputsOfAForward:
    """What the decoder layers of a model gave in one forward, call by call. A layer may be called several times."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        inside = {module for layer in layers for module in layer.modules() if module is not layer}
        self._layers = [layer for layer in layers if layer not in inside]
        self._outputs: list[Any] = []
        self.calls: list[nn.Module] = []
        """The layer of every call."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the layers give in the forward inside the context."""
        self.calls, self._outputs = [], []

        def record(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.calls.append(layer)
            # Later layers may add to it in place.
            self._outputs.append(_copy(output))
            return output

        with self._calling(record):
            yield

    @contextmanager
    def starting_at(self, first_call: int) -> Iterator[None]:
        """Let the forward inside the context begin at a call of a layer: those before it give what they gave when it was recorded."""
        number = 0

        def replay(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += 1
            return _copy(self._outputs[number - 1]) if number <= first_call else forward(*args, **kwargs)

        with self._calling(replay):
            yield

    def first_call(self, modules: Collection[nn.Module]) -> int:
        """The first call that one of these modules takes part in, as the last recording had them; 0 if one is in no layer."""
        inside = {layer: set(layer.modules()) for layer in set(self.calls)}
        calls = []
        for module in modules:
            own = [call for call, layer in enumerate(self.calls) if module in inside[layer]]
            if not own:
                return 0
            calls.append(own[0])
        return min(calls, default=0)

    def forget(self) -> None:
        """Free the memory of the outputs."""
        self._outputs = []

    @contextmanager
    def _calling(self, function: Callable[..., Any]) -> Iterator[None]:
        """Call `function(layer, its forward, ...)` in place of the forwards of layers."""
        own = [layer.__dict__.get("forward") for layer in self._layers]

        def in_place_of(layer: nn.Module) -> Callable[..., Any]:
            forward = layer.forward
            return lambda *args, **kwargs: function(layer, forward, *args, **kwargs)

        try:
            for layer in self._layers:
                layer.forward = in_place_of(layer)  # type: ignore[method-assign]
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward  # type: ignore[method-assign]


def _copy(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if type(output) in (tuple, list):
        return type(output)(map(_copy, output))
    return output
