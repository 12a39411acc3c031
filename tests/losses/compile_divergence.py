"""Compile the divergence kernel for every supported architecture, without a GPU, and print what came out as JSON.

A program of its own because Triton compiles nothing in a process that runs its interpreter: `python compile_divergence.py 80 90`.
"""

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_train.losses.divergence import DIVERGENCES, Objective
from nvfp4_train.losses.divergence_kernel import NUM_WARPS, constants, divergence_kernel
from nvfp4_train.models.logits import LogitMap

sys.path.append(str(Path(__file__).parent.parent / "kernels"))
from compile_kernels import read_cubins  # noqa: E402

OBJECTIVES = {name: Objective(divergence=name) for name in DIVERGENCES} | {
    "mix": Objective(temperature=2.0, cross_entropy=0.25),
    "capped": Objective(student_map=LogitMap(1.0, 30.0), teacher_map=LogitMap(0.0625)),
}
TYPES = {"targets_ptr": "*i64", "gradient_ptr": "*bf16", "num_rows": "i32", "num_columns": "i32"}
"""Of parameters that are no pointers to float32."""


def compile_for(objective: Objective, capability: int) -> bytes:
    """The cubin that a launch compiles, for a vocabulary that is a multiple of 16."""
    names, options = divergence_kernel.arg_names, constants(objective)
    source = ASTSource(
        fn=divergence_kernel,
        signature={name: "constexpr" if name in options else TYPES.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in options.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in options},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS}).asm["cubin"]


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        # The other objectives are variations of one kernel; one architecture stands for the others.
        objectives = OBJECTIVES if capability == 90 else {"forward_kl": Objective()}
        cubins = [compile_for(objective, capability) for objective in objectives.values()]
        for name, entry in zip(objectives, read_cubins(cubins, capability), strict=True):
            print(json.dumps({"objective": name, "capability": capability, **entry}))
