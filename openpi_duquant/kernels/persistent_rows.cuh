// Of persistent.cu: tokens to int8.

#pragma once

#include "persistent.cuh"

__device__ float sum_of_row(const Self& self, float x, float* scratch) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    if (self.lane == 0) scratch[self.warp] = x;
    wait_for_half(self);
    x = scratch[self.half * (WARPS / 2)];
    for (int i = 1; i < WARPS / 2; i++) x += scratch[self.half * (WARPS / 2) + i];
    return x;
}

template <int K, int BLOCK>
__device__ void butterflies(const Self& self, float (&x)[K / HALF]) {  // unnormalised Hadamard of every BLOCK channels
    constexpr int E = K / HALF;
    static_assert(BLOCK <= 32 * E, "a block of the rotation is in one warp");
#pragma unroll
    for (int step = 1; step < BLOCK && step < E; step *= 2)
#pragma unroll
        for (int i = 0; i < E; i++)
            if (!(i & step)) {
                float a = x[i], b = x[i + step];
                x[i] = a + b;
                x[i + step] = a - b;
            }
#pragma unroll
    for (int lane = 1; lane * E < BLOCK; lane *= 2) {
        float sign = self.thread & lane ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < E; i++) x[i] = fmaf(x[i], sign, __shfl_xor_sync(~0u, x[i], lane));  // exact but for the sum
    }
}

// What a thread needs of its channels before it has the row.
template <int K, bool NORMED, bool PERMUTED>
struct Channels {
    static constexpr int E = K / HALF;
    alignas(16) float scale[NORMED ? E : 1], shift[NORMED && ADAPTIVE ? E : 1];
    alignas(8) int source[PERMUTED ? E : 1];

    __device__ Channels(const Self& self, const float* norm, const int64* permutation) {
        int first = self.thread % HALF * E;
        if constexpr (NORMED) {
#pragma unroll
            for (int i = 0; i < E; i += 4) {
                reinterpret_cast<float4&>(scale[i]) = read4(norm + first + i);
                if constexpr (ADAPTIVE) reinterpret_cast<float4&>(shift[i]) = read4(norm + WIDTH + first + i);
            }
        }
        if constexpr (PERMUTED)
#pragma unroll
            for (int i = 0; i < E; i += 2) reinterpret_cast<int2&>(source[i]) = read_indices(permutation + first + i);
    }
};

template <int E>  // of E numbers, or of eight at a time
struct VectorOf {
    using type = uint4;
};
template <>
struct VectorOf<4> {
    using type = uint2;
};

// Norm, permutation, rotation and rounding of a row [K], by half a block: a thread's codes, and their scale.
template <int K, int BLOCK, bool NORMED, bool PERMUTED>
__device__ float transform(const Self& self, const bf16* x_row, bool written,
                           const Channels<K, NORMED, PERMUTED>& channels, bf16* row, unsigned (&codes)[K / HALF / 4],
                           Memory& memory) {
    constexpr int E = K / HALF;
    int first = self.thread % HALF * E;
    float x[E];
    using Vector = typename VectorOf<E>::type;
    constexpr int VECTORS = E * int(sizeof(bf16)) / int(sizeof(Vector)), EACH = E / VECTORS;
    const Vector* at = reinterpret_cast<const Vector*>(x_row + first);
    Vector pairs[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) pairs[i] = peek(at + i);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if (!written) pairs[i] = until_written(pairs[i], at + i);
        const unsigned* words = &pairs[i].x;
#pragma unroll
        for (int j = 0; j < EACH / 2; j++)
            x[i * EACH + 2 * j] = low_half(words[j]), x[i * EACH + 2 * j + 1] = high_half(words[j]);
    }
    if constexpr (NORMED) {
        float square = 0.f;
#pragma unroll
        for (int i = 0; i < E; i++) square += x[i] * x[i];
        float inverse_rms = rsqrtf(sum_of_row(self, square, memory.squares) / K + EPS);
#pragma unroll
        for (int i = 0; i < E; i++) {
            float scale = channels.scale[i];
            not_before(scale);
            x[i] = x[i] * inverse_rms * (1.f + scale);
            if constexpr (ADAPTIVE) x[i] += channels.shift[i];
            x[i] = to_float(to_bf16(x[i]));
        }
    }
    if constexpr (PERMUTED) {
#pragma unroll
        for (int i = 0; i < E; i += 2)
            *reinterpret_cast<unsigned*>(row + first + i) = to_pair(x[i], x[i + 1]);  // exact: x is rounded already
        wait_for_half(self);
#pragma unroll
        for (int i = 0; i < E; i++) {
            int source = channels.source[i];
            not_before(source);
            x[i] = to_float(row[source]);
        }
    }
    if constexpr (BLOCK > 1) butterflies<K, BLOCK>(self, x);
    unsigned bits = 0;  // of magnitudes, in order as the numbers are, NaN above all
#pragma unroll
    for (int i = 0; i < E; i++) bits = max(bits, __float_as_uint(x[i]) & 0x7FFFFFFF);
    bits = __reduce_max_sync(~0u, bits);
    if (self.lane == 0) memory.largest[self.warp] = bits;
    wait_for_half(self);
#pragma unroll
    for (int i = 0; i < WARPS / 2; i++) bits = max(bits, memory.largest[self.half * (WARPS / 2) + i]);
    float largest = __uint_as_float(bits);  // of the unnormalised numbers
    float act_scale = 1.f, per_scale = 0.f;
    if (largest != 0.f) {
        per_scale = 127.f * reciprocal(largest);
        act_scale = over_127(BLOCK > 1 ? largest * rsqrtf(float(BLOCK)) : largest);
    }
#pragma unroll
    for (int i = 0; i < E / 4; i++) {
        auto times = [&](int j) { return __fmul_rn(x[4 * i + j], per_scale); };
        codes[i] = rounded(times(0), times(1), times(2), times(3));
    }
    return act_scale;
}
