"""Export the weights of a training checkpoint as a packed NVFP4 folder, verified from disk.

python launch/export.py outputs/RUN/checkpoints/last.ckpt outputs/RUN/export --overwrite
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer

from nvfp4_train.export import export_compressed_tensors
from nvfp4_train.export.checkpoint import load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file that training wrote, or the folder of a sharded run")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder once the new one is verified")
    parser.add_argument(
        "--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="split larger weights (default: 5 GB)"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_NAME", help="default: the folder tokenizer/ beside the checkpoint, if there is one"
    )
    args = parser.parse_args()
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        tokenizer = args.tokenizer or checkpoint.tokenizer
        report = export_compressed_tensors(
            args.out,
            weights=checkpoint.weights,
            groups=checkpoint.groups,
            config=checkpoint.config,
            tokenizer=AutoTokenizer.from_pretrained(tokenizer) if tokenizer else None,
            generation_config=checkpoint.generation_config,
            rule=checkpoint.rule,
            max_shard_bytes=args.max_shard_bytes,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    print(report)


if __name__ == "__main__":
    main()
