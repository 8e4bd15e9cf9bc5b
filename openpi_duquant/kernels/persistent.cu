// The kernel of persistent_cuda.py: decoder layers of a few tokens in blocks that stay. It needs Hopper's clusters.
//
// A layer has five operations: q/k/v, attention, o, gate/up, down. No block waits for all others: every layer has
// buffers of its own, filled with a number that nothing here computes, and whoever reads waits until it is gone. Within
// a cluster, blocks send each other what they need, into shared memory that counts the bytes:
//   a matmul    Every cluster turns all tokens into int8 codes, 16 at a time; a block has two of the rows.
//               Wide matrices (q/k/v, gate/up): codes go to all blocks, each of which has some of the columns.
//               Deep ones (o, down): to the block that has the channel, an eighth of them; sums go to the block that
//               finishes the column.
//   attention   A cluster has 16 pairs of a token and a head, and half of the channels of the values; each of its
//   blocks
//               an eighth of the keys. Partial sums go to the block that has the channel, an eighth of that half.
// Weights, keys and whatever else is not computed here are read before what is waited for: weights as soon as those
// before them are used, keys after the attention before. Clusters without a part in attention fetch all that the next
// layer reads into L2.
//
// Defined by persistent_cuda.py: PASSES (of 16 tokens, over the weights); CLUSTERS, of CLUSTER blocks; WARPS (of a
// block), KEYS (most that one attends to); WIDTH, MLP, HEADS, HEAD; QKV_BLOCK, UP_BLOCK, DOWN_BLOCK (of Hadamards; 0
// for none); QKV_PERMUTED, UP_PERMUTED, DOWN_PERMUTED; ADAPTIVE (norms with a shift and a gate); EPS; SCALE (of scores,
// in base 2); ARRAYS (of a layer, most); SHARED_MEMORY (bytes).

#include "numbers.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int HALF = THREADS / 2;  // threads that have a row
constexpr int ROWS = 16;           // tokens, or pairs of a token and a head, that the tensor cores take
constexpr int SEGMENT = 64;        // bytes of a weight's row that four threads read, 16 each
constexpr int PAD = 8;             // elements between rows in shared memory, against bank conflicts
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
    bf16* out;      // [tokens, WIDTH]
    bf16* buffers;  // [layers, tokens, BUFFER], of unwritten numbers
    Matrix qkv, o, gate_up, down;
    const float* norms;  // [2 layers, NORM]
    const bf16* keys;    // [layers, batch, prefix, HEAD]
    const bf16* values;
    const uint8* visible;  // [batch, prefix]; null for all
    const bf16* cos;       // [tokens, HEAD]
    const bf16* sin;
    Array arrays[ARRAYS];  // all that layers have of their own; the rest without bytes
    int layers, batch, length, prefix, state_first;
};

struct AttentionMemory {
    bf16 q[ROWS][HEAD + PAD];
    float scores[2][ROWS][KEYS + PAD];  // of each half of the channels
    bf16 weights[ROWS][KEYS + PAD];
};

struct Memory {
    bf16 keys[KEYS][HEAD + PAD];
    bf16 values[KEYS][CHANNELS + PAD];
    uint8 codes[2][ROWS * MOST_CODES];  // of even and odd tiles of rows
    float act_scale[2][ROWS];
    union {
        bf16 row[2][MLP];                                   // of each half
        int sums[CLUSTER * ROWS * OWN_TILES<2 * MLP> * 8];  // [parts of the channels, ROWS, columns]
        AttentionMemory attention;
    };
    float partial[CLUSTER][ROWS][SLICE];  // by the block that they come from
    float2 totals[CLUSTER][ROWS];         // highest score, and sum of weights
    float squares[WARPS];
    unsigned largest[WARPS];
    uint8 seen[KEYS];
    uint64 codes_there[2], sums_there, partial_there;  // how many bytes have come
};

// --- small things ---------------------------------------------------------------------------------------------------

