// Runs the blocks of a launch: what launch.cpp asks of scheduler.cpp.
#pragma once

#include "include/cuda_host/launch.h"

namespace cuda_host {

bool set_order(const char* order);  // false: there is no such order
void run(Grid& grid, const Kernel& kernel);

}  // namespace cuda_host
