// Ops at their places in a network: see cpu_calls.h.
#include <algorithm>
#include <memory>

#include "cpu_calls.h"
#include "cpu_objects.h"
#include "cpu_snapshot.h"
#include "cpu_tensors.h"

namespace py = pybind11;

namespace kernelpress {
namespace {

// The parameters in `slots`, (table, name) each. `epoch` grows whenever they are not what they were, everything prepared was declared
// void, or another instruction set is in use.
class ParameterWatch {
 public:
  bool init(PyObject* arguments) {
    PyObject* slots;
    if (!PyArg_ParseTuple(arguments, "O:ParameterWatch", &slots)) return false;
    PyObject* sequence = PySequence_Tuple(slots);
    if (!sequence) return false;
    slots_ = py::reinterpret_steal<py::object>(sequence);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sequence); ++i) {
      PyObject *table, *name;
      if (!PyArg_ParseTuple(PyTuple_GET_ITEM(sequence, i), "O!U", &PyDict_Type, &table, &name)) return false;
    }
    return true;
  }

  // () → whether bound calls can run on what is in the slots now: plain tensors, none of which wants a gradient.
  PyObject* call(PyObject* const*, Py_ssize_t) {
    const std::shared_ptr<const Seen> seen = seen_;  // another thread may look meanwhile
    const bool plain = seen && is_unchanged(*seen) ? seen->all_plain : look_anew();
    return PyBool_FromLong(plain && !(is_grad_enabled() && any_requires_grad()));
  }

  int64_t epoch() const { return epoch_; }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(slots_.ptr());
    return 0;
  }

  void clear() {
    seen_.reset();
    slots_ = py::tuple();
  }

 private:
  struct Seen {
    int64_t generation, panel_width;
    std::vector<Snapshot> snapshots;  // of the plain ones
    bool all_plain;
  };

  size_t size() const { return static_cast<size_t>(PyTuple_GET_SIZE(slots_.ptr())); }

  // What is in a slot now; null where the module has the parameter no longer.
  py::object tensor(size_t i) const {
    PyObject* slot = PyTuple_GET_ITEM(slots_.ptr(), static_cast<Py_ssize_t>(i));
    PyObject* found = PyDict_GetItemWithError(PyTuple_GET_ITEM(slot, 0), PyTuple_GET_ITEM(slot, 1));
    if (!found) PyErr_Clear();
    return py::reinterpret_borrow<py::object>(found);
  }

  bool is_unchanged(const Seen& seen) const {
    if (seen.generation != generation() || seen.panel_width != kernels_in_use().panel_width) return false;
    if (seen.snapshots.size() != size()) return false;
    for (size_t i = 0; i < size(); ++i) {
      const py::object now = tensor(i);
      if (!now || !seen.snapshots[i].is_still(now.ptr())) return false;
    }
    return true;
  }

  bool look_anew() {
    ++epoch_;  // before `seen_`: another thread may look at the same time
    auto seen = std::make_shared<Seen>();
    seen->generation = generation();
    seen->panel_width = kernels_in_use().panel_width;
    for (size_t i = 0; i < size(); ++i) {
      TensorView view;
      const py::object now = tensor(i);
      if (now && view_plain(now.ptr(), &view)) seen->snapshots.emplace_back(now.ptr(), view);
    }
    seen->all_plain = seen->snapshots.size() == size();
    seen_ = seen;
    return seen->all_plain;
  }

  bool any_requires_grad() const {
    for (size_t i = 0; i < size(); ++i) {
      const py::object now = tensor(i);
      if (now && requires_grad(now.ptr())) return true;
    }
    return false;
  }

  py::object slots_;
  std::shared_ptr<const Seen> seen_;
  int64_t epoch_ = 0;
};

// An op as a function of its activations. It remembers the last call; any other is `renew`'s.
class BoundCall {
 public:
  bool init(PyObject* arguments) {
    PyObject *name, *watch, *renew;
    if (!PyArg_ParseTuple(arguments, "UOO:BoundCall", &name, &watch, &renew)) return false;
    if (!Callable<ParameterWatch>::in(watch)) {
      PyErr_Format(PyExc_TypeError, "watch: expected a ParameterWatch, got %s", Py_TYPE(watch)->tp_name);
      return false;
    }
    name_ = py::reinterpret_borrow<py::object>(name);
    watch_ = py::reinterpret_borrow<py::object>(watch);
    renew_ = py::reinterpret_borrow<py::object>(renew);
    return true;
  }

