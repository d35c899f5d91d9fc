// Prepared calls: an op on given parameters and activations of a given form, run again without a word of Python.
//
//   KernelCall   a kernel with its arguments; only the addresses of activations and output are missing
//   CallTable    what was prepared of one op, found by the arguments of a call
//   AcceptedForms   the calls of a network that were found to be such as it answers
//
// A table holds anything that maps an op's tensors to its output; a KernelCall it runs directly. What it cannot vouch for it leaves to
// Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "cpu_kernels.h"

namespace kernelpress {

constexpr Py_ssize_t kMostTensors = 16;

// A kernel on `words`, an output like `form` made by `allocate` for each call, and the addresses of tensors that change.
class KernelCall {
 public:
  bool init(PyObject* arguments);
  PyObject* call(PyObject* const* arguments, Py_ssize_t count);
  int visit(visitproc visit, void* arg) const;
  void clear();

  PyObject* compute(PyObject* const* tensors, Py_ssize_t count) const;

 private:
  struct Changing {
    size_t word;
    Py_ssize_t tensor;
  };
  NamedKernel kernel_{};
  std::vector<int64_t> words_;
  size_t output_word_ = 0;
  std::vector<Changing> changing_;
  pybind11::object held_, allocate_, form_;
};

bool add_call_types(PyObject* module);
bool add_forms_type(PyObject* module);

}  // namespace kernelpress
