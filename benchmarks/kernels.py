"""What Triton's compiler makes of the kernels for a GPU that need not be there.

  python -m benchmarks.kernels --output kernels.json
  python -m benchmarks.kernels --table kernels.json

Registers of a thread, bytes that it spills to memory, shared memory of a program, and whether it
uses the tensor cores of a whole warp group (wgmma), the bulk copy engine (bulk) or asynchronous
copies by pointer (async). One row for each kernel as the layer launches it, bfloat16 unless said.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

from benchmarks.measuring import Record, output_file
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.tables import markdown

POINTERS = {
    "*i64": ("slot_ptr", "seed_ptr", "index_ptr", "group_ptr"),
    "*i32": ("end_ptr", "tile_end_ptr", "tile_ptr", "count_ptr"),
    "*i1": ("padding_ptr",),
    "*fp32": (
        *("sums_ptr", "gate_ptr", "d_gate_ptr", "d_scale_ptr", "z_ptr", "d_z_ptr", "d_b_ptr"),
        *("noise_ptr", "uniform_ptr", "probs_ptr", "masked_probs_ptr", "d_probs_ptr"),
        *("d_masked_probs_ptr", "sampling_probs_ptr", "load_ptr", "d_sums_ptr"),
        *("d_sampling_probs_ptr", "d_load_ptr", "slope_ptr"),
    ),
}
"""Types of what is not in the dtype of the model."""
FLOATS = (
    *("kept_share", "scale_up", "jitter", "temperature", "chance", "point", "gradient_scale"),
    *("own", "choice", "other_own", "other_choice", "best_own", "best_choice"),
)
NOT_MULTIPLES_OF_16 = (
    *("num_slots", "num_tokens", "num_experts", "num_groups", "programs", "top_k"),
    *("index_stride_token", "index_stride_slot", "tokens_of_part", "most_tiles"),
)


class Launch(NamedTuple):
    """A kernel as the layer launches it."""

    name: str
    kernel: Any
    constants: Dict[str, Any]
    warps: int = 4
    stages: int = 3
    descriptors: Mapping[str, List[int]] = MappingProxyType({})
    """Shapes of the tiles of arguments that are tensor descriptors."""


def launches(capability: int) -> List[Launch]:
    """Every kernel of a layer of SparseMixer with eight experts; descriptors from Hopper on."""
    from fairseq_sparsemixer.moe.kernels import (
        expert_kernels,
        projection_kernels,
        router_kernels,
        sorting_kernels,
        statistics_kernels,
    )

    product = expert_kernels.product_kernel
    blocks: Dict[str, Any] = {"PRECISION": "ieee", "BLOCK_S": 128, "BLOCK_O": 128, "BLOCK_I": 64}
    tiles = {"a_ptr": [128, 64], "w_ptr": [1, 128, 64]}
    transposed_tiles = {"a_ptr": [128, 64], "w_ptr": [1, 64, 128]}
    nowhere = dict.fromkeys(("placed_ptr", "slot_ptr", "gate_ptr", "scale_ptr"))
    plain = {"seed_ptr": None, "active_ptr": None, "sums_ptr": None}
    first = {**blocks, **nowhere, "active_ptr": None, "sums_ptr": None, "RELU": True}
    second = {**blocks, **plain, "RELU": False}
    back = {**blocks, **nowhere, "seed_ptr": None, "bias_ptr": None, "RELU": False}
    to_x = {**second, "bias_ptr": None, "out_ptr": None, "gate_ptr": None, "scale_ptr": None}
    result = []
    for ending, described in ((", descriptors", True), (", pointers", False)):
        if described and capability < 90:
            continue
        straight = {"DESCRIBED": described, "TRANSPOSED": False}
        across = {"DESCRIBED": described, "TRANSPOSED": True}
        there = tiles if described else {}
        crosswise = transposed_tiles if described else {}
        without = {**straight, **first, "seed_ptr": None}
        result += [
            Launch(f"first product{ending}", product, without, 8, 3, there),
            Launch(f"first product, dropout{ending}", product, {**straight, **first}, 8, 3, there),
            Launch(f"second product{ending}", product, {**straight, **second}, 8, 3, there),
            Launch(
                f"gradient of the inner layer{ending}", product, {**across, **back}, 8, 3
            )._replace(descriptors=crosswise),
            Launch(f"gradient of the tokens{ending}", product, {**across, **to_x}, 8, 3)._replace(
                descriptors=crosswise
            ),
            Launch(
                f"gradient of the weights{ending}",
                expert_kernels.weight_gradient_kernel,
                {
                    "PRECISION": "ieee",
                    "BLOCK_S": 32 if described else 64,
                    "BLOCK_O": 128,
                    "BLOCK_I": 128,
                    "DESCRIBED": described,
                    **({} if described else {"grad_descriptor": None, "a_descriptor": None}),
                },
                8,
                5 if described else 3,
                {name: [32, 128] for name in ("grad_descriptor", "a_descriptor") if described},
            ),
        ]
    sorting: Dict[str, Any] = {"BLOCK_S": 256, "BLOCK_N": 32}
    routing: Dict[str, Any] = {"BLOCK_T": 256, "BLOCK_N": 8}
    projection: Dict[str, Any] = {"BLOCK_T": 64, "BLOCK_N": 16, "BLOCK_D": 64}
    return [
        *result,
        Launch(
            "gradient of the biases", expert_kernels.sum_groups_kernel, _block("R", 64, "X", 32)
        ),
        Launch(
            "gradients of gate and omega",
            expert_kernels.weigh_backward_kernel,
            {**_block("S", 64, "D", 128), "grad_stride_width": 1},
        ),
        Launch("count slots", sorting_kernels.count_kernel, sorting),
        Launch(
            "place slots", sorting_kernels.place_kernel, {**sorting, "TILE": 128, "BLOCK_P": 32}, 8
        ),
        Launch("logits", projection_kernels.project_kernel, projection),
        Launch("logits to tokens", projection_kernels.token_gradient_kernel, projection, 4, 2),
        Launch("logits to weights", projection_kernels.weight_gradient_kernel, projection),
        *(
            Launch(f"route{ending}{back}", kernel, {**routing, **gate, **constants})
            for ending, gate in (
                ("", {"GATE": "chance", "slope_ptr": None}),
                (", full gate", {"GATE": "full"}),
            )
            for back, kernel, constants in (
                ("", router_kernels.route_kernel, {"FULL_ON_BEST": True}),
                (", back", router_kernels.route_backward_kernel, {}),
            )
        ),
        Launch("statistics", statistics_kernels.sum_tokens_kernel, routing),
        Launch("statistics, back", statistics_kernels.sum_tokens_backward_kernel, routing),
    ]


def _block(first: str, rows: int, second: str, columns: int) -> Dict[str, Any]:
    return {f"BLOCK_{first}": rows, f"BLOCK_{second}": columns}


def _signature(launch: Launch) -> Tuple[Dict[str, str], Dict[Tuple[int], List[List[Any]]]]:
    """Types of the arguments, and which are multiples of 16."""
    signature, attributes = {}, {}
    of_router = "BLOCK_T" in launch.constants
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif name in launch.descriptors:
            shape = ", ".join(map(str, launch.descriptors[name]))
            signature[name] = f"tensordesc<bf16[{shape}]>"
        elif name.endswith("_ptr"):
            kinds = [kind for kind, names in POINTERS.items() if name in names]
            is_float = of_router and name in ("w_ptr", "bias_ptr", "d_w_ptr")
            signature[name] = "*fp32" if is_float else kinds[0] if kinds else "*bf16"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if signature[name][0] in "*i" and name not in NOT_MULTIPLES_OF_16:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, attributes


def compiled(launch: Launch, capability: int) -> Record:
    """What the compiler says of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = _signature(launch)
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=launch.constants, attrs=attributes
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = code.asm["ptx"]
    names = {"wgmma": "wgmma.mma_async", "bulk": "cp.async.bulk.tensor", "async": "cp.async.cg"}
    return {
        "kernel": launch.name,
        "warps": launch.warps,
        "stages": launch.stages,
        "shared_bytes": code.metadata.shared,
        "uses": [name for name, instruction in names.items() if instruction in ptx],
        **_resources(ptx, capability),
    }


