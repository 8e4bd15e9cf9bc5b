// The kernel of persistent_cuda.py: decoder layers of a few tokens in blocks that stay. It needs Hopper's clusters.
//
// A layer has five operations: q/k/v, attention, o, gate/up, down. No block waits for all others: every layer has
// buffers of its own, filled with a number that nothing here computes, and whoever reads waits until it is gone. Within
// a cluster, blocks send each other what they need, into shared memory that counts the bytes:
//   a matmul    Every cluster turns all tokens into int8 codes, 16 at a time; a block has two of the rows.
//               Wide matrices (q/k/v, gate/up): codes go to all blocks, each of which has some of the columns.
//               Deep ones (o, down): to the block that has the channel, an eighth of them; sums go to the block that
//               finishes the column.
//   attention   A cluster has 16 pairs of a token and a head, and half of the values' channels; each of its blocks an
//               eighth of the keys. Partial sums go to the block that has the channel, an eighth of that half.
// Weights, keys and whatever else is not computed here are asked for before what is waited for; the copy engine lays
// weights and keys into shared memory. Clusters without a part in attention fetch all that the next layer reads into
// L2.
//
// Defined by persistent_cuda.py: BATCH (observations), of LENGTH tokens each; CLUSTERS, of CLUSTER blocks; WARPS (of a
// block), WIDE_PARTS (of the channels of a wide matrix, for as many warps), KEYS (most that one attends to); WIDTH,
// MLP, HEADS, HEAD; QKV_BLOCK, UP_BLOCK, DOWN_BLOCK (of Hadamards; 0 for none); QKV_PERMUTED, UP_PERMUTED,
// DOWN_PERMUTED; ADAPTIVE (norms with a shift and a gate); EPS; SCALE (of scores, in base 2); ARRAYS (of a layer,
// most); SHARED_MEMORY (bytes).

#include "persistent_attention.cuh"
#include "persistent_matmul.cuh"

static_assert(sizeof(Memory) <= SHARED_MEMORY, "it has room");

extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1)
    run_layers(const __grid_constant__ Arguments given, const __grid_constant__ Maps maps) {
    Memory& memory = shared_memory<Memory>();
    Self self;
    if (self.thread == 0) {
        for (uint64* count : {&memory.codes_there[0], &memory.codes_there[1], &memory.weights_there, &memory.sums_there,
                              &memory.partial_there, &memory.cached_there})
            initialize(count, 1);
        publish_counts();
    }
    wait_for_cluster();
    Steps steps = {0, 0, -1};
    Matmul<QKV, WIDTH, QKV_BLOCK, true, QKV_PERMUTED, HEAD / 2> qkv = {given.qkv, nullptr};
    Matmul<WIDTH, HEADS * HEAD, 0, false, false, 1> o = {given.o, &maps.o};
    Matmul<2 * MLP, WIDTH, UP_BLOCK, true, UP_PERMUTED, MLP> gate_up = {given.gate_up, nullptr};
    Matmul<WIDTH, MLP, DOWN_BLOCK, false, DOWN_PERMUTED, 1> down = {given.down, &maps.down};
    auto ask_for_cached = [&](int layer) {
        if (layer < given.layers) Attention(self, given, maps, layer, nullptr, nullptr, memory).ask_for_cached();
    };
    auto nothing = [] {};
    const bf16* x = given.x;
    if (self.thread == 0) ask_for_cached(0);
    for (int layer = 0; layer < given.layers; layer++) {
        const float *norm = given.norms + 2 * layer * NORM, *norm2 = norm + NORM;
        bf16* heads = given.buffers + layer * TOKENS * BUFFER;
        bf16 *attended = heads + TOKENS * QKV, *middle = attended + TOKENS * (HEADS * HEAD);
        bool last = layer + 1 == given.layers;
        bf16 *hidden = middle + TOKENS * WIDTH, *out = hidden + TOKENS * MLP;
        Turned turned = {given.cos, given.sin, heads};
        Added added = {x, norm + 2 * WIDTH, middle}, added2 = {middle, norm2 + 2 * WIDTH, out};
        qkv.run(self, given, 4 * layer, x, layer == 0, norm, turned, nothing, memory);
        Attention(self, given, maps, layer, heads, attended, memory).run(last ? 0 : layer + 1, steps);
        o.run(self, given, 4 * layer + 1, attended, false, nullptr, added, [&] { ask_for_cached(layer + 1); }, memory);
        gate_up.run(self, given, 4 * layer + 2, middle, false, norm2, Gated{hidden}, nothing, memory);
        down.run(self, given, 4 * layer + 3, hidden, false, nullptr, added2, nothing, memory);
        x = out;
    }
    leave_cluster();  // nobody sends to a block that is gone
}
