#include "cpu_calls.h"

#include <algorithm>
#include <memory>
#include <new>
#include <unordered_map>

#include "cpu_objects.h"
#include "cpu_snapshot.h"
#include "cpu_tensors.h"

namespace py = pybind11;

namespace kernelpress {
namespace {

constexpr size_t kMostWords = 64;
constexpr size_t kMostCalls = 8192;

int64_t generation_count = 0;

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// Runs what was prepared: a KernelCall, or any function of the tuple of tensors.
PyObject* run_prepared(PyObject* prepared, PyObject* const* tensors, Py_ssize_t count) {
  if (const KernelCall* call = Callable<KernelCall>::in(prepared)) {
    const py::object kept = py::reinterpret_borrow<py::object>(prepared);
    return call->compute(tensors, count);
  }
  PyObject* given = PyTuple_New(count);
  if (!given) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_INCREF(tensors[i]);
    PyTuple_SET_ITEM(given, i, tensors[i]);
  }
  PyObject* output = PyObject_CallOneArg(prepared, given);
  Py_DECREF(given);
  return output;
}

// Everything prepared for one op. A call is known again by its parameters, unchanged, the form of its activations, its options and the
// backend it asks for.
class CallTable {
 public:
  bool init(PyObject* arguments) {
    PyObject* positions;
    if (!PyArg_ParseTuple(arguments, "O!:CallTable", &PyTuple_Type, &positions)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(positions); ++i) {
      const Py_ssize_t position = PyLong_AsSsize_t(PyTuple_GET_ITEM(positions, i));
      if (PyErr_Occurred()) return false;
      if (position < 0 || position >= kMostTensors) {
        PyErr_Format(PyExc_ValueError, "activations: expected positions below %zd, got %zd", kMostTensors, position);
        return false;
      }
      is_activation_[position] = true;
    }
    return true;
  }

  // (tensors, options, backend) → the op's output, or None where nothing prepared fits, a gradient is wanted, or a tensor is not plain.
  PyObject* call(PyObject* const* arguments, Py_ssize_t count) {
    Query query;
    if (count != 3 || !read(arguments[0], arguments[1], arguments[2], &query)) return none();
    if (generation_ != generation_count) return none();
    const auto found = entries_.find(query.hash);
    if (found == entries_.end()) return none();
    const std::shared_ptr<const Entry> entry = found->second;  // it may be forgotten meanwhile
    if (!fits(*entry, query)) return none();
    if (is_grad_enabled()) {
      for (Py_ssize_t i = 0; i < query.count; ++i) {
        if (query.tensors[i] != Py_None && requires_grad(query.tensors[i])) return none();
      }
    }
    return run_prepared(entry->prepared.ptr(), query.tensors, query.count);
  }

  // (tensors, options, backend, prepared, snapshot) → a word to `forget` it by when one of the parameters dies, or None if it is not
  // kept. `snapshot` are the Snapshots of the parameters, by position, taken before `prepared` read them.
  PyObject* remember(PyObject* const* arguments, Py_ssize_t count) {
    Query query;
    if (count != 5 || !Callable<Snapshots>::in(arguments[4])) {
      PyErr_SetString(PyExc_TypeError, "CallTable.remember: expected (tensors, options, backend, prepared, snapshot)");
      return nullptr;
    }
    if (!read(arguments[0], arguments[1], arguments[2], &query)) return none();
    auto entry = std::make_shared<Entry>();
    for (Py_ssize_t i = 0; i < query.count; ++i) {
      TensorView view;
      if (query.tensors[i] == Py_None) {
        entry->absent.push_back(i);
      } else if (!view_plain(query.tensors[i], &view)) {
        return none();
      } else if (is_activation_[i]) {
        entry->activations.push_back({i, Form(view)});
      }
    }
    entry->count = query.count;
    entry->kernels = &kernels_in_use();
    entry->options = py::reinterpret_borrow<py::object>(query.options);
    entry->backend = py::reinterpret_borrow<py::object>(query.backend);
    entry->prepared = py::reinterpret_borrow<py::object>(arguments[3]);
    entry->snapshot = py::reinterpret_borrow<py::object>(arguments[4]);
    Entries void_now;  // its objects are given up last: that may run anything
    if (generation_ != generation_count || entries_.size() >= kMostCalls) void_now.swap(entries_);
    generation_ = generation_count;
    std::shared_ptr<const Entry> kept = std::move(entry);
    entries_[query.hash].swap(kept);
    return PyLong_FromSize_t(query.hash);
  }

