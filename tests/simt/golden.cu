// Every wrapper of ptx.cuh and every conversion of numeric.cuh in a tiny kernel of one block: words in, words out.
// tests/test_cuda_golden.py compares what comes out, on the emulator and on a GPU, with plainly computed vectors.
#include <cstring>

#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/simt.cuh"

#define KERNELPRESS_EXPORT extern "C" __attribute__((visibility("default")))

namespace kernelpress::cuda {

namespace {

constexpr int kWords = 256;  // most of a thread block's exchange through shared memory

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x); }

// Each lane copies kBytes, every third lane zeros instead.
template <int kBytes>
__global__ void cp_async(const uint32_t* in, uint32_t* out) {
  SIMT_SHARED(uint32_t, words, [kWords]);
  constexpr int kEach = kBytes / 4;
  const bool valid = lane() % 3 != 0;
  if constexpr (kBytes == 16) cp_async_16(words + kEach * lane(), in + kEach * lane(), valid);
  if constexpr (kBytes == 8) cp_async_8(words + kEach * lane(), in + kEach * lane(), valid);
  if constexpr (kBytes == 4) cp_async_4(words + kEach * lane(), in + kEach * lane(), valid);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < kEach; ++i) out[kEach * lane() + i] = words[kEach * lane() + i];
}

// Two groups: the first has landed while one may be in flight, the second after all.
__global__ void cp_async_groups(const uint32_t* in, uint32_t* out) {
  SIMT_SHARED(uint32_t, words, [kWords]);
  cp_async_4(words + lane(), in + lane(), true);
  cp_async_commit();
  cp_async_4(words + 32 + lane(), in + 32 + lane(), true);
  cp_async_commit();
  cp_async_wait<1>();
  out[lane()] = words[lane()];
  cp_async_wait<0>();
  out[32 + lane()] = words[32 + lane()];
}

template <int kCount, bool kTransposed>
__global__ void ldmatrix(const uint32_t* in, uint32_t* out) {
  SIMT_SHARED(uint32_t, words, [kWords]);
  for (int i = 0; i < 4; ++i) words[4 * lane() + i] = in[4 * lane() + i];
  warp_barrier();
  uint32_t r[kCount];
  if constexpr (kCount == 4 && !kTransposed) ldmatrix_x4(r, words + 4 * lane());
  if constexpr (kCount == 4 && kTransposed) ldmatrix_x4_trans(r, words + 4 * lane());
  if constexpr (kCount == 2 && !kTransposed) ldmatrix_x2(r, words + 4 * lane());
  if constexpr (kCount == 2 && kTransposed) ldmatrix_x2_trans(r, words + 4 * lane());
  for (int i = 0; i < kCount; ++i) out[kCount * lane() + i] = r[i];
}

// in: a [32][4], b [32][2], d [32][4]
template <class Accumulator, void (*kMultiply)(Accumulator (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void mma(const uint32_t* in, uint32_t* out) {
  uint32_t a[4], b[2];
  Accumulator d[4];
  for (int i = 0; i < 4; ++i) a[i] = in[4 * lane() + i];
  for (int i = 0; i < 2; ++i) b[i] = in[128 + 2 * lane() + i];
  memcpy(d, in + 192 + 4 * lane(), sizeof d);
  kMultiply(d, a, b);
  memcpy(out + 4 * lane(), d, sizeof d);
}

__device__ void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_f16(d, a, b); }
__device__ void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k16_bf16(d, a, b); }
__device__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k8_tf32(d, a, b); }
__device__ void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_m16n8k32_s8(d, a, b); }

__global__ void dot_product(const uint32_t* in, uint32_t* out) {
  out[lane()] = static_cast<uint32_t>(
      dp4a(static_cast<int32_t>(in[lane()]), static_cast<int32_t>(in[32 + lane()]), static_cast<int32_t>(in[64 + lane()])));
}

// The selectors come from memory, then one is a constant.
__global__ void byte_permutes(const uint32_t* in, uint32_t* out) {
  out[lane()] = byte_permute(in[lane()], in[32 + lane()], in[64 + lane()]);
  out[32 + lane()] = byte_permute(in[lane()], in[32 + lane()], 0x7250);
}

__global__ void tensor_float(const uint32_t* in, uint32_t* out) { out[lane()] = to_tf32(__uint_as_float(in[lane()])); }

// Values of 4 bytes in each way, then of 2, 8 and 16 bytes.
__global__ void shuffles(const uint32_t* in, uint32_t* out) {
  const uint32_t value = in[lane()];
  out[lane()] = shuffle_xor(value, 5);
  out[32 + lane()] = shuffle_down(value, 3);
  out[64 + lane()] = shuffle_up(value, 3);
  out[96 + lane()] = shuffle_index(value, 31 - lane());
  out[128 + lane()] = shuffle_xor(Half{static_cast<uint16_t>(value)}, 1).bits;
  const Vector<uint32_t, 2> pair = shuffle_xor(Vector<uint32_t, 2>{{value, ~value}}, 16);
  out[160 + lane()] = pair[0] ^ 3 * pair[1];
  const Vector<uint32_t, 4> four = shuffle_down(Vector<uint32_t, 4>{{value, ~value, value + 1, value + 2}}, 1);
  out[192 + lane()] = four[0] ^ 3 * four[1] ^ 5 * four[2] ^ 7 * four[3];
}

