"""Marks channels by powers of two, so that whoever reads them tells which ones they are."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WINDOW = 8
"""Channels that are told from others together. All sizes of hidden states are multiples of it."""

MAX_EXPONENT = 20

UNKNOWN = 99
"""In place of an exponent where all values were 0."""


class ChannelCodes:
    """Random exponents for the channels of several modules: every aligned window of 8 channels has its own sequence of them."""

    def __init__(self, parts: Mapping[nn.Module, tuple[int, slice]], generator: torch.Generator) -> None:
        """`parts` has the number of channels of every module, and which of them are scaled."""
        self.scales: dict[nn.Module, Tensor] = {}
        """Powers of two, float32 [channels] on the CPU. Modules whose channels make no whole windows have none."""
        self._modules: list[nn.Module] = []
        windows, owners, places = [torch.empty(0, WINDOW, dtype=torch.int64)], [], []
        for module, (size, part) in parts.items():
            channels = torch.arange(size)[part]
            if size % WINDOW or len(channels) % WINDOW:
                continue
            exponents = torch.zeros(size, dtype=torch.int64)
            exponents[channels] = torch.randint(-MAX_EXPONENT, MAX_EXPONENT + 1, channels.shape, generator=generator)
            self.scales[module] = power_of_two(exponents)
            windows.append(exponents[channels].view(-1, WINDOW))
            owners += [len(self._modules)] * len(windows[-1])
            places += channels[::WINDOW].tolist()
            self._modules.append(module)
        self._windows = torch.cat(windows)
        """Exponents [windows, 8], with the module and the first channel of each."""
        self._owners, self._places = torch.tensor(owners, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)
        self._keys, self._order = _keys(self._windows).sort()

    def find(self, x: Tensor, scaled: Tensor) -> tuple[nn.Module, Tensor] | None:
        """The module whose scales make `scaled` of x, both [..., K], and its channel for each of theirs, int64 [K] on the CPU.

        None where it is not exactly that. Channels that are 0 in x are known by their neighbours.
        """
        exponents = _exponents(x, scaled)
        if exponents is None or len(exponents) % WINDOW or not len(self._windows):
            return None
        rows = exponents.view(-1, WINDOW)
        at = torch.searchsorted(self._keys, _keys(rows)).clamp(max=len(self._keys) - 1)
        found = torch.where((self._windows[self._order[at]] == rows).all(1), self._order[at], -1)
        if (found < 0).all():
            return None
        owner = self._owners[found.max()]
        own = (self._owners == owner).nonzero().flatten()
        for index in (found < 0).nonzero().flatten().tolist():
            similar = own[((self._windows[own] == rows[index]) | (rows[index] == UNKNOWN)).all(1)]
            in_place = similar[self._places[similar] == index * WINDOW]
            if len(similar) != 1 and len(in_place) != 1:
                return None
            found[index] = similar[0] if len(similar) == 1 else in_place[0]
        if (self._owners[found] != owner).any():
            return None
        channels = self._places[found].unsqueeze(1) + torch.arange(WINDOW)
        return self._modules[int(owner)], channels.flatten()


def power_of_two(exponents: Tensor) -> Tensor:
    """2^k exactly, which `torch.pow` does not promise on every device: float32 from int64, for -126 <= k <= 127."""
    return ((exponents + 127) << 23).to(torch.int32).view(torch.float32)


def _exponents(x: Tensor, scaled: Tensor) -> Tensor | None:
    """k with scaled = x * 2^k in every row, by channel, int64 [K] on the CPU; None where there is no such k."""
    if x.shape != scaled.shape or not scaled.isfinite().all():
        return None
    x, scaled = (tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (x, scaled))
    is_zero = x == 0
    if scaled[is_zero].any():
        return None
    quotient = scaled / x.masked_fill(is_zero, 1.0)
    most, least = quotient.masked_fill(is_zero, -torch.inf).amax(0), quotient.masked_fill(is_zero, torch.inf).amin(0)
    mantissa, exponents = torch.frexp(most)
    is_known = ~is_zero.all(0)
    if ((most != least) | (mantissa != 0.5))[is_known].any():
        return None
    return torch.where(is_known, exponents.long() - 1, UNKNOWN).cpu()


def _keys(windows: Tensor) -> Tensor:
    """A number for every row of exponents [n, 8]: equal rows have equal ones."""
    return (windows * 67 ** torch.arange(WINDOW)).sum(1)
