// The kernel of attention_cuda.py: attention of many tokens, eight query heads over one key/value head. It needs
// Hopper's wgmma.
//
// A tile is all heads of 16 tokens; the PARTS blocks of a cluster have a part of the keys each, 64 a step, which the
// copy engine (TMA) brings into stages of shared memory. A warp has a head; its softmax of one step runs while the
// tensor cores weigh the values of the step before, as in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). In the
// end all sums lie in shared memory, and a warp puts all heads of a token together.
//
// Defined by attention_cuda.py: `multiply`, the two wgmmas; PARTS; ROUNDED, to int8; SCALE, of scores in powers of two.

#include "numbers.cuh"

constexpr int HEADS = 8;
constexpr int HEAD = 256;  // channels
constexpr int TOKENS = 16;
constexpr int ROWS = HEADS * TOKENS;
constexpr int KEYS = 64;          // of a step
constexpr int BOXES = HEAD / 64;  // 64 channels are 128 bytes
constexpr int STAGES = 2;
constexpr int MOST_STEPS = 64;
constexpr int THREADS = 32 * HEADS;

struct Arguments {
    const uint8* visible;       // [batch, keys], or nothing: all are
    uint8* out;                 // [batch, tokens, HEADS * HEAD]: codes, or numbers in bf16
    float* act_scale;           // [batch, tokens]
    int* row_sum;               // [batch, tokens]
    int tokens, keys, heights;  // heights: tiles of an observation
};

struct Stage {
    uint8 keys[BOXES][KEYS][128], values[BOXES][KEYS][128];
};

struct Operands {
    uint8 queries[BOXES][ROWS][128];  // all tokens of a head, then the next head
    Stage stages[STAGES];
};

struct Memory {
    union {
        Operands operands;
        unsigned sums[ROWS][HEAD / 2 + 4];  // pairs in fp16, of the largest of a row
    };
    float4 totals[ROWS];
    uint2 seen[MOST_STEPS];  // a bit for each key
    uint64 queries_there, keys_there[STAGES], values_there[STAGES], keys_read[STAGES], values_read[STAGES];
};

// A tile of an observation, and the part of its keys that a block has.
struct Place {
    int rank = blockIdx.x % PARTS, element, first_token, first_step, steps;

    __device__ explicit Place(const Arguments& given) {
        int tile = blockIdx.x / PARTS, all = (given.keys + KEYS - 1) / KEYS;
        element = tile / given.heights, first_token = tile % given.heights * TOKENS;
        first_step = all * rank / PARTS, steps = all * (rank + 1) / PARTS - first_step;
    }
};

// What one thread has the copy engine do.
struct Filling {
    const TensorMap &queries, &keys, &values;
    const Arguments& given;
    const Place& place;
    Memory& memory;

    __device__ void fill_queries() const {
        expect(&memory.queries_there, sizeof(memory.operands.queries));
        int token = place.element * given.tokens + place.first_token;
        for (int i = 0; i < BOXES; i++)
            load_box(memory.operands.queries[i], queries, 128 * i, token, 0, &memory.queries_there);
    }
    __device__ void fill_keys(int step) const {
        int slot = step % STAGES;
        fill(memory.operands.stages[slot].keys, keys, step, memory.keys_there[slot], memory.keys_read[slot]);
    }
    __device__ void fill_values(int step) const {
        int slot = step % STAGES;
        fill(memory.operands.stages[slot].values, values, step, memory.values_there[slot], memory.values_read[slot]);
    }
    __device__ void fill(uint8 (&boxes)[BOXES][KEYS][128], const TensorMap& map, int step, uint64& there,
                         uint64& read) const {
        if (step >= place.steps) return;
        if (step >= STAGES) wait_for_bytes(&read, step / STAGES - 1);  // by all warps
        expect(&there, sizeof(boxes));
        int first = (place.first_step + step) * KEYS;
        for (int i = 0; i < BOXES; i++) load_box(boxes[i], map, 128 * i, first, place.element, &there);
    }
};

__device__ void look(const Arguments& given, const Place& place, Memory& memory) {  // a warp at 64 keys at a time
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto sees = [&](int key) {
        bool there = key < given.keys;
        return there && (given.visible == nullptr || given.visible[int64(place.element) * given.keys + key]);
    };
    for (int step = warp; step < place.steps; step += HEADS) {
        int key = (place.first_step + step) * KEYS + lane;
        unsigned low = __ballot_sync(~0u, sees(key)), high = __ballot_sync(~0u, sees(key + 32));
        if (lane == 0) memory.seen[step] = {low, high};
    }
}

__device__ float finite(float x) { return x == lowest() ? 0.f : x; }

// What a lane has of its head: two tokens, eight apart; of every eight keys or channels two, beside each other.
struct Attention {
    float scores[KEYS / 2];
    float sums[HEAD / 2] = {};
    float highest[2] = {lowest(), lowest()}, total[2] = {};

    __device__ void multiply_keys(const Memory& memory, const Stage& stage) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) scores[i] = 0;
        begin_products();