__device__ float lowest() { return __uint_as_float(0xFF800000); }  // minus infinity

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
template <class T>
__device__ T read_written(const T* at, bool written) {
    T x = peek(at);
    return written ? x : until_written(x, at);
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

// --- tokens to int8 -------------------------------------------------------------------------------------------------

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
    for (int lane = 1; lane * E < BLOCK; lane *= 2)
#pragma unroll
        for (int i = 0; i < E; i++) {
            float other = __shfl_xor_sync(~0u, x[i], lane);
            x[i] = self.thread & lane ? other - x[i] : x[i] + other;
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

// Norm, permutation, rotation and rounding of a row [K], by half a block: codes into `coded` [K]; returns their scale.
template <int K, int BLOCK, bool NORMED, bool PERMUTED>
__device__ float transform(const Self& self, const bf16* x_row, bool written,
                           const Channels<K, NORMED, PERMUTED>& channels, bf16* row, uint8* coded, Memory& memory) {
    constexpr int E = K / HALF;
    int first = self.thread % HALF * E;
    float x[E];
    const bf16* at = x_row + first;
    if constexpr (E == 4) {
        uint2 pairs = read_written(reinterpret_cast<const uint2*>(at), written);
        x[0] = low_half(pairs.x), x[1] = high_half(pairs.x), x[2] = low_half(pairs.y), x[3] = high_half(pairs.y);
    } else {
#pragma unroll
        for (int i = 0; i < E; i += 8) {
            uint4 pairs = read_written(reinterpret_cast<const uint4*>(at + i), written);
            x[i] = low_half(pairs.x), x[i + 1] = high_half(pairs.x), x[i + 2] = low_half(pairs.y);
            x[i + 3] = high_half(pairs.y), x[i + 4] = low_half(pairs.z), x[i + 5] = high_half(pairs.z);
            x[i + 6] = low_half(pairs.w), x[i + 7] = high_half(pairs.w);
        }
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
    unsigned codes[E / 4];
#pragma unroll
    for (int i = 0; i < E; i += 4) {
        unsigned c[4];  // added to 1.5 * 2^23, a number's nearest integer stands in the low bits of the sum
#pragma unroll
        for (int j = 0; j < 4; j++) c[j] = __float_as_uint(__fadd_rn(__fmul_rn(x[i + j], per_scale), 12582912.f));
        codes[i / 4] = __byte_perm(__byte_perm(c[0], c[1], 0x0040), __byte_perm(c[2], c[3], 0x0040), 0x5410);
    }
    if constexpr (E == 4) *reinterpret_cast<unsigned*>(coded + first) = codes[0];
    if constexpr (E == 8) *reinterpret_cast<uint2*>(coded + first) = make_uint2(codes[0], codes[1]);
    if constexpr (E == 16)
        *reinterpret_cast<uint4*>(coded + first) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    return act_scale;
}

// --- W4A8 -----------------------------------------------------------------------------------------------------------

// Codes of 16 tokens times a segment of the weights of some tiles of columns. Nibbles are moved to the high half of a
// byte, where they are 16 times what they stand for; the sums are shifted back in the end.
template <int UNITS, int EACH>
__device__ void multiply_segment(int (&sums)[UNITS][4], uint4 low, uint4 low8, uint4 high, uint4 high8,
                                 const uint4 (&w)[UNITS][EACH], int segment) {
    const unsigned *a0 = &low.x, *a1 = &low8.x, *a2 = &high.x, *a3 = &high8.x;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            unsigned b = (&w[unit][segment].x)[i];
            multiply(sums[unit], {a0[i], a1[i], a2[i], a3[i]}, (b << 4) & 0xF0F0F0F0, b & 0xF0F0F0F0);
        }
}

struct Steps {  // how often a block has waited for bytes
    int codes, sums, partial;
    int looked;  // the observation whose visible keys it knows
};

// Columns come in pairs, DISTANCE apart, that are finished together.
template <int N, int DISTANCE>
__device__ int column_of(int pair) {
    if (DISTANCE == 1) return 2 * pair;
    if (2 * DISTANCE == N) return pair;
    return pair / DISTANCE * 2 * DISTANCE + pair % DISTANCE;
}

// The tiles of 8 columns of a matrix that a block multiplies, and of these what it finishes.
template <int N, bool WIDE>
struct Share {
    int first, tiles, of_cluster, own;
    __device__ Share(const Self& self) {
        constexpr int TILES = TILES_OF_CLUSTER<N>, OWN = OWN_TILES<N>;
        of_cluster = min(TILES, N / 8 - self.cluster * TILES);
        own = max(0, min(OWN, of_cluster - self.rank * OWN));
        first = self.cluster * TILES + (WIDE ? self.rank * OWN : 0);
        tiles = WIDE ? own : of_cluster;
    }
};

// x [tokens, K] through norm, permutation, rotation and rounding, times a matrix [N, K].
template <int N, int K, int BLOCK, bool NORMED, bool PERMUTED, int DISTANCE>
struct Matmul {
    static constexpr bool WIDE = N > K;
    static constexpr int TILES = TILES_OF_CLUSTER<N>, OWN = OWN_TILES<N>;  // of 8 columns
    static constexpr int RUN = WIDE ? K / 2 : K / 2 / CLUSTER;             // channels that lie together in a block
    static constexpr int STRIDE = 2 * RUN + SEGMENT;                       // from a row's codes to the next one's
    static constexpr int PARTS = WIDE ? CLUSTER : 2;    // of the segments of a row, for as many warps
    static constexpr int EACH = RUN / SEGMENT / PARTS;  // segments
    static constexpr int ABREAST = WARPS / PARTS;       // tiles at a time
    static constexpr int UNITS = ((WIDE ? OWN : TILES) + ABREAST - 1) / ABREAST;  // tiles of a warp
    static constexpr int SOURCES = WIDE ? PARTS : PARTS * CLUSTER;                // of the sums of a column
    static constexpr int ITEMS = (ROWS * OWN * 4 + THREADS - 1) / THREADS;  // a row and a pair of columns, of a thread
    static_assert(EACH * PARTS * SEGMENT == RUN, "no part is empty");
    static_assert(ROWS * STRIDE <= sizeof(Memory::codes[0]), "codes have a place");
    static_assert(SOURCES * ROWS * OWN * 8 * sizeof(int) <= sizeof(Memory::sums), "sums have a place");

    uint4 w[UNITS][EACH];

    __device__ void read_ahead(const Self& given_self, const Matrix& matrix, int layer) {
        Self self(given_self);
        Share<N, WIDE> share(self);
        int part = self.warp % PARTS * EACH * SEGMENT + (WIDE ? 0 : self.rank * RUN) + self.lane % 4 * 16;
        const uint8* weight = matrix.weight + int64(layer) * N * (K / 2);
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            int tile = self.warp / PARTS + unit * ABREAST, pair = (share.first + tile) * 4 + self.lane / 8;
            int row = column_of<N, DISTANCE>(pair) + self.lane / 4 % 2 * DISTANCE;
#pragma unroll
            for (int i = 0; i < EACH; i++)
                w[unit][i] = read_weights(weight + unsigned(min(row, N - 1) * (K / 2) + part + i * SEGMENT));
        }
    }

    // `finish` takes the sums; `next` is called once the weights are used.
    template <class Finish, class Next>
    __device__ void run(const Self& given_self, const Arguments& given, const Matrix& matrix, int layer, const bf16* x,
                        bool written, const float* norm, const Finish& finish, const Next& next, Steps& steps,
                        Memory& memory) {
        int tokens = given.batch * given.length;
        Share<N, WIDE> share(given_self);
        Channels<K, NORMED, PERMUTED> channels(given_self, norm,
                                               PERMUTED ? matrix.permutation + int64(layer) * K : nullptr);
        for (int first = 0; first < PASSES * ROWS; first += ROWS) {
            Self self(given_self);
            int rows = min(ROWS, tokens - first), mine = self.rank + self.half * CLUSTER, step = steps.codes++;
            uint8* codes = memory.codes[step % 2];
            uint64* codes_there = &memory.codes_there[step % 2];
            if (self.thread == 0) {
                expect(codes_there, rows * 2 * RUN + ROWS * int(sizeof(float)));
                if (!WIDE) expect(&memory.sums_there, SOURCES * rows * share.own * 8 * int(sizeof(int)));
            }
            float act_scale = 0.f;
            if (mine < rows) {
                bf16* row = memory.row[self.half];
                uint8* coded = reinterpret_cast<uint8*>(row);
                act_scale =
                    transform<K, BLOCK>(self, x + unsigned((first + mine) * K), written, channels, row, coded, memory);
                wait_for_half(self);
#pragma unroll
                for (int to = self.warp % (WARPS / 2); to < CLUSTER; to += WARPS / 2) {
                    unsigned there = in_block(codes + mine * STRIDE, to), count = in_block(codes_there, to);
#pragma unroll
                    for (int at = self.lane * 16; at < 2 * RUN; at += 512) {
                        int from = WIDE ? at : at / RUN * (K / 2) + to * RUN + at % RUN;
                        send(there + at, count, *reinterpret_cast<uint4*>(coded + from));
                    }
                }
                wait_for_half(self);  // until all is sent: sums may come here next
            }  // all send something: who has it from all knows that all are here
            if (self.thread % HALF < CLUSTER) {
                int to = self.thread % HALF;
                send(in_block(&memory.act_scale[step % 2][mine], to), in_block(codes_there, to),
                     __float_as_uint(act_scale));
            }

            int row[ITEMS], pair[ITEMS], column[ITEMS];
            float scale[ITEMS], scale2[ITEMS];
            typename Finish::Operands operands[ITEMS];
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                if (i * THREADS >= rows * OWN * 4) break;
                int item = self.thread + i * THREADS;
                pair[i] = item % (OWN * 4), row[i] = pair[i] / 4 < share.own ? item / (OWN * 4) : ROWS;
                if (row[i] >= rows) continue;
                column[i] = column_of<N, DISTANCE>((self.cluster * TILES + self.rank * OWN) * 4 + pair[i]);
                scale[i] = read(matrix.scale + layer * N + column[i]);
                scale2[i] = read(matrix.scale + layer * N + column[i] + DISTANCE);
                operands[i] = finish.read(first + row[i], column[i]);
            }
            wait_for_bytes(codes_there, step / 2);
            int group = self.lane / 4, lane = self.lane % 4, part = self.warp % PARTS;
            int sums[UNITS][4] = {};
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const uint8* at = codes + group * STRIDE + (part * EACH + i) * SEGMENT + lane * 16;
                auto row = [&](int from) { return *reinterpret_cast<const uint4*>(at + from); };
                uint4 low = row(0), low8 = row(8 * STRIDE), high = row(RUN), high8 = row(8 * STRIDE + RUN);
                multiply_segment<UNITS, EACH>(sums, low, low8, high, high8, w, i);
            }
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                int tile = self.warp / PARTS + unit * ABREAST;
                if (tile >= share.tiles) break;
                int source = WIDE ? part : self.rank * PARTS + part;
                int* place = &memory.sums[(source * ROWS + group) * (OWN * 8) + tile % OWN * 8 + lane * 2];
                constexpr int LOWER = 8 * OWN * 8;  // eight rows below
                if constexpr (WIDE) {
                    *reinterpret_cast<int2*>(place) = make_int2(sums[unit][0], sums[unit][1]);
                    *reinterpret_cast<int2*>(place + LOWER) = make_int2(sums[unit][2], sums[unit][3]);
                } else {
                    unsigned there = in_block(place, tile / OWN), count = in_block(&memory.sums_there, tile / OWN);
                    if (group < rows) send(there, count, sums[unit][0], sums[unit][1]);
                    if (group + 8 < rows) send(there + LOWER * sizeof(int), count, sums[unit][2], sums[unit][3]);
                }
            }
            if constexpr (PASSES == 1) next();
            if constexpr (WIDE)
                __syncthreads();
            else
                wait_for_bytes(&memory.sums_there, steps.sums++);
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                if (i * THREADS >= rows * OWN * 4) break;
                if (row[i] >= rows) continue;
                int a = 0, b = 0;
#pragma unroll
                for (int source = 0; source < SOURCES; source++) {
                    int2 sums =
                        *reinterpret_cast<int2*>(&memory.sums[(source * ROWS + row[i]) * (OWN * 8) + pair[i] * 2]);
                    a += sums.x;
                    b += sums.y;
                }
                float act_scale = memory.act_scale[step % 2][row[i]];
                finish.write(first + row[i], column[i], float(a >> 4) * scale[i] * act_scale,
                             float(b >> 4) * scale2[i] * act_scale, operands[i]);
            }
            __syncthreads();
        }
        if constexpr (PASSES > 1) next();
    }
};

