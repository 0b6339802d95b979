// Threads: torch's own OpenMP pool where there is OpenMP, else none.
#pragma once

#include <sched.h>

#include <cstdint>

#include "dsopt/isa.h"

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
  return work < kSerialWork || omp_in_parallel() ? 1 : max_threads();
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

// Independent items that the threads of a team take one by one. Unlike an OpenMP loop it has no barrier of its
// own: a thread the system has put aside before it took an item delays nobody.
struct Phase {
  int64_t items;
  int64_t taken = 0, finished = 0;

  template <class F>
  void run(F&& item) {
    int64_t i;
    while ((i = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < items) {
      item(i);
      __atomic_fetch_add(&finished, 1, __ATOMIC_RELEASE);
    }
  }

  // returns when all items are finished; what their threads wrote is then visible
  void wait() {
    for (int spins = 0; __atomic_load_n(&finished, __ATOMIC_ACQUIRE) < items; ++spins) {
      if (spins > 2000) sched_yield();
    }
  }
};

}  // namespace dsopt::DSOPT_VARIANT
