// The Python module of the emulator's own test; its kernels are called through ctypes.
#include <pybind11/pybind11.h>

namespace kernelpress::cuda {

void bind_emulator(pybind11::module_& module);

PYBIND11_MODULE(_simt_self, module) { bind_emulator(module); }

}  // namespace kernelpress::cuda
