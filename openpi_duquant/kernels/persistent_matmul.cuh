// Of persistent.cu: W4A8.

#pragma once

#include "persistent_rows.cuh"

// Codes of 16 tokens times a segment of the weights of some tiles of columns. Nibbles are moved to the high half of a
// byte, where they are 16 times what they stand for; the sums are shifted back in the end. The last tile is left out,
// unless `all` are there.
template <int UNITS, int EACH>
__device__ void multiply_segment(int (&sums)[UNITS][4], uint4 low, uint4 low8, uint4 high, uint4 high8,
                                 const uint4 (&w)[UNITS][EACH], int segment, bool all) {
    const unsigned *a0 = &low.x, *a1 = &low8.x, *a2 = &high.x, *a3 = &high8.x;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            if (unit == UNITS - 1 && !all) break;
            unsigned b = (&w[unit][segment].x)[i];
            multiply(sums[unit], {a0[i], a1[i], a2[i], a3[i]}, (b << 4) & 0xF0F0F0F0, b & 0xF0F0F0F0);
        }
}

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

// x [tokens, K] through norm, permutation, rotation and rounding, times a matrix [N, K]. The copy engine brings the
// weights meanwhile.
template <int N, int K, int BLOCK, bool NORMED, bool PERMUTED, int DISTANCE>
struct Matmul {
    static constexpr bool WIDE = N > K;
    static constexpr int TILES = TILES_OF_CLUSTER<N>, OWN = OWN_TILES<N>;  // of 8 columns
    static constexpr int RUN = WIDE ? K / 2 : K / 2 / CLUSTER;             // channels that lie together in a block
    static constexpr int STRIDE = 2 * RUN + SEGMENT;                       // from a row's codes to the next one's
    static constexpr int PARTS = WIDE ? WIDE_PARTS : 1;  // of the segments of a row, for as many warps
    static constexpr int EACH = RUN / SEGMENT / PARTS;   // segments
    static constexpr int ABREAST = WARPS / PARTS;        // tiles at a time
    static constexpr int UNITS = ((WIDE ? OWN : TILES) + ABREAST - 1) / ABREAST;  // tiles of a warp
    static constexpr int SOURCES = WIDE ? PARTS : CLUSTER;                        // of the sums of a column
    static constexpr int ITEMS = (ROWS * OWN * 4 + THREADS - 1) / THREADS;  // a row and a pair of columns, of a thread
    static_assert(EACH * PARTS * SEGMENT == RUN, "no part is empty");
    static_assert(ROWS * STRIDE <= sizeof(Memory::codes[0]), "codes have a place");
    static_assert(SOURCES * ROWS * OWN * 8 * sizeof(int) <= sizeof(Memory::sums), "sums have a place");

    const Matrix& matrix;
    const TensorMap* map;  // of a deep matrix

