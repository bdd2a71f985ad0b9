#include "ops/same_objects.h"

#include <cstdint>
#include <cstring>

namespace bitnet_ops {
namespace {

// So far ahead that memory answers before a dictionary's turn comes.
constexpr Py_ssize_t kAhead = 16;

// Without a global lock other threads may change a dictionary meanwhile, hence the critical sections. No other object
// here needs one: tuples do not change, and a dictionary's value is compared by its address alone, never looked into.
// The limited API of 3.10 has no name for critical sections, nor any need.
#if !defined(Py_BEGIN_CRITICAL_SECTION)
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

// The dictionary at `index`, borrowed; nullptr and a TypeError where there is none.
PyObject* dict_at(PyObject* dicts, Py_ssize_t index) {
  const Py_ssize_t ahead = index + kAhead;
  if (ahead < PyTuple_Size(dicts)) __builtin_prefetch(PyTuple_GetItem(dicts, ahead));
  PyObject* dict = PyTuple_GetItem(dicts, index);
  if (dict != nullptr && !PyDict_Check(dict)) {
    PyErr_Format(PyExc_TypeError, "dicts: expected dictionaries, got %R at %zd", Py_TYPE(dict), index);
    return nullptr;
  }
  return dict;
}

}  // namespace

PyObject* same_values(PyObject*, PyObject* args) {
  PyObject *dicts, *values;
  const char* counts;
  Py_ssize_t bytes;
  if (!PyArg_ParseTuple(args, "O!y#O!:same_values", &PyTuple_Type, &dicts, &counts, &bytes, &PyTuple_Type, &values)) {
    return nullptr;
  }
  const Py_ssize_t size = PyTuple_Size(dicts), n_values = PyTuple_Size(values);
  if (bytes != size * static_cast<Py_ssize_t>(sizeof(uint32_t))) {
    return PyErr_Format(PyExc_ValueError, "counts: expected 4 bytes for each of %zd dictionaries, got %zd", size,
                        bytes);
  }
  Py_ssize_t next = 0;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* dict = dict_at(dicts, i);
    if (dict == nullptr) return nullptr;
    uint32_t count;
    std::memcpy(&count, counts + i * sizeof(count), sizeof(count));
    if (count > n_values - next) {
      return PyErr_Format(PyExc_ValueError, "values: expected as many as counts add up to, got %zd", n_values);
    }
    bool same;
    Py_BEGIN_CRITICAL_SECTION(dict);
    same = PyDict_Size(dict) == static_cast<Py_ssize_t>(count);
    Py_ssize_t position = 0;
    for (PyObject* value; same && PyDict_Next(dict, &position, nullptr, &value);) {
      same = value == PyTuple_GetItem(values, next++);
    }
    Py_END_CRITICAL_SECTION();
    if (!same) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* same_items(PyObject*, PyObject* args) {
  PyObject *dicts, *keys, *values;
  if (!PyArg_ParseTuple(args, "O!O!O!:same_items", &PyTuple_Type, &dicts, &PyTuple_Type, &keys, &PyTuple_Type,
                        &values)) {
    return nullptr;
  }
  const Py_ssize_t size = PyTuple_Size(dicts), n_keys = PyTuple_Size(keys);
  if (PyTuple_Size(values) != size * n_keys) {
    return PyErr_Format(PyExc_ValueError, "values: expected %zd for each of %zd dictionaries, got %zd", n_keys, size,
                        PyTuple_Size(values));
  }
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* dict = dict_at(dicts, i);
    if (dict == nullptr) return nullptr;
    bool same = true;
    Py_BEGIN_CRITICAL_SECTION(dict);
    for (Py_ssize_t k = 0; same && k < n_keys; ++k) {
      PyObject* value = PyDict_GetItemWithError(dict, PyTuple_GetItem(keys, k));
      same = (value == nullptr ? Py_None : value) == PyTuple_GetItem(values, i * n_keys + k);
      if (value == nullptr && PyErr_Occurred()) same = false;
    }
    Py_END_CRITICAL_SECTION();
    if (PyErr_Occurred()) return nullptr;
    if (!same) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

}  // namespace bitnet_ops