#pragma unroll
        for (int i = 0; i < HEAD / 16; i++) {
            uint64 queries = described(memory.operands.queries[i / 4][threadIdx.x / 128 * 64]);
            multiply(scores, queries + i % 4 * 2, described(stage.keys[i / 4]) + i % 4 * 2);
        }
        commit_products();
    }
    __device__ void multiply_values(const unsigned (&weights)[KEYS / 16][4], const Stage& stage) {
        begin_products();
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            multiply(sums, weights[i], described(stage.values[0][16 * i], sizeof(stage.values[0])));
        commit_products();
    }
    // Makes weights of scores; returns by how much the sums so far shrink (Milakov & Gimelshein 2018,
    // arXiv:1805.02867). Nothing does until a score is so much higher that weights would be above 2^8.
    __device__ float2 weigh(uint2 seen) {
        int first = threadIdx.x % 4 * 2;
        if ((seen.x & seen.y) != ~0u)
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) {
                unsigned word = i < KEYS / 4 ? seen.x : seen.y;
                if (!(word >> (i / 4 % 4 * 8 + i % 2 + first) & 1)) scores[i] = lowest();
            }
        float most[2], shrink[2] = {1, 1};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            most[r] = highest[r];
#pragma unroll
            for (int i = 2 * r; i < KEYS / 2; i += 4) most[r] = fmaxf(most[r], fmaxf(scores[i], scores[i + 1]));
            most[r] = highest_of_four(most[r]);
        }
        auto far = [&](int r) { return (most[r] - highest[r]) * SCALE > 8; };
        if (__any_sync(~0u, far(0) || far(1)))
#pragma unroll
            for (int r = 0; r < 2; r++)
                shrink[r] = exp2_of((highest[r] - finite(most[r])) * SCALE), highest[r] = most[r],
                total[r] *= shrink[r];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float from = finite(highest[r]) * SCALE;
#pragma unroll
            for (int i = 2 * r; i < KEYS / 2; i += 4) {
                scores[i] = exp2_of(scores[i] * SCALE - from), scores[i + 1] = exp2_of(scores[i + 1] * SCALE - from);
                total[r] += scores[i] + scores[i + 1];
            }
        }
        return {shrink[0], shrink[1]};
    }
    __device__ void to_weights(unsigned (&weights)[KEYS / 16][4]) const {
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) weights[i / 4][i % 4] = to_pair(scores[2 * i], scores[2 * i + 1]);
    }
    __device__ void run(const Place& place, const Filling& filling, Memory& memory) {
        bool first_lane = threadIdx.x % 32 == 0;
        wait_for_bytes(&memory.queries_there, 0);
        wait_for_bytes(&memory.keys_there[0], 0);
        multiply_keys(memory, memory.operands.stages[0]);
        if (threadIdx.x == 0) {  // not before: L2 is busy
            filling.fill_values(0);
            filling.fill_keys(1);
            filling.fill_values(1);
        }
        wait_for_products();
        if (first_lane) arrive(&memory.keys_read[0]);
        weigh(memory.seen[0]);
        unsigned weights[KEYS / 16][4];
        to_weights(weights);
        for (int step = 1; step < place.steps; step++) {
            int slot = step % STAGES, before = (step - 1) % STAGES;
            wait_for_bytes(&memory.keys_there[slot], step / STAGES);
            multiply_keys(memory, memory.operands.stages[slot]);
            wait_for_bytes(&memory.values_there[before], (step - 1) / STAGES);
            multiply_values(weights, memory.operands.stages[before]);
            if (threadIdx.x == 0) {
                filling.fill_keys(step + 1);
                if (step > 1) filling.fill_values(step);
            }
            wait_for_products<1>();  // of keys
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) not_before(scores[i]);
            if (first_lane) arrive(&memory.keys_read[slot]);
            float2 shrink = weigh(memory.seen[step]);
            wait_for_products();
            if (first_lane) arrive(&memory.values_read[before]);
#pragma unroll
            for (int i = 0; i < HEAD / 2; i++) not_before(sums[i]);
            if (__any_sync(~0u, shrink.x != 1 || shrink.y != 1))
#pragma unroll
                for (int i = 0; i < HEAD / 2; i++) sums[i] *= i / 2 % 2 ? shrink.y : shrink.x;
            to_weights(weights);
        }
        int last = place.steps - 1;
        wait_for_bytes(&memory.values_there[last % STAGES], last / STAGES);
        multiply_values(weights, memory.operands.stages[last % STAGES]);
        wait_for_products();
    }
    __device__ void lay_down(Memory& memory) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) not_before(sums[i]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = threadIdx.x / 32 * TOKENS + lane / 4 + 8 * r;
            float largest = 0;
#pragma unroll
            for (int i = 2 * r; i < HEAD / 2; i += 4)
                largest = fmaxf(largest, fmaxf(fabsf(sums[i]), fabsf(sums[i + 1])));
            largest = fmaxf(highest_of_four(largest), 1e-30f), total[r] = sum_of_four(total[r]);
            float each = 1 / largest;
#pragma unroll
            for (int i = 2 * r; i < HEAD / 2; i += 4)
                memory.sums[row][i / 4 * 4 + lane % 4] = to_half_pair(sums[i] * each, sums[i + 1] * each);
            if (lane % 4 == 0) memory.totals[row] = {highest[r], total[r], largest, 0};
        }
    }
};