// How the sums of a pair of columns are finished.

struct Turned {  // rotary embedding of q and k; a pair is the same channel of both halves of a head
    const bf16 *cos, *sin;
    bf16* out;
    struct Operands {
        bf16 cos, sin;
    };
    __device__ Operands read(int m, int column) const {
        if (column >= (HEADS + 1) * HEAD) return {0x3F80, 0};  // 1 and 0
        int at = m * HEAD + column % HEAD;
        return {::read(cos + at), ::read(sin + at)};
    }
    __device__ void write(int m, int column, float a, float b, Operands angle) const {
        float cos = to_float(angle.cos), sin = to_float(angle.sin);
        ::write(out + m * QKV + column, a * cos - b * sin);
        ::write(out + m * QKV + column + HEAD / 2, b * cos + a * sin);
    }
};

struct Gated {  // GeGLU; a pair is a channel of the gate and of up
    bf16* out;
    struct Operands {};
    __device__ Operands read(int, int) const { return {}; }
    __device__ void write(int m, int column, float gate, float up, Operands) const {
        ::write(out + m * MLP + column, low_half(geglu(to_pair(gate, 0.f), to_pair(up, 0.f))));
    }
};

struct Added {      // to the residual stream, times a gate
    const bf16* x;  // what this thread wrote, or was given
    const float* gate;
    bf16* out;
    struct Operands {
        unsigned pair;
        float gate_a, gate_b;
    };
    __device__ Operands read(int m, int column) const {
        unsigned pair = ::read(reinterpret_cast<const unsigned*>(x + m * WIDTH + column));
        if constexpr (!ADAPTIVE) return {pair, 1.f, 1.f};
        return {pair, ::read(gate + column), ::read(gate + column + 1)};
    }
    __device__ void write(int m, int column, float a, float b, Operands with) const {
        ::write(reinterpret_cast<unsigned*>(out + m * WIDTH + column), a * with.gate_a + low_half(with.pair),
                b * with.gate_b + high_half(with.pair));
    }
};

