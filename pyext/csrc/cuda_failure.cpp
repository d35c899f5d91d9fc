#include "cuda_failure.h"

#include <sstream>

#include "cuda_runtime_seam.h"

#define KERNELPRESS_TEXT_(...) #__VA_ARGS__
#define KERNELPRESS_TEXT(...) KERNELPRESS_TEXT_(__VA_ARGS__)

#ifndef KERNELPRESS_CUDA_ARCHITECTURES
#define KERNELPRESS_CUDA_ARCHITECTURES
#endif

namespace kernelpress::cuda {
namespace {

// Codes of cudaError_t, which stay as they are from one CUDA to the next.
enum Code {
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidConfiguration = 9,
  kStubLibrary = 34,
  kInsufficientDriver = 35,
  kNoDevice = 100,
  kNoKernelImage = 209,
  kUnsupportedPtx = 222,
  kIllegalAddress = 700,
  kLaunchOutOfResources = 701,
  kLaunchTimeout = 702,
  kContextIsDestroyed = 709,
  kAssert = 710,
  kHardwareStackError = 714,
  kLaunchFailure = 719,
};

std::string architectures_text() {
  std::string text;
  for (const std::string& name : compiled_architectures()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// Errors after which no call on this context succeeds.
bool is_sticky(int code) {
  return code == kIllegalAddress || code == kLaunchTimeout || code == kContextIsDestroyed || code == kAssert ||
         (code >= kHardwareStackError && code <= kLaunchFailure);
}

bool is_given(const char* text) { return text != nullptr && *text != '\0'; }

// What to do, after the error's own text.
std::string advice(int code) {
  switch (code) {
    case kMemoryAllocation:
      return "free device memory (torch.cuda.empty_cache()) or take a smaller batch";
    case kInvalidValue:
    case kInvalidConfiguration:
    case kLaunchOutOfResources:
      return "this configuration does not fit the device; take another backend, or delete what ops.tune measured if it did";
    case kNoKernelImage:
    case kUnsupportedPtx:
      return "this build has code for " + architectures_text() + "; build for this device: KERNELPRESS_CUDA_ARCHS=<its capability>";
    default:
      if (is_sticky(code)) {
        return "the CUDA context of this process is lost, and an earlier kernel may have done it; CUDA_LAUNCH_BLOCKING=1 or "
               "compute-sanitizer shows which";
      }
      return {};
  }
}

}  // namespace

std::vector<std::string> compiled_architectures() {
  std::vector<std::string> names;
  std::istringstream list(KERNELPRESS_TEXT(KERNELPRESS_CUDA_ARCHITECTURES));
  for (std::string name; std::getline(list, name, ':');) names.push_back(name);
  return names;
}

std::string unavailability(int code) {
  const int driver = runtime::driver_version(), toolkit = runtime::toolkit_version();
  if (driver == 0 || code == kStubLibrary) return "no NVIDIA driver is installed";
  if (code == kInsufficientDriver) {
    return "the driver takes CUDA up to " + version_text(driver) + ", this module was built with " + version_text(toolkit) +
           "; update the driver or build with an older toolkit";
  }
  if (code == kNoDevice) return "no CUDA device is visible (CUDA_VISIBLE_DEVICES may hide it)";
  return "CUDA: " + runtime::error_text(code);
}

std::string describe_failure(const char* launcher, const Status& status, int index) {
  std::ostringstream text;
  text << launcher << ": ";
  if (is_given(status.kernel)) {
    text << "kernel " << status.kernel;
    if (is_given(status.configuration)) text << " in configuration " << status.configuration;
    text << ' ';
  }
  text << "failed on device " << index;
  runtime::DeviceDescription description;
  if (runtime::describe_device(index, &description) == 0) {
    text << " (" << description.name << ", sm_" << description.device.capability << ")";
  } else {
    runtime::clear_error();
  }
  text << ": " << runtime::error_text(status.code) << " (cudaError " << status.code << ")";
  const std::string what_to_do = advice(status.code);
  if (!what_to_do.empty()) text << "; " << what_to_do;
  return text.str();
}

}  // namespace kernelpress::cuda
