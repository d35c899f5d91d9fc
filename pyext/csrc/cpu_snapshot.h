// Parameters as they were, remembered without keeping them alive, to tell later whether what was made of them still holds.
//
// Version counters miss what is written through `.data`, numpy or another process. So some of the values are compared too, where that
// needs no other device: lines of memory spread over the tensor, which whatever updates a whole parameter changes.
#pragma once

#include <Python.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cpu_tensors.h"

namespace kernelpress {

// Lines of a tensor's memory, copied; all of it where it is small. Holds the first, the last and some between, those that are not all
// zero where there are such: a factor changes no zero.
class Sample {
 public:
  explicit Sample(const TensorView& view);
  bool is_still(int64_t address) const;

 private:
  std::vector<int64_t> offsets_;  // bytes from the tensor's first element
  int64_t length_ = 0;            // bytes of a line
  std::vector<char> bytes_;
};

// One tensor: identity, address, form, version counter, and a sample; without a sample the identity of its storage, since another one
// may come to lie at the same address. One whose storage is too small for it (frameworks free it so for a while) is never the same.
class Snapshot {
 public:
  Snapshot(PyObject* tensor, const TensorView& view, bool is_sampled);
  Snapshot(PyObject* tensor, const TensorView& view) : Snapshot(tensor, view, view.is_on_cpu()) {}
  Snapshot(Snapshot&& other) noexcept;
  ~Snapshot();
  bool is_still(PyObject* tensor) const;
  bool is_dead() const { return !reference_ || !referent(reference_); }

 private:
  PyObject *reference_ = nullptr, *storage_ = nullptr;  // weak references; `storage_` null where there is a sample
  Form form_;
  int64_t address_, version_;
  std::optional<Sample> sample_;
};

// Several at once, as an object of Python: (tensors) -> whether all are what they were. Absent ones (None) are not looked at.
class Snapshots {
 public:
  bool init(PyObject* arguments);
  PyObject* call(PyObject* const* arguments, Py_ssize_t count);
  int visit(visitproc, void*) const { return 0; }
  void clear() {}

  bool are_still(PyObject* const* tensors, Py_ssize_t count) const;
  bool has_dead() const;

 private:
  Py_ssize_t count_ = 0;
  bool is_readable_ = true;  // false where a tensor's memory could not be read: nothing then holds
  std::vector<std::pair<Py_ssize_t, Snapshot>> snapshots_;
};

bool add_snapshot_type(PyObject* module);

}  // namespace kernelpress
