// What the kernels made for Hopper have in common: numbers, and shared memory whose writes are counted.

using uint8 = unsigned char;
using bf16 = unsigned short;
using int64 = long long;
using uint64 = unsigned long long;

__device__ float to_float(bf16 x) { return __uint_as_float(unsigned(x) << 16); }
__device__ float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ float high_half(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000); }

__device__ unsigned to_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ bf16 to_bf16(float x) { return bf16(to_pair(x, 0.f)); }

__device__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float quotient(float a, float b) {
    float y;
    asm("div.full.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

__device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float gelu(float x) {  // with the tanh approximation: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
    return x * reciprocal(1.f + exp2_of(x * (-2.302208198f - 0.1029432396f * x * x)));
}
__device__ unsigned geglu(unsigned gate, unsigned up) {  // pairs; gelu(gate) is rounded to bf16 too, as in torch
    unsigned x = to_pair(gelu(low_half(gate)), gelu(high_half(gate)));
    return to_pair(low_half(x) * low_half(up), high_half(x) * high_half(up));
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
__device__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
