"""The tensors of an NVFP4 folder as the transformers class holds them, by `state_dict` name: what a reader computes with."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nvfp4_train.export.packed_folder import PackedFolder
from nvfp4_train.export.unpack import Decode, decode_by_reader


def tensors_in_memory(folder: PackedFolder, decode: Decode = decode_by_reader) -> Iterator[tuple[str, Tensor]]:
    """Every tensor but tied copies, in the dtype that is served, on the CPU; quantized ones decoded to bf16."""
    layout, key_of = folder.layout, folder.layout.hub_names()
    for names, keys in layout.bundles.items():
        name = names[0]
        is_matrix = keys == (key_of.get(name),) and keys[0].removesuffix(".weight") in folder.quantized
        if is_matrix or name in layout.quantized_experts:
            # A quantized weight is a bundle of its own, and its matrices on disk are parts of it.
            whole = torch.empty(layout.tensors[name].shape, dtype=layout.served_dtype(name))
            for key, part in layout.to_hub({name: whole}).items():
                part.copy_(decode(folder, key.removesuffix(".weight")))
            is_transposed = name in layout.quantized_experts and layout.experts[name].is_transposed
            yield name, whole.mT.contiguous() if is_transposed else whole
        elif keys == (key_of.get(name),):
            yield name, folder.tensor(keys[0])
        else:
            yield from _joined(folder, names).items()


def input_scales(folder: PackedFolder) -> dict[str, Tensor]:
    """1 / g of the input of every quantized weight, float32 [1], by `state_dict` name; none where the folder quantizes no inputs."""
    if not folder.reader.quantizes_inputs(folder.config):
        return {}
    layout = folder.layout
    modules = {f"{name}.weight": key for name, key in layout.linears().items() if key in folder.quantized}
    modules |= {name: layout.matrices(name)[0].module for name in layout.quantized_experts}
    return {name: torch.from_numpy(folder.input_scale(module).reshape(1).copy()) for name, module in modules.items()}  # type: ignore[union-attr]


def _joined(folder: PackedFolder, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors that transformers joins or splits on disk: it rearranges the numbers of the elements as it would the elements."""
    layout = folder.layout
    sizes = [layout.tensors[name].numel() for name in names]
    numbers = torch.arange(sum(sizes)).split(sizes)
    places = layout.to_hub({name: part.view(layout.tensors[name].shape) for name, part in zip(names, numbers, strict=True)})
    flat = torch.empty(sum(sizes), dtype=layout.served_dtype(names[0]))
    for key, of_key in places.items():
        flat[of_key.flatten()] = folder.tensor(key).flatten()
    return {name: part.view(layout.tensors[name].shape) for name, part in zip(names, flat.split(sizes), strict=True)}
