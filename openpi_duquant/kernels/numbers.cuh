// What the kernels made for Hopper compute alike.

#include "hopper.cuh"

__device__ float to_float(bf16 x) { return __uint_as_float(unsigned(x) << 16); }
__device__ float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ float high_half(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000); }

__device__ float lowest() { return __uint_as_float(0xFF800000); }  // minus infinity

__device__ float gelu(float x) {  // with the tanh approximation: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
    return x * reciprocal(1.f + exp2_of(x * (-2.302208198f - 0.1029432396f * x * x)));
}
__device__ unsigned geglu(unsigned gate, unsigned up) {  // pairs; gelu(gate) is rounded to bf16 too, as in torch
    unsigned x = to_pair(gelu(low_half(gate)), gelu(high_half(gate)));
    return to_pair(low_half(x) * low_half(up), high_half(x) * high_half(up));
}

// Four numbers, each to the nearest integer, ties to even, in a byte: added to 1.5 * 2^23, a number's nearest integer
// stands in the low bits of the sum.
__device__ unsigned rounded(float a, float b, float c, float d) {
    float x[4] = {a, b, c, d};
    unsigned codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) codes[i] = __float_as_uint(x[i] + 12582912.f);
    return __byte_perm(__byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
}

// Rows of 128 bytes lie with their pieces of 16 in another order, so that neither reads nor writes meet in a bank: the
// copy engine's swizzle. This is how wgmma is told; `apart` are the bytes from one box of 64 columns to the next, where
// an operand is read across its rows.
__device__ uint64 described(const void* at, int apart = 16) {
    uint64 eight_rows = 8 * 128, start = shared_address(at) & 0x3FFFF;
    return uint64(1) << 62 | eight_rows / 16 << 32 | uint64(apart / 16) << 16 | start / 16;
}
// An operand that lies in matrices of eight by eight numbers instead, 128 bytes each: `along` are the bytes from one to
// the next along the channels that are summed up, `across` those to the next across them.
__device__ uint64 described_in_eights(const void* at, int along, int across) {
    return uint64(across / 16) << 32 | uint64(along / 16) << 16 | (shared_address(at) & 0x3FFFF) / 16;
}

// Of lanes in fours, which have the same rows of a wgmma's sums.
__device__ float highest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
