// The kernel of matmul_cuda.py: int8 codes times int4 or int8 weights, of many tokens. It needs Hopper's wgmma.
//
// A block makes TOKENS x ROWS sums, tile after tile; a step takes CHANNELS bytes of every row of both operands. The
// copy engine (TMA) fills stages of shared memory, ahead into the next tile; two warpgroups multiply what is in them,
// each half of the weight's rows, which it unpacks into registers, by all tokens, and finishes what it has. Where tiles
// are few, the PARTS blocks of a cluster have a part of the channels each; sums go through shared memory, and a block
// finishes every PARTS-th eight tokens.
//
// With GeGLU a tile's halves are gate and up of the same channels, and a warp takes eight rows of both, so that one
// thread has both.
//
// Defined by matmul_cuda.py: `multiply`, the wgmma of that many TOKENS; TOKENS, ROWS, STAGES, PARTS; BITS of a weight;
// GEGLU, RESIDUAL: whether there is one.

#include "numbers.cuh"

constexpr int WARPS = 8;
constexpr int CHANNELS = 128;
constexpr int SLICES = CHANNELS / 32;  // that one wgmma takes
constexpr int HALF = ROWS / 2;
constexpr int HEIGHT = HALF / 64;  // wgmmas for the rows of a warpgroup
constexpr int NIBBLES = 8 / BITS;  // channels in a byte: k, and k + K / 2
constexpr int GROUPS = TOKENS / 8;
constexpr int MOST = (GROUPS + PARTS - 1) / PARTS;  // that a block finishes
static_assert(TOKENS % 16 == 0 && (!GEGLU || HEIGHT == 2));
static_assert(PARTS == 1 || TOKENS * ROWS * 4 <= STAGES * CHANNELS * (ROWS + NIBBLES * TOKENS));

struct Arguments {
    const float* act_scale;     // [tokens]
    const float* weight_scale;  // [rows]
    const bf16* residual;       // [tokens, rows]
    bf16* out;                  // [tokens, rows], or [tokens, rows / 2] with GeGLU
    int tokens, rows, bytes;    // bytes: of a row of the weight
};

struct Stage {
    uint8 weight[ROWS][CHANNELS];
    uint8 codes[NIBBLES][TOKENS][CHANNELS];
};

struct Memory {
    Stage stages[STAGES];
    uint64 filled[STAGES], emptied[STAGES];
};

__device__ void read_slice(unsigned (&w)[4], const Stage& stage, int sixteen, int lane, int slice) {  // of 16 rows
    int row = GEGLU ? sixteen * 8 + lane % 8 + lane / 8 % 2 * HALF : sixteen * 16 + lane % 16;
    int piece = (2 * slice + lane / 16) ^ (row % 8);
    load_matrices(w, &stage.weight[row][16 * piece]);
}

// A tile, and the part of its channels that a block has.
struct Place {
    int first_token, first_row;
    int first_step, steps, part, tiles;

    __device__ explicit Place(const Arguments& given) : part(blockIdx.x % PARTS) {
        tiles = (given.tokens + TOKENS - 1) / TOKENS * ((given.rows + ROWS - 1) / ROWS);
        int all = (given.bytes + CHANNELS - 1) / CHANNELS;
        first_step = all * part / PARTS;
        steps = all * (part + 1) / PARTS - first_step;
    }
    __device__ void go_to(const Arguments& given, int tile) {
        int heights = (given.tokens + TOKENS - 1) / TOKENS;
        first_token = tile % heights * TOKENS;
        first_row = tile / heights * (GEGLU ? HALF : ROWS);
    }
};

// What one thread has the copy engine do: the next step, once all warps are done with what its stage had.
struct Filling {
    const TensorMap &weight, &codes;
    const Arguments& given;
    Memory& memory;
    Place place;
    int tile = blockIdx.x / PARTS, step = 0, turn = 0;

    __device__ void operator()() {
        if (tile >= place.tiles) return;
        int slot = turn % STAGES, column = (place.first_step + step) * CHANNELS;
        Stage& stage = memory.stages[slot];
        uint64* count = &memory.filled[slot];
        if (turn >= STAGES) wait_for_bytes(&memory.emptied[slot], turn / STAGES - 1);
        place.go_to(given, tile);
        expect(count, sizeof(Stage));
        load_box(stage.weight, weight, column, place.first_row, 0, count);
        load_box(stage.codes, codes, column, place.first_token, 0, count);
        turn++;
        if (++step == place.steps) step = 0, tile += gridDim.x / PARTS;
    }
};

