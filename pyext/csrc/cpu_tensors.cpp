#include "cpu_tensors.h"

#include <algorithm>

namespace kernelpress {
namespace {

// The functions that a framework publishes; of them only one is called here.
struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, TensorView* view);
};

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* grad_enabled_function = nullptr;
PyObject* is_neg_method = nullptr;
PyObject* requires_grad_attribute = nullptr;
PyObject* version_attribute = nullptr;
PyObject* storage_method = nullptr;
int (*view_of_object)(void* object, TensorView* view) = nullptr;

const Exchange* published_exchange(PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  auto* found = capsule ? static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
  Py_XDECREF(capsule);
  PyErr_Clear();
  while (found && found->major > 1) found = found->older;
  return found && found->major == 1 ? found : nullptr;
}

bool learn(PyObject* type, const char* name, PyObject** attribute) {
  *attribute = PyObject_GetAttrString(type, name);
  return *attribute != nullptr;
}

// Whether what Python said is not what is wanted; an error counts as such and is dropped.
bool differs(PyObject* answer, PyObject* wanted) {
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer != wanted;
}

PyObject* attribute_of(PyObject* attribute, PyObject* tensor) {
  return Py_TYPE(attribute)->tp_descr_get(attribute, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

}  // namespace

bool learn_tensors(PyObject* tensor, PyObject* parameter, PyObject* grad_enabled) {
  if (!PyType_Check(tensor) || !PyType_Check(parameter)) {
    PyErr_SetString(PyExc_TypeError, "tensor_type, parameter_type: expected types");
    return false;
  }
  if (!learn(tensor, "is_neg", &is_neg_method) || !learn(tensor, "requires_grad", &requires_grad_attribute) ||
      !learn(tensor, "_version", &version_attribute) || !learn(tensor, "untyped_storage", &storage_method)) {
    return false;
  }
  Py_INCREF(tensor), Py_INCREF(parameter), Py_INCREF(grad_enabled);
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  grad_enabled_function = grad_enabled;
  const Exchange* exchange = published_exchange(tensor);
  const bool readable = exchange && Py_TYPE(requires_grad_attribute)->tp_descr_get && Py_TYPE(version_attribute)->tp_descr_get;
  view_of_object = readable ? exchange->view_of_object : nullptr;
  return true;
}

bool reads_tensors() { return view_of_object != nullptr; }

bool view_memory(PyObject* tensor, TensorView* view) {
  if (view_of_object(tensor, view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view->device_type != kDlpackCpu && view->device_type != kDlpackCuda) return false;
  const int64_t* end = view->shape + view->dimensions;
  return view->data || std::find(view->shape, end, 0) != end;
}

bool view_plain(PyObject* tensor, TensorView* view) {
  const bool is_exact = Py_TYPE(tensor) == tensor_type || Py_TYPE(tensor) == parameter_type;
  // First of all: torch gives up the GIL meanwhile.
  return is_exact && !differs(PyObject_CallOneArg(is_neg_method, tensor), Py_False) && view_memory(tensor, view);
}

bool address_of(PyObject* tensor, int64_t* address) {
  if (view_of_object) {
    TensorView view;
    if (view_of_object(tensor, &view) != 0) return false;
    *address = view.address();
    return true;
  }
  PyObject* number = PyObject_CallMethod(tensor, "data_ptr", nullptr);
  *address = number ? static_cast<int64_t>(PyLong_AsUnsignedLongLong(number)) : 0;
  Py_XDECREF(number);
  return !PyErr_Occurred();
}

bool is_grad_enabled() { return differs(PyObject_CallNoArgs(grad_enabled_function), Py_False); }

bool requires_grad(PyObject* tensor) { return differs(attribute_of(requires_grad_attribute, tensor), Py_False); }

int64_t version_of(PyObject* tensor) {
  PyObject* number = attribute_of(version_attribute, tensor);
  const int64_t version = number ? PyLong_AsLongLong(number) : -1;
  if (!number) PyErr_Clear();
  Py_XDECREF(number);
  return version;
}

PyObject* storage_of(PyObject* tensor) {
  PyObject* storage = PyObject_CallOneArg(storage_method, tensor);
  if (!storage) PyErr_Clear();
  return storage;
}

PyObject* referent(PyObject* reference) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(reference, &found) < 0) PyErr_Clear();
  Py_XDECREF(found);  // only compared
  return found;
#else
  PyObject* found = PyWeakref_GetObject(reference);
  return found == Py_None ? nullptr : found;
#endif
}

Form::Form(const TensorView& view)
    : device_type_(view.device_type), device_index_(view.device_index), dimensions_(view.dimensions), dtype_(view.dtype) {
  sizes_.assign(view.shape, view.shape + dimensions_);
  sizes_.insert(sizes_.end(), view.strides, view.strides + dimensions_);
}

bool Form::fits(const TensorView& view) const {
  return view.dimensions == dimensions_ && view.dtype == dtype_ && view.device_type == device_type_ &&
         view.device_index == device_index_ && std::equal(view.shape, view.shape + dimensions_, sizes_.begin()) &&
         std::equal(view.strides, view.strides + dimensions_, sizes_.begin() + dimensions_);
}

size_t Form::hash(const TensorView& view) {
  size_t hash = view.dtype;
  for (int32_t i = 0; i < view.dimensions; ++i) {
    hash = (hash * 1000003 ^ static_cast<size_t>(view.shape[i])) * 1000003 ^ static_cast<size_t>(view.strides[i]);
  }
  return hash;
}

}  // namespace kernelpress
