// Callable Python objects with a C++ value inside, called without a frame or an argument tuple.
//
// The value's type `T` has a default constructor and
//   bool init(PyObject* arguments)                         from the constructor's argument tuple; false with a Python error set
//   PyObject* call(PyObject* const* arguments, Py_ssize_t count)
//   int visit(visitproc visit, void* arg) const            its Python objects, for the garbage collector
//   void clear()                                           gives them up
#pragma once

#include <Python.h>
#include <structmember.h>

#include <cstddef>
#include <new>

namespace kernelpress {

struct CallableHead {
  PyObject_HEAD
  vectorcallfunc entry;
};

template <class T>
class Callable : public CallableHead {
 public:
  static T& of(PyObject* self) { return reinterpret_cast<Callable*>(self)->value_; }

  // The value of an object of exactly this type, null for any other.
  static T* in(PyObject* object) { return Py_TYPE(object) == type_ ? &of(object) : nullptr; }

  // Makes the type and adds it to the module under the last part of its name. Returns false with a Python error set.
  static bool add_to(PyObject* module, const char* qualified_name, const char* doc, PyMethodDef* methods) {
    static PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(CallableHead, entry), READONLY, nullptr},
                                    {nullptr, 0, 0, 0, nullptr}};
    PyType_Slot slots[] = {{Py_tp_new, slot(&create)},
                           {Py_tp_dealloc, slot(&destroy)},
                           {Py_tp_traverse, slot(&traverse)},
                           {Py_tp_clear, slot(&clear)},
                           {Py_tp_call, slot(&PyVectorcall_Call)},
                           {Py_tp_members, members},
                           {Py_tp_methods, methods},
                           {Py_tp_doc, const_cast<char*>(doc)},
                           {0, nullptr}};
    constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL;
    PyType_Spec spec = {qualified_name, sizeof(Callable), 0, kFlags, slots};
    type_ = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    return type_ && PyModule_AddType(module, type_) == 0;
  }

 private:
  template <class Function>
  static void* slot(Function function) {
    return reinterpret_cast<void*>(function);
  }

  static PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* names) {
    if (names && PyDict_GET_SIZE(names) > 0) return refuse_names(type);
    auto* self = reinterpret_cast<Callable*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    new (&self->value_) T();
    self->entry = &enter;
    if (self->value_.init(arguments)) return reinterpret_cast<PyObject*>(self);
    Py_DECREF(self);
    return nullptr;
  }

  static PyObject* enter(PyObject* self, PyObject* const* arguments, size_t flags, PyObject* names) {
    if (names && PyTuple_GET_SIZE(names) > 0) return refuse_names(Py_TYPE(self));
    return of(self).call(arguments, PyVectorcall_NARGS(flags));
  }

  static PyObject* refuse_names(PyTypeObject* type) {
    PyErr_Format(PyExc_TypeError, "%s: expected arguments by position", type->tp_name);
    return nullptr;
  }

  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return of(self).visit(visit, arg);
  }

  static int clear(PyObject* self) {
    of(self).clear();
    return 0;
  }

  static void destroy(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    of(self).~T();
    type->tp_free(self);
    Py_DECREF(type);
  }

  static inline PyTypeObject* type_ = nullptr;
  T value_;
};

}  // namespace kernelpress