// The products of one step, on their way. A nibble is unpacked to 16 times what it is.
__device__ void multiply_step(int (&sums)[HEIGHT][TOKENS / 2], const Stage& stage, int warp, int lane) {
    unsigned w[HEIGHT][SLICES][NIBBLES][4];
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int i = 0; i < SLICES; i++) {
            unsigned packed[4];
            read_slice(packed, stage, warp * HEIGHT + h, lane, i);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if constexpr (BITS == 4)
                    w[h][i][0][j] = packed[j] << 4 & 0xF0F0F0F0, w[h][i][1][j] = packed[j] & 0xF0F0F0F0;
                else
                    w[h][i][0][j] = packed[j];
        }
    begin_products();
#pragma unroll
    for (int i = 0; i < SLICES; i++)
#pragma unroll
        for (int j = 0; j < NIBBLES; j++)
#pragma unroll
            for (int h = 0; h < HEIGHT; h++) multiply(sums[h], w[h][i][j], described(stage.codes[j]) + 2 * i);
    commit_products();
}

// From two channels of each of two such matrices to four of one, so that a token's sixteen lie in a row; and back.
__device__ uint2 exchanged(uint2 pairs) {
    bool odd = threadIdx.x % 2;
    unsigned got = __shfl_xor_sync(~0u, odd ? pairs.x : pairs.y, 1);
    return odd ? uint2{got, pairs.y} : uint2{pairs.x, got};
}

// What a warp finishes of a tile: sixteen of the weight's rows at a time, or with GeGLU eight of gate and of up, by
// eight tokens.
struct Finishing {
    const Arguments& given;
    int first_token, end, channel, width;  // channel: the first of four that a lane writes
    float weight_scale[HEIGHT][2];
    float2 act_scales[(MOST * 4 + 31) / 32];  // of two tokens; lanes share them

    __device__ Finishing(const Arguments& given, const Place& place, int warp, int lane) : given(given) {
        constexpr int ROW = GEGLU ? 8 : 16;
        int first = place.first_row + warp * HEIGHT * ROW;
        first_token = place.first_token, end = given.tokens, width = GEGLU ? given.rows / 2 : given.rows;
        channel = first + lane % 2 * 8 + lane % 4 / 2 * 4;
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = first + h * ROW + lane / 4 + (GEGLU ? 0 : half * 8);
                float scale = row < width ? given.weight_scale[row + (GEGLU ? half * width : 0)] : 0.f;
                weight_scale[h][half] = BITS == 4 ? scale / 16 : scale;
            }
#pragma unroll
        for (int i = 0; i < sizeof(act_scales) / sizeof(float2); i++) {
            int pair = i * 32 + lane, token = first_token + 8 * (pair / 4 * PARTS + place.part) + 2 * (pair % 4);
            act_scales[i].x = token < end ? given.act_scale[token] : 0.f;
            act_scales[i].y = token + 1 < end ? given.act_scale[token + 1] : 0.f;
        }
    }
    __device__ float2 act_scale(int i) const {  // of this block's i-th eight tokens
        float2 held = act_scales[i / 8];
        int lane = i % 8 * 4 + threadIdx.x % 4;
        return {__shfl_sync(~0u, held.x, lane), __shfl_sync(~0u, held.y, lane)};
    }
    __device__ uint2 read(int group, int h) const {  // the residual stream
        int token = first_token + 8 * group + threadIdx.x % 32 / 4, at = channel + 16 * h;
        if (token >= end || at >= width) return {0, 0};
        return *reinterpret_cast<const uint2*>(given.residual + int64(token) * width + at);
    }
    __device__ void write(int group, int h, uint2 pairs) const {
        int token = first_token + 8 * group + threadIdx.x % 32 / 4, at = channel + 16 * h;
        pairs = exchanged({transposed(pairs.x), transposed(pairs.y)});
        if (token < end && at < width) *reinterpret_cast<uint2*>(given.out + int64(token) * width + at) = pairs;
    }
    __device__ void operator()(int i, int group, const int4 (&sums)[HEIGHT], const uint2 (&residual)[HEIGHT]) const {
        float2 act = act_scale(i);
        unsigned y[HEIGHT][2];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++) {
            uint2 more = {0, 0};
            if constexpr (RESIDUAL) more = exchanged(residual[h]), more = {transposed(more.x), transposed(more.y)};
            y[h][0] = scaled({sums[h].x, sums[h].y}, weight_scale[h][0], act, more.x);
            y[h][1] = scaled({sums[h].z, sums[h].w}, weight_scale[h][1], act, more.y);
        }
        if constexpr (GEGLU)
            write(group, 0, {geglu(y[0][0], y[0][1]), geglu(y[HEIGHT - 1][0], y[HEIGHT - 1][1])});
        else
