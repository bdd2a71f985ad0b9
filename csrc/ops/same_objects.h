// Whether dictionaries still hold the same objects. bitnet_ops/decoder/plan.py asks it of some thousand of them before
// every token, when the weights have pushed them out of the processor's caches: Python takes 0.7 ms for that.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace bitnet_ops {

// same_values(dicts: tuple[dict, ...], counts: bytes, values: tuple) -> bool: whether the values of the dictionaries,
// one dictionary after another, are these very objects. `counts` is a uint32 for each dictionary, its number of values.
PyObject* same_values(PyObject* self, PyObject* args);

// same_items(dicts: tuple[dict, ...], keys: tuple, values: tuple) -> bool: whether dict.get(key) is the very object in
// `values`, for each key of each dictionary.
PyObject* same_items(PyObject* self, PyObject* args);

}  // namespace bitnet_ops
