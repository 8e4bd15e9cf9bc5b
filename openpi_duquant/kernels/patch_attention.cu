// The kernel of patch_attention_cuda.py: attention of all patches of an image to each other, for the vision tower. It
// needs Hopper's wgmma.
//
// A block has 64 queries of a head and all of its keys, so that a softmax sees all its scores at once and nothing need
// be put together. The copy engine (TMA) brings a head's first 64 channels in rows of 128 bytes, and the last eight in
// rows of 16.
//
// Defined by patch_attention_cuda.py: `multiply`, wgmmas; SCALE, of scores in powers of two.

#include "numbers.cuh"

constexpr int PATCHES = 256;
constexpr int QUERIES = 64;
constexpr int HEAD = 72;
constexpr int THREADS = 128;
constexpr int BYTES = HEAD * int(sizeof(bf16));

struct Maps {
    TensorMap wide[3],
        narrow[3];  // of q, k and v [images, PATCHES, heads * BYTES]; boxes of as many rows as an Operand
};

template <int ROWS>
struct Operand {
    uint8 wide[ROWS][128];
    uint8 narrow[2][ROWS][16];  // channels 64 to 71, and then, for a sum over 16 channels, zeros

    __device__ void fill(const Maps& maps, int which, int image, int row, int head, uint64* count) {  // by one thread
        expect(count, ROWS * BYTES);
        load_box(wide, maps.wide[which], head * BYTES, row, image, count);
        load_box(narrow, maps.narrow[which], head * BYTES + 128, row, image, count);
    }
};

struct Memory {
    Operand<QUERIES> queries;
    Operand<PATCHES> keys, values;
    uint64 scores_can_be, values_there;
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attend_patches(const __grid_constant__ Maps maps, bf16* out, int heads) {
    Memory& memory = shared_memory<Memory>();
    int head = blockIdx.x / (PATCHES / QUERIES) % heads, first = blockIdx.x % (PATCHES / QUERIES) * QUERIES;
    int image = blockIdx.x / (PATCHES / QUERIES) / heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && elected()) {
        initialize(&memory.scores_can_be, 2), initialize(&memory.values_there, 1);
        publish_counts();
        memory.queries.fill(maps, 0, image, first, head, &memory.scores_can_be);
        memory.keys.fill(maps, 1, image, 0, head, &memory.scores_can_be);
    }
    for (int i = threadIdx.x; i < PATCHES; i += THREADS) {
        *reinterpret_cast<uint4*>(memory.keys.narrow[1][i]) = {0, 0, 0, 0};
        if (i < QUERIES) *reinterpret_cast<uint4*>(memory.queries.narrow[1][i]) = {0, 0, 0, 0};
    }
    let_tensor_cores_read();
    __syncthreads();

    float scores[PATCHES / 2] = {};  // of two queries, eight apart; of every eight keys two, beside each other
    wait_for_bytes(&memory.scores_can_be, 0);
    begin_products();
#pragma unroll
    for (int i = 0; i < 4; i++)
        multiply(scores, described(memory.queries.wide) + 2 * i, described(memory.keys.wide) + 2 * i);
    multiply(scores, described_in_eights(memory.queries.narrow, sizeof(memory.queries.narrow[0]), 128),
             described_in_eights(memory.keys.narrow, sizeof(memory.keys.narrow[0]), 128));
    commit_products();
    if (warp == 0 && elected())
        memory.values.fill(maps, 2, image, 0, head, &memory.values_there);  // not before: L2 is busy
    wait_for_products();
    float each[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float highest = lowest(), total = 0;
#pragma unroll
        for (int i = 2 * r; i < PATCHES / 2; i += 4) {
            not_before(scores[i]), not_before(scores[i + 1]);
            highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
        }
        highest = highest_of_four(highest) * SCALE;
#pragma unroll
        for (int i = 2 * r; i < PATCHES / 2; i += 4) {
            scores[i] = exp2_of(scores[i] * SCALE - highest), scores[i + 1] = exp2_of(scores[i + 1] * SCALE - highest);
            total += scores[i] + scores[i + 1];
        }
        each[r] = 1 / sum_of_four(total);
    }
    unsigned weights[PATCHES / 16][4];
#pragma unroll
    for (int i = 0; i < PATCHES / 4; i++) weights[i / 4][i % 4] = to_pair(scores[2 * i], scores[2 * i + 1]);

    float sums[32] = {}, last_sums[4] = {};
    wait_for_bytes(&memory.values_there, 0);
    begin_products();
#pragma unroll
    for (int i = 0; i < PATCHES / 16; i++) {
        multiply(sums, weights[i], described(memory.values.wide[16 * i]));
        multiply(last_sums, weights[i], described_in_eights(memory.values.narrow[0][16 * i], 128, 128));
    }
    commit_products();
    wait_for_products();
#pragma unroll
    for (int i = 0; i < HEAD / 2; i += 2) {
        float* pair = i < 32 ? &sums[i] : &last_sums[i - 32];
        not_before(pair[0]), not_before(pair[1]);
        int query = first + warp * 16 + lane / 4 + i / 2 % 2 * 8, channel = i / 4 * 8 + lane % 4 * 2;
        int64 row = (int64(image) * PATCHES + query) * heads + head;
        float by = each[i / 2 % 2];
        *reinterpret_cast<unsigned*>(out + row * HEAD + channel) = to_pair(pair[0] * by, pair[1] * by);
    }
}
