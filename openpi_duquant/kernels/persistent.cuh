// What the parts of persistent.cu have in common: sizes, arguments, shared memory, and numbers that go between blocks.

#pragma once

#include "numbers.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int HALF = THREADS / 2;  // threads that have a row
constexpr int ROWS = 16;           // tokens, or pairs of a token and a head, that the tensor cores take
constexpr int TOKENS = BATCH * LENGTH;
constexpr int PASSES = (TOKENS + ROWS - 1) / ROWS;  // over the weights
constexpr int SEGMENT = 64;                         // bytes of a weight's row that four threads take, 16 each
constexpr int PAD = 8;                              // elements between rows in shared memory, against bank conflicts
constexpr int QKV = (HEADS + 2) * HEAD;
constexpr int NORM = ADAPTIVE ? 3 * WIDTH : WIDTH;
constexpr int SHARES = 2;  // of the channels of the values, for as many clusters
constexpr int CHANNELS = HEAD / SHARES;
constexpr int SLICE = CHANNELS / CLUSTER;  // that a block finishes
constexpr int BUFFER = QKV + HEADS * HEAD + MLP + 2 * WIDTH;
constexpr int MOST_CODES = WIDTH + SEGMENT;  // of a row, in a block, and room against bank conflicts
static_assert(WARPS == ROWS && KEYS == 8 * WARPS && HEAD == 16 * WARPS,
              "in attention a warp has a row, 8 keys, 8 channels");

// Columns are dealt out by eights: so many to a cluster, and of these to a block, to finish.
template <int N>
constexpr int TILES_OF_CLUSTER = (N / 8 + CLUSTERS - 1) / CLUSTERS;
template <int N>
constexpr int OWN_TILES = (TILES_OF_CLUSTER<N> + CLUSTER - 1) / CLUSTER;

struct Matrix {                // of every layer
    const uint8* weight;       // [N, K / 2]: a byte has channels k and k + K / 2
    const float* scale;        // [N]
    const int64* permutation;  // [K], of the input; null for none
};

struct Array {  // layer after layer
    const uint8* first;
    unsigned bytes;  // of a layer
};

struct Arguments {
    const bf16* x;  // [tokens, WIDTH]
    bf16* buffers;  // [layers, tokens, BUFFER], of unwritten numbers; a layer's last are what it makes
    Matrix qkv, o, gate_up, down;
    const float* norms;    // [2 layers, NORM]
    const uint8* visible;  // [batch, prefix]; null for all
    const bf16* cos;       // [tokens, HEAD]
    const bf16* sin;
    Array arrays[ARRAYS];  // all that layers have of their own; the rest without bytes
    int layers, prefix, state_first;
};

struct Maps {
    TensorMap keys, values;  // [layers * batch, prefix, HEAD], in boxes of 64 channels and as many keys as a block has
    TensorMap o, down;       // weights of every layer, in boxes of a segment and as many rows as a cluster has columns
};

struct AttentionMemory {
    bf16 q[ROWS][HEAD + PAD];
    float scores[2][ROWS][KEYS + PAD];  // of each half of the channels
    bf16 weights[ROWS][KEYS + PAD];
};

struct Memory {
    uint8 keys[HEAD / 64][KEYS][128];  // as the copy engine lays boxes down
    uint8 values[CHANNELS / 64][KEYS][128];
    union {                                                             // weights of a matrix; columns come in pairs
        uint8 wide[2][OWN_TILES<2 * MLP> * 4 * (WIDTH / 2) + SEGMENT];  // apart by half the banks
        uint8 deep[MLP / 2 / CLUSTER / SEGMENT][TILES_OF_CLUSTER<WIDTH> * 8][SEGMENT];  // as boxes are laid down
    };
    uint8 codes[2][ROWS * MOST_CODES];  // of even and odd tiles of rows
    float act_scale[2][ROWS];
    union {
        bf16 row[2][MLP];                                      // of each half
        int sums[WIDE_PARTS * ROWS * OWN_TILES<2 * MLP> * 8];  // [parts of the channels, ROWS, columns]
        AttentionMemory attention;
    };
    float partial[CLUSTER][ROWS][SLICE];  // by the block that they come from
    float2 totals[CLUSTER][ROWS];         // highest score, and sum of weights
    float squares[WARPS];
    unsigned largest[WARPS];
    uint8 seen[KEYS];
    uint64 codes_there[2], weights_there, sums_there, partial_there, cached_there;  // how many bytes have come
};

// Who asks. Every operation has a copy that the compiler cannot see through: else it keeps all that follows from it in
// registers, for all layers.
struct Self {
    unsigned thread, block;
    int warp, lane, half, rank, cluster;  // rank: of the block in its cluster
    __device__ Self() : Self(threadIdx.x, blockIdx.x) {}
    __device__ Self(const Self& other) : Self(other.thread, other.block) {}
    __device__ Self(unsigned thread, unsigned block) : thread(thread), block(block) {
        not_before(this->thread, this->block);
        warp = this->thread / 32, lane = this->thread % 32, half = this->thread / HALF;
        rank = this->block % CLUSTER, cluster = this->block / CLUSTER;
        __builtin_assume(warp < WARPS && cluster < CLUSTERS);
    }
};

// Numbers go from block to block one by one. A NaN with all bits set is none that the conversion to bf16 gives.
__device__ bool unwritten(unsigned pair) { return (~pair - 0x00010001) & pair & 0x80008000; }

__device__ bool unwritten(uint2 x) { return unwritten(x.x) | unwritten(x.y); }
__device__ bool unwritten(uint4 x) { return unwritten(x.x) | unwritten(x.y) | unwritten(x.z) | unwritten(x.w); }

// By a warp, which stays together: where its lanes part, every shuffle after that takes a detour.
template <class T>
__device__ T until_written(T x, const T* at) {
    while (__any_sync(~0u, unwritten(x))) x = peek(at);
    return x;
}
__device__ float over_127(float x) {  // rounded correctly (Markstein)
    float y = x * (1.f / 127.f);
    return fmaf(fmaf(-127.f, y, x), 1.f / 127.f, y);
}
__device__ float highest_of_warp(float x) {  // NaN above all
    auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); };
    return __int_as_float(ordered(__reduce_max_sync(~0u, ordered(__float_as_int(x)))));
}

__device__ void wait_for_half(const Self& self) {  // the threads that have the same row
    wait_for_threads<HALF>(1 + self.half);
}

// Numbers for others, where there are none yet.
__device__ void put_pair(bf16* to, unsigned at, float low, float high) {  // `at` is even
    put(reinterpret_cast<unsigned*>(to + at), to_pair(low, high));
}
__device__ void put_one(bf16* to, unsigned at, float x) {
    unsigned bits = to_bf16(x);
    put(reinterpret_cast<unsigned*>(to + (at & ~1u)), at % 2 ? bits << 16 | 0xFFFF : bits | 0xFFFF0000);
}

struct Steps {            // of attention
    int partial, cached;  // how often a block has waited
    int looked;           // the observation whose visible keys it knows
};
