// Of persistent.cu: attention over cached keys and the tokens' own.

#pragma once

#include "persistent.cuh"

template <int BOXES>  // 8 channels of a row, where the copy engine puts them
__device__ uint8* piece_of(uint8 (&boxes)[BOXES][KEYS][128], int row, int channel) {
    return &boxes[channel / 64][row][(channel / 8 % 8 ^ row % 8) * 16];
}

struct Attention {
    const Arguments& given;
    const Maps& maps;
    Memory& memory;
    const bf16* heads;  // [tokens, QKV]
    bf16* out;          // [tokens, HEADS * HEAD]
    Self self;
    int layer, blocks;      // blocks: of pairs, of an observation
    int first, keys, each;  // of this block: the cached ones, then the tokens' own; each: the most that one has

    __device__ Attention(const Self& self, const Arguments& given, const Maps& maps, int layer, const bf16* heads,
                         bf16* out, Memory& memory)
        : given(given), maps(maps), memory(memory), heads(heads), out(out), self(self), layer(layer) {
        int all = given.prefix + LENGTH;
        each = ((all + CLUSTER - 1) / CLUSTER + 15) / 16 * 16;
        first = self.rank * each;
        keys = min(each, (all - first + 15) / 16 * 16);  // none, or less, if the others have all
        blocks = (LENGTH * HEADS + ROWS - 1) / ROWS;
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
    __device__ bool exists(const Unit& unit) const { return unit.group < BATCH * SHARES; }

    __device__ void ask_for_cached() const {  // by one thread, before `run`
        Unit unit = this->unit(0, self.cluster);
        if (exists(unit)) ask_for_cached(unit);
    }
    __device__ void ask_for_cached(const Unit& unit) const {  // zeros where there are none
        int matrix = layer * BATCH + unit.element();
        uint64* count = &memory.cached_there;
        let_copy_engine_write();
        expect(count, (HEAD + CHANNELS) * int(sizeof(bf16)) * each);
        for (int i = 0; i < HEAD / 64; i++) load_box(memory.keys[i], maps.keys, i * 128, first, matrix, count);
        for (int i = 0; i < CHANNELS / 64; i++)
            load_box(memory.values[i], maps.values, (unit.share() * CHANNELS / 64 + i) * 128, first, matrix, count);
    }
    __device__ void look(int element) const {  // which keys are to be seen
        int key = first + self.thread;
        if (int(self.thread) >= keys) return;
        uint8 seen = key < given.prefix + LENGTH;
        if (given.visible != nullptr && key < given.prefix) seen = given.visible[element * given.prefix + key];
        memory.seen[self.thread] = seen;
    }

    __device__ void read_own(const Unit& unit) const {  // q, and of the tokens' own keys and values what is here
        int pair = unit.block * ROWS + self.warp, d = self.lane * 8, row = unit.element() * LENGTH;
        auto at = [&](int token, int column) {
            return reinterpret_cast<const uint4*>(heads + unsigned((row + token) * QKV + column));
        };
        const uint4* q_at = at(pair / HEADS, pair % HEADS * HEAD + d);
        bool asks = pair < LENGTH * HEADS;
        uint4 none = make_uint4(0, 0, 0, 0), q = asks ? peek(q_at) : none;
        for (int i = max(given.prefix - first, 0) + self.warp; i < keys; i += WARPS) {
            int own = first + i - given.prefix;
            uint4 k = none, v = none;
            if (own < LENGTH) {
                const uint4 *k_at = at(own, HEADS * HEAD + d), *v_at = at(own, (HEADS + 1) * HEAD + d);
                k = peek(k_at), v = peek(v_at);
                k = until_written(k, k_at), v = until_written(v, v_at);
            }
            *reinterpret_cast<uint4*>(piece_of(memory.keys, i, d)) = k;
            if (d / CHANNELS == unit.share()) *reinterpret_cast<uint4*>(piece_of(memory.values, i, d % CHANNELS)) = v;
        }
        if (asks) q = until_written(q, q_at);
        *reinterpret_cast<uint4*>(&memory.attention.q[self.warp][d]) = q;
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
            load_matrices(b, piece_of(memory.keys, tile + lane / 16 * 8 + lane % 8, d + lane / 8 % 2 * 8));
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
            load_transposed(b, piece_of(memory.values, key + lane, d));
            multiply(sums[0], a, b[0], b[1]);
            if (key + 16 < keys) multiply(sums[1], a2, b[2], b[3]);
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
        if (row >= ROWS || pair >= LENGTH * HEADS) return;
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
        int at = (unit.element() * LENGTH * HEADS + pair) * HEAD + unit.share() * CHANNELS + self.rank * SLICE + d;
        put_pair(out, at, y * each, y2 * each);
    }

    // What a layer reads, into L2, by the clusters that have no unit; by all if all have one.
    __device__ void fetch(int layer) const {
        int busy = min(blocks * SHARES * BATCH, CLUSTERS) % CLUSTERS;
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
        for (int loaded = -1; exists(unit);) {
            if (self.thread == 0) expect(&memory.partial_there, int(sizeof(memory.partial) + sizeof(memory.totals)));
            bool others = unit.group != loaded;
            if (others && loaded >= 0 && self.thread == 0) ask_for_cached(unit);
            if (unit.element() != steps.looked) look(unit.element());
            if (others) wait_for_bytes(&memory.cached_there, steps.cached++);
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