  PyObject* call(PyObject* const* activations, Py_ssize_t count) {
    const std::shared_ptr<const Known> known = known_;  // another thread may renew it meanwhile
    if (known && known->epoch == watch().epoch() && static_cast<size_t>(count) == known->activations.size()) {
      PyObject* tensors[kMostTensors];
      std::copy(known->tensors.begin(), known->tensors.end(), tensors);
      Py_ssize_t fitting = 0;
      for (const auto& [position, form] : known->activations) {
        TensorView view;
        if (!view_plain(activations[fitting], &view) || !form.fits(view)) break;
        tensors[position] = activations[fitting++];
      }
      if (fitting == count) return run_prepared(known->prepared.ptr(), tensors, static_cast<Py_ssize_t>(known->tensors.size()));
    }
    return PyObject_Vectorcall(renew_.ptr(), activations, static_cast<size_t>(count), nullptr);
  }

  // (epoch, positions, tensors, prepared): what to run from now on. Activations stand in `tensors` at `positions`.
  PyObject* remember(PyObject* const* arguments, Py_ssize_t count) {
    if (count != 4 || !PyTuple_Check(arguments[1]) || !PyTuple_Check(arguments[2]) || PyTuple_GET_SIZE(arguments[2]) > kMostTensors) {
      PyErr_SetString(PyExc_TypeError, "BoundCall.remember: expected (epoch, positions, tensors, prepared)");
      return nullptr;
    }
    auto known = std::make_shared<Known>();
    known->epoch = PyLong_AsLongLong(arguments[0]);
    const Py_ssize_t size = PyTuple_GET_SIZE(arguments[2]);
    known->tensors.assign(&PyTuple_GET_ITEM(arguments[2], 0), &PyTuple_GET_ITEM(arguments[2], 0) + size);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[1]); ++i) {
      const Py_ssize_t position = PyLong_AsSsize_t(PyTuple_GET_ITEM(arguments[1], i));
      TensorView view;
      if (position < 0 || position >= size || !view_plain(known->tensors[static_cast<size_t>(position)], &view)) Py_RETURN_NONE;
      known->activations.push_back({position, Form(view)});
      known->tensors[static_cast<size_t>(position)] = Py_None;
    }
    known->held = py::tuple(known->tensors.size());
    for (Py_ssize_t i = 0; i < size; ++i) {
      Py_INCREF(known->tensors[static_cast<size_t>(i)]);
      PyTuple_SET_ITEM(known->held.ptr(), i, known->tensors[static_cast<size_t>(i)]);
    }
    known->prepared = py::reinterpret_borrow<py::object>(arguments[3]);
    if (PyErr_Occurred()) return nullptr;
    std::shared_ptr<const Known> now = std::move(known);
    known_.swap(now);
    Py_RETURN_NONE;
  }

  PyObject* name() const { return name_.inc_ref().ptr(); }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(watch_.ptr());
    Py_VISIT(renew_.ptr());
    if (known_) {
      Py_VISIT(known_->held.ptr());
      Py_VISIT(known_->prepared.ptr());
    }
    return 0;
  }

  void clear() {
    known_.reset();
    renew_ = py::none();
  }

 private:
  struct Known {
    int64_t epoch;
    std::vector<std::pair<Py_ssize_t, Form>> activations;
    std::vector<PyObject*> tensors;  // None in place of activations; `held` owns them
    py::tuple held;
    py::object prepared;
  };

  const ParameterWatch& watch() const { return Callable<ParameterWatch>::of(watch_.ptr()); }

  py::object name_, watch_, renew_;
  std::shared_ptr<const Known> known_;
};

PyObject* look(PyObject* self, PyObject*) { return Callable<ParameterWatch>::of(self).call(nullptr, 0); }

PyObject* epoch(PyObject* self, void*) { return PyLong_FromLongLong(Callable<ParameterWatch>::of(self).epoch()); }

PyObject* name(PyObject* self, void*) { return Callable<BoundCall>::of(self).name(); }

PyObject* remember(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return Callable<BoundCall>::of(self).remember(arguments, count);
}

}  // namespace

bool add_bound_types(PyObject* module) {
  static PyMethodDef watch_methods[] = {
      {"look", &look, METH_NOARGS, "To be called before a run: whether bound calls can run on what is in the slots now."},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef watch_attributes[] = {{"epoch", &epoch, nullptr, "Another number whenever `look` saw something else.", nullptr},
                                           {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyMethodDef call_methods[] = {{"remember", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&remember)), METH_FASTCALL,
                                        "(epoch, positions, tensors, prepared): what to run for activations like these, in that epoch"},
                                       {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef call_attributes[] = {{"__name__", &name, nullptr, nullptr, nullptr}, {nullptr, nullptr, nullptr, nullptr, nullptr}};
  return Callable<ParameterWatch>::add_to(module, "kernelpress._cpu.ParameterWatch", "ParameterWatch(slots), a slot being (table, name)",
                                          watch_methods, watch_attributes) &&
         Callable<BoundCall>::add_to(module, "kernelpress._cpu.BoundCall", "BoundCall(name, watch, renew): activations -> output",
                                     call_methods, call_attributes);
}

}  // namespace kernelpress