  PyObject* forget(PyObject* word) {
    const size_t hash = PyLong_AsSize_t(word);
    if (PyErr_Occurred()) return nullptr;
    const auto found = entries_.find(hash);
    if (found == entries_.end()) return none();
    if (parameters_of(*found->second).has_dead()) {
      const std::shared_ptr<const Entry> last = found->second;
      entries_.erase(found);
    }
    return none();
  }

  int visit(visitproc visit, void* arg) const {
    for (const auto& [hash, entry] : entries_) {
      Py_VISIT(entry->options.ptr());
      Py_VISIT(entry->prepared.ptr());
    }
    return 0;
  }

  void clear() { Entries().swap(entries_); }

 private:
  struct Entry {
    Py_ssize_t count;
    const KernelTable* kernels;  // weights are packed for them
    std::vector<Py_ssize_t> absent;
    std::vector<std::pair<Py_ssize_t, Form>> activations;
    py::object options, backend, prepared, snapshot;
  };
  using Entries = std::unordered_map<size_t, std::shared_ptr<const Entry>>;

  struct Query {
    PyObject* const* tensors;
    Py_ssize_t count;
    PyObject *options, *backend;
    TensorView views[kMostTensors];  // of the activations
    size_t hash;
  };

  // Looks at the arguments of a call. Returns false for tensors that are not plain and options without a hash.
  bool read(PyObject* tensors, PyObject* options, PyObject* backend, Query* query) const {
    if (!reads_tensors() || !PyTuple_Check(tensors) || PyTuple_GET_SIZE(tensors) > kMostTensors) return false;
    query->tensors = &PyTuple_GET_ITEM(tensors, 0);
    query->count = PyTuple_GET_SIZE(tensors);
    query->options = options;
    query->backend = backend;
    const Py_hash_t of_options = PyObject_Hash(options), of_backend = PyObject_Hash(backend);
    if (of_options == -1 || of_backend == -1) {
      PyErr_Clear();
      return false;
    }
    size_t hash = static_cast<size_t>(of_options) * 1000003 ^ static_cast<size_t>(of_backend);
    for (Py_ssize_t i = 0; i < query->count; ++i) {
      PyObject* tensor = query->tensors[i];
      size_t word = reinterpret_cast<size_t>(tensor);
      if (is_activation_[i] && tensor != Py_None) {
        if (!view_plain(tensor, &query->views[i])) return false;
        word = Form::hash(query->views[i]);
      }
      hash = (hash ^ word) * 0x9e3779b97f4a7c15 + static_cast<size_t>(i);
      hash ^= hash >> 29;
    }
    query->hash = hash;
    return true;
  }

  static bool fits(const Entry& entry, const Query& query) {
    if (entry.count != query.count || entry.kernels != &kernels_in_use()) return false;
    for (Py_ssize_t position : entry.absent) {
      if (query.tensors[position] != Py_None) return false;
    }
    for (const auto& [position, form] : entry.activations) {
      if (query.tensors[position] == Py_None || !form.fits(query.views[position])) return false;
    }
    return parameters_of(entry).are_still(query.tensors, query.count) && are_equal(entry.options.ptr(), query.options) &&
           are_equal(entry.backend.ptr(), query.backend);
  }

  static const Snapshots& parameters_of(const Entry& entry) { return Callable<Snapshots>::of(entry.snapshot.ptr()); }

  static bool are_equal(PyObject* a, PyObject* b) {
    const int answer = PyObject_RichCompareBool(a, b, Py_EQ);
    if (answer < 0) PyErr_Clear();
    return answer == 1;
  }

  bool is_activation_[kMostTensors] = {};
  int64_t generation_ = 0;
  Entries entries_;
};

PyObject* remember_call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return Callable<CallTable>::of(self).remember(arguments, count);
}

PyObject* forget_call(PyObject* self, PyObject* word) { return Callable<CallTable>::of(self).forget(word); }

}  // namespace

