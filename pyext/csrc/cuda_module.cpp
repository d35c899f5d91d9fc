// The Python module kernelpress._cuda: the CUDA kernels by raw addresses and sizes (see docs/architecture.md), and the devices.
// Arguments were checked by the ops; here only their number and kind are. With KERNELPRESS_SIMT the same file is the module of the
// host emulator, `_simt`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <type_traits>
#include <vector>

#include "cuda_failure.h"
#include "cuda_runtime_seam.h"
#include "kernels/cuda/dense.h"
#include "kernels/cuda/dense_tiles.h"
#include "kernels/cuda/int8_depthwise.h"
#include "kernels/cuda/depthwise_tiles.h"
#include "kernels/cuda/ghost_tiles.h"
#include "kernels/cuda/grouped_tiles.h"
#include "kernels/cuda/int8.h"
#include "kernels/cuda/int8_tiles.h"
#include "kernels/cuda/int8_quantize.h"
#include "kernels/cuda/lowrank.h"
#include "kernels/cuda/separable.h"
#include "kernels/cuda/separable_tiles.h"
#include "kernels/cuda/sparse_tiles.h"

#ifdef KERNELPRESS_SIMT
#define KERNELPRESS_MODULE _simt
#else
#define KERNELPRESS_MODULE _cuda
#endif

namespace py = pybind11;

namespace kernelpress::cuda {

#ifdef KERNELPRESS_SIMT
void bind_emulator(py::module_& module);  // the emulator's own functions: memory extents, seed and order, reports
#endif

namespace {

// Devices do not change while a process lives: each is asked once.
const runtime::DeviceDescription& device_at(int index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<runtime::DeviceDescription>> known;
  const std::lock_guard<std::mutex> held(mutex);
  const auto place = static_cast<size_t>(index);
  if (place < known.size() && known[place]) return *known[place];
  int count = 0;
  if (const int code = runtime::device_count(&count)) throw std::runtime_error(unavailability(code));
  if (index < 0 || index >= count) {
    throw std::invalid_argument("device: expected an index below " + std::to_string(count) + ", got " + std::to_string(index));
  }
  auto description = std::make_unique<runtime::DeviceDescription>();
  if (const int code = runtime::describe_device(index, description.get())) throw std::runtime_error(unavailability(code));
  known.resize(static_cast<size_t>(count));
  known[place] = std::move(description);
  return *known[place];
}

// Makes a device the current one of this thread, and puts the old one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) : code_(runtime::current_device(&before_)) {
    if (code_ == 0 && before_ != index) {
      code_ = runtime::set_device(index);
      has_changed_ = code_ == 0;
    }
  }
  ~DeviceGuard() {
    if (has_changed_) runtime::set_device(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int code() const { return code_; }

 private:
  int before_ = 0;
  int code_;
  bool has_changed_ = false;
};

int64_t integer_of(PyObject* value) {
  const int64_t integer = PyLong_AsLongLong(value);
  if (integer == -1 && PyErr_Occurred()) throw py::error_already_set();
  return integer;
}

// Fills an argument struct from a flat list: addresses and integers up to `configuration`, floats after it.
template <class Args>
void fill(Args* arguments, const char* launcher, const py::args& values) {
  static_assert(std::is_trivially_copyable_v<Args> && std::is_standard_layout_v<Args> && sizeof(Args) % sizeof(int64_t) == 0);
  static_assert(sizeof(int64_t) == sizeof(double) && sizeof(int64_t) == sizeof(void*));
  constexpr size_t kWords = sizeof(Args) / sizeof(int64_t);
  constexpr size_t kIntegers = offsetof(Args, configuration) / sizeof(int64_t) + 1;
  if (values.size() != kWords + 2) {
    std::ostringstream message;
    message << launcher << ": expected " << kIntegers << " integers, " << kWords - kIntegers
            << " floats, the stream and the device's index, got " << values.size() << " arguments";
    throw py::type_error(message.str());
  }
  std::array<int64_t, kWords> words;
  for (size_t i = 0; i < kWords; ++i) {
    PyObject* value = PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i));
    if (i < kIntegers) {
      words[i] = integer_of(value);
    } else {
      if (!PyFloat_Check(value)) throw py::type_error(std::string(launcher) + ": argument " + std::to_string(i) + ": expected a float");
      const double scalar = PyFloat_AS_DOUBLE(value);
      std::memcpy(&words[i], &scalar, sizeof scalar);
    }
  }
  std::memcpy(static_cast<void*>(arguments), words.data(), sizeof(Args));
}

// Launcher → the names of its tile configurations, in the order of their indices.
std::map<std::string, std::vector<std::string>> configuration_names;

