// The kernel of transform_cuda.py: norm or GeGLU, permutation, Hadamard and rounding to int8 of rows in bf16.
//
// A block makes row after row, which the copy engine brings into shared memory, the next while one is rounded. A thread
// has EACH channels next to each other, so that a Hadamard's first sums and differences are between its own registers;
// the last are between lanes. A row is permuted in shared memory.
//
// Defined by transform_cuda.py: K; EACH; BLOCKS of an SM; BLOCK of the Hadamard, 0 for none, and its GAIN; GEGLU, NORM,
// SCALE, SHIFT, PERMUTED: whether there is one; FACTOR, the type of scale and shift; EPS.

#include "numbers.cuh"

constexpr int THREADS = K / EACH;
constexpr int WARPS = THREADS / 32;
constexpr int PIECES = EACH / 8;                  // 16 bytes each
constexpr int OWN = BLOCK < EACH ? BLOCK : EACH;  // of a Hadamard's block, in one thread
constexpr int LANES = OWN ? BLOCK / OWN : 1;
constexpr int BYTES = K * (GEGLU ? 4 : 2);
static_assert(THREADS % 32 == 0 && EACH % 16 == 0 && LANES <= 32);

struct Arguments {
    const uint8* x;               // rows, `stride` bytes apart: K numbers, or gate and up
    const FACTOR *scale, *shift;  // [K]
    const int64* permutation;     // [K]
    uint8* codes;                 // [rows, K]
    float* act_scale;             // [rows]
    int* row_sum;                 // [rows]
    int64 stride;
    int rows;
};

struct Memory {
    uint4 row[BYTES / 16];
    unsigned permuted[PERMUTED ? K / 2 : 4];  // pairs
    uint64 filled;
    unsigned squares[WARPS], largest[WARPS], sums[WARPS];
};

__device__ void fill(const Arguments& given, Memory& memory, int row) {  // by one thread
    if (row >= given.rows) return;
    expect(&memory.filled, BYTES);
    load_bytes(memory.row, given.x + row * given.stride, BYTES, &memory.filled);
}

// What all threads have, put together.
template <typename Reduce>
__device__ unsigned over_row(unsigned of_lane, unsigned (&of_warps)[WARPS], Reduce reduce) {
    unsigned of_warp = reduce(of_lane);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = of_warp;
    __syncthreads();
    return reduce(threadIdx.x % 32 < WARPS ? of_warps[threadIdx.x % 32] : 0);
}
__device__ unsigned sum_of_floats(unsigned x) {
    float sum = __uint_as_float(x);
#pragma unroll
    for (int l = 1; l < 32; l *= 2) sum += __shfl_xor_sync(~0u, sum, l);
    return __float_as_uint(sum);
}
__device__ unsigned largest_of(unsigned x) { return __reduce_max_sync(~0u, x); }
__device__ unsigned sum_of_integers(unsigned x) { return __reduce_add_sync(~0u, x); }

__device__ void unpack(float* to, uint4 x) {
    to[0] = low_half(x.x), to[1] = high_half(x.x), to[2] = low_half(x.y), to[3] = high_half(x.y);
    to[4] = low_half(x.z), to[5] = high_half(x.z), to[6] = low_half(x.w), to[7] = high_half(x.w);
}
__device__ uint4 geglu(uint4 gate, uint4 up) {
    return {geglu(gate.x, up.x), geglu(gate.y, up.y), geglu(gate.z, up.z), geglu(gate.w, up.w)};
}
__device__ void read_eight(float* to, const float* from) {
    reinterpret_cast<float4*>(to)[0] = reinterpret_cast<const float4*>(from)[0];
    reinterpret_cast<float4*>(to)[1] = reinterpret_cast<const float4*>(from)[1];
}
__device__ void read_eight(float* to, const bf16* from) { unpack(to, *reinterpret_cast<const uint4*>(from)); }

// Of eight channels, what a norm multiplies by and adds.
struct alignas(16) Modulation {
    float scale[8] = {}, shift[8] = {};