// All heads of one token, by a warp; a lane gets eight channels of each.
__device__ void put_together(uint4 (&y)[HEADS], const Memory& memory, int rank, int token) {
    int lane = threadIdx.x % 32, mine = lane % 4;
    float4 of_part = {lowest(), 0, 0, 0};  // a lane has one part of a head
    if (mine < PARTS) of_part = read_in_block(&memory.totals[lane / 4 * TOKENS + token], mine);
    float from = finite(highest_of_four(of_part.x)) * SCALE;
    float weight = exp2_of(of_part.x * SCALE - from), total = sum_of_four(weight * of_part.y);
    float factor = weight * of_part.z / (total == 0 ? 1.f : total);
#pragma unroll
    for (int head = 0; head < HEADS; head++) {
        float x[8] = {};
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int of = (rank + part) % PARTS;  // its own first: what is read in a block of the cluster takes a detour
            const unsigned* at = &memory.sums[head * TOKENS + token][4 * lane];
            const uint4* four = reinterpret_cast<const uint4*>(at);
            uint4 sums = part == 0 ? *four : read_in_block(four, of);
            float by = __shfl_sync(~0u, factor, 4 * head + of);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 pair = from_half_pair((&sums.x)[i]);
                x[2 * i] += by * pair.x, x[2 * i + 1] += by * pair.y;
            }
        }
        y[head] = {to_pair(x[0], x[1]), to_pair(x[2], x[3]), to_pair(x[4], x[5]), to_pair(x[6], x[7])};
    }
}

// Writes all heads of one token, by a warp.
__device__ void write_token(const Arguments& given, int64 token, const uint4 (&y)[HEADS]) {
    int lane = threadIdx.x % 32;
    if constexpr (!ROUNDED) {
        uint4* out = reinterpret_cast<uint4*>(given.out) + token * (HEADS * HEAD / 8);
#pragma unroll
        for (int head = 0; head < HEADS; head++) out[head * HEAD / 8 + lane] = y[head];
        return;
    }
    unsigned largest = 0;  // in order as the numbers are, NaN above infinity
#pragma unroll
    for (int i = 0; i < 4 * HEADS; i++) {
        unsigned pair = (&y[i / 4].x)[i % 4];
        largest = max(largest, max(pair & 0x7FFF, pair >> 16 & 0x7FFF));
    }
    float most = low_half(__reduce_max_sync(~0u, largest)), scale = most == 0 ? 1.f : most / 127, by = 1 / scale;
    int sum = 0;
    auto rounded_pairs = [&](unsigned a, unsigned b) {
        unsigned codes = rounded(low_half(a) * by, high_half(a) * by, low_half(b) * by, high_half(b) * by);
        sum = __dp4a(int(codes), 0x01010101, sum);
        return codes;
    };
    uint2* out = reinterpret_cast<uint2*>(given.out) + token * (HEADS * HEAD / 8);
#pragma unroll
    for (int head = 0; head < HEADS; head++)
        out[head * HEAD / 8 + lane] = {rounded_pairs(y[head].x, y[head].y), rounded_pairs(y[head].z, y[head].w)};
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) given.act_scale[token] = scale, given.row_sum[token] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(PARTS, 1, 1)
    attend(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
           const __grid_constant__ TensorMap values, const Arguments given) {
    Memory& memory = shared_memory<Memory>();
    Place place(given);
    Filling filling = {queries, keys, values, given, place, memory};
    bool fills = threadIdx.x == THREADS - 32;  // of the warp that has the least to look at
    if (fills) {
        initialize(&memory.queries_there, 1);
        for (int i = 0; i < STAGES; i++) {
            initialize(&memory.keys_there[i], 1), initialize(&memory.values_there[i], 1);
            initialize(&memory.keys_read[i], HEADS), initialize(&memory.values_read[i], HEADS);
        }
        publish_counts();
        filling.fill_keys(0);
        filling.fill_queries();
    }
    look(given, place, memory);
    __syncthreads();
    Attention attention;
    attention.run(place, filling, memory);
    __syncthreads();  // sums lie where stages lay
    attention.lay_down(memory);
    if constexpr (PARTS > 1)
        wait_for_cluster();
    else
        __syncthreads();
    for (int i = place.rank + PARTS * (threadIdx.x / 32); i < TOKENS; i += PARTS * HEADS) {
        if (place.first_token + i >= given.tokens) break;
        uint4 y[HEADS];
        put_together(y, memory, place.rank, i);
        write_token(given, int64(place.element) * given.tokens + place.first_token + i, y);
    }
    if constexpr (PARTS > 1) leave_cluster();
}
