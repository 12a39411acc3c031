"""Convert an exported NVFP4 folder to another format, without a GPU and without the original weights.

python launch/convert.py SRC DST --to modelopt              for TensorRT-LLM
python launch/convert.py SRC DST --to compressed_tensors    for transformers, vLLM and SGLang
python launch/convert.py SRC DST --to bf16                  decoded, for readers that know no NVFP4
"""

import argparse
import sys
from pathlib import Path

from nvfp4_train.errors import one_line
from nvfp4_train.export.convert import TARGETS, convert_folder
from nvfp4_train.progress import progress


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s SRC DST --to FORMAT [--overwrite]",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a folder that an export or a conversion wrote")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format of the new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder once the new one is verified")
    args = parser.parse_args()
    try:
        report = convert_folder(args.source, args.target, to=args.to, overwrite=args.overwrite, progress=progress)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    print(report)


if __name__ == "__main__":
    main()