// --- attention ------------------------------------------------------------------------------------------------------

struct Attention {
    const Arguments& given;
    Memory& memory;
    const bf16* heads;  // [tokens, QKV]
    bf16* out;          // [tokens, HEADS * HEAD]
    Self self;
    int layer, blocks;  // blocks: of pairs, of an observation
    int first, keys;    // of this block: the cached ones, then the tokens' own

    __device__ Attention(const Self& self, const Arguments& given, int layer, const bf16* heads, bf16* out,
                         Memory& memory)
        : given(given), memory(memory), heads(heads), out(out), self(self), layer(layer) {
        int all = given.prefix + given.length, each = ((all + CLUSTER - 1) / CLUSTER + 15) / 16 * 16;
        first = self.rank * each;
        keys = min(each, (all - first + 15) / 16 * 16);  // none, or less, if the others have all
        blocks = (given.length * HEADS + ROWS - 1) / ROWS;
    }

    struct Unit {  // what a cluster does at a time: a block of pairs, a share of the channels
        int group, block;
        __device__ int element() const { return group / SHARES; }
        __device__ int share() const { return group % SHARES; }
    };
    __device__ Unit unit(int group, int block) const {
        for (; block >= blocks; block -= blocks) group++;
        return {group, block};
    }
    __device__ bool exists(const Unit& unit) const { return unit.group < given.batch * SHARES; }

