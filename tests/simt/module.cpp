// The emulator's place in the Python module `_simt`: its own functions, and a device for `cuda_module.cpp`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"
#include "pyext/csrc/cuda_runtime_seam.h"

namespace py = pybind11;

namespace kernelpress::cuda {

namespace {

// On the second one, few tiles are more than its multiprocessors hold: blocks take several.
const runtime::DeviceDescription devices[] = {
    {{80, 108, 163 * 1024, 40 << 20}, "host emulator"},
    {{80, 2, 163 * 1024, 40 << 20}, "host emulator of two multiprocessors"},
};

simt::Order order_of(const std::string& name) {
  if (name == "random") return simt::Order::random;
  if (name == "ascending") return simt::Order::ascending;
  if (name == "descending") return simt::Order::descending;
  throw py::value_error("order: expected random, ascending or descending, got " + name);
}

py::dict statistics() {
  const simt::Statistics& found = simt::machine.statistics;
  py::dict fields;
  fields["blocks"] = found.blocks;
  fields["switches"] = found.switches;
  fields["collectives"] = found.collectives;
  fields["ldmatrix_accesses"] = found.ldmatrix_accesses;
  fields["ldmatrix_conflicts"] = found.ldmatrix_conflicts;
  fields["shared_accesses"] = found.shared_accesses;
  fields["shared_conflicts"] = found.shared_conflicts;
  return fields;
}

}  // namespace

namespace runtime {

int device_count(int* count) {
  *count = sizeof devices / sizeof devices[0];
  return 0;
}

int describe_device(int index, DeviceDescription* description) {
  *description = devices[index];
  return 0;
}

int current_device(int* index) {
  *index = 0;
  return 0;
}

int set_device(int) { return 0; }
int clear_error() { return 0; }

std::string error_text(int code) {
  return code == 1 ? "invalid argument" : code == 9 ? "invalid configuration argument" : "the emulator has a report";
}

int toolkit_version() { return 13000; }
int driver_version() { return 13000; }

}  // namespace runtime

void bind_emulator(py::module_& module) {
  module.def("register_extent", [](uintptr_t address, size_t bytes, const std::string& name, uintptr_t mask, bool is_unwritten) {
    simt::register_extent(address, bytes, name, reinterpret_cast<const unsigned char*>(mask), is_unwritten);
  });
  module.def("clear_extents", &simt::clear_extents);
  module.def("unwritten_outputs", &simt::unwritten_outputs);
  module.def("configure", [](uint64_t seed, const std::string& order, bool counts_shared) {
    simt::machine.seed = seed;
    simt::machine.order = order_of(order);
    simt::machine.counts_shared = counts_shared;
    simt::machine.shared_limit = static_cast<size_t>(devices[0].device.shared_bytes);
  });
  module.def("take_report", [] { return std::exchange(simt::machine.report, {}); });
  module.def("statistics", &statistics);
  module.def("clear_statistics", [] { simt::machine.statistics = {}; });
}

}  // namespace kernelpress::cuda
