"""Export the weights of a training checkpoint as a packed NVFP4 folder, verified from disk.

python launch/export.py outputs/RUN/checkpoints/last.ckpt outputs/RUN/export --overwrite
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer

from nvfp4_train.errors import RunError, one_line
from nvfp4_train.export import export_model
from nvfp4_train.export.checkpoint import load_checkpoint
from nvfp4_train.export.folder import check_target
from nvfp4_train.export.masters import FromMasters
from nvfp4_train.export.passed_through import PassedThrough
from nvfp4_train.export.registry import BOTH, folders_of, known_formats
from nvfp4_train.export.writer import MAX_SHARD_BYTES
from nvfp4_train.load_errors import reading
from nvfp4_train.progress import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file that training wrote, or the folder of a sharded run")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder once the new one is verified")
    parser.add_argument(
        "--format",
        choices=[*known_formats(), BOTH],
        default="compressed_tensors",
        help="default: compressed_tensors; both writes it to OUT, and modelopt to OUT_modelopt",
    )
    parser.add_argument(
        "--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, metavar="N", help="split larger weights (default: 5 GB)"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_NAME", help="default: the folder tokenizer/ beside the checkpoint, if there is one"
    )
    parser.add_argument(
        "--original",
        metavar="DIR_OR_NAME",
        help="where the model was trained from, if that has moved: tensors are copied from there",
    )
    parser.add_argument(
        "--without-original", action="store_true", help="leave out tensors of the original that transformers does not build"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that came with the model, if any")
    args = parser.parse_args()
    try:
        # Reading the weights may take long, so the target is checked first.
        folders = folders_of(args.format, args.out)
        for folder in folders.values():
            check_target(folder, args.overwrite)
        checkpoint = load_checkpoint(args.checkpoint, trust_remote_code=args.trust_remote_code)
        tokenizer = args.tokenizer or checkpoint.tokenizer
        if tokenizer is None:
            print(
                f"no folder tokenizer/ beside {args.checkpoint}: the export has no tokenizer; --tokenizer names one",
                file=sys.stderr,
            )
        is_copied = checkpoint.not_built is not None and checkpoint.not_built.kept and not args.without_original
        passed_through = PassedThrough(checkpoint.not_built, args.original or checkpoint.path) if is_copied else None
        loaded = None
        if tokenizer:
            with reading(f"--tokenizer {tokenizer}", str(tokenizer)):
                loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=args.trust_remote_code)
        served = FromMasters(checkpoint.weights, checkpoint.manifest, checkpoint.config, checkpoint.quant_state)
        for format, folder in folders.items():
            report = export_model(
                folder,
                served,
                format=format,
                tokenizer=loaded,
                generation_config=checkpoint.generation_config,
                max_shard_bytes=args.max_shard_bytes,
                overwrite=args.overwrite,
                passed_through=passed_through,
                files_from=args.original or checkpoint.tokenizer,
                progress=progress,
            )
            print(report, flush=True)
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
