// What the kernels made for Hopper compute alike.

#include "hopper.cuh"

__device__ float to_float(bf16 x) { return __uint_as_float(unsigned(x) << 16); }
__device__ float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ float high_half(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000); }

__device__ float gelu(float x) {  // with the tanh approximation: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
    return x * reciprocal(1.f + exp2_of(x * (-2.302208198f - 0.1029432396f * x * x)));
}
__device__ unsigned geglu(unsigned gate, unsigned up) {  // pairs; gelu(gate) is rounded to bf16 too, as in torch
    unsigned x = to_pair(gelu(low_half(gate)), gelu(high_half(gate)));
    return to_pair(low_half(x) * low_half(up), high_half(x) * high_half(up));
}
