// The Python module bitnet_ops._C: importing it loads the library, which registers the operators
// (library.cpp). Its functions see and set the instruction set for bitnet_ops.isa, and look at dictionaries for
// bitnet_ops.decoder.plan.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "run/dispatch.h"
#include "ops/same_objects.h"

namespace {

PyObject* isas(PyObject*, PyObject*) {
  size_t count;
  const bitnet_ops::Candidate* list = bitnet_ops::candidates(&count);
  PyObject* result = PyList_New(0);
  if (result == nullptr) return nullptr;
  for (size_t i = 0; i < count; ++i) {
    PyObject* item = Py_BuildValue("(sO)", list[i].table->isa, list[i].supported ? Py_True : Py_False);
    if (item == nullptr || PyList_Append(result, item) != 0) {
      Py_XDECREF(item);
      Py_DECREF(result);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return result;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(bitnet_ops::kernels().isa); }

PyObject* select_isa(PyObject*, PyObject* name) {
  PyObject* utf8 = PyUnicode_AsUTF8String(name);
  if (utf8 == nullptr) return nullptr;
  const char* text = PyBytes_AsString(utf8);
  const bool selected = text != nullptr && bitnet_ops::select(text);
  Py_DECREF(utf8);
  return PyBool_FromLong(selected);
}

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "(name, supported) of every instruction set of this architecture, best first."},
    {"isa", isa, METH_NOARGS, "Name of the instruction set in use."},
    {"select_isa", select_isa, METH_O, "Uses the named instruction set; False if it is unknown or unsupported."},
    {"same_values", bitnet_ops::same_values, METH_VARARGS, "Whether the values of dictionaries are these very objects."},
    {"same_items", bitnet_ops::same_items, METH_VARARGS, "Whether keys of dictionaries have these very objects."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Kernels of bitnet_ops.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
