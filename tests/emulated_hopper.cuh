// kernels/hopper.cuh on a CPU, with enough of CUDA to compile a kernel as C++: every thread of a grid is a fiber, and
// runs until it waits for another. What is asynchronous comes late and in any order, products now or later. Whatever
// the machine would refuse is an error, and so is a thread that waits for what never comes.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __device__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __builtin_assume(x)

using std::max;
using std::min;
using uint8 = unsigned char;
using bf16 = unsigned short;
using int64 = long long;
using uint64 = unsigned long long;

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) longlong2 {
    long long x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- the grid -------------------------------------------------------------------------------------------------------

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

inline char failure[200];
inline jmp_buf failed;

[[noreturn]] inline void fail(const char* what) {
    std::snprintf(failure, sizeof(failure), "block %u, thread %u: %s", blockIdx.x, threadIdx.x, what);
    _longjmp(failed, 1);
}
inline void require(bool holds, const char* what) {
    if (!holds) fail(what);
}

struct Barrier {  // of so many threads
    int arrived = 0;
    unsigned turn = 0;
};

struct Warp {
    Barrier barrier;
    uint64 given[32][6], words[2][32][6];  // by even and odd turns
};

struct Block {
    std::vector<Warp> warps;
    Barrier all, named[16];
    int left = 0;  // threads that are not done
    std::unique_ptr<uint8, decltype(&std::free)> memory{nullptr, std::free};
};

struct Thread {
    ucontext_t start;
    jmp_buf at;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
    std::vector<std::vector<std::function<void()>>> groups{1};  // of products; the last is open
    unsigned commits = 0;
};

struct Grid {
    int blocks, cluster, threads, shared_bytes;
    std::vector<Block> of_blocks;
    std::vector<Barrier> of_clusters;
    std::vector<Thread> of_threads;
    std::vector<std::function<void()>> under_way;  // what is asynchronous
    jmp_buf scheduler;
    int running;
    bool moved;  // whether any thread has since the last turn
    std::function<void()> kernel;

    Block& block() { return of_blocks[blockIdx.x]; }
    Block& of_cluster(int rank) { return of_blocks[blockIdx.x / cluster * cluster + rank]; }
};
inline Grid* grid;

inline void yield() {
    if (!_setjmp(grid->of_threads[grid->running].at)) _longjmp(grid->scheduler, 1);
}
inline void start_thread() {
    grid->kernel();
    grid->block().left--;
    grid->of_threads[grid->running].done = grid->moved = true;
    _longjmp(grid->scheduler, 1);
}
inline void resume(int index) {
    Thread& thread = grid->of_threads[index];
    grid->running = index;
    blockIdx.x = index / grid->threads, threadIdx.x = index % grid->threads;
    if (_setjmp(grid->scheduler)) return;
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    setcontext(&thread.start);
}

// Whether a block has its turn: half of them pause, for eight turns each, so that blocks are far apart.
inline unsigned scattered(unsigned x) { return x * 2654435761u; }
inline bool has_turn(int turn, int block) { return scattered(turn / 8 * 37 + block + 1) >> 31; }

// Runs a kernel; says what went wrong, if anything did. Threads have their turns forwards and backwards.
template <class... Given>
const char* run_grid(Grid& given, void (*kernel)(Given...), void** arguments) {
    grid = &given;
    if (_setjmp(failed)) return failure;
    gridDim.x = given.blocks;
    [&]<std::size_t... I>(std::index_sequence<I...>) {
        given.kernel = [=] { kernel(*static_cast<std::remove_reference_t<Given>*>(arguments[I])...); };
    }(std::index_sequence_for<Given...>());
    given.of_clusters.resize(given.blocks / given.cluster);
    given.of_blocks.resize(given.blocks);
    for (Block& block : given.of_blocks) {
        block.warps.resize(given.threads / 32);
        block.left = given.threads;
        block.memory.reset(static_cast<uint8*>(std::aligned_alloc(1024, (given.shared_bytes + 1023) / 1024 * 1024)));
        auto* numbers = reinterpret_cast<uint16_t*>(block.memory.get());
        std::fill_n(numbers, given.shared_bytes / 2, 0x7FC0);  // NaN, if read before they are written
    }
    given.of_threads.resize(given.blocks * given.threads);
    for (Thread& thread : given.of_threads) {
        constexpr int STACK = 1 << 16;
        thread.stack = std::make_unique<char[]>(STACK);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get(), thread.start.uc_stack.ss_size = STACK;
        makecontext(&thread.start, start_thread, 0);
    }
    int left = given.of_threads.size();
    for (int turn = 0, idle = 0; left; turn++) {
        given.moved = !given.under_way.empty();
        left = 0;
        for (int i = 0; i < int(given.of_threads.size()); i++) {
            int index = turn % 2 ? given.of_threads.size() - 1 - i : i;
            if (!given.of_threads[index].done && has_turn(turn, index / given.threads)) resume(index);
            left += !given.of_threads[index].done;
        }
        auto coming = std::move(given.under_way);
        given.under_way.clear();
        for (unsigned i = 0; i < coming.size(); i++)  // a few, the others later
            if (scattered(turn * 101 + i + 1) >> 26)
                given.under_way.push_back(std::move(coming[i]));
            else
                coming[i]();
        idle = given.moved ? 0 : idle + 1;
        require(idle < 100, "waits for what never comes");
    }
    require(given.under_way.empty(), "nobody is left to take what comes");
    return nullptr;
}

inline void arrive_and_wait(Barrier& barrier, int threads) {
    unsigned turn = barrier.turn;
    grid->moved = true;
    if (++barrier.arrived == threads)
        barrier.arrived = 0, barrier.turn++;
    else
        while (barrier.turn == turn) yield();
}
inline void __syncthreads() { arrive_and_wait(grid->block().all, grid->threads); }
template <int THREADS>
void wait_for_threads(int barrier) {
    arrive_and_wait(grid->block().named[barrier], THREADS);
}
inline void wait_for_cluster() {
    arrive_and_wait(grid->of_clusters[blockIdx.x / grid->cluster], grid->threads * grid->cluster);
}
inline void leave_cluster() { wait_for_cluster(); }

// What the lanes of a warp give each other; all of them must come.
template <int WORDS>
const uint64 (*exchange(const uint64 (&words)[WORDS]))[6] {
    Warp& warp = grid->block().warps[threadIdx.x / 32];
    unsigned turn = warp.barrier.turn;
    for (int i = 0; i < WORDS; i++) warp.given[threadIdx.x % 32][i] = words[i];
    if (warp.barrier.arrived == 31) std::memcpy(warp.words[turn % 2], warp.given, sizeof(warp.given));
    arrive_and_wait(warp.barrier, 32);
    return warp.words[turn % 2];
}
template <class T, class Reduce>
T reduced(T x, Reduce reduce) {
    auto words = exchange({uint64(x)});
    T all = T(words[0][0]);
    for (int lane = 1; lane < 32; lane++) all = reduce(all, T(words[lane][0]));
    return all;
}
inline bool __any_sync(unsigned, bool x) {
    return reduced(unsigned(x), [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __ballot_sync(unsigned, bool x) {
    return reduced(unsigned(x) << threadIdx.x % 32, [](unsigned a, unsigned b) { return a | b; });
}
inline bool elected() {  // whichever it is
    exchange({uint64(0)});
    return threadIdx.x % 32 == 17;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    return reduced(x, [](unsigned a, unsigned b) { return max(a, b); });
}
inline int __reduce_max_sync(unsigned, int x) {
    return reduced(x, [](int a, int b) { return max(a, b); });
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
    return reduced(x, [](unsigned a, unsigned b) { return a + b; });
}

// --- numbers --------------------------------------------------------------------------------------------------------

template <class To, class From>
To same_bits(From x) {
    To y;
    static_assert(sizeof(To) == sizeof(From));
    std::memcpy(&y, &x, sizeof(y));
    return y;
}
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
    uint64 bytes = uint64(y) << 32 | x;
    unsigned chosen = 0;
    for (int i = 0; i < 4; i++) chosen |= unsigned(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return chosen;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return sum;
}
inline float __shfl_xor_sync(unsigned, float x, int mask) {
    return __uint_as_float(unsigned(exchange({uint64(__float_as_uint(x))})[threadIdx.x % 32 ^ mask][0]));
}
inline unsigned __shfl_xor_sync(unsigned, unsigned x, int mask) {
    return unsigned(exchange({uint64(x)})[threadIdx.x % 32 ^ mask][0]);
}
inline float __shfl_sync(unsigned, float x, int lane) {
    return __uint_as_float(unsigned(exchange({uint64(__float_as_uint(x))})[lane % 32][0]));
}

inline bf16 to_bf16(float x) {
    if (x != x) return 0x7FFF;
    unsigned bits = __float_as_uint(x);
    return bf16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline unsigned to_pair(float low, float high) { return to_bf16(low) | unsigned(to_bf16(high)) << 16; }
inline unsigned to_half_pair(float low, float high) {
    return same_bits<uint16_t>(_Float16(low)) | unsigned(same_bits<uint16_t>(_Float16(high))) << 16;
}
inline float2 from_half_pair(unsigned pair) {
    return {float(same_bits<_Float16>(uint16_t(pair))), float(same_bits<_Float16>(uint16_t(pair >> 16)))};
}
inline float exp2_of(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.f / x; }

template <class... T>
void not_before(T&...) {}

// --- shared memory, and counts of the bytes that come ---------------------------------------------------------------

template <class Memory>
Memory& shared_memory() {
    require(sizeof(Memory) < std::size_t(grid->shared_bytes) + alignof(Memory), "there is not so much shared memory");
    return *reinterpret_cast<Memory*>(grid->block().memory.get());
}
inline unsigned in_block(const void* at, int rank) {  // the rank in the highest byte
    int64 place = static_cast<const uint8*>(at) - grid->block().memory.get();
    require(place >= 0 && place < grid->shared_bytes, "this is not in shared memory");
    return unsigned(place) | unsigned(rank) << 24;
}
inline unsigned shared_address(const void* at) { return in_block(at, blockIdx.x % grid->cluster); }
inline uint8* pointer_to(unsigned there) { return grid->of_cluster(there >> 24).memory.get() + (there & 0xFFFFFF); }

struct Count {  // an mbarrier, in 8 bytes
    int bytes;
    unsigned short phase;
    uint8 arrivals, missing;

    void settle() {
        if (bytes == 0 && missing == 0) phase++, missing = arrivals, grid->moved = true;
    }
};
inline Count& count_at(void* at) {
    require(reinterpret_cast<std::uintptr_t>(at) % 8 == 0, "a count is not aligned");
    return *static_cast<Count*>(at);
}
inline void initialize(uint64* count, int arrivals) { count_at(count) = {0, 0, uint8(arrivals), uint8(arrivals)}; }
inline void publish_counts() {}
inline void expect(uint64* at, int bytes) {
    Count& count = count_at(at);
    require(count.missing > 0, "more arrive than are awaited");
    count.bytes += bytes, count.missing--;
    count.settle();
}
inline void arrive(uint64* at) { expect(at, 0); }
inline void wait_for_bytes(uint64* at, int waits) {
    Count& count = count_at(at);
    while (count.phase % 2 == waits % 2) yield();
    require(count.phase == (unsigned short)(waits + 1), "a count went on without those who wait for it");
}
template <class T>
void send_bytes(unsigned there, unsigned count, const T& x) {
    require(there % sizeof(T) == 0, "what is sent is not aligned");
    grid->under_way.push_back([to = pointer_to(there), at = pointer_to(count), x] {
        std::memcpy(to, &x, sizeof(T));
        count_at(at).bytes -= sizeof(T);
        count_at(at).settle();
    });
}
inline void send(unsigned there, unsigned count, unsigned a) { send_bytes(there, count, a); }
inline void send(unsigned there, unsigned count, unsigned a, unsigned b) { send_bytes(there, count, uint2{a, b}); }
inline void send(unsigned there, unsigned count, uint4 a) { send_bytes(there, count, a); }
template <class T>
T read_in_block(const T* at, int rank) {
    require(grid->of_cluster(rank).left > 0, "the block that is read is gone");
    return *reinterpret_cast<T*>(pointer_to(in_block(at, rank)));
}

// --- global memory --------------------------------------------------------------------------------------------------

template <class T>
T read_aligned(const void* at) {
    require(reinterpret_cast<std::uintptr_t>(at) % sizeof(T) == 0, "what is read is not aligned");
    T x;
    std::memcpy(&x, at, sizeof(T));
    return x;
}
inline float4 read4(const float* at) { return read_aligned<float4>(at); }
inline int2 read_indices(const int64* at) {
    int4 x = read_aligned<int4>(at);
    return {x.x, x.z};
}
template <class T>
T read(const T* at) {
    return read_aligned<T>(at);
}
template <class T>
T peek(const T* at) {
    yield();
    return read_aligned<T>(at);
}
inline void put(unsigned* at, unsigned bits) { *at &= bits, grid->moved = true; }

// --- the copy engine ------------------------------------------------------------------------------------------------

struct alignas(64) TensorMap {  // as emulated_hopper.py makes it
    const uint8* first;
    int64 sizes[3], strides[2], box[3];  // of columns in bytes, rows, matrices; of rows, matrices
};

inline void load_box(void* to, const TensorMap& map, int column, int row, int matrix, uint64* count) {
    int64 lines = map.box[0] / 16;  // the swizzle's pattern is as high as rows have pieces
    require(shared_address(to) % (128 * lines) == 0 && map.box[0] <= 128, "a box is not aligned");
    grid->under_way.push_back([=, to = static_cast<uint8*>(to)] {
        int64 at = 0;
        for (int p = matrix; p < matrix + map.box[2]; p++)
            for (int r = row; r < row + map.box[1]; r++)
                for (int c = column; c < column + map.box[0]; c++, at++) {
                    bool inside = p < map.sizes[2] && r < map.sizes[1] && c < map.sizes[0];
                    int64 swizzled = at ^ (at >> 7 & (lines - 1)) << 4;
                    to[swizzled] = inside ? map.first[p * map.strides[1] + r * map.strides[0] + c] : 0;
                }
        count_at(count).bytes -= at;
        count_at(count).settle();
    });
}
inline void load_bytes(void* to, const void* from, int bytes, uint64* count) {
    require(shared_address(to) % 16 == 0 && std::uintptr_t(from) % 16 == 0 && bytes % 16 == 0, "a copy is not aligned");
    grid->under_way.push_back([=] {
        std::memcpy(to, from, bytes);
        count_at(count).bytes -= bytes;
        count_at(count).settle();
    });
}
inline void let_copy_engine_write() {}
inline void fetch_into_l2(const void* at, int bytes) {
    require(std::uintptr_t(at) % 16 == 0 && bytes > 0 && bytes % 16 == 0, "what is fetched is not aligned");
}

// --- the tensor cores -----------------------------------------------------------------------------------------------

// Rows of 8 numbers, by the lane that names them; a lane gets two of a row or, transposed, of a column.
inline void load_four(unsigned (&fragment)[4], const void* row, bool transposed) {
    require(shared_address(row) % 16 == 0, "a row is not aligned");
    auto rows = exchange({reinterpret_cast<uint64>(row)});
    int lane = threadIdx.x % 32, mine = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
        auto number = [&](int r, int c) { return unsigned(reinterpret_cast<const bf16*>(rows[8 * i + r][0])[c]); };
        fragment[i] = transposed ? number(pair, mine) | number(pair + 1, mine) << 16
                                 : number(mine, pair) | number(mine, pair + 1) << 16;
    }
}
inline void load_matrices(unsigned (&fragment)[4], const void* row) { load_four(fragment, row, false); }
inline void load_transposed(unsigned (&fragment)[4], const void* row) { load_four(fragment, row, true); }

// What a word of one operand and one of the other add to a sum.
inline float product_of(unsigned a, unsigned b, float) {
    float low = __uint_as_float(a << 16) * __uint_as_float(b << 16);
    return low + __uint_as_float(a & 0xFFFF0000) * __uint_as_float(b & 0xFFFF0000);
}
inline int product_of(unsigned a, unsigned b, int) { return __dp4a(int(a), int(b), 0); }

template <class Sum>
void multiply(Sum (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {  // m16n8, K of 32 bytes
    auto words = exchange({a[0], a[1], a[2], a[3], b0, b1});
    for (int i = 0; i < 4; i++) {
        int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2 + i % 2;
        for (int half = 0; half < 2; half++)
            for (int word = 0; word < 4; word++)
                sums[i] +=
                    product_of(words[row * 4 + word][2 * half + i / 2], words[column * 4 + word][4 + half], Sum());
    }
}
// wgmma: products of a group are made at once, or when it is waited for, and later.
inline void let_tensor_cores_read() {}
inline void begin_products() {}
inline void make_products(unsigned left) {
    auto& groups = grid->of_threads[grid->running].groups;
    for (; groups.size() > left + 1; groups.erase(groups.begin()))
        for (auto& product : groups.front()) product();
}
inline void commit_products() {
    Thread& thread = grid->of_threads[grid->running];
    thread.groups.emplace_back();
    if (scattered(++thread.commits + blockIdx.x) >> 31) make_products(0);
}
template <int LEFT = 0>
void wait_for_products() {
    require(grid->of_threads[grid->running].groups.back().empty(), "products are not in a group");
    for (unsigned i = 0; i <= threadIdx.x / 128; i++) yield();  // a warpgroup after the other
    make_products(LEFT);
    arrive_and_wait(grid->block().warps[threadIdx.x / 32].barrier, 32);  // they are the warp's
}

// An operand in shared memory, as wgmma is told of it: in rows of 128 bytes, swizzled, or in matrices of eight by
// eight.
struct Described {
    uint8* start;
    int along, across;
    bool swizzled;

    explicit Described(uint64 told) : along((told >> 16 & 0x3FFF) * 16), across((told >> 32 & 0x3FFF) * 16) {
        start = grid->block().memory.get() + (told & 0x3FFF) * 16;
        swizzled = told >> 62 == 1;
        require(swizzled ? across == 1024 : told >> 62 == 0, "an operand lies otherwise");
    }
    template <class T>
    T read(int row, int byte) const {  // channels beside each other
        if (!swizzled)
            return *reinterpret_cast<T*>(start + row / 8 * across + row % 8 * 16 + byte / 16 * along + byte % 16);
        std::uintptr_t at = reinterpret_cast<std::uintptr_t>(start) + row * 128 + byte;
        return *reinterpret_cast<const T*>(at ^ (at >> 7 & 7) << 4);
    }
    bf16 read_across(int row, int column) const {  // the sum is over rows
        if (!swizzled)
            return *reinterpret_cast<bf16*>(start + column / 8 * across + row / 8 * along + row % 8 * 16 +
                                            column % 8 * 2);
        return read<bf16>(row, column / 64 * along + column % 64 * 2);
    }
};
struct At {  // where a sum is, in 64 rows
    int row, column;

    explicit At(int i) {
        row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
        column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    }
};
template <class Sum, int SUMS, class A, class B>
void multiply_later(Sum (&sums)[SUMS], A word_of_row, B word_of_column) {
    grid->of_threads[grid->running].groups.back().push_back([=, &sums] {
        for (int i = 0; i < SUMS; i++)
            for (int word = 0; word < 8; word++) {
                At at(i);
                sums[i] += product_of(word_of_row(at.row, word), word_of_column(at.column, word), Sum());
            }
    });
}
struct Fragments {  // of a warp's rows
    unsigned words[32][4];

    explicit Fragments(const unsigned (&a)[4]) {
        auto given = exchange({a[0], a[1], a[2], a[3]});
        for (int i = 0; i < 128; i++) words[i / 4][i % 4] = unsigned(given[i / 4][i % 4]);
    }
    unsigned operator()(int row, int word) const { return words[row % 8 * 4 + word % 4][word / 4 * 2 + row / 8 % 2]; }
};
template <int SUMS>
void multiply(int (&sums)[SUMS], const unsigned (&a)[4], uint64 b) {
    multiply_later(sums, Fragments(a), [b = Described(b)](int n, int word) { return b.read<unsigned>(n, 4 * word); });
}
template <int SUMS>
void multiply(float (&sums)[SUMS], uint64 a, uint64 b) {
    auto words = [](uint64 told) {
        return [from = Described(told)](int row, int word) { return from.read<unsigned>(row, 4 * word); };
    };
    multiply_later(sums, words(a), words(b));
}
template <int SUMS>
void multiply(float (&sums)[SUMS], const unsigned (&a)[4], uint64 b) {  // across the rows of b
    multiply_later(sums, Fragments(a), [b = Described(b)](int n, int word) {
        auto number = [&](int row) { return unsigned(b.read_across(row, n)); };
        return number(2 * word) | number(2 * word + 1) << 16;
    });
}

inline unsigned transposed(unsigned pair) {
    auto words = exchange({uint64(pair)});
    int lane = threadIdx.x % 32, column = lane / 4;
    auto number = [&](int row) { return unsigned(words[row * 4 + column / 2][0]) >> column % 2 * 16 & 0xFFFF; };
    return number(lane % 4 * 2) | number(lane % 4 * 2 + 1) << 16;
}