    __device__ void read(const Arguments& given, int channel) {
        if constexpr (SCALE) read_eight(scale, given.scale + channel);
        if constexpr (SHIFT) read_eight(shift, given.shift + channel);
    }
    __device__ uint4 operator()(uint4 x, float inverse_rms) const {
        float y[8];
        unpack(y, x);
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = y[i] * inverse_rms * (1 + scale[i]) + shift[i];
        return {to_pair(y[0], y[1]), to_pair(y[2], y[3]), to_pair(y[4], y[5]), to_pair(y[6], y[7])};
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) transform(const Arguments given) {
    Memory& memory = shared_memory<Memory>();
    int t = threadIdx.x;
    if (t == 0) {
        initialize(&memory.filled, 1);
        publish_counts();
        fill(given, memory, blockIdx.x);
    }
    // Register p has piece p ^ first of the thread's, so that pieces read at the same time lie in different banks.
    // Within a Hadamard's block that changes nothing but signs.
    constexpr int WITHIN = OWN ? OWN / 8 - 1 : 0, TOGETHER = 8 / PIECES < LANES ? LANES : 8 / PIECES;
    int first = t / TOGETHER % PIECES & (OWN ? ~0 : ~1);
    auto own_place = [&](int p) { return t * PIECES + (p ^ first); };
    auto place = [&](int p) { return PERMUTED ? p * THREADS + t : own_place(p); };  // before the permutation
    unsigned channels[PERMUTED ? EACH / 2 : 1];                                     // pairs
    if constexpr (PERMUTED)
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            longlong2 pair = reinterpret_cast<const longlong2*>(given.permutation)[i * THREADS + t];
            channels[i] = unsigned(pair.x) | unsigned(pair.y) << 16;
        }
    Modulation modulation[NORM ? PIECES : 1];
    if constexpr (NORM)
#pragma unroll
        for (int p = 0; p < PIECES; p++) modulation[p].read(given, 8 * place(p));
    __syncthreads();
    for (int row = blockIdx.x, turn = 0; row < given.rows; row += gridDim.x, turn++) {
        wait_for_bytes(&memory.filled, turn);
        uint4 x[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            x[p] = memory.row[place(p)];
            if constexpr (GEGLU) x[p] = geglu(x[p], memory.row[K / 8 + place(p)]);
        }
        float y[EACH];
        if constexpr (NORM) {
            float square = 0;
#pragma unroll
            for (int p = 0; p < PIECES; p++) unpack(y + 8 * p, x[p]);
#pragma unroll
            for (int i = 0; i < EACH; i++) square += y[i] * y[i];
            square = __uint_as_float(over_row(__float_as_uint(square), memory.squares, sum_of_floats));
#pragma unroll
            for (int p = 0; p < PIECES; p++) x[p] = modulation[p](x[p], rsqrtf(square / K + EPS));
        }
        if constexpr (PERMUTED) {
            if constexpr (NORM || GEGLU) {
#pragma unroll
                for (int p = 0; p < PIECES; p++) memory.row[place(p)] = x[p];
                let_copy_engine_write();
                __syncthreads();
            }
            const bf16* numbers = reinterpret_cast<const bf16*>(memory.row);
#pragma unroll
            for (int i = 0; i < EACH / 2; i++)
                memory.permuted[i * THREADS + t] = numbers[channels[i] % 65536] | unsigned(numbers[channels[i] / 65536])
                                                                                      << 16;
            __syncthreads();
#pragma unroll
            for (int p = 0; p < PIECES; p++) x[p] = reinterpret_cast<const uint4*>(memory.permuted)[own_place(p)];
        }
#pragma unroll
        for (int p = 0; p < PIECES; p++) unpack(y + 8 * p, x[p]);
#pragma unroll
        for (int s = 1; s < OWN; s *= 2)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (!(i & s)) {
                    float a = y[i], b = y[i + s];
                    y[i] = a + b, y[i + s] = a - b;
                }
#pragma unroll
        for (int l = 1; l < LANES; l *= 2) {
            float sign = t & l ? -1.f : 1.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) y[i] = __shfl_xor_sync(~0u, y[i], l) + sign * y[i];
        }
        unsigned largest = 0;  // in order as the numbers are, NaN above infinity
#pragma unroll
        for (int i = 0; i < EACH; i++) largest = max(largest, __float_as_uint(y[i]) & 0x7FFFFFFF);
        largest = over_row(largest, memory.largest, largest_of);
        if (t == 0) fill(given, memory, row + gridDim.x);
        float most = __uint_as_float(largest) * GAIN, scale = most == 0 ? 1.f : most / 127, per_scale = GAIN / scale;
        int sum = 0;
#pragma unroll
        for (int p = 0; p < PIECES; p += 2) {
            unsigned codes[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float by = __popc((p + i / 2) & first & WITHIN) % 2 ? -per_scale : per_scale;
                const float* x = y + 8 * p + 4 * i;
                codes[i] = rounded(x[0] * by, x[1] * by, x[2] * by, x[3] * by);
                sum = __dp4a(int(codes[i]), 0x01010101, sum);
            }
            uint8* to = given.codes + int64(row) * K + t * EACH + 8 * (p ^ (first & ~WITHIN));
            *reinterpret_cast<uint4*>(to) = {codes[0], codes[1], codes[2], codes[3]};
        }
        sum = over_row(sum, memory.sums, sum_of_integers);
        if (t == 0) given.act_scale[row] = scale, given.row_sum[row] = sum;
    }
}
