// The kernel of matmul_cuda.py: int8 codes times int4 or int8 weights, of many tokens. It needs Hopper's wgmma.
//
// A block makes TOKENS x ROWS sums, tile after tile; a step takes CHANNELS bytes of every row of both operands. The copy
// engine (TMA) fills stages of shared memory, ahead into the next tile; two warpgroups multiply what is in them, each
// half of the weight's rows, which it unpacks into registers, by all tokens. Then sums go through shared memory, CHUNK
// tokens at a time, to warps that finish a token each.
// Where tiles are few, the PARTS blocks of a cluster have a part of the channels each, and finish every PARTS-th token.
//
// With GeGLU a tile's halves are gate and up of the same channels, so that one thread has both.
//
// Defined by matmul_cuda.py: `multiply`, the wgmma of that many TOKENS; TOKENS, ROWS, STAGES, PARTS; BITS of a weight;
// GEGLU, RESIDUAL: whether there is one.

#include "hopper.cuh"

constexpr int WARPS = 8;
constexpr int CHANNELS = 128;
constexpr int SLICES = CHANNELS / 32;  // that one wgmma takes
constexpr int HALF = ROWS / 2;
constexpr int HEIGHT = HALF / 64;                  // wgmmas for the rows of a warpgroup
constexpr int NIBBLES = 8 / BITS;                  // channels in a byte: k, and k + K / 2
constexpr int CHUNK = PARTS == 1 ? WARPS : TOKENS;
constexpr int EVERY = PARTS * WARPS;               // a warp finishes every so many tokens
constexpr int MOST = (CHUNK + EVERY - 1) / EVERY;  // of a chunk
constexpr int WIDTH = ROWS + 4;                    // of a row of sums; the rest against bank conflicts
static_assert(TOKENS % 16 == 0 && TOKENS <= 32 * EVERY && CHUNK * WIDTH * 4 <= STAGES * CHANNELS * (ROWS + TOKENS));

struct alignas(64) TensorMap {  // CUtensorMap
    uint64 opaque[16];
};

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
    int sums[PARTS == 1 ? 2 * CHUNK * WIDTH : 1];  // of even and odd chunks; of all tokens, they lie where stages lay
    uint64 filled[STAGES], emptied[STAGES];
};

__device__ void load_box(void* to, const TensorMap& map, int column, int row, uint64* count) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(count))
        : "memory");
}
__device__ void initialize(uint64* count, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(count)), "r"(arrivals) : "memory");
}
__device__ void arrive(uint64* count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(count)) : "memory");
}
__device__ void wait_for_parts() {
    if constexpr (PARTS > 1)
        wait_for_cluster();
    else
        __syncthreads();
}

// Rows of 128 bytes lie with their pieces of 16 in another order, so that neither reads nor writes meet in a bank: the
// copy engine's swizzle.
__device__ uint64 described(const void* at) {  // for wgmma
    return uint64(1) << 62 | uint64(8 * CHANNELS / 16) << 32 | uint64(1) << 16 | (shared_address(at) & 0x3FFFF) / 16;
}
__device__ void read_slice(unsigned (&w)[4], const uint8 (*rows)[CHANNELS], int lane, int slice) {  // of 16 rows
    int row = lane % 16, piece = (2 * slice + lane / 16) ^ (row % 8);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(shared_address(&rows[row][16 * piece]))
                 : "memory");
}

// A tile, and the part of its channels that a block has.
struct Place {
    int first_token, first_row, partner;  // partner: how far the other half's rows are
    int first_step, steps, part, tiles;

    __device__ explicit Place(const Arguments& given) : part(blockIdx.x % PARTS) {
        partner = GEGLU ? given.rows / 2 : HALF;
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
        load_box(stage.weight[0], weight, column, place.first_row, count);
        load_box(stage.weight[HALF], weight, column, place.first_row + place.partner, count);
        for (int i = 0; i < NIBBLES; i++)
            load_box(stage.codes[i], codes, column + i * given.bytes, place.first_token, count);
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
            read_slice(packed, stage.weight + warp / 4 * HALF + h * 64 + warp % 4 * 16, lane, i);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if constexpr (BITS == 4)
                    w[h][i][0][j] = packed[j] << 4 & 0xF0F0F0F0, w[h][i][1][j] = packed[j] & 0xF0F0F0F0;
                else
                    w[h][i][0][j] = packed[j];
        }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < SLICES; i++)
#pragma unroll
        for (int j = 0; j < NIBBLES; j++)
#pragma unroll
            for (int h = 0; h < HEIGHT; h++) multiply(sums[h], w[h][i][j], described(stage.codes[j]) + 2 * i);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ int2 sums_of(const int* at) {  // of two channels, over the parts
    if constexpr (PARTS == 1) return *reinterpret_cast<const int2*>(at);
    int2 sums = {0, 0};
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int x, y;
        asm volatile("ld.shared::cluster.v2.s32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(in_block(at, part)));
        sums.x += x, sums.y += y;
    }
    return sums;
}
__device__ unsigned& pair_at(const bf16* at) { return *reinterpret_cast<unsigned*>(const_cast<bf16*>(at)); }