    __device__ void read_ahead() const {
        Unit unit = this->unit(0, self.cluster);
        if (exists(unit)) read_cached(unit);
    }
    __device__ void read_cached(const Unit& unit) const {  // asynchronously
        int rows = min(keys, given.prefix - first);
        int64 start = ((int64(layer) * given.batch + unit.element()) * given.prefix + first) * HEAD;
        const bf16 *key = given.keys + start, *value = given.values + start + unit.share() * CHANNELS;
        for (int i = self.warp, d = self.lane * 8; i < rows; i += WARPS)
            copy_async(&memory.keys[i][d], key + unsigned(i * HEAD + d));
        constexpr int LANES = CHANNELS / 8;  // of a row
        for (int i = self.thread / LANES, d = self.thread % LANES * 8; i < rows; i += THREADS / LANES)
            copy_async(&memory.values[i][d], value + unsigned(i * HEAD + d));
    }
    __device__ void look(int element) const {  // which keys are to be seen
        int key = first + self.thread;
        if (int(self.thread) >= keys) return;
        uint8 seen = key < given.prefix + given.length;
        if (given.visible != nullptr && key < given.prefix) seen = given.visible[element * given.prefix + key];
        memory.seen[self.thread] = seen;
    }

    __device__ void read_own(const Unit& unit) const {  // q, and of the tokens' own keys and values what is here
        int pair = unit.block * ROWS + self.warp, d = self.lane * 8, row = unit.element() * given.length;
        auto at = [&](int token, int column) {
            return reinterpret_cast<const uint4*>(heads + unsigned((row + token) * QKV + column));
        };
        const uint4* q_at = at(pair / HEADS, pair % HEADS * HEAD + d);
        bool asks = pair < given.length * HEADS;
        uint4 none = make_uint4(0, 0, 0, 0), q = asks ? peek(q_at) : none;
        for (int i = max(given.prefix - first, 0) + self.warp; i < keys; i += WARPS) {
            int own = first + i - given.prefix;
            uint4 k = none, v = none;
            if (own < given.length) {
                const uint4 *k_at = at(own, HEADS * HEAD + d), *v_at = at(own, (HEADS + 1) * HEAD + d);
                k = peek(k_at), v = peek(v_at);
                k = until_written(k, k_at), v = until_written(v, v_at);
            }
            *reinterpret_cast<uint4*>(&memory.keys[i][d]) = k;
            if (d / CHANNELS == unit.share()) *reinterpret_cast<uint4*>(&memory.values[i][d % CHANNELS]) = v;
        }
        if (asks) q = until_written(q, q_at);
        *reinterpret_cast<uint4*>(&memory.attention.q[self.warp][d]) = q;
        wait_for_copies();
    }

