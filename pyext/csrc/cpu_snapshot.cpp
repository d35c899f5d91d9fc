#include "cpu_snapshot.h"

#include <algorithm>
#include <cstring>

#include "cpu_objects.h"

namespace kernelpress {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kSampledBytes = 1024;
constexpr int64_t kMostLines = 32;  // of tensors whose elements lie apart, so that a line is short
constexpr int64_t kMostLooks = 1024;  // for a line that is not blank, in each part of a tensor

// The memory of a tensor as lines: `inner` bytes in a piece, repeated along `outer`, (size, stride in bytes) each; a line lies within a
// piece. No byte between the elements is part of a line: it may be somebody else's.
class Lines {
 public:
  explicit Lines(const TensorView& view) : inner_(view.element_bytes()) {
    std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size)
    for (int32_t i = 0; i < view.dimensions; ++i) {
      if (view.shape[i] == 0) return;
      if (view.shape[i] > 1 && view.strides[i] != 0) axes.emplace_back(view.strides[i] * inner_, view.shape[i]);
    }
    std::sort(axes.begin(), axes.end());
    for (const auto& [stride, size] : axes) {
      if (stride == inner_ && outer_.empty()) {
        inner_ *= size;
      } else {
        outer_.emplace_back(size, stride);
      }
    }
    length_ = std::min(inner_, kLineBytes);
    per_piece_ = (inner_ + length_ - 1) / length_;
    count_ = per_piece_;
    for (const auto& axis : outer_) count_ *= axis.first;
  }

  int64_t count() const { return count_; }
  int64_t length() const { return length_; }

  // Bytes from the tensor's first element; the last line of a piece ends with it.
  int64_t offset(int64_t line) const {
    int64_t offset = std::min(line % per_piece_ * length_, inner_ - length_), piece = line / per_piece_;
    for (const auto& [size, stride] : outer_) {
      offset += piece % size * stride;
      piece /= size;
    }
    return offset;
  }

 private:
  int64_t inner_, length_ = 0, per_piece_ = 0, count_ = 0;
  std::vector<std::pair<int64_t, int64_t>> outer_;
};

// Whether all elements are zero, of either sign.
bool is_blank(const char* line, int64_t bytes, int64_t element_bytes) {
  static constexpr char kZeros[kLineBytes] = {};
  if (std::memcmp(line, kZeros, static_cast<size_t>(bytes)) == 0) return true;
  for (int64_t i = 0; i < bytes; ++i) {
    const bool has_sign = i % element_bytes == element_bytes - 1;
    if (line[i] & (has_sign ? 0x7f : 0xff)) return false;
  }
  return true;
}

bool is_same(const char* a, const char* b, int64_t bytes) {
  if (bytes != kLineBytes) return std::memcmp(a, b, static_cast<size_t>(bytes)) == 0;
  uint64_t x[kLineBytes / 8], y[kLineBytes / 8], difference = 0;
  std::memcpy(x, a, sizeof x);
  std::memcpy(y, b, sizeof y);
  for (size_t i = 0; i < kLineBytes / 8; ++i) difference |= x[i] ^ y[i];
  return difference == 0;
}

int64_t number_of(PyObject* object, const char* method) {
  PyObject* number = PyObject_CallMethod(object, method, nullptr);
  const int64_t value = number ? PyLong_AsLongLong(number) : 0;
  Py_XDECREF(number);
  return value;
}

// Whether the tensor lies within its storage.
bool holds(PyObject* storage, const TensorView& view) {
  int64_t end = view.element_bytes();
  for (int32_t i = 0; i < view.dimensions; ++i) {
    if (view.shape[i] == 0) return true;
    end += (view.shape[i] - 1) * view.strides[i] * view.element_bytes();
  }
  return view.address() - number_of(storage, "data_ptr") + end <= number_of(storage, "nbytes");
}

const char* at(int64_t address) { return reinterpret_cast<const char*>(static_cast<uintptr_t>(address)); }

}  // namespace