def _resources(ptx: str, capability: int) -> Record:
    """Registers and spilled bytes, by Triton's own assembler."""
    from triton import knobs

    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w", encoding="ascii") as file:
            file.write(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", path]
        command += ["-o", os.path.join(folder, "kernel.cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores, loads = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)[:2]
    (registers,) = re.findall(r"Used (\d+) registers", said)[:1]
    return {"registers": int(registers), "spilled_bytes": int(stores) + int(loads)}


def table(rows: List[Record]) -> str:
    """One row for each kernel."""
    head = ["kernel", "warps", "stages", "registers", "spilled (bytes)", "shared (KiB)", "uses"]
    cells = [head]
    for row in rows:
        cells.append([row["kernel"], *(str(row[key]) for key in ("warps", "stages", "registers"))])
        shared = f"{row['shared_bytes'] / 1024:.0f}"
        cells[-1] += [str(row["spilled_bytes"]), shared, ", ".join(row["uses"])]
    return markdown(cells)


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capability", type=int, default=90, metavar="N", help="of the GPU; 90 is Hopper (default)"
    )
    parser.add_argument(
        "--output", type=output_file, metavar="FILE.json", help="also write the figures there"
    )
    parser.add_argument("--table", metavar="FILE.json", help="print the table of a file instead")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(Path(args.table).read_text(encoding="utf-8"))["rows"]))
        return
    import triton

    rows = [compiled(launch, args.capability) for launch in launches(args.capability)]
    record = {"triton": triton.__version__, "capability": args.capability, "rows": rows}
    print(f"Triton {triton.__version__}, compute capability {args.capability / 10}\n")
    print(table(rows))
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    main()
