// Kernels with known results, compiled by nvcc to the .ptx files beside this one; test_nvcc.py has the command.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void axpy(float a, const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

// A sum over the whole grid: warps by shuffles, CTAs by shared memory, the grid by the last CTA to come.
extern "C" __global__ void sum(const float* x, float* partial, unsigned* counter, float* out, int n) {
    __shared__ float warps[32];
    __shared__ bool last;
    float total = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) total += x[i];
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        float block = 0.0f;
        for (int w = 0; w < blockDim.x / 32; ++w) block += warps[w];
        partial[blockIdx.x] = block;
        __threadfence();
        last = atomicAdd(counter, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float all = 0.0f;
        for (int b = 0; b < gridDim.x; ++b) all += partial[b];
        *out = all;
    }
}

extern "C" __global__ void histogram(const unsigned char* x, unsigned* bins, int n) {
    extern __shared__ unsigned local[];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&bins[i], local[i]);
}

extern "C" __global__ void halves(const __half* x, __half* h, __nv_bfloat16* b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    h[i] = __hfma(x[i], x[i], __float2half_rn(0.25f));
    b[i] = __float2bfloat16_rn(__half2float(x[i]) * 3.0f);
}

extern "C" __global__ void integers(const unsigned* x, long long* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned a = x[i], b = x[(i + 1) % n];
    long long wide = (long long)a * (int)b;
    out[8 * i + 0] = wide / 1000003;
    out[8 * i + 1] = wide % 97;
    out[8 * i + 2] = __umulhi(a, b);
    out[8 * i + 3] = __funnelshift_l(a, b, a & 31);
    out[8 * i + 4] = __popc(a) + 100 * __clz(b) + 10000 * __ffs(a);
    out[8 * i + 5] = __byte_perm(a, b, 0x3175);
    out[8 * i + 6] = __brev(a);
    out[8 * i + 7] = __mul64hi(wide, wide);
}

// With the slow path of sinf for large arguments: local memory, 64-bit products, a table in constant memory.
extern "C" __global__ void functions(const float* x, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    out[4 * i + 0] = sinf(v);
    out[4 * i + 1] = expf(-fabsf(v) * 1e-3f);
    out[4 * i + 2] = logf(fabsf(v) + 1.0f);
    out[4 * i + 3] = sqrtf(fabsf(v)) / (v * v + 3.0f);
}

// Warps whose lanes part in a loop and meet again.
extern "C" __global__ void collatz(const unsigned* x, unsigned* steps, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned v = x[i], count = 0;
    while (v != 1) {
        if (v & 1) v = 3 * v + 1; else v /= 2;
        ++count;
    }
    steps[i] = count;
}
