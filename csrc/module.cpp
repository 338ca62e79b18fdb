// The Python module fastdynat._C. Importing it loads the library, whose static initialisers register the
// operators.
#include <Python.h>

// Raised with every change to the arguments of an operator, here and in fastdynat/ops/_extension.py, which
// refuses a library of another number.
constexpr long kSignatures = 5;

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&def);
#ifdef FASTDYNAT_WITH_CUDA
  const long with_cuda = 1;
#else
  const long with_cuda = 0;
#endif
  if (module != nullptr && (PyModule_AddIntConstant(module, "WITH_CUDA", with_cuda) != 0 ||
                            PyModule_AddIntConstant(module, "SIGNATURES", kSignatures) != 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