__global__ void votes(const uint32_t* in, uint32_t* out) {
  const uint32_t value = in[lane()];
  out[lane()] = vote_any(value == 7) | vote_any(value > 1000) << 1 | vote_all(value < 1000) << 2 | vote_all(value == 7) << 3;
}

__global__ void reductions(const uint32_t* in, uint32_t* out) {
  const auto value = static_cast<int32_t>(in[lane()]);
  out[lane()] = static_cast<uint32_t>(reduce_add(value));
  out[32 + lane()] = static_cast<uint32_t>(reduce_max(value));
  out[64 + lane()] = __float_as_uint(reduce_add(static_cast<float>(value)));
  out[96 + lane()] = __float_as_uint(reduce_max(static_cast<float>(value)));
}

__global__ void vectors(const uint32_t* in, uint32_t* out) {
  using Words = Vector<uint32_t, 4>;
  prefetch_l2(in);
  store_16(out + 4 * lane(), load_16<Words>(in + 4 * (31 - lane())));
  store_16(out + 128 + 4 * lane(), load_streaming_16<Words>(in + 4 * (31 - lane())));
}

// out: a counter, a float sum, then what each lane found in the counter.
__global__ void atomics(const uint32_t* in, uint32_t* out) {
  if (lane() == 0) out[0] = out[1] = 0;
  block_barrier();
  const int32_t before = atomic_add(reinterpret_cast<int32_t*>(out), 1);
  out[2 + before] = 1;
  atomic_add(reinterpret_cast<float*>(out + 1), static_cast<float>(static_cast<int32_t>(in[lane()])));
  device_fence();
}

// 64 threads, in two warps, turn 64 words round.
__global__ void barriers(const uint32_t* in, uint32_t* out) {
  SIMT_SHARED(uint32_t, words, [64]);
  words[threadIdx.x] = in[threadIdx.x];
  block_barrier();
  const uint32_t other = words[63 - threadIdx.x];
  block_barrier();
  words[threadIdx.x] = other;
  warp_barrier();
  out[threadIdx.x] = words[threadIdx.x ^ 1];
}

template <class T>
__global__ void from_floats(const uint32_t* in, uint32_t* out) {
  for (int i = lane(); i < kWords; i += 32) {
    const T value = from_float<T>(__uint_as_float(in[i]));
    uint32_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    out[i] = bits;
  }
}

template <class T>
__global__ void packs(const uint32_t* in, uint32_t* out) {
  for (int i = lane(); i < kWords / 2; i += 32) out[i] = pack<T>(__uint_as_float(in[2 * i]), __uint_as_float(in[2 * i + 1]));
}

// All 65536 values of a 16-bit type, in order.
template <class T>
__global__ void to_floats(const uint32_t*, uint32_t* out) {
  for (int i = lane(); i < 65536; i += 32) out[i] = __float_as_uint(to_float(T{static_cast<uint16_t>(i)}));
}

struct Golden {
  const char* name;
  void (*kernel)(const uint32_t*, uint32_t*);
  unsigned threads;
};

const Golden kGolden[] = {
    {"cp_async_16", cp_async<16>, 32},
    {"cp_async_8", cp_async<8>, 32},
    {"cp_async_4", cp_async<4>, 32},
    {"cp_async_groups", cp_async_groups, 32},
    {"ldmatrix_x4", ldmatrix<4, false>, 32},
    {"ldmatrix_x2", ldmatrix<2, false>, 32},
    {"ldmatrix_x4_trans", ldmatrix<4, true>, 32},
    {"ldmatrix_x2_trans", ldmatrix<2, true>, 32},
    {"mma_m16n8k16_f16", mma<float, multiply_f16>, 32},
    {"mma_m16n8k16_bf16", mma<float, multiply_bf16>, 32},
    {"mma_m16n8k8_tf32", mma<float, multiply_tf32>, 32},
    {"mma_m16n8k32_s8", mma<int32_t, multiply_s8>, 32},
    {"dp4a", dot_product, 32},
    {"byte_permute", byte_permutes, 32},
    {"to_tf32", tensor_float, 32},
    {"shuffles", shuffles, 32},
    {"votes", votes, 32},
    {"reductions", reductions, 32},
    {"vectors", vectors, 32},
    {"atomics", atomics, 32},
    {"barriers", barriers, 64},
    {"half_from_float", from_floats<Half>, 32},
    {"bfloat16_from_float", from_floats<BFloat16>, 32},
    {"int8_from_float", from_floats<int8_t>, 32},
    {"pack_half", packs<Half>, 32},
    {"pack_bfloat16", packs<BFloat16>, 32},
    {"half_to_float", to_floats<Half>, 32},
    {"bfloat16_to_float", to_floats<BFloat16>, 32},
};

}  // namespace

}  // namespace kernelpress::cuda

// Runs one of the kernels on the current device's default stream; returns a cudaError_t, -1 where there is none of that name.
KERNELPRESS_EXPORT int kernelpress_golden(const char* name, const uint32_t* in, uint32_t* out) {
  using namespace kernelpress::cuda;
  for (const Golden& golden : kGolden) {
    if (std::strcmp(golden.name, name) == 0) return launch(golden.kernel, Grid{dim3(1), dim3(golden.threads)}, in, out);
  }
  return -1;
}
