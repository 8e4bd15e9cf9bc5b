// All that the kernels made for Hopper ask of the machine in PTX. Tests put a header in its place that does the same on
// a CPU: tests/emulated_hopper.cuh.

using uint8 = unsigned char;
using bf16 = unsigned short;
using int64 = long long;
using uint64 = unsigned long long;

__device__ unsigned to_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ bf16 to_bf16(float x) { return bf16(to_pair(x, 0.f)); }
__device__ unsigned to_half_pair(float low, float high) {  // in fp16
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ float2 from_half_pair(unsigned pair) {
    float2 x;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(x.x), "=f"(x.y)
        : "r"(pair));
    return x;
}

__device__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- threads --------------------------------------------------------------------------------------------------------

__device__ void not_before(float& x) { asm volatile("" : "+f"(x)); }  // is x known to the compiler
__device__ void not_before(int& x) { asm volatile("" : "+r"(x)); }
__device__ void not_before(unsigned& x, unsigned& y) { asm volatile("" : "+r"(x), "+r"(y)); }

// One thread of a warp that is together. The compiler knows that it is one; of any other that asks the copy engine it
// makes a loop over all threads.
__device__ bool elected() {
    unsigned is;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p; }" : "=r"(is));
    return is;
}

template <int THREADS>
__device__ void wait_for_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
__device__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void leave_cluster() {  // once all have read what they need: nobody waits for anything to be written
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// --- shared memory, and counts of the bytes that come ---------------------------------------------------------------

template <class Memory>
__device__ Memory& shared_memory() {
    extern __shared__ __align__(1024) uint8 dynamic[];
    return *reinterpret_cast<Memory*>(dynamic);
}
__device__ unsigned shared_address(const void* at) { return unsigned(__cvta_generic_to_shared(at)); }

__device__ unsigned in_block(const void* at, int rank) {  // the same place in another block of the cluster
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(rank));
    return there;
}

__device__ void initialize(uint64* count, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(count)), "r"(arrivals) : "memory");
}
__device__ void publish_counts() {  // once they are initialized: to the copy engine and the cluster
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ void expect(uint64* count, int bytes) {  // by one thread, once for every wait
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(count)), "r"(bytes)
                 : "memory");
}
__device__ void wait_for_bytes(uint64* count, int waits) {  // after so many waits
    unsigned there;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(there)
                     : "r"(shared_address(count)), "r"(waits % 2)
                     : "memory");
    while (!there);
}
__device__ void arrive(uint64* count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(count)) : "memory");
}

__device__ void send(unsigned there, unsigned count, unsigned a) {  // and count the bytes, in the same block
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there), "r"(a),
                 "r"(count)
                 : "memory");
}
__device__ void send(unsigned there, unsigned count, unsigned a, unsigned b) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(there),
                 "r"(a), "r"(b), "r"(count)
                 : "memory");
}
__device__ void send(unsigned there, unsigned count, uint4 a) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
        "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(count)
        : "memory");
}
__device__ int4 read_in_block(const int4* at, int rank) {
    int4 x;
    asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(in_block(at, rank)));
    return x;
}

__device__ uint4 read_in_block(const uint4* at, int rank) {
    int4 x = read_in_block(reinterpret_cast<const int4*>(at), rank);
    return {unsigned(x.x), unsigned(x.y), unsigned(x.z), unsigned(x.w)};
}
__device__ float4 read_in_block(const float4* at, int rank) {
    int4 x = read_in_block(reinterpret_cast<const int4*>(at), rank);
    return {__int_as_float(x.x), __int_as_float(x.y), __int_as_float(x.z), __int_as_float(x.w)};
}

// --- global memory --------------------------------------------------------------------------------------------------

// Reads that stay where they are written: before a wait.
__device__ float read(const float* at) {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(at));
    return x;
}
__device__ float4 read4(const float* at) {
    float4 x;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(at));
    return x;
}
__device__ int2 read_indices(const int64* at) {  // two; of each the low half
    int4 x;
    asm volatile("ld.global.nc.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
    return {x.x, x.z};
}
__device__ unsigned read(const unsigned* at) {
    unsigned x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    return x;
}
__device__ bf16 read(const bf16* at) {
    bf16 x;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(at));
    return x;
}

// What other blocks write meanwhile.
__device__ uint2 peek(const uint2* at) {
    uint2 x;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(at) : "memory");
    return x;
}
__device__ uint4 peek(const uint4* at) {
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(at)
                 : "memory");
    return x;
}
// Into bits that are all set. This is made in L2 itself; a plain store is held up by those who look at what it changes.
__device__ void put(unsigned* at, unsigned bits) {
    asm volatile("red.relaxed.gpu.global.and.b32 [%0], %1;" ::"l"(at), "r"(bits) : "memory");
}

// --- the copy engine (TMA) ------------------------------------------------------------------------------------------

struct alignas(64) TensorMap {  // CUtensorMap
    uint64 opaque[16];
};

__device__ void load_box(void* to, const TensorMap& map, int column, int row, int matrix, uint64* count) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(count))
        : "memory");
}
__device__ void load_bytes(void* to, const void* from, int bytes, uint64* count) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(count))
                 : "memory");
}
__device__ void let_copy_engine_write() {  // where this thread has written or read
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ void fetch_into_l2(const void* at, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes));
}

// --- the tensor cores -----------------------------------------------------------------------------------------------

__device__ void load_matrices(unsigned (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row)));
}
__device__ void load_transposed(unsigned (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row)));
}
__device__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void multiply(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {  // 16 x 32 by 32 x 8
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Numbers of eight rows and eight columns, two in a row a lane, and the other way round.
__device__ unsigned transposed(unsigned pair) {
    unsigned other;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
    return other;
}

// wgmma: what lies between begin and commit is a group, and runs on its own until it is waited for.
__device__ void let_tensor_cores_read() {  // what this thread has written
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT = 0>  // groups that may go on
__device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