#pragma unroll
            for (int h = 0; h < HEIGHT; h++) write(group, h, {y[h][0], y[h][1]});
    }
    __device__ static unsigned scaled(int2 sums, float weight_scale, float2 act_scale, unsigned more) {
        float x = float(sums.x) * weight_scale * act_scale.x, y = float(sums.y) * weight_scale * act_scale.y;
        return RESIDUAL ? to_pair(x + low_half(more), y + high_half(more)) : to_pair(x, y);
    }
};

// Sums of all parts, which lie at the same place in their blocks. What is read in a block of the cluster takes a
// detour, even if it is one's own.
__device__ int4 sums_of(const int4* at, int own) {
    int4 sums = *at;
#pragma unroll
    for (int part = 1; part < PARTS; part++) {
        int4 x = read_in_block(at, (own + part) % PARTS);
        sums.x += x.x, sums.y += x.y, sums.z += x.z, sums.w += x.w;
    }
    return sums;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) __cluster_dims__(PARTS, 1, 1)
    matmul(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap codes, const Arguments given) {
    Memory& memory = shared_memory<Memory>();
    Place place(given);
    Filling fill = {weight, codes, given, memory, place};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = 0;
    if (warp == 0 && elected()) {
        for (int i = 0; i < STAGES; i++) initialize(&memory.filled[i], 1), initialize(&memory.emptied[i], WARPS);
        publish_counts();
        for (int i = 0; i < STAGES; i++) fill();
    }
    __syncthreads();
    for (int tile = blockIdx.x / PARTS; tile < place.tiles; tile += gridDim.x / PARTS) {
        place.go_to(given, tile);
        const Finishing finish(given, place, warp, lane);
        int sums[HEIGHT][TOKENS / 2] = {};
        for (int step = 0; step < place.steps; step++, turn++) {
            wait_for_bytes(&memory.filled[turn % STAGES], turn / STAGES);
            multiply_step(sums, memory.stages[turn % STAGES], warp, lane);
            if (turn > 0 && warp == 0 && elected()) fill();  // what the step before had
            wait_for_products();
            if (lane == 0) arrive(&memory.emptied[turn % STAGES]);
        }
        uint2 residual[MOST][HEIGHT];
#pragma unroll
        for (int i = 0; i < (RESIDUAL ? MOST * HEIGHT : 0); i++)
            residual[i / HEIGHT][i % HEIGHT] = finish.read(i / HEIGHT * PARTS + place.part, i % HEIGHT);
        int4* exchange = reinterpret_cast<int4*>(&memory) + threadIdx.x;  // sums lie where stages lay
        if constexpr (PARTS > 1) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < HEIGHT * GROUPS; i++) {
                const int* four = &sums[i % HEIGHT][i / HEIGHT * 4];
                exchange[i * 32 * WARPS] = {four[0], four[1], four[2], four[3]};
            }
            wait_for_cluster();
        }
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            int group = i * PARTS + place.part;
            if (PARTS > 1 && group >= GROUPS) break;
            int4 all[HEIGHT];
#pragma unroll
            for (int h = 0; h < HEIGHT; h++) {
                const int* four = &sums[h][i * 4];
                if constexpr (PARTS > 1)
                    all[h] = sums_of(exchange + (group * HEIGHT + h) * 32 * WARPS, place.part);
                else
                    all[h] = {four[0], four[1], four[2], four[3]};
            }
            finish(i, group, all, residual[i]);
        }
    }
    if constexpr (PARTS > 1) leave_cluster();
}
