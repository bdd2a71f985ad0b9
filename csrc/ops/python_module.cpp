// The Python module bitnet_ops._C: importing it loads the library, which registers the operators
// (library.cpp). Its functions see and set the instruction set for bitnet_ops.isa, look at dictionaries for
// bitnet_ops.decoder.plan, and are told which memory is a file by bitnet_ops.layers.memory. The builder says with
// TORCH_EXTENSION_NAME what the module is called: _C, or as the builders of hub kernels like (.ci/hub_kernel.py).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "run/dispatch.h"
#include "run/file_memory.h"
#include "ops/same_objects.h"

// With its argument expanded.
#define BITNET_JOINED(a, b) a##b
#define BITNET_INIT(name) BITNET_JOINED(PyInit_, name)

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

PyObject* add_file_memory(PyObject*, PyObject* arguments) {
  unsigned long long begin, bytes;
  int descriptor, sparing;
  if (!PyArg_ParseTuple(arguments, "KKip", &begin, &bytes, &descriptor, &sparing)) return nullptr;
  bitnet_ops::add_file_memory(reinterpret_cast<const void*>(static_cast<uintptr_t>(begin)), static_cast<size_t>(bytes),
                              descriptor, sparing != 0);
  Py_RETURN_NONE;
}

PyObject* remove_file_memory(PyObject*, PyObject* begin) {
  const unsigned long long address = PyLong_AsUnsignedLongLong(begin);
  if (PyErr_Occurred() != nullptr) return nullptr;
  bitnet_ops::remove_file_memory(reinterpret_cast<const void*>(static_cast<uintptr_t>(address)));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "(name, supported) of every instruction set of this architecture, best first."},
    {"isa", isa, METH_NOARGS, "Name of the instruction set in use."},
    {"select_isa", select_isa, METH_O, "Uses the named instruction set; False if it is unknown or unsupported."},
    {"add_file_memory", add_file_memory, METH_VARARGS,
     "Memory (begin, bytes) is a private mapping of a file; (descriptor, sparing)."},
    {"remove_file_memory", remove_file_memory, METH_O, "The mapping that begins there is about to end."},
    {"same_values", bitnet_ops::same_values, METH_VARARGS,
     "Whether the values of dictionaries are these very objects."},
    {"same_items", bitnet_ops::same_items, METH_VARARGS, "Whether keys of dictionaries have these very objects."},
    {nullptr, nullptr, 0, nullptr},
};

// It holds no state of Python's between calls, so threads may call it at once. Written for Pythons without a global
// lock, for which the limited API has no name before 3.13.
PyModuleDef_Slot slots[] = {
#if defined(Py_mod_gil)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Kernels of bitnet_ops.", 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC BITNET_INIT(TORCH_EXTENSION_NAME)() { return PyModuleDef_Init(&module); }
