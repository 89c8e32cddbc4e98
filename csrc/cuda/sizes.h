// The numbers by which Python allocates what the kernels write and work in. Each launcher that is named here has the
// constants that follow it under the same names; tests/cuda_host/test_sizes.py compares them.
#pragma once

namespace {

// pykernels/launch/wkv4.py, pykernels/launch/linear_recurrence.py
constexpr int SAVED = 32;  // steps from one saved state to the next

// pykernels/launch/linear_recurrence.py
constexpr int LARGEST_K = 128;
constexpr int TILE_NUMBERS = 2048;                          // of S that a block of the gradients has at once
constexpr int SCRATCH_ROWS = 16, SCRATCH_COLUMNS = 128;     // of a block of the gradients
constexpr int CORRECTED_SHARED = 104608;                    // bytes for the gradients of a and b where K > 64

// pykernels/launch/topk.py
constexpr int LARGEST_LIST = 256;        // k to which lists are kept
constexpr int DIGITS = 3, BINS = 2048;   // bits 31 .. 21, 20 .. 10 and 9 .. 0 of a score's order
constexpr int SECTION = 2048;            // keys whose selected scores a warp collects

// pykernels/launch/weighted_gather.py
constexpr int LOT = 32;  // hits that a warp sums

// pykernels/launch/rnn.py
constexpr int TILE_ROWS = 8;         // sequences of a tile
constexpr int WEIGHT_COLUMNS = 512;  // of which a row of weights has a multiple

}  // namespace