// Two channels next to each other of each half of a tile, which a lane finishes for token after token.
struct Finishing {
    const Arguments& given;
    int channel[2];
    bool known[2];
    float2 scale[2];

    __device__ Finishing(const Arguments& given, int first, int partner) : given(given) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            channel[half] = first + half * partner;
            known[half] = channel[half] < (GEGLU && half == 0 ? partner : given.rows);
            if (!known[half]) continue;
            scale[half] = *reinterpret_cast<const float2*>(given.weight_scale + channel[half]);
            if constexpr (BITS == 4) scale[half].x /= 16, scale[half].y /= 16;
        }
    }
    __device__ uint2 read(int64 token) const {  // the residual stream
        uint2 pairs = {0, 0};
        if (RESIDUAL && known[0]) pairs.x = pair_at(given.residual + token * given.rows + channel[0]);
        if (RESIDUAL && known[1]) pairs.y = pair_at(given.residual + token * given.rows + channel[1]);
        return pairs;
    }
    __device__ void write(int64 token, float act_scale, const int* sums, uint2 residual) const {
        unsigned pairs[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int2 sum = sums_of(sums + half * HALF);
            unsigned more = half == 0 ? residual.x : residual.y;
            float x = float(sum.x) * scale[half].x * act_scale, y = float(sum.y) * scale[half].y * act_scale;
            pairs[half] = RESIDUAL ? to_pair(x + low_half(more), y + high_half(more)) : to_pair(x, y);
        }
        if constexpr (GEGLU) {
            if (known[0]) pair_at(given.out + token * (given.rows / 2) + channel[0]) = geglu(pairs[0], pairs[1]);
            return;
        }
        if (known[0]) pair_at(given.out + token * given.rows + channel[0]) = pairs[0];
        if (known[1]) pair_at(given.out + token * given.rows + channel[1]) = pairs[1];
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) __cluster_dims__(PARTS, 1, 1)
    matmul(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap codes, const Arguments given) {
    extern __shared__ __align__(1024) uint8 shared[];
    Memory& memory = *reinterpret_cast<Memory*>(shared);
    Place place(given);
    Filling fill = {weight, codes, given, memory, place};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) initialize(&memory.filled[i], 1), initialize(&memory.emptied[i], WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (int i = 0; i < STAGES; i++) fill();
    }
    __syncthreads();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = PARTS * warp + place.part, turn = 0, chunk = 0;
    for (int tile = blockIdx.x / PARTS; tile < place.tiles; tile += gridDim.x / PARTS) {
        place.go_to(given, tile);
        int end = min(TOKENS, given.tokens - place.first_token), of_lane = own + EVERY * lane;  // the token it reads
        float scales = of_lane < end ? given.act_scale[place.first_token + of_lane] : 0.f;
        const Finishing finishing[2] = {Finishing(given, place.first_row + 2 * lane, place.partner),
                                        Finishing(given, place.first_row + 64 + 2 * lane, place.partner)};
        int sums[HEIGHT][TOKENS / 2] = {};
        for (int step = 0; step < place.steps; step++, turn++) {
            wait_for_bytes(&memory.filled[turn % STAGES], turn / STAGES);
            multiply_step(sums, memory.stages[turn % STAGES], warp, lane);
            if (threadIdx.x == 0 && turn > 0) fill();  // what the step before had
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (lane == 0) arrive(&memory.emptied[turn % STAGES]);
        }
        if constexpr (PARTS > 1) __syncthreads();  // sums lie where stages lay
        int row = warp / 4 * HALF + warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int first = 0; first < TOKENS; first += CHUNK, chunk++) {
            int* of_chunk = PARTS == 1 ? memory.sums + chunk % 2 * CHUNK * WIDTH : reinterpret_cast<int*>(&memory);
            int64 token = place.first_token + first + own;
            uint2 residual[MOST][HEIGHT];
#pragma unroll
            for (int i = 0; i < MOST * HEIGHT; i++)
                if (first + own + i / HEIGHT * EVERY < end)
                    residual[i / HEIGHT][i % HEIGHT] = finishing[i % HEIGHT].read(token + i / HEIGHT * EVERY);
#pragma unroll
            for (int h = 0; h < HEIGHT; h++)
#pragma unroll
                for (int i = 0; i < CHUNK / 2; i++)
                    of_chunk[(i / 4 * 8 + column + i % 2) * WIDTH + h * 64 + row + i / 2 % 2 * 8] =
                        sums[h][first / 2 + i];
            wait_for_parts();
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                if (first + own + i * EVERY >= end) break;
                float act_scale = __shfl_sync(~0u, scales, first / EVERY + i);
#pragma unroll
                for (int h = 0; h < HEIGHT; h++)
                    finishing[h].write(token + i * EVERY, act_scale,
                                       of_chunk + (own + i * EVERY) * WIDTH + h * 64 + 2 * lane, residual[i][h]);
            }
        }
    }
    if constexpr (PARTS > 1) wait_for_parts();  // nobody leaves while another reads its sums
}
