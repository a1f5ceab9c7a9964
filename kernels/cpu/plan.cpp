// The dispatch plan of a mask, in two passes over it: counts first, then the indices.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

// Fields and their order are those of `_Call` in plan.py. T tokens, S slots, N pairs that the mask holds. The tokens are
// divided into parts of as many each, in their order; the last may have fewer.
struct PlanCall {
    ParallelFor parallel_for;
    int64_t tokens, slots, parts;
    const uint8_t* mask;       // [T, S], 0 or 1
    int64_t* counts;           // [parts, S]: pairs of a slot in a part
    int64_t *token_index, *pair_index, *row_index, *entry_index;  // [N]
    int64_t* first_row;        // [T + 1]
};

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "of the bytes of a number the first must be the lowest");

namespace {

// `compute(part, first_token, last_token)` of all parts.
template <typename Compute>
int for_parts(const PlanCall& call, const Compute& compute) {
    const int64_t size = (call.tokens + call.parts - 1) / call.parts;
    return for_ranges(call.parallel_for, call.parts, 1, [&](int64_t first_part, int64_t last_part) {
        for (int64_t part = first_part; part < last_part; ++part)
            compute(part, std::min(part * size, call.tokens), std::min((part + 1) * size, call.tokens));
    });
}

// The first row of every slot's pairs in this part, and, as the last value, the part's first entry.
std::vector<int64_t> starts(const PlanCall& call, int64_t part) {
    std::vector<int64_t> first(call.slots + 1, 0);
    int64_t row = 0;
    for (int64_t slot = 0; slot < call.slots; ++slot) {
        for (int64_t other = 0; other < call.parts; ++other) {
            if (other == part) first[slot] = row;
            const int64_t count = call.counts[other * call.slots + slot];
            row += count;
            if (other < part) first[call.slots] += count;
        }
    }
    return first;
}

}  // namespace

extern "C" int plan_count(const PlanCall* call) {
    return for_parts(*call, [&](int64_t part, int64_t first, int64_t last) {
        int64_t* counts = call->counts + part * call->slots;
        std::fill(counts, counts + call->slots, 0);
        for (int64_t token = first; token < last; ++token)
            for (int64_t slot = 0; slot < call->slots; ++slot) counts[slot] += call->mask[token * call->slots + slot];
    });
}

extern "C" int plan_fill(const PlanCall* call) {
    const int64_t S = call->slots;
    call->first_row[0] = 0;
    return for_parts(*call, [&](int64_t part, int64_t first, int64_t last) {
        std::vector<int64_t> next_row = starts(*call, part);
        int64_t entry = next_row[S];
        for (int64_t token = first; token < last; ++token) {
            for (int64_t slot = 0; slot < S; slot += 8) {
                uint64_t pairs = 0;  // a byte each
                std::memcpy(&pairs, call->mask + token * S + slot, std::min<int64_t>(8, S - slot));
                for (; pairs != 0; pairs &= pairs - 1) {
                    const int64_t chosen = slot + __builtin_ctzll(pairs) / 8, row = next_row[chosen]++;
                    call->token_index[row] = token;
                    call->pair_index[row] = token * S + chosen;
                    call->entry_index[row] = entry;
                    call->row_index[entry++] = row;
                }
            }
            call->first_row[token + 1] = entry;
        }
    });
}
