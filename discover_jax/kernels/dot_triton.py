"""The product of bfloat16 tiles for all Triton kernels. It is correct on a GPU and in the interpreter."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sums):
    """sums + a b of bfloat16, summed in float32."""
    if INTERPRETED:  # the interpreter reads bfloat16 bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)