    __device__ void ask_for_weights(const Share<N, WIDE>& share, const Self& self, int layer, Memory& memory) const {
        uint64* count = &memory.weights_there;
        if constexpr (WIDE) {
            const uint8* weight = matrix.weight + int64(layer) * N * RUN;
            int first = share.first * 4, end = first + share.own * 4;  // pairs of columns; they lie together
            expect(count, 2 * (end - first) * RUN);
            for (int pair = first, next; pair < end; pair = next) {
                next = min(end, (pair / DISTANCE + 1) * DISTANCE);
                for (int i = 0; i < 2; i++)
                    load_bytes(memory.wide[i] + (pair - first) * RUN,
                               weight + (column_of<N, DISTANCE>(pair) + i * DISTANCE) * RUN, (next - pair) * RUN,
                               count);
            }
        } else {
            constexpr int SEGMENTS = RUN / SEGMENT;
            expect(count, SEGMENTS * sizeof(memory.deep[0]));
            for (int i = 0; i < SEGMENTS; i++)
                load_box(memory.deep[i], *map, self.rank * RUN + i * SEGMENT, share.first * 8, layer, count);
        }
    }
    // Those that a warp multiplies. Four lanes have a row; of pairs of rows, eight lanes meet in no bank.
    __device__ static void read_weights(uint4 (&w)[UNITS][EACH], const Self& self, const Memory& memory) {
        int group = self.lane / 4, piece = self.lane % 4;
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int tile = min(self.warp / PARTS + unit * ABREAST, (WIDE ? OWN : TILES) - 1), row = tile * 8 + group;
                int segment = self.warp % PARTS * EACH + i, pair = tile * 4 + group / 2;
                const uint8* at = WIDE ? &memory.wide[group % 2][pair * RUN + segment * SEGMENT + piece * 16]
                                       : &memory.deep[segment][row][(piece ^ row / 2 % 4) * 16];
                w[unit][i] = *reinterpret_cast<const uint4*>(at);
            }
    }

    // A thread's codes of a row, to all who multiply them.
    __device__ static void send_codes(const unsigned (&codes)[K / HALF / 4], const Self& self, uint8* row,
                                      uint64* codes_there) {
        constexpr int E = K / HALF;
        int first = self.thread % HALF * E, at = WIDE ? first : first / (K / 2) * RUN + first % RUN;
#pragma unroll
        for (int i = 0; i < (WIDE ? CLUSTER : 1); i++) {
            int to = WIDE ? (self.warp + i) % CLUSTER : first % (K / 2) / RUN;  // not all to the same at once
            unsigned there = in_block(row + at, to), count = in_block(codes_there, to);
            if constexpr (E == 4) send(there, count, codes[0]);
            if constexpr (E == 8) send(there, count, codes[0], codes[1]);
            if constexpr (E == 16) send(there, count, make_uint4(codes[0], codes[1], codes[2], codes[3]));
        }
    }

    // Sums of 16 tokens' codes, to where they are put together.
    __device__ static void multiply(const uint4 (&w)[UNITS][EACH], const Self& self, const Share<N, WIDE>& share,
                                    const uint8* codes, int rows, Memory& memory) {
        int group = self.lane / 4, lane = self.lane % 4, part = self.warp % PARTS;
        bool all = self.warp / PARTS + (UNITS - 1) * ABREAST < share.tiles;  // of the warp's tiles are there
        constexpr int CHAINS = WIDE ? 1 : 2;  // of products, which do not wait for each other
        int sums[CHAINS][UNITS][4] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint8* at = codes + group * STRIDE + (part * EACH + i) * SEGMENT + lane * 16;
            auto row = [&](int from) { return *reinterpret_cast<const uint4*>(at + from); };
            uint4 low = row(0), low8 = row(8 * STRIDE), high = row(RUN), high8 = row(8 * STRIDE + RUN);
            multiply_segment<UNITS, EACH>(sums[i % CHAINS], low, low8, high, high8, w, i, all);
        }
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            int tile = self.warp / PARTS + unit * ABREAST;
            if (tile >= share.tiles) break;
            int source = WIDE ? part : self.rank, (&own)[4] = sums[0][unit];
            for (int i = 0; i < (CHAINS > 1 ? 4 : 0); i++) own[i] += sums[CHAINS - 1][unit][i];
            int* place = &memory.sums[(source * ROWS + group) * (OWN * 8) + tile % OWN * 8 + lane * 2];
            constexpr int LOWER = 8 * OWN * 8;  // eight rows below
            if constexpr (WIDE) {
                auto write = [](int* at, int a, int b) { *reinterpret_cast<int2*>(at) = make_int2(a, b); };
                if (group < rows) write(place, own[0], own[1]);
                if (group + 8 < rows) write(place + LOWER, own[2], own[3]);
            } else {
                unsigned there = in_block(place, tile / OWN), count = in_block(&memory.sums_there, tile / OWN);
                if (group < rows) send(there, count, own[0], own[1]);
                if (group + 8 < rows) send(there + LOWER * sizeof(int), count, own[2], own[3]);
            }
        }
    }

    // The turn-th of all matmuls, of which a layer has four. `finish` takes the sums; `meanwhile` is called by a thread
    // that has the fewest of them.
    template <class Finish, class Meanwhile>
    __device__ void run(const Self& given_self, const Arguments& given, int turn, const bf16* x, bool written,
                        const float* norm, const Finish& finish, const Meanwhile& meanwhile, Memory& memory) const {
        int layer = turn / 4;
        Self starting(given_self);
        Share<N, WIDE> share(starting);
        Channels<K, NORMED, PERMUTED> channels(starting, norm,
                                               PERMUTED ? matrix.permutation + int64(layer) * K : nullptr);
        if (starting.thread == 0) ask_for_weights(share, starting, layer, memory);
        for (int pass = 0; pass < PASSES; pass++) {
            Self self(starting);
            int first = pass * ROWS, step = turn * PASSES + pass;
            int rows = min(ROWS, TOKENS - first), mine = self.rank + self.half * CLUSTER;
            not_before(rows);  // where the compiler knows it, what it makes of it takes 10 us a step more
            uint8* codes = memory.codes[step % 2];
            uint64* codes_there = &memory.codes_there[step % 2];
            if (self.thread == 0) {
                expect(codes_there, rows * 2 * RUN + ROWS * int(sizeof(float)));
                if (!WIDE) expect(&memory.sums_there, SOURCES * rows * share.own * 8 * int(sizeof(int)));
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
            float act_scale = 0.f;
            if (mine < rows) {
                unsigned coded[K / HALF / 4];
                act_scale = transform<K, BLOCK>(self, x + unsigned((first + mine) * K), written, channels,
                                                memory.row[self.half], coded, memory);
                send_codes(coded, self, codes + mine * STRIDE, codes_there);
            }  // all send something: who has it from all knows that all are here
            if (self.thread % HALF < CLUSTER) {
                int to = self.thread % HALF;
                send(in_block(&memory.act_scale[step % 2][mine], to), in_block(codes_there, to),
                     __float_as_uint(act_scale));
            }

            if (pass == 0) wait_for_bytes(&memory.weights_there, turn);
            // warps without a tile leave shared memory to the others; with more passes that would spill registers
            bool multiplies = WIDE || PASSES > 1 || self.warp < TILES;
            uint4 w[UNITS][EACH];
            if (multiplies) read_weights(w, self, memory);
            wait_for_bytes(codes_there, step / 2);
            if (multiplies) multiply(w, self, share, codes, rows, memory);
            if (pass == PASSES - 1 && self.thread == THREADS - 1) meanwhile();
            if constexpr (WIDE)
                __syncthreads();
            else
                wait_for_bytes(&memory.sums_there, turn / 2 * PASSES + pass);
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
        put_one(out, m * QKV + column, a * cos - b * sin);
        put_one(out, m * QKV + column + HEAD / 2, b * cos + a * sin);
    }
};

struct Gated {  // GeGLU; a pair is a channel of the gate and of up
    bf16* out;
    struct Operands {};
    __device__ Operands read(int, int) const { return {}; }
    __device__ void write(int m, int column, float gate, float up, Operands) const {
        put_one(out, m * MLP + column, low_half(geglu(to_pair(gate, 0.f), to_pair(up, 0.f))));
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
        put_pair(out, m * WIDTH + column, a * with.gate_a + low_half(with.pair),
                 b * with.gate_b + high_half(with.pair));
    }
};
