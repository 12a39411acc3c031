"""One model type from a folder to a folder: trained, exported, read by others, and what came of it.

What is trained and exported is what a run trains and exports. The folder is decoded by compressed-tensors alone and loaded by the
plain transformers class, so a difference of logits shows a mistake in what was shown, written or named.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from nvfp4_train.export.replicated import FromStore
from nvfp4_train.export.writer import export_model
from nvfp4_train.models.build import BuiltModel, build_model
from nvfp4_train.models.causal_lm import ModelConfig, compute_logits
from nvfp4_train.models.served_check import check_served
from nvfp4_train.quant.manifest import QuantManifest
from nvfp4_train.quant.policy import QuantConfig

STEPS = 2
SEQUENCES, TOKENS = 2, 32
MESSAGE_LENGTH = 400
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")
STANDARD_DEVIATION = 0.1
"""Of matrices, before their rows are scaled."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one model type."""

    refused: str | None = None
    """Why training does not begin; None where it does. All that follows is about types that train."""
    failed: str | None = None
    """What went wrong after training began; None where nothing did."""
    difference: float = 0.0
    """Largest difference between logits of the training model and of the decoded folder in the plain class."""
    packed: bool = False
    """Whether transformers loads the packed folder as it is, with no tensor missing or left over, and with the logits of training."""
    share: float = 0.0
    """Share of the trained weights outside embeddings and head that is in NVFP4, rounded to four digits."""
    tensors: int = 0
    """Tensors in the folder."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def config_of(model_type: str, fields: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **fields)


def class_of_folder(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of which the published folders of a config are: a multimodal one where there is one."""
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if (found := mapping.get(type(config), None)) is not None:
            return found
    raise ValueError(f"{config.model_type} is no causal LM of transformers")


def run_family(model_type: str, fields: dict[str, Any], folder: Path) -> Outcome:
    """Save, train, export and read a random model of a type, in a folder of its own. Raises where it cannot even be saved."""
    with _quiet():
        original = save_random(config_of(model_type, fields), folder / "bf16")
        model = ModelConfig(path=str(folder / "bf16"))
        try:
            built = build_model(model, QuantConfig(), torch.device("cpu"), compute_dtype=torch.bfloat16)
        except ValueError as error:
            return Outcome(refused=_first_line(error, folder))
        try:
            return _train_and_read(built, original, folder)
        except Exception as error:  # an outcome, too
            return Outcome(failed=f"{type(error).__name__}: {_first_line(error, folder)}")


@torch.no_grad()
def _train_and_read(built: BuiltModel, original: type[PreTrainedModel], folder: Path) -> Outcome:
    with torch.enable_grad():
        train(built)
    export_model(folder / "nvfp4", FromStore(built.model, built.store))
    tensors = decode(folder / "nvfp4", folder / "bf16", folder / "decoded")
    require_same_tensors(folder / "bf16", folder / "decoded")
    ids = random_ids(seed=1)
    expected = compute_logits(built.model.eval(), ids)
    if not expected.isfinite().all():
        raise ValueError("the logits of the training model are not finite")
    return Outcome(
        difference=_difference(logits_of(original, folder / "decoded", ids), expected),
        packed=loads_packed(original, folder / "nvfp4", ids, expected),
        share=round(share_in_nvfp4(built.model, built.store.manifest), 4),
        tensors=len(tensors),
    )


@torch.no_grad()
def save_random(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """Save a random bf16 model of the config's class, with rows of many sizes and no constant norm or bias. Returns the class."""
    cls = class_of_folder(config)
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32)
    saved = model.state_dict()
    # Tied tensors are one and are scaled once.
    for tensor in {id(parameter): parameter for parameter in model.parameters()}.values():
        if tensor.dim() > 1 and (deviation := tensor.std()) > 0:
            tensor.mul_(max(1.0, STANDARD_DEVIATION / deviation.item()))
            tensor.mul_(torch.randn(tensor.shape[:-1] + (1,)).mul_(0.5).exp_())
        else:
            tensor.add_(torch.randn(tensor.shape), alpha=0.05)
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and not buffer.any():
            buffer.add_(torch.randn(buffer.shape), alpha=0.01)
    model.to(torch.bfloat16).save_pretrained(folder)
    return cls


def random_ids(seed: int) -> Tensor:
    # Below the vocabulary of every case, and above its special tokens.
    return torch.randint(4, 64, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(seed))


