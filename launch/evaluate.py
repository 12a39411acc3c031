"""Compare models by one measure: loss, perplexity, KL and top-1 agreement on held-out text, with intervals.

    python launch/evaluate.py model=A [model=B ...] [OPTION=VALUE ...]
    torchrun --nproc-per-node N launch/evaluate.py ...          ranks share out the text; each holds whole models

A model is [NAME@]PATH: a Hugging Face folder or hub name in bf16, an exported folder, a checkpoint or the folder of a run; or
[NAME@]ptq:PATH, a bf16 model that is quantized here, as quant.* says; 'ptq:PATH quant.rule=hessian' sets options of one model. The
first model is the reference of the others. OPTION is one of configs/evaluate.yaml: data.path=, data.seq_len=, domains.NAME=PATH,
servings=[w4a16], fail_if.kl=0.05, tasks=[...], output=FILE, ...

The exit code is 0, 1 after an error, or 2 where a quantized model exceeds a threshold of fail_if (torchrun itself then ends with 1).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s model=A [OPTION=VALUE ...]"
    )
    parser.add_argument("arguments", nargs="*", metavar="OPTION=VALUE", help="models and options")
    # Its own exit code is that of a threshold.
    parser.error = lambda message: sys.exit(f"error: {message}")  # type: ignore[method-assign, assignment]
    arguments = parser.parse_args().arguments
    if not any(argument.startswith("model=") for argument in arguments):
        sys.exit("error: model=A must name what to evaluate; it may be given several times, the reference first")
    # This import takes seconds. Neither --help nor a refusal needs it.
    from nvfp4_train.run.evaluation import run_evaluation

    sys.exit(run_evaluation(ROOT, arguments))


if __name__ == "__main__":
    main()