    __device__ void score(int block) const {  // a warp has 16 keys, and half of the channels
        AttentionMemory& own = memory.attention;
        int lane = self.lane, tile = self.warp / 2 * 16, part = self.warp % 2;
        if (tile >= keys) return;
        float sums[2][4] = {};
#pragma unroll
        for (int i = 0; i < HEAD / 32; i++) {
            unsigned a[4], b[4];
            int d = part * (HEAD / 2) + i * 16;
            load_matrices(a, &own.q[lane % 16][d + lane / 16 * 8]);
            load_matrices(b, &memory.keys[tile + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]);
            multiply(sums[0], a, b[0], b[1]);
            multiply(sums[1], a, b[2], b[3]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int key = tile + i * 8 + lane % 4 * 2;
            bool seen = memory.seen[key], seen2 = memory.seen[key + 1];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int row = lane / 4 + j * 8;
                bool state = given.state_first && block * ROWS + row < HEADS;  // it sees none of the tokens after it
                float2 pair;
                pair.x = seen && !(state && first + key > given.prefix) ? sums[i][2 * j] * SCALE : lowest();
                pair.y = seen2 && !(state && first + key >= given.prefix) ? sums[i][2 * j + 1] * SCALE : lowest();
                *reinterpret_cast<float2*>(&own.scores[part][row][key]) = pair;
            }
        }
    }

