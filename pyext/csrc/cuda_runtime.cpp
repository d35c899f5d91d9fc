// The CUDA runtime, linked statically, behind cuda_runtime_seam.h.
#include <cuda_runtime_api.h>

#include "cuda_runtime_seam.h"

namespace kernelpress::cuda::runtime {

int device_count(int* count) { return cudaGetDeviceCount(count); }

int describe_device(int index, DeviceDescription* description) {
  const auto read = [index](cudaDeviceAttr attribute, int64_t* to) {
    int value = 0;
    const cudaError_t code = cudaDeviceGetAttribute(&value, attribute, index);
    *to = value;
    return code;
  };
  int64_t major = 0, minor = 0;
  Device& device = description->device;
  cudaError_t code = read(cudaDevAttrComputeCapabilityMajor, &major);
  if (code == cudaSuccess) code = read(cudaDevAttrComputeCapabilityMinor, &minor);
  if (code == cudaSuccess) code = read(cudaDevAttrMultiProcessorCount, &device.multiprocessors);
  if (code == cudaSuccess) code = read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.shared_bytes);
  if (code == cudaSuccess) code = read(cudaDevAttrL2CacheSize, &device.l2_bytes);
  device.capability = 10 * major + minor;
  cudaDeviceProp properties;
  if (code == cudaSuccess) code = cudaGetDeviceProperties(&properties, index);
  if (code == cudaSuccess) description->name = properties.name;
  return code;
}

int current_device(int* index) { return cudaGetDevice(index); }
int set_device(int index) { return cudaSetDevice(index); }
int clear_error() { return cudaGetLastError(); }
std::string error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int toolkit_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

}  // namespace kernelpress::cuda::runtime
