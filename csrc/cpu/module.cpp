// pykernels._C: knows the processor, so that Python loads the best library it can run. Compiled for the baseline.

#include <Python.h>

namespace {

const char* level() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? "avx512bf16" : "avx512";
  if (avx2) return "avx2";
#endif
  return "baseline";
}

PyObject* cpu_level(PyObject*, PyObject*) { return PyUnicode_FromString(level()); }

PyMethodDef methods[] = {
    {"cpu_level", cpu_level, METH_NOARGS, "The highest instruction-set level that this processor runs."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