    __device__ float2 weigh() const {  // a warp has a row; returns the highest score, and a lane's sum of weights
        AttentionMemory& own = memory.attention;
        int row = self.warp, lane = self.lane;
        float x[KEYS / 32], best = lowest(), total = 0.f;
#pragma unroll
        for (int i = 0; i < KEYS / 32; i++) {
            int key = lane + i * 32;
            x[i] = key < keys ? own.scores[0][row][key] + own.scores[1][row][key] : lowest();
            best = fmaxf(best, x[i]);
        }
        best = highest_of_warp(best);
        float from = best == lowest() ? 0.f : best;
#pragma unroll
        for (int i = 0; i < KEYS / 32; i++) {
            float weight = exp2_of(x[i] - from);
            total += weight;
            own.weights[row][lane + i * 32] = to_bf16(weight);
        }
        return {best, total};
    }

    __device__ void sum_values() const {  // a warp has 8 channels
        AttentionMemory& own = memory.attention;
        int lane = self.lane, d = self.warp * 8;
        float sums[2][4] = {};
#pragma unroll
        for (int key = 0; key < KEYS; key += 32) {
            if (key >= keys) break;
            unsigned a[4], a2[4], b[4];
            load_matrices(a, &own.weights[lane % 16][key + lane / 16 * 8]);
            load_matrices(a2, &own.weights[lane % 16][key + 16 + lane / 16 * 8]);
            load_transposed(b, &memory.values[min(key + lane, keys - 1)][d]);
            multiply(sums[0], a, b[0], b[1]);
            multiply(sums[1], a2, b[2], b[3]);
        }
        int channel = d + lane % 4 * 2, to = d / SLICE;
        unsigned there = in_block(&memory.partial[self.rank][lane / 4][channel % SLICE], to);
        unsigned count = in_block(&memory.partial_there, to);
        send(there, count, __float_as_uint(sums[0][0] + sums[1][0]), __float_as_uint(sums[0][1] + sums[1][1]));
        send(there + 8 * SLICE * sizeof(float), count, __float_as_uint(sums[0][2] + sums[1][2]),
             __float_as_uint(sums[0][3] + sums[1][3]));
    }

    __device__ void send_totals(float2 of_row) const {
        for (int i = 16; i > 0; i /= 2) of_row.y += __shfl_xor_sync(~0u, of_row.y, i);
        if (self.lane < CLUSTER)
            send(in_block(&memory.totals[self.rank][self.warp], self.lane), in_block(&memory.partial_there, self.lane),
                 __float_as_uint(of_row.x), __float_as_uint(of_row.y));
    }

    __device__ void finish(const Unit& unit) const {  // a thread has two channels of a row
        int row = self.thread / (SLICE / 2), d = self.thread % (SLICE / 2) * 2, pair = unit.block * ROWS + row;
        if (row >= ROWS || pair >= given.length * HEADS) return;
        float highest = lowest(), total = 0.f, y = 0.f, y2 = 0.f;
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) highest = fmaxf(highest, memory.totals[i][row].x);
        if (highest == lowest()) highest = 0.f;
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) {
            float2 part = memory.totals[i][row], sums = *reinterpret_cast<float2*>(&memory.partial[i][row][d]);
            float weight = exp2_of(part.x - highest);
            total += weight * part.y;
            y += weight * sums.x;
            y2 += weight * sums.y;
        }
        float each = total > 0.f ? reciprocal(total) : 1.f;
        int at =
            (unit.element() * given.length * HEADS + pair) * HEAD + unit.share() * CHANNELS + self.rank * SLICE + d;
        write(reinterpret_cast<unsigned*>(out + unsigned(at)), y * each, y2 * each);
    }

    // What a layer reads, into L2, by the clusters that have no unit; by all if all have one.
    __device__ void fetch(int layer) const {
        int busy = min(blocks * SHARES * given.batch, CLUSTERS) % CLUSTERS;
        if (self.cluster < busy || self.warp > 0 || self.lane >= ARRAYS) return;
        Array array = given.arrays[self.lane];
        unsigned parts = (CLUSTERS - busy) * CLUSTER, each = (array.bytes / parts + 16) / 16 * 16;
        unsigned from = (self.block - busy * CLUSTER) * each;
        if (from < array.bytes)
            fetch_into_l2(array.first + int64(layer) * array.bytes + from, min(each, array.bytes - from));
    }

    __device__ void run(int following, Steps& steps) const {
        Unit unit = this->unit(0, self.cluster);
        fetch(following);
        for (int loaded = unit.group; exists(unit);) {
            if (self.thread == 0) expect(&memory.partial_there, int(sizeof(memory.partial) + sizeof(memory.totals)));
            if (unit.group != loaded) read_cached(unit);
            if (unit.element() != steps.looked) look(unit.element());
            loaded = unit.group, steps.looked = unit.element();
            read_own(unit);
            __syncthreads();
            score(unit.block);
            __syncthreads();
            float2 of_row = weigh();
            __syncthreads();
            sum_values();
            send_totals(of_row);
            wait_for_bytes(&memory.partial_there, steps.partial++);
            finish(unit);
            unit = this->unit(unit.group, unit.block + CLUSTERS);
            if (exists(unit)) wait_for_cluster();  // until the partial sums are read
        }
        __syncthreads();
    }
};

