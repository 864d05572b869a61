"""Runs every Gluon kernel with one tile, with fewer tiles than multiprocessors, and with many; 0 if all return.

A script, not a test: test_gpu_fp8.py starts it under a time limit, since a wrong barrier hangs the process that waits.
"""

import sys

import torch
from inputs import Maker
from inputs8 import make

from deepv3.kernels import gemm8, testing

# One tile of one step; as many steps as stages, with a part of 64 columns; more tiles than a GPU has processors.
SHAPES = [(128, 128, 128), (256, 320, 512), (256, 256, 1024), (2048, 2048, 2048)]


def main() -> None:
    m = Maker(0, torch.bfloat16, "cuda")
    for op, table in gemm8.BACKENDS.items():
        twin = next(iter(table))
        for name in (name for name in table if name.startswith("gluon")):
            for rows, n, k in SHAPES:
                shape = {"rows": rows, "n": n, "k": k}
                if op.startswith("grouped"):
                    shape["ends"] = [0, rows // 2 // 128 * 128, rows]
                args = make(op, m, **shape)
                results = []
                for chosen in (twin, name):
                    if op.endswith("mm"):
                        offsets = args[4] if op.startswith("grouped") else None
                        results.append(table[chosen](*args[:4], offsets, torch.bfloat16))
                    else:
                        grad = torch.zeros_like(args[0])
                        offsets = args[5] if op.startswith("grouped") else None
                        table[chosen](grad, *args[1:5], offsets, True)
                        results.append(grad)
                    torch.cuda.synchronize()
                error = testing.relative_norm(results[1], results[0])
                print(f"{op} {name} {rows} x {n} x {k}: {error:.1e} from plain Triton", flush=True)
                if error > 3e-3:
                    sys.exit(1)


if __name__ == "__main__":
    main()
