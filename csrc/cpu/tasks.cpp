// 20 µs: a parallel region costs 2 to 10 µs where all threads have a core, and where they have none, milliseconds.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int64_t pykernels_least_work;
int64_t pykernels_least_work = 20000;