def train(built: BuiltModel) -> None:
    """Some optimizer steps of the quantized model, as a run takes them; before and after the first one it must be as served."""
    built.store.update()
    optimizer = torch.optim.AdamW([p for p in built.model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        ids = random_ids(seed=2 + step)
        check_served(built.model, ids[:1])
        logits = compute_logits(built.model, ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        built.store.update()
    built.store.check_finite()


def decode(folder: Path, original: Path, target: Path) -> dict[str, Tensor]:
    """Write a plain bf16 folder, laid out as the original is, with the weights that compressed-tensors decodes.

    Returns the tensors of the packed folder.
    """
    tensors = load_file(folder / "model.safetensors")
    decoded = CompressedTensorsDequantizer(folder).process(dict(tensors))
    decoded = join_experts(decoded, load_file(original / "model.safetensors"))
    target.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in decoded.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return tensors


def join_experts(decoded: dict[str, Tensor], original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the matrices of single experts where the original folder has one tensor for all experts of a layer.

    Transposed or not, gate and up one after the other or row by row: what is nearest to the original is taken, of which the decoded
    weights are some optimizer steps and a rounding away.
    """
    joined, parts = dict(decoded), set()
    for key, tensor in original.items():
        if key in decoded or tensor.dim() < 2:
            continue
        kind = "bias" if key.endswith("_bias") else "weight"
        block = key.removesuffix(".weight").rpartition(".")[0]
        experts = f"{block.removesuffix('.experts')}.experts"
        names = [[f"{experts}.{expert}.{leaf}.{kind}" for expert in range(len(tensor))] for leaf in EXPERT_LINEARS]
        found = [torch.stack([decoded[name] for name in of_all]) for of_all in names if of_all[0] in decoded]
        if candidates := [candidate for candidate in _arrangements(found) if candidate.shape == tensor.shape]:
            joined[key] = min(candidates, key=lambda candidate: (candidate.float() - tensor.float()).square().sum().item())
            parts |= {name for of_all in names for name in of_all}
    return {key: tensor for key, tensor in joined.items() if key not in parts}


def _arrangements(parts: list[Tensor]) -> Iterator[Tensor]:
    """Every way to hold some of the weights [E, N, K] or biases [E, N] of experts in one tensor."""
    together = [torch.cat(parts[:2], 1), torch.stack(parts[:2], 2).flatten(1, 2)] if len(parts) > 2 else []
    for tensor in [*parts, *together]:
        yield tensor
        if tensor.dim() > 2:
            yield tensor.mT


def require_same_tensors(original: Path, decoded: Path) -> None:
    """Raise ValueError where a folder has other names or shapes than the one that was trained."""
    of = [
        {key: tensor.shape for key, tensor in load_file(folder / "model.safetensors").items()} for folder in (original, decoded)
    ]
    lost, added = of[0].items() - of[1].items(), of[1].items() - of[0].items()
    if lost or added:
        names = ", ".join(sorted(key for key, _ in lost)[:2])
        raise ValueError(f"the folder lost {len(lost)} tensors of the original ({names} ...) and has {len(added)} others")


def logits_of(cls: type[PreTrainedModel], folder: Path, ids: Tensor) -> Tensor:
    """Logits of a folder in a transformers class. Raises ValueError where tensors are missing or left over."""
    loaded: Any = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    model, info = loaded
    if faults := {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}:
        raise ValueError(f"{folder.name} does not hold the tensors of {cls.__name__}: {faults}")
    return compute_logits(model.eval(), ids)


def loads_packed(cls: type[PreTrainedModel], folder: Path, ids: Tensor, expected: Tensor) -> bool:
    try:
        return _difference(logits_of(cls, folder, ids), expected) == 0
    except Exception:  # whatever a reader raises
        return False


def share_in_nvfp4(model: nn.Module, manifest: QuantManifest) -> float:
    """Share of the elements that are trained, outside embeddings and head: towers for images are not trained."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding) or module is head}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(p): p.numel() for p in parameters.values() if id(p) not in outside and p.requires_grad}
    quantized = {id(parameters[name]): parameters[name].numel() for name in manifest.names}
    return sum(quantized.values()) / sum(trained.values())


def _first_line(error: Exception, folder: Path) -> str:
    return str(error).replace(str(folder), "FOLDER").split("\n")[0][:MESSAGE_LENGTH]


def _difference(x: Tensor, y: Tensor) -> float:
    assert x.dtype is y.dtype
    return (x.double() - y.double()).abs().max().item()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loaders print tables and bars of what they miss; here that is an outcome."""
    logger = logging.getLogger("transformers")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
