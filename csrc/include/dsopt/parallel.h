// Threads: torch's own OpenMP pool where there is OpenMP, else none.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dsopt::DSOPT_VARIANT {

// Waking the pool costs about as much as this many multiply-adds.
constexpr int64_t kSerialWork = 400'000;

// Threads to use for `work` multiply-adds: as many as torch would, one if the work is tiny or if the caller
// is itself one of a team.
inline int team_size(int64_t work) {
#ifdef _OPENMP
  return work < kSerialWork || omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace dsopt::DSOPT_VARIANT