Sample::Sample(const TensorView& view) {
  const Lines lines(view);
  if (lines.count() == 0) return;
  length_ = lines.length();
  const int64_t wanted = std::min(lines.count(), std::min(kSampledBytes / length_, kMostLines));
  const char* memory = at(view.address());
  for (int64_t i = 0; i < wanted; ++i) {
    // One of each part of the lines, the next one that tells something from a first choice on; which is anywhere in the part, so that
    // the lines do not all lie on the same channels.
    const int64_t begin = i * lines.count() / wanted, size = (i + 1) * lines.count() / wanted - begin;
    const int64_t first = i == 0 ? 0 : i == wanted - 1 ? size - 1 : (i * 0x9e3779b1 >> 8) % size;
    int64_t chosen = lines.offset(begin + first);
    for (int64_t step = 0; step < std::min(size, kMostLooks); ++step) {
      const int64_t offset = lines.offset(begin + (first + step) % size);
      if (is_blank(memory + offset, length_, view.element_bytes())) continue;
      chosen = offset;
      break;
    }
    offsets_.push_back(chosen);
    bytes_.insert(bytes_.end(), memory + chosen, memory + chosen + length_);
  }
}

bool Sample::is_still(int64_t address) const {
  const char *memory = at(address), *known = bytes_.data();
  for (int64_t offset : offsets_) __builtin_prefetch(memory + offset);
  for (int64_t offset : offsets_) {
    if (!is_same(memory + offset, known, length_)) return false;
    known += length_;
  }
  return true;
}

Snapshot::Snapshot(PyObject* tensor, const TensorView& view, bool is_sampled)
    : form_(view), address_(view.address()), version_(version_of(tensor)) {
  PyObject* storage = storage_of(tensor);
  if (storage && holds(storage, view)) {
    reference_ = PyWeakref_NewRef(tensor, nullptr);
    if (is_sampled) {
      sample_.emplace(view);
    } else {
      storage_ = PyWeakref_NewRef(storage, nullptr);
    }
  }
  Py_XDECREF(storage);
  PyErr_Clear();
}

Snapshot::Snapshot(Snapshot&& other) noexcept
    : reference_(std::exchange(other.reference_, nullptr)),
      storage_(std::exchange(other.storage_, nullptr)),
      form_(std::move(other.form_)),
      address_(other.address_),
      version_(other.version_),
      sample_(std::move(other.sample_)) {}

Snapshot::~Snapshot() {
  Py_XDECREF(reference_);
  Py_XDECREF(storage_);
}

bool Snapshot::is_still(PyObject* tensor) const {
  TensorView view;
  if (!reference_ || referent(reference_) != tensor || !view_memory(tensor, &view) || view.address() != address_ || !form_.fits(view) ||
      (version_ >= 0 && version_of(tensor) != version_)) {
    return false;
  }
  if (sample_) return sample_->is_still(address_);
  PyObject* storage = storage_of(tensor);
  const bool is_same_storage = storage && storage_ && referent(storage_) == storage;
  Py_XDECREF(storage);
  return is_same_storage;
}

bool Snapshots::init(PyObject* arguments) {
  PyObject* tensors;
  int is_sampled = 1;
  if (!PyArg_ParseTuple(arguments, "O!|p:Snapshots", &PyTuple_Type, &tensors, &is_sampled)) return false;
  count_ = PyTuple_GET_SIZE(tensors);
  for (Py_ssize_t i = 0; i < count_ && is_readable_; ++i) {
    PyObject* tensor = PyTuple_GET_ITEM(tensors, i);
    if (tensor == Py_None) continue;
    TensorView view;
    is_readable_ = reads_tensors() && view_memory(tensor, &view);
    if (is_readable_) snapshots_.emplace_back(i, Snapshot(tensor, view, is_sampled && view.is_on_cpu()));
  }
  return true;
}

PyObject* Snapshots::call(PyObject* const* arguments, Py_ssize_t count) {
  if (count != 1 || !PyTuple_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "Snapshots: expected the tensors as a tuple");
    return nullptr;
  }
  return PyBool_FromLong(are_still(&PyTuple_GET_ITEM(arguments[0], 0), PyTuple_GET_SIZE(arguments[0])));
}

bool Snapshots::are_still(PyObject* const* tensors, Py_ssize_t count) const {
  const auto is_still = [tensors](const auto& known) { return known.second.is_still(tensors[known.first]); };
  return is_readable_ && count == count_ && std::all_of(snapshots_.begin(), snapshots_.end(), is_still);
}

bool Snapshots::has_dead() const {
  return std::any_of(snapshots_.begin(), snapshots_.end(), [](const auto& known) { return known.second.is_dead(); });
}

bool add_snapshot_type(PyObject* module) {
  static PyMethodDef no_methods[] = {{nullptr, nullptr, 0, nullptr}};
  return Callable<Snapshots>::add_to(module, "kernelpress._cpu.Snapshots",
                                     "Snapshots(tensors, sampled=True): (tensors) -> whether they are what they were", no_methods);
}

}  // namespace kernelpress
