// Torch's tensors without torch's headers: their memory through the C functions of the DLPack exchange (major version 1) that
// `torch.Tensor` publishes, the rest through its Python attributes. All of it needs the GIL.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace kernelpress {

constexpr int32_t kDlpackCpu = 1, kDlpackCuda = 2;

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
  int64_t element_bytes() const { return ((dtype >> 8 & 0xff) * (dtype >> 16) + 7) / 8; }
  bool is_on_cpu() const { return device_type == kDlpackCpu; }
};

// Looks up what the functions below call. Where torch publishes no exchange, `reads_tensors` stays false. Returns false with a Python
// error set for types that lack the attributes.
bool learn_tensors(PyObject* tensor_type, PyObject* parameter_type, PyObject* is_grad_enabled);
bool reads_tensors();

// The memory of a plain tensor: a torch.Tensor or Parameter and no subclass, on the CPU or a CUDA device, whose memory holds its values.
// Returns false, and sets no error, for anything else.
bool view_plain(PyObject* tensor, TensorView* view);

// The same for a tensor that is known to hold its values, which takes torch most of the time to tell; of any type.
bool view_memory(PyObject* tensor, TensorView* view);

// The address of any tensor's first element. Returns false with a Python error set where it has none.
bool address_of(PyObject* tensor, int64_t* address);

bool is_grad_enabled();
bool requires_grad(PyObject* tensor);

// How often a tensor was written to; -1 for one that does not count that (made under torch.inference_mode).
int64_t version_of(PyObject* tensor);

// What torch calls the tensor's storage, a new reference; null, and no error set, where it has none.
PyObject* storage_of(PyObject* tensor);

// What a weak reference refers to, borrowed, only to be compared; null once that is dead.
PyObject* referent(PyObject* reference);

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

}  // namespace kernelpress
