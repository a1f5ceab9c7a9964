// torch's threads.

#pragma once

#include <cstdint>

using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

// `compute(first, last)` of ranges of 0 to `end`, as many of at least `grain` as there are threads. 0, or torch's error.
// torch's own products inside know where they are, and stay on their thread.
template <typename Compute>
int32_t for_ranges(ParallelFor parallel_for, int64_t end, int64_t grain, const Compute& compute) {
    const auto body = [](int64_t first, int64_t last, void* given) { (*static_cast<const Compute*>(given))(first, last); };
    return parallel_for(0, end, grain, body, const_cast<Compute*>(&compute));
}
