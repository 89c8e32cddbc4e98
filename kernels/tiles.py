"""The tile arithmetic that kernels of several files share."""
import triton
import triton.language as tl

from .target import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
IN_INTERPRETER = tl.constexpr(INTERPRETED)


@triton.jit
def to_bf16(x):
    """x rounded to bf16; in the interpreter, which has none, to such a number in fp32"""
    if IN_INTERPRETER:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return (bits + 0x7FFF + (bits >> 16 & 1) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def split_bf16(x, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    """x as a sum of two or three bf16 numbers, largest first; just x in DTYPE if COUNT is 1"""
    if COUNT == 1:
        return (x.to(DTYPE),)
    else:
        first = to_bf16(x)
        x -= first.to(x.dtype)
        second = to_bf16(x)
        if COUNT == 2:
            return first, second
        else:
            return first, second, to_bf16(x - second.to(x.dtype))


@triton.jit
def dot_at(a, b, acc, PRECISION: tl.constexpr):
    """PRECISION: "bf16", to which both are rounded; or how exact fp32 (fp64) is multiplied: "bf16x6" in as many
    products of three bf16 pieces of each, of which an operand that is bf16 needs three."""
    if PRECISION == "bf16":
        return tl.dot(to_bf16(a), to_bf16(b), acc, out_dtype=acc.dtype)
    elif PRECISION == "bf16x6" and a.dtype == tl.bfloat16:
        high, middle, low = split_bf16(b.to(acc.dtype), tl.bfloat16, 3)
        acc = tl.dot(a, low, acc, out_dtype=acc.dtype)
        acc = tl.dot(a, middle, acc, out_dtype=acc.dtype)
        return tl.dot(a, high, acc, out_dtype=acc.dtype)
    elif PRECISION == "bf16x6" and b.dtype == tl.bfloat16:
        high, middle, low = split_bf16(a.to(acc.dtype), tl.bfloat16, 3)
        acc = tl.dot(low, b, acc, out_dtype=acc.dtype)
        acc = tl.dot(middle, b, acc, out_dtype=acc.dtype)
        return tl.dot(high, b, acc, out_dtype=acc.dtype)
    else:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
