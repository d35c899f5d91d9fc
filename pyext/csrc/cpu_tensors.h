// Torch's tensors without torch's headers: their memory through the C functions of the DLPack exchange (major version 1) that
// `torch.Tensor` publishes, the rest through its Python attributes. All of it needs the GIL.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace kernelpress {

// DLPack's DLTensor. Shape and strides belong to the tensor, which must not change meanwhile.
struct TensorView {
  void* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  uint32_t dtype;  // DLPack's code, bits and lanes
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;

  int64_t address() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) + byte_offset); }
};

// Looks up what the functions below call. Where torch publishes no exchange, `reads_tensors` stays false. Returns false with a Python
// error set for types that lack the attributes.
bool learn_tensors(PyObject* tensor_type, PyObject* parameter_type, PyObject* is_grad_enabled);
bool reads_tensors();

// The memory of a plain tensor: a torch.Tensor or Parameter and no subclass, on the CPU or a CUDA device, whose memory holds its values.
// Returns false, and sets no error, for anything else.
bool view_plain(PyObject* tensor, TensorView* view);

// The same for a tensor that is known to hold its values, which takes torch most of the time to tell.
bool view_memory(PyObject* tensor, TensorView* view);

// The address of any tensor's first element. Returns false with a Python error set where it has none.
bool address_of(PyObject* tensor, int64_t* address);

bool is_grad_enabled();
bool requires_grad(PyObject* tensor);

// How often a tensor was written to; -1 for one that does not count that (made under torch.inference_mode).
int64_t version_of(PyObject* tensor);

// What a tensor looks like, without its values.
class Form {
 public:
  explicit Form(const TensorView& view);
  bool fits(const TensorView& view) const;
  static size_t hash(const TensorView& view);

 private:
  int32_t device_type_, device_index_, dimensions_;
  uint32_t dtype_;
  std::vector<int64_t> sizes_;  // shape, then strides
};

// A parameter as it was, remembered without keeping it alive. Writes through `.data`, and to tensors that do not count them, leave it
// valid, as they do kernelpress.ops.snapshot.Snapshot.
class Snapshot {
 public:
  Snapshot(PyObject* tensor, const TensorView& view);
  Snapshot(Snapshot&& other) noexcept;
  ~Snapshot() { Py_XDECREF(reference_); }
  bool is_still(PyObject* tensor) const;
  bool is_dead() const;

 private:
  PyObject* reference_;
  Form form_;
  int64_t address_, version_;
};

}  // namespace kernelpress