// Binds a launcher as `name(*fields, stream, device)`.
template <class Args>
void bind_launcher(py::module_& module, const char* name, Status (*launcher)(const Args&, const Device&, void*)) {
  module.def(name, [name, launcher](const py::args& values) {
    Args arguments;
    fill(&arguments, name, values);
    PyObject** last = &PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(values.size()) - 2);
    void* stream = reinterpret_cast<void*>(integer_of(last[0]));
    const int index = static_cast<int>(integer_of(last[1]));
    const Device& device = device_at(index).device;
    Status status;
    {
      const py::gil_scoped_release released;
      const DeviceGuard guard(index);
      status.code = guard.code();
      if (status.code == 0) status = launcher(arguments, device, stream);
      if (status.code != 0) runtime::clear_error();
    }
    if (status.code != 0) throw std::runtime_error(describe_failure(name, status, index));
  });
}

// The same for a launcher with a table of tile configurations, each with a `const char* name`.
template <class Args, class Tile, size_t kCount>
void bind_launcher(py::module_& module, const char* name, Status (*launcher)(const Args&, const Device&, void*), const Tile (&tiles)[kCount]) {
  bind_launcher(module, name, launcher);
  for (const Tile& tile : tiles) configuration_names[name].emplace_back(tile.name);
}

py::dict describe_device(int index) {
  const runtime::DeviceDescription& found = device_at(index);
  py::dict fields;
  fields["name"] = found.name;
  fields["capability"] = found.device.capability;
  fields["multiprocessors"] = found.device.multiprocessors;
  fields["shared_bytes"] = found.device.shared_bytes;
  fields["l2_bytes"] = found.device.l2_bytes;
  return fields;
}

// Why no kernel can run, or None.
py::object unavailable_because() {
  int count = 0;
  const int code = runtime::device_count(&count);
  if (code != 0) return py::str(unavailability(code));
  if (count == 0) return py::str("no CUDA device is visible (CUDA_VISIBLE_DEVICES may hide it)");
  return py::none();
}

}  // namespace

PYBIND11_MODULE(KERNELPRESS_MODULE, module) {
  module.doc() = "CUDA kernels of kernelpress: raw addresses, sizes in elements. Use torch.ops.kernelpress instead.";

  // One line a launcher: bind_launcher(module, "name", &name, kTable), the table of its tile configurations only where it has one.
  bind_launcher(module, "pointwise_conv2d", &pointwise_conv2d, kDenseTiles);
  bind_launcher(module, "depthwise_conv2d", &depthwise_conv2d, kDepthwiseTiles);
  bind_launcher(module, "ghost_conv2d", &ghost_conv2d, kGhostTiles);
  bind_launcher(module, "separable_conv2d", &separable_conv2d, kSeparableTiles);
  bind_launcher(module, "inverted_residual", &inverted_residual, kSeparableTiles);
  bind_launcher(module, "grouped_conv2d", &grouped_conv2d, kGroupedTiles);
  bind_launcher(module, "shuffle_concat", &shuffle_concat, kShuffleTiles);
  bind_launcher(module, "lowrank_linear", &lowrank_linear, kLowrankTiles);
  bind_launcher(module, "lowrank_conv2d", &lowrank_conv2d, kLowrankTiles);
  bind_launcher(module, "sparse_conv2d", &sparse_conv2d, kSparseTiles);
  bind_launcher(module, "int8_matmul", &int8_matmul, kInt8Tiles);
  bind_launcher(module, "int8_depthwise_conv2d", &int8_depthwise_conv2d, kInt8DepthwiseTiles);
  bind_launcher(module, "int8_conv2d", &int8_conv2d, kInt8WindowTiles);
  bind_launcher(module, "quantize", &quantize);
  bind_launcher(module, "dequantize", &dequantize);
  bind_launcher(module, "int8_add", &int8_add);
  bind_launcher(module, "quantize_rows", &quantize_rows);

  module.def("configurations", [](const std::string& launcher) { return configuration_names[launcher]; }, py::arg("launcher"));
  module.def("architectures", &compiled_architectures);
  module.def("unavailable_because", &unavailable_because);
  module.def("device_count", [] {
    int count = 0;
    return runtime::device_count(&count) == 0 ? count : 0;
  });
  module.def("device", &describe_device, py::arg("index"));
  module.def("toolkit_version", &runtime::toolkit_version);
  module.def("driver_version", &runtime::driver_version);
  module.def(
      "describe_failure",
      [](const std::string& launcher, const std::string& kernel, const std::string& configuration, int code, int index) {
        return describe_failure(launcher.c_str(), Status{code, kernel.c_str(), configuration.c_str()}, index);
      },
      py::arg("launcher"), py::arg("kernel"), py::arg("configuration"), py::arg("code"), py::arg("device"));
#ifdef KERNELPRESS_SIMT
  bind_emulator(module);
#endif
}

}  // namespace kernelpress::cuda
