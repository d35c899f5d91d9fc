// Calls that were accepted once, known again by the form of their tensors.
#include <algorithm>
#include <deque>

#include "cpu_calls.h"
#include "cpu_objects.h"
#include "cpu_tensors.h"

namespace kernelpress {
namespace {

constexpr size_t kMostForms = 8;

class AcceptedForms {
 public:
  bool init(PyObject* arguments) { return PyArg_ParseTuple(arguments, ":AcceptedForms") != 0; }

  // (inputs) → whether these are plain tensors, each of the form of an accepted call's.
  PyObject* call(PyObject* const* arguments, Py_ssize_t count) {
    std::vector<TensorView> views;
    if (!view_all(arguments, count, &views)) Py_RETURN_FALSE;
    const auto fits = [&](const std::vector<Form>& forms) {
      return forms.size() == views.size() &&
             std::equal(forms.begin(), forms.end(), views.begin(), [](const Form& form, const TensorView& view) { return form.fits(view); });
    };
    return PyBool_FromLong(std::any_of(accepted_.begin(), accepted_.end(), fits));
  }

  // Accepts calls like these inputs from now on, if they are plain tensors; forgets the oldest.
  void accept(PyObject* const* arguments, Py_ssize_t count) {
    std::vector<TensorView> views;
    if (!view_all(arguments, count, &views)) return;
    accepted_.emplace_front(views.begin(), views.end());
    if (accepted_.size() > kMostForms) accepted_.pop_back();
  }

  int visit(visitproc, void*) const { return 0; }
  void clear() {}

 private:
  static bool view_all(PyObject* const* arguments, Py_ssize_t count, std::vector<TensorView>* views) {
    if (count != 1 || !PyTuple_Check(arguments[0])) return false;
    const Py_ssize_t size = PyTuple_GET_SIZE(arguments[0]);
    views->resize(static_cast<size_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!view_plain(PyTuple_GET_ITEM(arguments[0], i), &(*views)[static_cast<size_t>(i)])) return false;
    }
    return size > 0;
  }

  std::deque<std::vector<Form>> accepted_;
};

PyObject* accept(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  Callable<AcceptedForms>::of(self).accept(arguments, count);
  Py_RETURN_NONE;
}

}  // namespace

bool add_forms_type(PyObject* module) {
  static PyMethodDef methods[] = {{"accept", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&accept)), METH_FASTCALL,
                                   "(inputs): accepts calls like these from now on, if they are plain tensors; forgets the oldest."},
                                  {nullptr, nullptr, 0, nullptr}};
  return Callable<AcceptedForms>::add_to(module, "kernelpress._cpu.AcceptedForms",
                                         "Calls that were accepted once: (inputs) → whether these are plain tensors, each of the form of an "
                                         "accepted call's.",
                                         methods);
}

}  // namespace kernelpress