// --- the layers -----------------------------------------------------------------------------------------------------

static_assert(sizeof(Memory) <= SHARED_MEMORY, "it has room");

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1)
    run_layers(const __grid_constant__ Arguments given) {
    Memory& memory = shared_memory<Memory>();
    Self self;
    if (self.thread == 0) {
        for (uint64* count :
             {&memory.codes_there[0], &memory.codes_there[1], &memory.sums_there, &memory.partial_there})
            initialize(count, 1);
        publish_counts();
    }
    wait_for_cluster();
    Steps steps = {0, 0, 0, -1};
    Matmul<QKV, WIDTH, QKV_BLOCK, true, QKV_PERMUTED, HEAD / 2> qkv;
    Matmul<WIDTH, HEADS * HEAD, 0, false, false, 1> o;
    Matmul<2 * MLP, WIDTH, UP_BLOCK, true, UP_PERMUTED, MLP> gate_up;
    Matmul<WIDTH, MLP, DOWN_BLOCK, false, DOWN_PERMUTED, 1> down;
    unsigned tokens = given.batch * given.length;
    const bf16* x = given.x;
    qkv.read_ahead(self, given.qkv, 0);
    Attention(self, given, 0, nullptr, nullptr, memory).read_ahead();
    for (int layer = 0; layer < given.layers; layer++) {
        const float *norm = given.norms + 2 * layer * NORM, *norm2 = norm + NORM;
        bf16* heads = given.buffers + layer * tokens * BUFFER;
        bf16 *attended = heads + tokens * QKV, *middle = attended + tokens * (HEADS * HEAD);
        bf16 *hidden = middle + tokens * WIDTH, *out = layer + 1 < given.layers ? hidden + tokens * MLP : given.out;
        int following = layer + 1 < given.layers ? layer + 1 : 0;
        qkv.run(
            self, given, given.qkv, layer, x, layer == 0, norm, Turned{given.cos, given.sin, heads},
            [&] { o.read_ahead(self, given.o, layer); }, steps, memory);
        Attention(self, given, layer, heads, attended, memory).run(following, steps);
        o.run(
            self, given, given.o, layer, attended, false, nullptr, Added{x, norm + 2 * WIDTH, middle},
            [&] { gate_up.read_ahead(self, given.gate_up, layer); }, steps, memory);
        gate_up.run(
            self, given, given.gate_up, layer, middle, false, norm2, Gated{hidden},
            [&] {
                down.read_ahead(self, given.down, layer);
                Attention(self, given, following, nullptr, nullptr, memory).read_ahead();
            },
            steps, memory);
        down.run(
            self, given, given.down, layer, hidden, false, nullptr, Added{middle, norm2 + 2 * WIDTH, out},
            [&] { qkv.read_ahead(self, given.qkv, following); }, steps, memory);
        x = out;
    }
    wait_for_cluster();  // nobody sends to a block that is gone
}