bool KernelCall::init(PyObject* arguments) {
  const char* name;
  Py_ssize_t output_word;
  PyObject *words, *changing, *held, *allocate, *form;
  if (!PyArg_ParseTuple(arguments, "sO!nO!O!OO:KernelCall", &name, &PyTuple_Type, &words, &output_word, &PyTuple_Type, &changing,
                        &PyTuple_Type, &held, &allocate, &form)) {
    return false;
  }
  const auto kernel = named_kernels().find(name);
  if (kernel == named_kernels().end()) {
    PyErr_Format(PyExc_ValueError, "name: expected a kernel, got '%s'", name);
    return false;
  }
  kernel_ = kernel->second;
  const auto count = static_cast<Py_ssize_t>(kernel_.words);
  if (PyTuple_GET_SIZE(words) != count || kernel_.words > kMostWords) {
    PyErr_Format(PyExc_TypeError, "%s: expected %zd integers, got %zd", name, count, PyTuple_GET_SIZE(words));
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) words_.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(words, i)));
  bool in_range = output_word >= 0 && output_word < count;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(changing); ++i) {
    Py_ssize_t word, tensor;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(changing, i), "nn", &word, &tensor)) return false;
    in_range = in_range && word >= 0 && word < count && tensor >= 0;
    changing_.push_back({static_cast<size_t>(word), tensor});
  }
  if (!in_range) PyErr_Format(PyExc_ValueError, "%s: expected words below %zd to be filled in", name, count);
  output_word_ = static_cast<size_t>(output_word);
  held_ = py::reinterpret_borrow<py::object>(held);
  allocate_ = py::reinterpret_borrow<py::object>(allocate);
  form_ = py::reinterpret_borrow<py::object>(form);
  return !PyErr_Occurred();
}

PyObject* KernelCall::call(PyObject* const* arguments, Py_ssize_t count) {
  if (count != 1) {
    PyErr_Format(PyExc_TypeError, "KernelCall: expected the tensors as one argument, got %zd", count);
    return nullptr;
  }
  PyObject* tensors = PySequence_Fast(arguments[0], "KernelCall: expected a sequence of tensors");
  if (!tensors) return nullptr;
  PyObject* output = compute(PySequence_Fast_ITEMS(tensors), PySequence_Fast_GET_SIZE(tensors));
  Py_DECREF(tensors);
  return output;
}

PyObject* KernelCall::compute(PyObject* const* tensors, Py_ssize_t count) const {
  int64_t words[kMostWords];
  std::copy(words_.begin(), words_.end(), words);
  for (const Changing& changing : changing_) {
    if (changing.tensor >= count) {
      PyErr_Format(PyExc_ValueError, "tensors: expected more than %zd, got %zd", changing.tensor, count);
      return nullptr;
    }
    if (!address_of(tensors[changing.tensor], &words[changing.word])) return nullptr;
  }
  PyObject* output = PyObject_CallOneArg(allocate_.ptr(), form_.ptr());
  if (!output || !address_of(output, &words[output_word_])) {
    Py_XDECREF(output);
    return nullptr;
  }
  bool has_memory = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    kernel_.run(kernels_in_use(), words);
  } catch (const std::bad_alloc&) {
    has_memory = false;
  }
  Py_END_ALLOW_THREADS
  if (has_memory) return output;
  Py_DECREF(output);
  return PyErr_NoMemory();
}

int KernelCall::visit(visitproc visit, void* arg) const {
  Py_VISIT(held_.ptr());
  Py_VISIT(allocate_.ptr());
  Py_VISIT(form_.ptr());
  return 0;
}

void KernelCall::clear() { held_ = py::object(); }

bool add_call_types(PyObject* module) {
  static PyMethodDef no_methods[] = {{nullptr, nullptr, 0, nullptr}};
  static PyMethodDef table_methods[] = {
      {"remember", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&remember_call)), METH_FASTCALL,
       "(tensors, options, backend, prepared, snapshot) -> a word for `forget`, or None where the call cannot be kept"},
      {"forget", &forget_call, METH_O, "Drops what `remember` gave this word for, if one of its parameters is no more."},
      {nullptr, nullptr, 0, nullptr}};
  static PyMethodDef functions[] = {{"forget_calls",
                                     [](PyObject*, PyObject*) {
                                       ++generation_count;
                                       return none();
                                     },
                                     METH_NOARGS, "Declares every call void that was prepared so far."},
                                    {nullptr, nullptr, 0, nullptr}};
  return Callable<KernelCall>::add_to(module, "kernelpress._cpu.KernelCall",
                                      "KernelCall(name, words, output_word, changing, held, allocate, form): tensors -> output", no_methods) &&
         Callable<CallTable>::add_to(module, "kernelpress._cpu.CallTable",
                                     "CallTable(activations): (tensors, options, backend) -> output or None", table_methods) &&
         PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace kernelpress
